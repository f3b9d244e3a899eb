"""The three exceptions that end a run with a message in place of a traceback."""


class UserError(ValueError):
    """Something wrong in recipe, data or model: the message names the value and the cure."""


class SharedError(UserError):
    """What is wrong with one rank, raised on all of them at the same place: they may still do things together."""


class Preempted(Exception):
    """The run was told to stop. What it has done until its last complete step is good."""
