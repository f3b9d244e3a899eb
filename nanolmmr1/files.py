"""Atomic file replacement and fsync.

Next: terminal.py, safe output.
"""

import contextlib
import os
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace a file: after a crash it holds the old content or all of the new."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync(path: str | Path) -> None:
    """fsync a file, or a folder so that its entries survive a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
