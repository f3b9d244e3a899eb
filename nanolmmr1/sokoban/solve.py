"""Shortest solutions, by search over the boxes and the player's cell after each push.

The walk between two pushes is not searched cell by cell: the player's region is flooded, one distance a time, as a
number with a bit per cell. The sum of the boxes' distances from their nearest targets bounds the pushes to come from
below (A*), and cells from which no box can be pushed to any target are never entered. The first solution that leaves
the queue has the least moves, walks and pushes counted alike.

Next: generate.py, levels.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator

from nanolmmr1.sokoban.level import MOVES, Level

MOST_STATES = 20_000
State = tuple[int, int]  # boxes as bits, the player's cell


class Unsolved(Exception):
    """No solution was found; `bounded`: the search was cut, so that there may be one."""

    def __init__(self, bounded: bool) -> None:
        super().__init__(bounded)
        self.bounded = bounded


def solve(level: Level, most_states: int = MOST_STATES) -> list[str]:
    """The moves of a shortest solution; of several, always the same one.

    Args:
        most_states: to expand, 0.1 ms each.

    Raises:
        Unsolved: there is none, or not within the bound.
    """
    search = _Search(level)
    start = bits(level.boxes), level.player
    queue: dict[int, list[State]] = defaultdict(list)  # least moves of a solution through a state -> states
    cost, parent, closed = {start: 0}, dict[State, State](), set[State]()
    if (least := search.bound(start[0])) is not None:
        queue[least].append(start)
    while queue:
        total = min(queue)
        state = queue[total].pop()
        if not queue[total]:
            del queue[total]
        if state in closed:
            continue
        if not state[0] & ~search.targets:
            return search.moves(state, parent)
        if len(closed) == most_states:
            raise Unsolved(True)
        closed.add(state)
        for after, moves in search.pushes(state):
            moves += cost[state]
            if moves < cost.get(after, 1 << 30) and (rest := search.bound(after[0])) is not None:
                cost[after], parent[after] = moves, state
                queue[moves + rest].append(after)
    raise Unsolved(False)


class _Search:
    """What a search asks about a level's walls and targets."""

    def __init__(self, level: Level) -> None:
        self.level, self.offsets = level, [level.offset(move) for move in MOVES]
        self.open, self.targets = bits(level.open), bits(level.targets)
        self.distance = dict.fromkeys(level.targets, 0)  # pushes from a cell to the nearest target, if it were alone
        ring = list(level.targets)
        for cell in ring:  # which grows: boxes are pulled from the targets, breadth first
            for offset in self.offsets:
                box, player = cell - offset, cell - 2 * offset
                if box in level.open and player in level.open and box not in self.distance:
                    self.distance[box] = self.distance[cell] + 1
                    ring.append(box)

    def bound(self, boxes: int) -> int | None:
        """Pushes that are needed at least; None if a box can reach no target any more."""
        total = 0
        for cell in cells(boxes):
            if (pushes := self.distance.get(cell)) is None:
                return None
            total += pushes
        return total

    def pushes(self, state: State) -> Iterator[tuple[State, int]]:
        """The states after the next push, and the moves to each, the push included."""
        boxes, player = state
        free = self.open & ~boxes
        places: dict[int, list[tuple[int, int]]] = defaultdict(list)  # where the player must stand -> box, offset
        for box in cells(boxes):
            for offset in self.offsets:
                if free >> (box + offset) & 1 and free >> (box - offset) & 1:
                    places[box - offset].append((box, offset))
        wanted, walk = bits(places), 0
        for ring in flood(free, player, self.level.columns):
            walk += 1
            for cell in cells(ring & wanted):
                for box, offset in places[cell]:
                    yield (boxes ^ 1 << box | 1 << box + offset, box), walk

    def moves(self, state: State, parent: dict[State, State]) -> list[str]:
        """The moves that lead from the start to a state."""
        chain = [state]
        while chain[-1] in parent:
            chain.append(parent[chain[-1]])
        moves: list[str] = []
        for (boxes, player), (after, box) in itertools.pairwise(reversed(chain)):
            offset = next(cells(after & ~boxes)) - box
            moves += self._walk(self.open & ~boxes, player, box - offset)
            moves.append(self._name(offset))
        return moves

    def _walk(self, free: int, start: int, end: int) -> list[str]:
        rings = list(itertools.takewhile(lambda ring: not ring >> end & 1, flood(free, start, self.level.columns)))
        moves = []
        for ring in reversed(rings):
            offset = next(offset for offset in self.offsets if ring >> (end - offset) & 1)
            moves.append(self._name(offset))
            end -= offset
        return moves[::-1]

    def _name(self, offset: int) -> str:
        return list(MOVES)[self.offsets.index(offset)]


def bits(chosen: Iterable[int]) -> int:
    """Cells as a number with a bit for each."""
    return sum(1 << cell for cell in chosen)


def cells(number: int) -> Iterator[int]:
    """The inverse of `bits`, in ascending order."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def region(level: Level) -> frozenset[int]:
    """The cells that the player can walk to without a push."""
    free = bits(level.open - level.boxes)
    return frozenset(cell for ring in flood(free, level.player, level.columns) for cell in cells(ring))


def flood(free: int, start: int, columns: int) -> Iterator[int]:
    """The cells at 0, 1, 2 ... steps from a start, as bits. `free` must have no cell at the border of the grid."""
    ring, free = 1 << start, free & ~(1 << start)
    while ring:
        yield ring
        ring = (ring << 1 | ring >> 1 | ring << columns | ring >> columns) & free
        free &= ~ring
