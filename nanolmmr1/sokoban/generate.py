"""New levels: a walk carves the floor, and boxes are pulled from their targets, so that every level can be solved.

Each level is solved by search all the same, and dropped if the search takes too long. No box and no player starts on a
target. Levels that are equal when turned or mirrored, or when the player walks without a push, count as the same. A
hash of that decides whether a level is held out, so that the training and test levels of any two commands, whatever
their seeds, are different.

Next: render.py, pictures.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nanolmmr1.sokoban.level import MOST_MOVES, MOVES, PLAYER, PLAYER_ON_TARGET, Level
from nanolmmr1.sokoban.solve import Unsolved, region, solve

SIZES = {"small-v0": (7, 7, 2), "small-v1": (7, 7, 3), "large-v0": (13, 11, 3)}  # rows, columns, boxes; gym-sokoban's
STEPS, TURN = 1.7, 0.35  # of the walk: steps per row and column, probability of a new direction; as in gym-sokoban
WIDE = 0.7  # probability that a step carves two cells
DRAWS = 2  # levels, of which the one with the longest solution is kept
PULLS = 60  # of boxes, one cell each
HELD_OUT = 8  # one level of so many is a test level


class Solved(NamedTuple):
    """A new level."""

    level: Level
    plan: list[str]  # a shortest solution
    key: str  # `canonical`


def generate(size: str, count: int, seed: int, test: bool = False) -> Iterator[Solved]:
    """Different levels of a size, one of SIZES: the training levels of a seed, or its test levels."""
    seen = set[str]()
    for number in range(count):
        rng = random.Random(f"{size} {seed} {test} {number}")
        drawn: list[Solved] = []
        while len(drawn) < DRAWS:
            drawn += _draw(size, rng, test, seen)
        hardest = max(drawn, key=lambda each: len(each.plan))
        seen.add(hardest.key)
        yield hardest


def _draw(size: str, rng: random.Random, test: bool, seen: set[str]) -> list[Solved]:
    """A new level, or none."""
    rows, columns, boxes = SIZES[size]
    level = _pulled(_carved(rows, columns, rng), boxes, rng)
    if level is None or (key := canonical(level)) in seen or is_held_out(key) != test:
        return []
    try:
        plan = solve(level)
    except Unsolved as error:
        assert error.bounded, f"a level that was made by pulls has no solution:\n{level}"
        return []
    return [Solved(level, plan, key)] if len(plan) <= MOST_MOVES else []


def canonical(level: Level) -> str:
    """A hash of what makes a level: the same for its 8 symmetries, and wherever the player can walk before a push."""
    grid = level.codes()
    reached = region(level)
    grid.flat[list(reached)] = PLAYER
    grid.flat[list(reached & level.targets)] = PLAYER_ON_TARGET
    views = [np.rot90(side, turns) for side in (grid, grid.T) for turns in range(4)]
    return hashlib.sha256(min(bytes(view.shape) + view.tobytes() for view in views)).hexdigest()


def is_held_out(key: str) -> bool:
    """Whether a level is a test level, by its `canonical` hash."""
    return int(key, 16) % HELD_OUT == 0


def _carved(rows: int, columns: int, rng: random.Random) -> Level:
    """Floor that hangs together, without targets and boxes; the player is where the walk that carved it ends."""
    open, row, column = set[int](), rng.randrange(1, rows - 1), rng.randrange(1, columns - 1)
    down, right = rng.choice(list(MOVES.values()))
    for _ in range(int(STEPS * (rows + columns))):
        if rng.random() < TURN:
            down, right = rng.choice(list(MOVES.values()))
        row, column = min(max(row + down, 1), rows - 2), min(max(column + right, 1), columns - 2)
        open.add(row * columns + column)
        if rng.random() < WIDE:  # beside the walk, or else most boxes could be pushed along one line only
            beside = min(max(row + right, 1), rows - 2), min(max(column + down, 1), columns - 2)
            open.add(beside[0] * columns + beside[1])
    return Level(rows, columns, frozenset(open), frozenset(), frozenset(), row * columns + column)


def _pulled(level: Level, count: int, rng: random.Random) -> Level | None:
    """The level with `count` boxes on targets, played backwards. Of all states without a box on a target it is that
    with the largest product of the boxes' distances from their own targets and the changes from one box to another,
    as in gym-sokoban. None if there is no such state."""
    if len(level.open) < 3 * count:
        return None
    targets = rng.sample(sorted(level.open), count)
    level = replace(level, targets=frozenset(targets))
    boxes, best, most, changes, last = list(targets), None, 0, 0, -1
    player = rng.choice(sorted(level.open - level.targets))
    for _ in range(PULLS):
        reached = region(replace(level, boxes=frozenset(boxes), player=player))
        pulls = [(box, offset) for box in boxes for offset in map(level.offset, MOVES)
                 if {box + offset, box + 2 * offset} <= reached]
        if not pulls:
            break
        box, offset = rng.choice(pulls)
        changes, last = changes + (box != last), box + offset
        boxes[boxes.index(box)], player = box + offset, box + 2 * offset
        far = sum(abs(a // level.columns - b // level.columns) + abs(a % level.columns - b % level.columns)
                  for a, b in zip(boxes, targets, strict=True))
        if far * changes > most and not level.targets & set(boxes):
            best, most = replace(level, boxes=frozenset(boxes), player=player), far * changes
    if best is None or not (starts := sorted(region(best) - best.targets)):
        return None
    return replace(best, player=rng.choice(starts))
