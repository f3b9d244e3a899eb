"""A run: phases of steps, in a folder that survives a crash.

The room imports every other room, and only train.py, doctor.py and bench/ import it.
Begin with loop.py, the whole run; trainer.py is one step.
"""
