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
import datetime
import io
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from nanolmmr1.config import UserError
from nanolmmr1.terminal import printable

THUMBNAIL_SIDE = 160
FIGURES = {  # shown beside each bar: name -> (metrics key, number format)
    "reward": ("reward/overall", "{:.3f}"),
    "acc": ("reward/accuracy", "{:.3f}"),
    "length": ("response_length/mean", "{:.0f}"),
    "KL": ("actor/kl_loss", "{:.4f}"),
    "entropy": ("actor/entropy", "{:.3f}"),
    "tok/s": ("perf/throughput", "{:.0f}"),
}


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


def peak_rss_mb():
    """Largest resident memory of this process so far, in 1e6 bytes. Child processes, as judging workers, not in it."""
    with contextlib.suppress(FileNotFoundError):  # Linux: what getrusage says there begins with what the parent held
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # macOS counts bytes, Linux KiB


def rss_mb():
    """Resident memory of this process now, in 1e6 bytes; where /proc is missing, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return peak_rss_mb()
    return pages * resource.getpagesize() / 1e6


class StageTimer:
    """Seconds per named stage of a step. A stage entered again adds up; a stage inside another counts in both.

    Args:
        watch: told of every stage as well, so that a rank that stays in one can be named; or None.
        step: number of the step, for the watch.
    """

    def __init__(self, watch=None, step=0):
        self._seconds, self._watch, self._step = {}, watch, step

    @contextlib.contextmanager
    def stage(self, name):
        """Time the body of a `with`, also when it raises."""
        start = time.perf_counter()
        try:
            with self._watch.stage(name, self._step) if self._watch else contextlib.nullcontext():
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def seconds(self):
        """{"timing_s/<name>": seconds} since the last reset, in order of first use."""
        return {f"timing_s/{name}": seconds for name, seconds in self._seconds.items()}

    def reset(self):
        """Forget all stages: a step begins."""
        self._seconds = {}


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


class Display:
    """Where the run is, and how it does: one bar a phase on a terminal, else plain lines. `quiet` shows nothing."""

    def __init__(self, phases, quiet=False):
        """phases: name -> number of steps, in order."""
        self.phases, self.quiet = phases, quiet
        self.phase, self.done, self.first, self.began = None, 0, 0, 0.0
        self.bars, self.bar_of = None, {}
        if not quiet and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self.bars = _Bars(*_bar_columns(), console=Console(markup=False, highlight=False))
            for name, steps in phases.items():
                self.bar_of[name] = self.bars.add_task(name, total=steps, start=False, **_figures({}), left="")

    def start(self):
        """Show the bars."""
        if self.bars:
            self.bars.start()

    def stop(self):
        """Leave the bars as they are and give the terminal back."""
        if self.bars:
            self.bars.stop()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start_phase(self, name, done=0):
        """The next `step` belongs to this phase; `done` of its steps were taken before the run was resumed."""
        self.phase, self.done, self.first, self.began = name, done, done, time.monotonic()
        if self.bars:
            for earlier in list(self.phases)[:list(self.phases).index(name)]:
                self.bars.update(self.bar_of[earlier], completed=self.phases[earlier])
            self.bars.update(self.bar_of[name], completed=done)
            self.bars.start_task(self.bar_of[name])

    def step(self, record):
        """One step is done; `record` is what went into metrics.jsonl."""
        self.done += 1
        steps = self.phases[self.phase]
        left = _left(self.began, self.done - self.first, steps - self.done)
        if self.bars:
            self.bars.update(self.bar_of[self.phase], completed=self.done, left=left, **_figures(record))
        elif self.done in (self.first + 1, steps) or self.done % max(1, steps // 10) == 0:
            figures = "  ".join(f"{key} {value}" for key, value in _figures(record).items())
            name, done = self.phase.ljust(max(map(len, self.phases))), str(self.done).rjust(len(str(steps)))
            elapsed = _clock(time.monotonic() - self.began)
            self.note(f"{name}  {done}/{steps}  {figures}  elapsed {elapsed}  left {left}")

    def note(self, text):
        """A line that stays, above the bars."""
        text = printable(text)
        if self.bars:
            self.bars.console.print(text, soft_wrap=True)
        elif not self.quiet:
            print(text, flush=True)

    @contextlib.contextmanager
    def busy(self, text, total):
        """Other long work, as evaluation: yields `advance(n=1)`. When it ends, its bar goes and a line stays."""
        began, done = time.monotonic(), 0
        task = self.bars.add_task(text, total=total, **dict.fromkeys(FIGURES, ""), left="") if self.bars else None

        def advance(n=1):
            nonlocal done
            done += n
            if self.bars:
                self.bars.update(task, completed=done, left=_left(began, done, total - done))

        if not self.bars:
            self.note(f"{text}: 0/{total}")
        try:
            yield advance
        finally:
            if self.bars:
                self.bars.remove_task(task)
            self.note(f"{text}: {done}/{total} in {_clock(time.monotonic() - began)}")


def accuracy_rows(accuracy):
    """Held-out accuracy as rows to print.

    Args:
        accuracy: moment -> {task: fraction right}, first the start, then each phase.

    Returns:
        (tasks, rows, change): rows of (moment, [percent or None per task]); change is [points or None per task], last
        moment minus first, or None where there is only one moment.
    """
    tasks = list(dict.fromkeys(task for moment in accuracy.values() for task in moment))
    rows = [(moment, [None if task not in right else 100 * right[task] for task in tasks])
            for moment, right in accuracy.items()]
    if len(rows) < 2:
        return tasks, rows, None
    pairs = zip(rows[0][1], rows[-1][1], strict=True)
    return tasks, rows, [None if None in (start, end) else end - start for start, end in pairs]


def accuracy_table(accuracy):
    """Held-out accuracy as a rich Table: a row per moment, a column per task, last the change in points."""
    tasks, rows, change = accuracy_rows(accuracy)
    table = Table("accuracy, %", *(Column(task, justify="right") for task in tasks), box=SIMPLE_HEAD, show_edge=False)
    for number, (moment, percents) in enumerate(rows, 1):
        table.add_row(moment, *("-" if p is None else f"{p:.1f}" for p in percents), end_section=number == len(rows))
    if change:
        table.add_row("change, points", *("-" if p is None else f"{p:+.1f}" for p in change), style="bold")
    return table


def print_accuracy(accuracy):
    """Print the accuracy table: with colour on a terminal, else as plain text, which a narrow pipe does not fold."""
    terminal = sys.stdout.isatty()
    Console(force_terminal=terminal, width=None if terminal else 200, markup=False).print(accuracy_table(accuracy))


class _Bars(Progress):
    """rich's bars under a heading, so that each figure is named once."""

    def make_tasks_table(self, tasks):
        table = super().make_tasks_table(tasks)
        table.show_header, table.header_style = True, "dim"
        return table


def _bar_columns():
    def column(heading, justify="right"):
        return Column(heading, justify=justify, no_wrap=True)

    def text(field, heading, justify="right"):
        return TextColumn(f"{{task.{field}}}", justify=justify, markup=False, table_column=column(heading, justify))

    return [
        text("description", "phase", "left"), BarColumn(bar_width=None),
        MofNCompleteColumn(table_column=column("step")), *(text(f"fields[{name}]", name) for name in FIGURES),
        TimeElapsedColumn(table_column=column("elapsed")), text("fields[left]", "left"),
    ]


def _figures(record):
    return {name: "-" if record.get(key) is None else form.format(record[key]) for name, (key, form) in FIGURES.items()}


def _clock(seconds):
    return str(datetime.timedelta(seconds=round(seconds)))


def _left(began, done, remaining):
    """Time left at the mean pace since `began`; empty before there is a pace."""
    return _clock((time.monotonic() - began) / done * remaining) if done else ""


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
