"""Live display of a run: progress bars on a terminal, plain lines elsewhere (a CI log, a file), about ten per phase.

Next: diagnose.py, runs that cannot learn.
"""

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from rich import progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from nanolmmr1.terminal import printable

Accuracy = Mapping[str, Mapping[str, float]]  # moment -> {task: fraction right}: the start, then each phase
Percents = list[float | None]  # by task

LINE_S = 30.0  # between two lines about other long work
FIGURES = {  # shown beside each bar: name -> (metrics key, number format)
    "reward": ("reward/overall", "{:.3f}"),
    "acc": ("reward/accuracy", "{:.3f}"),
    "length": ("response_length/mean", "{:.0f}"),
    "KL": ("actor/kl_loss", "{:.4f}"),
    "entropy": ("actor/entropy", "{:.3f}"),
    "tok/s": ("perf/throughput", "{:.0f}"),
}


class Display:
    """Progress and figures of a run: one bar per phase on a terminal, plain lines elsewhere, nothing if `quiet`.

    Args:
        phases: name -> number of steps, in order.
    """

    def __init__(self, phases: dict[str, int], quiet: bool = False) -> None:
        self.phases, self.quiet = phases, quiet
        self.phase = ""  # the current phase
        self.done = 0  # its steps so far
        self.first = 0  # its steps before the run was resumed
        self.began = 0.0  # when this process began it, by time.monotonic
        self.bars: progress.Progress | None = None
        self.bar_of: dict[str, progress.TaskID] = {}  # phase -> its bar
        if not quiet and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            self.bars = progress.Progress(
                "{task.description}", progress.BarColumn(10), progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[figures]}", markup=False, table_column=Column()),  # wraps if too wide
                progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
                console=Console(markup=False, emoji=False, highlight=False),
                speed_estimate_period=math.inf,  # the mean pace: a step may take minutes
            )
            for name, steps in phases.items():
                self.bar_of[name] = self.bars.add_task(name, total=steps, start=False, figures="")

    def __enter__(self) -> Self:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def start_phase(self, name: str, done: int = 0) -> None:
        """The next `step` belongs to this phase; a resumed run has already taken `done` of its steps."""
        self.phase, self.done, self.first, self.began = name, done, done, time.monotonic()
        if self.bars:
            for earlier in list(self.phases)[: list(self.phases).index(name)]:
                self.bars.update(self.bar_of[earlier], completed=self.phases[earlier])
            self.bars.update(self.bar_of[name], completed=done)
            self.bars.start_task(self.bar_of[name])

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a finished step; `record` is its record in metrics.jsonl."""
        self.done += 1
        steps = self.phases[self.phase]
        figures = [(name, "-" if record.get(key) is None else form.format(record[key]))
                   for name, (key, form) in FIGURES.items()]
        if self.bars:
            shown = " ".join(f"{name}={value}" for name, value in figures)
            self.bars.update(self.bar_of[self.phase], completed=self.done, figures=shown)
        elif self.done in (self.first + 1, steps) or self.done % max(1, steps // 10) == 0:
            phase, done = self.phase.ljust(max(map(len, self.phases))), str(self.done).rjust(len(str(steps)))
            elapsed = time.monotonic() - self.began
            left = elapsed / (self.done - self.first) * (steps - self.done)
            shown = "  ".join(f"{name} {value}" for name, value in figures)
            self.note(f"{phase}  {done}/{steps}  {shown}  elapsed {_clock(elapsed)}  left {_clock(left)}")

    def note(self, text: str) -> None:
        """Print a line, above the bars if there are any."""
        text = printable(text)
        if self.bars:
            self.bars.console.print(text, soft_wrap=True)
        elif not self.quiet:
            print(text, flush=True)

    @contextlib.contextmanager
    def busy(self, text: str, total: int) -> Iterator[Callable[..., None]]:
        """Show other long work, such as an evaluation. Yields `advance(n=1)`; at the end the bar becomes a line.

        Without bars there is a line every LINE_S seconds.
        """
        began, done = time.monotonic(), 0
        told = began
        bar = self.bars.add_task(text, total=total, figures="") if self.bars else None

        def advance(n: int = 1) -> None:
            nonlocal done, told
            done += n
            if self.bars and bar is not None:
                self.bars.update(bar, completed=done)
            elif (now := time.monotonic()) - told > LINE_S and 0 < done < total:
                told, elapsed = now, now - began
                self.note(f"{text}: {done}/{total}  elapsed {_clock(elapsed)}  "
                          f"left {_clock(elapsed / done * (total - done))}")

        if not self.bars:
            self.note(f"{text}: 0/{total}")
        try:
            yield advance
        finally:
            if self.bars and bar is not None:
                self.bars.remove_task(bar)
            self.note(f"{text}: {done}/{total} in {_clock(time.monotonic() - began)}")


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def accuracy_rows(accuracy: Accuracy) -> tuple[list[str], list[tuple[str, Percents]], Percents | None]:
    """Held-out accuracy as a table.

    Returns:
        (tasks, rows, change): a row is (moment, percent per task); change is the last moment minus the first, in points
        per task, or None if there is only one moment. A task that a moment lacks is None.
    """
    tasks = list(dict.fromkeys(task for fractions in accuracy.values() for task in fractions))
    rows = [(moment, [None if task not in fractions else 100 * fractions[task] for task in tasks])
            for moment, fractions in accuracy.items()]
    if len(rows) < 2:
        return tasks, rows, None
    pairs = zip(rows[0][1], rows[-1][1], strict=True)
    return tasks, rows, [None if start is None or end is None else end - start for start, end in pairs]


def print_accuracy(accuracy: Accuracy) -> None:
    """Print held-out accuracy: a row per moment, a column per task, and the change in points."""
    tasks, rows, change = accuracy_rows(accuracy)
    table = Table("accuracy, %", *(Column(task, justify="right") for task in tasks), box=SIMPLE_HEAD, show_edge=False)
    for number, (moment, percents) in enumerate(rows, 1):
        table.add_row(moment, *("-" if p is None else f"{p:.1f}" for p in percents), end_section=number == len(rows))
    if change:
        table.add_row("change, points", *("-" if p is None else f"{p:+.1f}" for p in change), style="bold")
    terminal = sys.stdout.isatty()  # elsewhere plain text, of a fixed width: a narrow pipe must not fold it
    Console(force_terminal=terminal, width=None if terminal else 200, markup=False, emoji=False).print(table)
