"""Sokoban as LMM-R1 trains on it: levels, their shortest solutions, pictures of them, and the reward of a plan.

`python -m nanolmmr1.sokoban` writes rows; the reward is a function that a recipe names, see plan.py. No run imports
the room, only worker processes do.
Begin with __main__.py; level.py has the rules of the game, and generate.py makes levels that solve.py has solved.
"""
