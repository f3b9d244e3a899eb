"""Data: from files and hub data sets to prompts, which are token ids, image patches and positions.

The room imports errors.py and schema.py, nothing else of the project.
Begin with rows.py. readers.py reads raw records; schemas.py knows published ones; columns.py, chat.py, images.py and
archives.py make rows of them, which store.py keeps on disk; prompt.py turns a row into the model's input, and group.py
adds responses.
"""
