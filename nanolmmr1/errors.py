"""Exceptions that end a run with a message instead of a traceback.

Next: files.py, atomic files.
"""

import errno
import signal

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError


class UserError(ValueError):
    """A wrong recipe, data or model. The message names the value and the cure."""


class SharedError(UserError):
    """An error of any rank, raised on all ranks at the same place, so that their collectives still match."""


class Preempted(Exception):
    """A signal asked the run to stop. Its last complete step can be saved."""

    def __init__(self, number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__()
        self.signal = number

    @property
    def exit_status(self) -> int:
        """128 + signal number, as shells report it. SIGUSR1 counts as SIGTERM, since Slurm sends it as a warning."""
        return 128 + (signal.SIGTERM if self.signal == signal.SIGUSR1 else self.signal)
