"""What a run says about itself: two logs that survive a kill, stage times, and the live display.

`metrics.jsonl` has one line a step, under the key names EasyR1 and verl use, so that existing
plots keep working; `samples.jsonl` keeps some groups to look at. Both are append-only, and a
resumed run first cuts them back to its checkpoint, so that a step is never told twice.

The display is a table of bars on a terminal. Anywhere else (a CI log, a file) it is plain lines,
about ten a phase.

Next: report.py, which turns a run folder into one HTML page.
"""

import base64
import contextlib
import io
import json
import math
import os
import time
from pathlib import Path

from nanolmmr1.errors import UserError
from nanolmmr1.files import write_atomically

THUMBNAIL_SIDE = 160
def read_lines(path, unreadable=None):
    """The records of a .jsonl file, oldest first; [] where there is no file. A torn last line is left out.

    Args:
        unreadable: of a run's log, a list that is given the lines that no step has written, as bytes.

    Raises:
        UserError: a complete line that is not a JSON object, and no list for it. OSError: the disk's.
    """
    records = []
    for number, line in enumerate(_complete_lines(path), 1):
        try:
            record = json.loads(line)
            wrong = "" if isinstance(record, dict) else f"holds {type(record).__name__}, not an object"
        except (ValueError, RecursionError) as error:
            wrong = f"is not JSON ({error})"
        if unreadable is not None and (wrong or not isinstance(record.get("step"), int)):
            unreadable.append(line)
        elif wrong:
            raise UserError(f"{path}:{number} {wrong}; remove that line")
        else:
            records.append(record)
    return records


class _Log:
    """A log of a run folder: a record a line, in order of steps. Nothing that is wrong with it ends the run.

    Args:
        note: told what a user should know.
    """

    name = ""

    def __init__(self, folder, note=print):
        self.path, self.note = Path(folder) / self.name, note
        self.size, self.waiting, self.told = 0, b"", False  # bytes written; lines not written yet; whether that is told
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self.path.exists() and not self.path.is_file():
                self._set_aside("is no file")
            self._rewrite(lambda record: True)
        except OSError as error:
            self._set_aside(f"cannot be read ({error})")

    def truncate(self, step):
        """Drop the records of steps after `step`: what a resumed run will write again."""
        try:
            self._rewrite(lambda record: record["step"] <= step)
        except OSError as error:
            self.note(f"{self.path} cannot be cut back to step {step}: {error}")

    def _rewrite(self, wanted):
        """Keep the wanted records. Lines that no step has written are moved to a file beside the log."""
        unreadable, lines = [], _complete_lines(self.path)
        records = read_lines(self.path, unreadable)
        strange = set(unreadable)
        kept = [line for line, record in zip((x for x in lines if x not in strange), records, strict=True)
                if wanted(record)]
        if unreadable:
            aside = self.path.with_suffix(".unreadable")
            with open(aside, "ab") as file:
                file.writelines(unreadable)
            self.note(f"{self.path}: {len(unreadable)} lines are no records of a step; they are kept in {aside.name}")
        data = b"".join(kept)
        if self.path.exists() and self.path.stat().st_size != len(data):
            write_atomically(self.path, data)
        self.size = len(data)

    def _set_aside(self, why):
        aside = self.path.with_suffix(f".aside{time.time_ns()}")
        with contextlib.suppress(OSError):
            os.replace(self.path, aside)
        self.note(f"{self.path} {why}; it is kept as {aside.name}, and a new one is begun")

    def _append(self, record):
        """Write a record. What the disk does not take now is kept, and written with the next one."""
        # ASCII: any text of data or model can be written, a lone surrogate too.
        self.waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                end = min(self.size, os.fstat(file.fileno()).st_size)  # a full disk may have taken a part of a line
                file.seek(end)
                file.truncate()
                file.write(self.waiting)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not self.told:
                self.note(f"{self.path} cannot be written ({error}): its lines wait until it can")
            self.told = True
        else:
            self.size, self.waiting, self.told = end + len(self.waiting), b"", False


class MetricsLog(_Log):
    """`metrics.jsonl` of a run folder: one flat record a step, on disk when `write` returns."""

    name = "metrics.jsonl"

    def write(self, record):
        """Append a record. JSON has no NaN or infinity: such a value becomes null, its key named under `nonfinite`."""
        nonfinite = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        if nonfinite:
            record = record | dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
        self._append(record)


class SampleLog(_Log):
    """`samples.jsonl` of a run folder: one kept group a line, its pictures inside as small PNGs."""

    name = "samples.jsonl"

    def write(self, record):
        """Append a group.

        Args:
            record: {"phase", "step", "problem", "answer", "caption" (only where it was shown), "images": [PIL image],
                "responses": [{"text", "reward", "advantage", "parts": {name: number}}]}. Pictures become base64 PNGs of
                at most 160 pixels a side.
        """
        self._append(record | {"images": [_thumbnail(image) for image in record["images"]]})


def _thumbnail(image):
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    png = io.BytesIO()
    small.save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


def _complete_lines(path):
    """The file's lines that end in a newline, as bytes; [] where there is no file."""
    data = path.read_bytes() if path.exists() else b""
    return data[:data.rfind(b"\n") + 1].splitlines(keepends=True)
