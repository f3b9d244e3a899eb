"""Data: from files and hub data sets to prompts, that is token ids, image patches and positions.

The room imports errors.py and libraries, nothing else of the project.
Begin with rows.py; prompt.py turns a row into what the model reads.
"""
