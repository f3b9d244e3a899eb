"""Rewards: rules that score a response, and worker processes for untrusted text.

The room imports errors.py and schema.py only, and never torch, so a worker starts fast.
Begin with rules.py. judge.py is the trainer's side of the workers, worker.py the code of a worker process.
"""
