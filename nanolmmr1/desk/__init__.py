"""The embedded world of `make train`: generated data and a small model to train on it.

The room imports the rooms that make a model: data/, model/, parallel/, update/.
Begin with world.py; tasks.py writes the rows, cold_start.py trains the model that the run starts from.
"""
