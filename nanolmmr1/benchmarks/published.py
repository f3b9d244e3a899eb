"""Scores that others have published, to stand beside ours. They are of other prompts, pixel limits and scorers.

Next: lenient.py, the benchmarks' own scorers.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple


class Published(NamedTuple):
    """A score in percent, as printed."""

    model: str
    # A name of table.py; "NAME: COLUMN=VALUE" for a part of its rows, "NAME: ..." for another measure, "mean: ..." for
    # the mean of several.
    benchmark: str
    value: float
    source: str
    rows: int | None  # of which it is the share that is right; None: not stated
    fits: bool = True  # whether a whole number of right rows gives the value; if not, `note` says why
    note: str = ""


@functools.cache
def scores() -> list[Published]:
    """All of published.json, in the order in which tables show them."""
    return [Published(**each) for each in json.loads(Path(__file__).with_name("published.json").read_bytes())]


def published(benchmark: str) -> list[Published]:
    """The scores on a benchmark, or on a part of it by the part's own name."""
    return [score for score in scores() if score.benchmark == benchmark]
