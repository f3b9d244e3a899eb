"""Sampling: engines that turn prompts into groups of responses, and the exchange of these groups between ranks.

The room may import data, model, parallel, update, kernels and lower floors, but no report, desk or run.
Begin with sampler.py, the interface of all engines.
"""
