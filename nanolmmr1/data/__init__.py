"""Data: from files and hub data sets to prompts, which are token ids, image patches and positions.

The room imports errors.py and schema.py, nothing else of the project.
Begin with rows.py. readers.py reads raw records; columns.py, chat.py and images.py make rows of them; prompt.py turns a
row into the model's input, and group.py adds responses.
"""
