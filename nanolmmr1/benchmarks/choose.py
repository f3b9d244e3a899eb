"""The benchmark that a user names, and its rows among those of a source.

Next: item.py, one answered row.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from nanolmmr1.benchmarks import official
from nanolmmr1.benchmarks.table import BENCHMARKS, Benchmark, find
from nanolmmr1.data.readers import shown
from nanolmmr1.data.store import Row, Rows, picture_hash
from nanolmmr1.errors import UserError


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
        # Its name is all of the text: a file mathvision.jsonl need not be that benchmark.
        return Chosen(Benchmark(text, shown(text), (text,), 0, "not stated", "", official.plain), [text])
    entry = find(name)
    return Chosen(entry, [source] if source else [*entry.source])


def choose_task(data: str | list[str]) -> Chosen:
    """The benchmark of `evaluate.tasks.NAME.data`; of a list, the rows of all its sources.

    Raises:
        UserError: there is no such benchmark, or a list names one.
    """
    if isinstance(data, str):
        return choose(data)
    entries = [choose(each).entry for each in data]
    if named := [entry.name for entry in entries if entry.name in BENCHMARKS]:
        raise UserError(f"evaluate.tasks: a list holds files, and {named[0]} is a benchmark: give it a task of its own")
    return Chosen(entries[0], data)


def kept(rows: Rows, entry: Benchmark) -> Rows:
    """The benchmark's rows of a source."""
    keep = entry.keep
    return rows.subset(place for place, row in enumerate(rows) if keep(row)) if keep else rows


def spread(count: int, limit: int) -> list[int]:
    """The places of `limit` of `count` rows, evenly spread, since a file may be sorted by subject; all with 0."""
    few = min(limit, count) or count
    return [number * count // few for number in range(few)]


def unique(names: Iterable[str]) -> list[str]:
    """The names, each another one: the second "7" is "7#2"."""
    found: dict[str, None] = {}
    for name in names:
        number, other = 1, name
        while other in found:
            number += 1
            other = f"{name}#{number}"
        found[other] = None
    return list(found)


def identity(row: Row) -> str:
    """A hash of what a row asks, whatever its id and its file are. Raises OSError if a picture cannot be read."""
    content = [row.problem, row.answer, row.options, [picture_hash(item) for item in row.images]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def as_published(row: Row, entry: Benchmark) -> Row:
    """The row with the benchmark's own prompt for its problem."""
    return Row(**vars(row) | {"problem": entry.official(row)})
