"""Files that are whole after a crash: atomic replacement and fsync."""

import contextlib
import os
from pathlib import Path


def write_atomically(path, data):
    """Replace a file by `data` (bytes): after a kill the old content or the new one is there, never a part."""
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


def sync(path):
    """Wait until a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
