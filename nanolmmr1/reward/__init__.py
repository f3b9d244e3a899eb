"""Rewards: rules that score a response, and the worker processes in which untrusted text is evaluated.

The room imports errors.py alone, and never torch: a worker starts fast and holds no model.
Begin with rules.py; judge.py asks workers, worker.py is what runs in one.
"""
