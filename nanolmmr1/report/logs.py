"""Append-only logs of a run folder: metrics and sample rollouts.

`metrics.jsonl` has one line per step, under the key names of EasyR1 and verl, so that existing plots keep working.
`samples.jsonl` keeps a few groups per phase to read. A resumed run truncates both logs to its checkpoint, so that no
step appears twice.

Both survive a kill, and no fault of a log ends the run: a torn last line is dropped, unreadable lines are moved to a
file beside the log, and lines that the disk refuses are retried with the next one.

Next: display.py, bars and plain lines.
"""

import base64
import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from nanolmmr1.errors import UserError
from nanolmmr1.files import write_atomically

THUMBNAIL_SIDE = 160  # pixels

Record = dict[str, Any]  # one JSON object of a log


def read_lines(path: Path) -> list[Record]:
    """The records of a .jsonl file, oldest first; [] if there is no file. A torn last line is left out.

    Raises:
        UserError: a complete line is not a JSON object.
    """
    records = []
    for number, (_, record, fault) in enumerate(_parse(path), 1):
        if fault:
            raise UserError(f"{path}:{number} {fault}; remove that line")
        records.append(record)
    return records


def read_log(path: Path) -> tuple[list[tuple[bytes, Record]], list[bytes]]:
    """(lines with their records, lines that no step has written) of a run's log. OSError if it cannot be read."""
    written, unreadable = [], []
    for line, record, fault in _parse(path):
        if fault or not isinstance(record.get("step"), int):
            unreadable.append(line)
        else:
            written.append((line, record))
    return written, unreadable


def _parse(path: Path) -> Iterator[tuple[bytes, Record, str]]:
    """(line, record, fault) of each line that ends in a newline; the fault is empty if the line is a JSON object."""
    data = path.read_bytes() if path.exists() else b""
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        try:
            record = json.loads(line)
            fault = "" if isinstance(record, dict) else f"holds {type(record).__name__}, not an object"
        except (ValueError, RecursionError) as error:
            record, fault = {}, f"is not JSON ({error})"
        yield line, record, fault


class _Log:
    """A log of a run folder: one record per line, in order of steps.

    Args:
        folder: the run folder; created if missing.
        note: prints a line for the user.
    """

    name = ""  # file name

    def __init__(self, folder: str | Path, note: Callable[[str], object] = print) -> None:
        self.path, self.note = Path(folder) / self.name, note
        self.size = 0  # bytes of complete lines in the file
        self.waiting = b""  # lines that the disk has refused so far
        self.warned = False  # the user knows that lines wait
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self.path.exists() and not self.path.is_file():
                raise OSError("it is no file")
            self._rewrite()
        except OSError as error:
            aside = self.path.with_suffix(f".aside{time.time_ns()}")
            with contextlib.suppress(OSError):
                os.replace(self.path, aside)
            self.note(f"{self.path} cannot be read ({error}); it is kept as {aside.name}, and a new one is begun")

    def truncate(self, step: int) -> None:
        """Drop the records after `step`; the resumed run writes them again."""
        try:
            self._rewrite(step)
        except OSError as error:
            self.note(f"{self.path} cannot be cut back to step {step}: {error}")

    def _rewrite(self, last_step: float = math.inf) -> None:
        """Keep the records up to `last_step`. Move lines that no step has written to a file beside the log."""
        written, unreadable = read_log(self.path)
        if unreadable:
            aside = self.path.with_suffix(".unreadable")
            with open(aside, "ab") as file:
                file.writelines(unreadable)
            self.note(f"{self.path}: {len(unreadable)} lines are no records of a step; they are kept in {aside.name}")
        data = b"".join(line for line, record in written if record["step"] <= last_step)
        if self.path.exists() and self.path.stat().st_size != len(data):
            write_atomically(self.path, data)
        self.size = len(data)

    def _append(self, record: Record) -> None:
        """Write a record and fsync. If the disk refuses it, retry with the next record."""
        # ASCII, so that any text of data or model can be written, even a lone surrogate.
        self.waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                end = min(self.size, os.fstat(file.fileno()).st_size)  # a full disk may have taken half a line
                file.seek(end)
                file.truncate()
                file.write(self.waiting)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not self.warned:
                self.note(f"{self.path} cannot be written ({error}): its lines wait until it can")
            self.warned = True
        else:
            self.size, self.waiting, self.warned = end + len(self.waiting), b"", False


class MetricsLog(_Log):
    """`metrics.jsonl`: one flat record per step, on disk when `write` returns."""

    name = "metrics.jsonl"

    def write(self, record: Record) -> None:
        """Append a record. JSON has no NaN or infinity: they become null, and `nonfinite` lists their keys."""
        nonfinite = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        if nonfinite:
            record = record | dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
        self._append(record)


class SampleLog(_Log):
    """`samples.jsonl`: one group per line, its images inside as small PNGs."""

    name = "samples.jsonl"

    def write(self, record: Record) -> None:
        """Append a group.

        Args:
            record: {"phase", "step", "problem", "answer", "caption" (only if the prompt shows it), "images": [PIL
                image], "responses": [{"text", "reward", "advantage", "parts": {name: number}}]}. Images become base64
                PNGs of at most 160 pixels a side.
        """
        self._append(record | {"images": [_thumbnail(image) for image in record["images"]]})


def _thumbnail(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    png = io.BytesIO()
    small.save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()
