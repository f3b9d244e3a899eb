"""The reward of a plan: all moves at once, as LMM-R1 asks for them. A recipe names one of two functions.

    reward: {format_weight: 0, accuracy_weight: 0, functions: {"nanolmmr1/sokoban/plan.py:sokoban": 1.0}}

`sokoban_paper` is the reward that LMM-R1 (arXiv 2503.07536) published in its code, sokoban_verifier.py. Its bonus for
length pays 0.05 for each of the first 20 moves, whatever the level needs and whether they are carried out. A plan that
solves a level in 8 moves gains 0.6 by 12 more behind them, and until a level is solved, any 20 moves are the surest
way to be paid. Of a plan that needs more than 20 it takes a little. In `sokoban` moves are paid only up to the length
of the row's answer, the shortest solution, and the loss begins only beyond it. All else is equal: a plan that solves
nothing is still paid for as many moves as the level needs, which is far less than solving pays.

Next: ../prepare/__main__.py, from published data to rows.
"""

import re
from typing import Any

from nanolmmr1.errors import UserError
from nanolmmr1.sokoban.level import MOST_MOVES, MOVES, read_map

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORMAT = 0.5
PER_MOVE, PAID_MOVES = 0.05, 20
EXCESS, EXCESS_MOVES = 0.2, 30  # what so many moves too many cost; it grows with the square
PER_WORD, PAID_WORDS = 0.001, 200
REPEATED = 0.2
REPEATS = re.compile(r"(.{1,5})\1{7}")  # a sequence of up to 5 moves, more than 7 times in a row; a letter is a move

Scores = dict[str, float]


def sokoban(response: str, row: dict[str, Any]) -> Scores:
    """The reward whose bonus for length ends with the length of the row's `answer`, a shortest plan.

    Args:
        row: with the map of the level as `level`.

    Returns:
        overall, and its parts: format, game (the best sum of rewards that the game has paid so far, at least 0),
        length (also the loss for repetition) and thinking. Beside them accuracy, 1 if the level was solved, which the
        judge takes for the accuracy of the response, and the number of moves.

    Raises:
        UserError: the row has no level, or an answer that is no plan.
    """
    if not (gold := read_plan(row["answer"])):
        raise UserError(f"the answer {row['answer'][:100]!r} is no plan; write moves with commas between them")
    return _score(response, row, len(gold))


def sokoban_paper(response: str, row: dict[str, Any]) -> Scores:
    """LMM-R1's reward as it was published; see `sokoban`."""
    return _score(response, row, PAID_MOVES)


def read_plan(text: str) -> list[str] | None:
    """The moves of a list with commas, in any case; None if one is no move."""
    moves = [move.strip().capitalize() for move in text.split(",")]
    return moves if MOVES.keys() >= set(moves) else None


def play(level_map: str, moves: list[str]) -> tuple[float, bool]:
    """The best sum of rewards after any number of moves, at least 0, and whether the level was solved. The game ends
    when it is, or after MOST_MOVES."""
    level, total, best = read_map(level_map), 0.0, 0.0
    for move in moves[:MOST_MOVES]:
        level, reward = level.step(move)
        total += reward
        best = max(best, total)
        if level.done:
            break
    return best, level.done


def length_bonus(moves: int, needed: int) -> float:
    """The bonus for a plan's length: moves are paid up to `needed`, at most PAID_MOVES, and cost beyond both."""
    excess = max(0, moves - max(needed, PAID_MOVES))
    return PER_MOVE * min(moves, needed, PAID_MOVES) - EXCESS * (excess / EXCESS_MOVES) ** 2


def _score(response: str, row: dict[str, Any], needed: int) -> Scores:
    if not isinstance(row.get("level"), str):
        raise UserError("the row has no map in a column `level`; python -m nanolmmr1.sokoban writes such rows")
    plan = read_plan(_between(response, "<answer>", "</answer>"))
    if plan is None or any(response.count(tag) != 1 for tag in TAGS):
        return dict.fromkeys(("overall", "format", "game", "length", "thinking", "accuracy", "moves"), 0.0)
    game, solved = play(row["level"], plan)
    length = length_bonus(len(plan), needed)
    if REPEATS.search("".join(move[0] for move in plan)):
        length = min(0.0, length - REPEATED)
    words = sum(len(word) > 1 for word in _between(response, "<think>", "</think>").strip().split(" "))
    parts = {"format": FORMAT, "game": game, "length": length, "thinking": PER_WORD * min(words, PAID_WORDS)}
    return {"overall": sum(parts.values())} | parts | {"accuracy": float(solved), "moves": float(len(plan))}


def _between(text: str, start: str, end: str) -> str:
    return text.partition(start)[2].partition(end)[0]
