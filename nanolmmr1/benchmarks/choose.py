"""The benchmark that a user names, and its rows among those of a source.

Next: item.py, one answered row.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from nanolmmr1.benchmarks import official
from nanolmmr1.benchmarks.table import BENCHMARKS, Benchmark, find
from nanolmmr1.data.store import Row, Rows


class Chosen(NamedTuple):
    """A benchmark and where its rows are."""

    entry: Benchmark
    sources: list[str]  # as phases.NAME.data


def choose(text: str) -> Chosen:
    """The benchmark of NAME or NAME=SOURCE; or of a SOURCE alone, whose rows are read by their columns.

    Raises:
        UserError: it has the form of a name, and there is no benchmark of this name.
    """
    name, _, source = text.partition("=")
    if name not in BENCHMARKS and (re.search("[/.]", name) or os.path.exists(text)):
        # Its name is no short one: a file mathvision.jsonl need not be that benchmark.
        title = Path(text.partition("@")[0]).stem
        return Chosen(Benchmark(text, title, (text,), 0, "not stated", "", official.plain), [text])
    entry = find(name)
    return Chosen(entry, [source] if source else [*entry.source])


def kept(rows: Rows, entry: Benchmark) -> Rows:
    """The benchmark's rows of a source."""
    return rows.subset(place for place, row in enumerate(rows) if entry.keep(row))


def spread(count: int, limit: int) -> list[int]:
    """The places of `limit` of `count` rows, evenly spread, since a file may be sorted by subject; all with 0."""
    few = min(limit, count) or count
    return [number * count // few for number in range(few)]


class Numbered:
    """Makes names different: the second "7" is "7#2". In the order of a benchmark's rows, it gives each an id."""

    def __init__(self) -> None:
        self.seen = Counter[str]()

    def __call__(self, name: str) -> str:
        self.seen[name] += 1
        return name if self.seen[name] == 1 else f"{name}#{self.seen[name]}"


def as_published(row: Row, entry: Benchmark) -> Row:
    """The row with the benchmark's own prompt for its problem."""
    return Row(**vars(row) | {"problem": entry.official(row)})
