"""Benchmarks: which rows, which prompt, which answer is right, and what scores of them mean.

A held-out task of a run and `python -m nanolmmr1.evaluate` use the same ones.
Begin with table.py, one entry a benchmark. official.py has their own prompts and lenient.py their own scorers, where
these are deterministic; choose.py finds the benchmark that a user names. item.py is one answered row, statistics.py
turns items into scores with intervals, and published.json has the scores of others.
"""
