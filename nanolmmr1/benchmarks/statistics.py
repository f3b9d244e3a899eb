"""Scores of items with 95 % intervals, and the paired difference of two models.

All of them are fractions. A resample of the bootstrap draws as many problems as there are, with all of their items.
What it gives depends only on how often each kind of problem is drawn, and problems of equal counts and scores are of
one kind: so one multinomial draw over a few kinds replaces thousands of single ones, with the same distribution.

Next: ../evaluate/__main__.py, the command.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanolmmr1.benchmarks.item import Item
from nanolmmr1.reward.parts import as_text

RESAMPLES, BLOCK = 10_000, 1_000  # a block's draws are in memory together
Z = 1.959963984540054  # 97.5 % of a normal distribution lie below


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float
    rows: int


class Difference(NamedTuple):
    """How much better the second of two models is."""

    estimate: Estimate
    lost: int  # items of which fewer responses are right; of one response each: that were right and are wrong
    gained: int
    p: float | None  # of the exact test that both are equally likely (McNemar); None: rows are not independent


def share_right(item: Item) -> float:
    """The share of an item's responses that are right; 0 with a fault."""
    return sum(response.right for response in item.responses) / max(len(item.responses), 1)


def pass_at_k(item: Item, k: int) -> float:
    """The chance that one of k responses is right, without bias from n >= k of them (Chen et al. 2021)."""
    n = len(item.responses)
    assert n >= k or item.fault, f"pass@{k} of {n} responses"
    wrong = n - sum(response.right for response in item.responses)
    return 1 - math.comb(wrong, k) / math.comb(n, k) if n else 0.0


def majority(item: Item) -> bool:
    """Whether the most frequent final answer is right; of equally frequent ones the first. No answer has no vote."""
    votes = [(as_text(response.answer), response.right) for response in item.responses if response.answer]
    winner = Counter(answer for answer, _ in votes).most_common(1)
    return bool(winner) and dict(reversed(votes))[winner[0][0]]


def score(items: Sequence[Item], macro: str = "") -> Estimate | None:
    """The mean over items of `share_right`; None without items.

    The interval is Wilson's if every problem has one item with one response, and the bootstrap's otherwise.

    Args:
        macro: a subject: the mean over its values of the means over their items.
    """
    values = np.array([share_right(item) for item in items])
    if macro or not _independent(items):
        return _bootstrap(items, values, macro, 0.0)
    return wilson(float(values.sum()), len(items)) if items else None


def difference(first: Sequence[Item], second: Sequence[Item], macro: str = "") -> Difference | None:
    """The difference of two models' scores over the items that both have, by the bootstrap; None if there are none.

    An item that could not be asked is wrong here too, so that it is the difference of the scores.
    """
    others = {(item.benchmark, item.id): item for item in second}
    pairs = [(item, others[key]) for item in first if (key := (item.benchmark, item.id)) in others]
    changes = np.array([share_right(new) - share_right(old) for old, new in pairs])
    found = _bootstrap([old for old, _ in pairs], changes, macro, -1.0)
    lost, gained = int((changes < 0).sum()), int((changes > 0).sum())
    independent = _independent([old for old, _ in pairs]) and _independent([new for _, new in pairs])
    return found and Difference(found, lost, gained, _mcnemar(lost, gained) if independent else None)


def _mcnemar(lost: int, gained: int) -> float:
    """The two-sided binomial test of lost against gained."""
    count, least = lost + gained, min(lost, gained)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(least + 1)) / 2**count)


def _independent(items: Sequence[Item]) -> bool:
    """Whether every problem has one item with at most one response."""
    return len({item.problem for item in items}) == len(items) and max(map(_responses, items), default=0) < 2


def wilson(right: float, count: int) -> Estimate:
    """The share right / count with Wilson's score interval (Wilson 1927)."""
    share, spread = right / count, Z * Z / count
    centre, half = share + spread / 2, math.sqrt(spread * (share * (1 - share) + spread / 4))
    return Estimate(share, max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread)), count)


def _responses(item: Item) -> int:
    return len(item.responses)


def _bootstrap(items: Sequence[Item], values: np.ndarray, macro: str, least: float) -> Estimate | None:
    """The mean of values with the percentile interval of the bootstrap by problem.

    Problems are drawn from all, not within each value of `macro`: a value with a single row would have no spread then.
    A resample that lacks a value is the mean over the others.

    Args:
        values: (items,), from `least` to 1.
    """
    if not items:
        return None
    problems = _numbers([item.problem for item in items])
    groups = _numbers([item.subjects.get(macro, "") for item in items])
    shape = (problems.max() + 1, groups.max() + 1)
    cells = problems * shape[1] + groups
    parts = [np.bincount(cells, weights, math.prod(shape)).reshape(shape) for weights in (values, None)]
    table = np.stack(parts, 1)  # (problems, 2, groups): sums of values, and numbers of items
    value = float(_mean(table.sum(0)))
    if values.min() == values.max():
        # No resample differs. As in Wilson's interval of 0 of n, a share of the problems not seen may be at the bounds.
        unseen = Z * Z / (len(table) + Z * Z)
        return Estimate(value, value - unseen * (value - least), value + unseen * (1 - value), len(items))
    kinds, counts = np.unique(table.reshape(len(table), -1), axis=0, return_counts=True)
    generator = np.random.RandomState(0)  # its draws, unlike a Generator's, are the same in all releases of numpy
    draws = (generator.multinomial(len(table), counts / len(table), BLOCK) for _ in range(RESAMPLES // BLOCK))
    means = [_mean((draw @ kinds).reshape(BLOCK, *table.shape[1:])) for draw in draws]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(items))


def _numbers(names: Sequence[str]) -> np.ndarray:
    """0, 1, ... for equal names."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names])


def _mean(sums: np.ndarray) -> np.ndarray:
    """(..., 2, groups), sums of values and their counts, to (...,): the mean over groups with values of their means."""
    total, count = sums[..., 0, :], sums[..., 1, :]
    return np.divide(total, count, where=count > 0, out=np.zeros_like(total)).sum(-1) / (count > 0).sum(-1)
