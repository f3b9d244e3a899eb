"""Finished work of a long command, in one append-only file beside its output: a kill costs the chunk in progress.

The first line says what the work depends on. Each further line is a chunk of work as JSON, on disk when `append`
returns. A line that was cut short is removed by the next opening.

Next: sampling.py, asking a model for many rows.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from nanolmmr1.data.readers import reason, shown
from nanolmmr1.errors import UserError
from nanolmmr1.files import sync

START = b'{"journal": '  # of every journal


class Journal:
    """A journal that is open and locked. A context manager.

    Args:
        path: of the file, which is created if it is missing. fingerprint: JSON-able; what the chunks depend on, such as
            arguments, versions and hashes of sources.

    Attributes:
        done: number of chunks in it.

    Raises:
        UserError: it belongs to other work, another process has it open, it is no journal, or it cannot be written.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path, self.done = path, 0
        try:
            self.file = self._locked()
            try:
                self._recover(json.loads(json.dumps(fingerprint)))
            except BaseException:
                self.file.close()
                raise
        except OSError as error:
            raise UserError(f"{shown(path)} cannot be written: {reason(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def chunks(self) -> Iterator[Any]:
        """The chunks, in the order in which they were appended; one is held in memory at a time."""
        with open(self.path, "rb") as file:
            file.readline()
            for line, _ in zip(file, range(self.done), strict=False):
                yield json.loads(line)

    def append(self, chunk: Any) -> None:
        """Add a chunk, and return when it is on disk.

        Raises:
            UserError: the disk is full or fails; the journal is then as before.
        """
        end = os.fstat(self.file.fileno()).st_size
        try:
            self._write(chunk)
        except OSError as error:
            os.ftruncate(self.file.fileno(), end)
            raise UserError(f"{shown(self.path)} cannot be written ({reason(error)}); started again, the command goes "
                            f"on after its {self.done} finished chunks") from error
        self.done += 1

    def remove(self) -> None:
        """Delete the file: the work is done."""
        self.path.unlink()
        self.file.close()

    def _write(self, value: Any) -> None:
        line = json.dumps(value).encode() + b"\n"
        while line:  # a disk that is nearly full takes a part
            line = line[self.file.write(line) :]
        os.fsync(self.file.fileno())

    def _locked(self) -> Any:
        while True:
            file = open(self.path, "a+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                        return file  # and not one that its owner has just removed
            except BlockingIOError:
                file.close()
                raise UserError(f"{shown(self.path)}: another process is doing this work; wait for it, or choose "
                                "another output") from None
            except OSError:
                file.close()
                raise
            file.close()

    def _recover(self, fingerprint: dict[str, Any]) -> None:
        """Check the header, count the whole lines and cut off the rest."""
        with open(self.path, "rb") as lines:
            header = lines.readline()
            if not header.startswith(START[: len(header)]) or header.endswith(b"\n") and not _is_whole(header):
                raise UserError(f"{shown(self.path)} is no journal of this program: move it, or choose another output")
            end, line = len(header), header
            if header.endswith(b"\n"):
                self._compare(json.loads(header)["journal"], fingerprint)
                while (line := lines.readline()) and _is_whole(line):
                    self.done += 1
                    end += len(line)
        if not header.endswith(b"\n"):
            os.ftruncate(self.file.fileno(), 0)
            self._write({"journal": fingerprint})
            sync(self.path.parent)
        elif line:
            os.ftruncate(self.file.fileno(), end)

    def _compare(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        for key in {**then, **now}:
            if then.get(key) != now.get(key):
                raise UserError(f"{shown(self.path)} holds work with {key}={shown(then.get(key), 200)}, not "
                                f"{shown(now.get(key), 200)}: start the command that it is of, choose another output, "
                                "or delete the file to start over")


def _is_whole(line: bytes) -> bool:
    """Whether a line is a chunk; a power cut may leave zeros, too."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")
