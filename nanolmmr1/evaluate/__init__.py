"""Evaluation: tables of benchmarks that one can defend. No run imports it.

`python -m nanolmmr1.evaluate` asks models about benchmarks with `prepare/sampling.py` and judges them by the rules of
the accuracy reward.
Begin with __main__.py. prompts.py has the prompts to choose from, answers.py asks and judges, summary.py makes the
numbers and the table, and page.py the HTML page.
"""
