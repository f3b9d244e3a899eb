"""Output that cannot end a run: a closed pipe, a full disk or an ASCII terminal loses text, not training.

Next: desk/world.py, the embedded world.
"""

import os
import re
import sys
from typing import TextIO

# Characters that a terminal obeys: control codes except tab and newline, and changes of the direction of text.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Untrusted text (data, paths, servers) for a terminal: control codes become \\xNN."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def protect() -> None:
    """Let this process outlive the readers of its stdout and stderr. Call it once, before anything is printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream or open(os.devnull, "w")))  # None if it was closed from the start


class _Lasting:
    """A text stream that drops its output once nobody reads it, and escapes characters that it cannot encode."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    # OSError: BrokenPipeError, ENOSPC, EIO of a closed terminal. ValueError: a file closed in Python.
    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._discard()

    def _discard(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, self._stream.fileno())  # buffered text goes there too, at exit at the latest
        except (OSError, ValueError):  # no file descriptor behind it
            self._stream = open(os.devnull, "w")
        finally:
            os.close(null)
