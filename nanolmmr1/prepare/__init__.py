"""Data preparation: from published data sets to training rows. No run imports it.

`python -m nanolmmr1.prepare` converts, checks, deduplicates and decontaminates rows; `nanolmmr1.passrate` and
`nanolmmr1.caption` add a column that a model made.
Begin with __main__.py. decontaminate.py finds rows of benchmarks; output.py writes rows and their pictures, journal.py
keeps finished work through a kill, and sampling.py asks a model.
"""
