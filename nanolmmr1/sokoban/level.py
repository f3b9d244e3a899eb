"""The game: a grid of cells, the four moves, and the rewards of a step.

Codes of cells and rewards are those of gym-sokoban (mpSchrader/gym-sokoban), which LMM-R1 uses. A map is text in the
characters that most Sokoban programs read.

Next: solve.py, shortest solutions.
"""

from dataclasses import dataclass, replace

import numpy as np

from nanolmmr1.data.readers import shown
from nanolmmr1.errors import UserError

WALL, FLOOR, TARGET, BOX_ON_TARGET, BOX, PLAYER, PLAYER_ON_TARGET = range(7)
CHARACTERS = "# .*$@+"  # of a map, by code; gym-sokoban has no code for a player on a target, 6 is ours
MOVES = {"Left": (0, -1), "Right": (0, 1), "Up": (-1, 0), "Down": (1, 0)}  # (rows, columns)
STEP, ON, OFF, DONE = -0.1, 1.0, -1.0, 10.0  # rewards: of every step, of a box pushed on or off a target, of the last
MOST_MOVES = 50  # of a plan that are carried out, in LMM-R1's reward
MOST_SIDE = 40  # cells: more is no level for a model


@dataclass(frozen=True)
class Level:
    """A state of the game. A cell is its index in the grid, row by row; all border cells are walls."""

    rows: int
    columns: int
    open: frozenset[int]  # cells that are no wall
    targets: frozenset[int]
    boxes: frozenset[int]
    player: int

    @property
    def done(self) -> bool:
        """Whether every target has a box."""
        return self.targets <= self.boxes

    def offset(self, move: str) -> int:
        """How far a move leads in cell indices."""
        down, right = MOVES[move]
        return down * self.columns + right

    def step(self, move: str) -> "tuple[Level, float]":
        """The level after a move, one of MOVES, and the reward. A move that is blocked changes nothing, but costs."""
        offset = self.offset(move)
        ahead, behind = self.player + offset, self.player + 2 * offset
        if ahead not in self.open or ahead in self.boxes and (behind not in self.open or behind in self.boxes):
            return self, STEP
        if ahead not in self.boxes:
            return replace(self, player=ahead), STEP
        after = replace(self, player=ahead, boxes=self.boxes - {ahead} | {behind})
        reward = ON * (behind in self.targets) + OFF * (ahead in self.targets) + DONE * after.done
        return after, STEP + reward

    def codes(self) -> np.ndarray:
        """The grid, uint8 (rows, columns)."""
        grid = np.full(self.rows * self.columns, WALL, np.uint8)
        grid[list(self.open)] = FLOOR
        grid[list(self.targets)] = TARGET
        grid[list(self.boxes)] = BOX
        grid[list(self.boxes & self.targets)] = BOX_ON_TARGET
        grid[self.player] = PLAYER_ON_TARGET if self.player in self.targets else PLAYER
        return grid.reshape(self.rows, self.columns)

    def __str__(self) -> str:
        """The map, a line for each row."""
        return "\n".join("".join(CHARACTERS[code] for code in row) for row in self.codes())


def read_map(text: str) -> Level:
    """The level of a map. Short lines end in floor that nobody can reach, so they are filled with walls.

    Raises:
        UserError: it is no level: other characters, open at the border, or without one player and a box per target.
    """
    lines = text.strip("\n").split("\n")
    rows, columns = len(lines), max(map(len, lines))
    if not 3 <= min(rows, columns) <= max(rows, columns) <= MOST_SIDE or set(text) - {*CHARACTERS, "\n"}:
        raise UserError(f"map {shown(repr(text), 100)}: write 3 to {MOST_SIDE} lines of 3 to {MOST_SIDE} characters "
                        f"out of {CHARACTERS!r}")
    grid = np.array([[CHARACTERS.index(character) for character in line.ljust(columns, "#")] for line in lines])
    cells = {code: frozenset(np.flatnonzero(grid == code).tolist()) for code in range(len(CHARACTERS))}
    boxes, players = cells[BOX] | cells[BOX_ON_TARGET], cells[PLAYER] | cells[PLAYER_ON_TARGET]
    targets = cells[TARGET] | cells[BOX_ON_TARGET] | cells[PLAYER_ON_TARGET]
    border = np.concatenate([grid[0], grid[-1], grid[:, 0], grid[:, -1]])
    if border.any() or len(players) != 1 or not 0 < len(targets) == len(boxes):
        raise UserError(f"map {shown(repr(text), 100)} has {len(players)} players, {len(boxes)} boxes and "
                        f"{len(targets)} targets; it needs one player, as many boxes as targets, and walls all around")
    return Level(rows, columns, frozenset(np.flatnonzero(grid).tolist()), targets, boxes, next(iter(players)))
