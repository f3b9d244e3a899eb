"""Output that cannot end a run: a closed pipe, a full disk or an ASCII terminal loses text, not training.

Next: metrics.py, the logs and the display.
"""

import os
import re
import sys

# Control codes but tab and newline, and the characters that reverse the direction of text: a terminal obeys them.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text):
    """Text of data, paths or servers as it can be shown: control codes become \\xNN."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def protect():
    """Let stdout and stderr of this process outlive their readers. Call it once, before anything is printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream or open(os.devnull, "w")))  # None: it was closed from the start


class _Lasting:
    """A text stream. Once nobody reads what is written, it goes nowhere; characters it cannot encode are escaped."""

    def __init__(self, stream):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        return self._lasting("write", text)

    def flush(self):
        return self._lasting("flush")

    def _lasting(self, method, *args):
        try:
            return getattr(self._stream, method)(*args)
        except (OSError, ValueError):  # BrokenPipeError, ENOSPC, EIO of a closed terminal; a file closed in Python
            self._lose()
            return len(args[0]) if args else None

    def _lose(self):
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, self._stream.fileno())  # what is buffered goes there too, at exit at the latest
        except (OSError, ValueError):  # no file behind it
            self._stream = open(os.devnull, "w")
        finally:
            os.close(null)
