"""The live display of a run."""

import contextlib
import datetime
import os
import sys
import time

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from nanolmmr1.terminal import printable

FIGURES = {  # shown beside each bar: name -> (metrics key, number format)
    "reward": ("reward/overall", "{:.3f}"),
    "acc": ("reward/accuracy", "{:.3f}"),
    "length": ("response_length/mean", "{:.0f}"),
    "KL": ("actor/kl_loss", "{:.4f}"),
    "entropy": ("actor/entropy", "{:.3f}"),
    "tok/s": ("perf/throughput", "{:.0f}"),
}


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
