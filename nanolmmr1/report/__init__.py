"""Metrics, logs and display of a run, and its HTML report.

The room imports data/, rollout/ and update/ for the types and definitions that a record needs.
Begin with record.py, the metrics record of a step; logs.py stores it, display.py shows it, page.py plots it.
"""
