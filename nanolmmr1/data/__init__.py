"""Data: from files and hub data sets to prompts, which are token ids, image patches and positions.

The room imports errors.py and schema.py, nothing else of the project.
Begin with rows.py; readers.py reads raw rows, prompt.py turns a row into the model's input, group.py adds responses.
"""
