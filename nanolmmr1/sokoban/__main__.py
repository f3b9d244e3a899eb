"""Rows of Sokoban: new levels, each with its map and a shortest solution.

    python -m nanolmmr1.sokoban OUT --size small-v0 --levels 1000 --seed 0 --test 200 --as pictures

OUT becomes a folder with train.jsonl, test.jsonl if asked for, and the pictures. A row shows its level as a picture or
as a map in characters. Its answer is a shortest solution, so that it has a gold answer; any other solution is as good,
and only a reward function of plan.py can tell. Columns are also `level`, the map, and `moves`, the length of the
answer, for data_filter. No level is in both files, nor in a train.jsonl and a test.jsonl that two commands wrote.

The folder appears when all is written. A command whose OUT is there does nothing.

Next: level.py, the game.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import track

from nanolmmr1.data.images import MARKER
from nanolmmr1.data.readers import reason, shown
from nanolmmr1.data.schemas import OURS
from nanolmmr1.errors import UserError
from nanolmmr1.files import sync
from nanolmmr1.sokoban.generate import SIZES, Solved, generate
from nanolmmr1.sokoban.render import HEIGHT, LEGEND, png
from nanolmmr1.terminal import printable, protect

SETTINGS = "sokoban.json"  # of the command that wrote a folder
VERSION = 1  # of levels and rows
MOST = 1_000_000  # levels, or pixels of a picture's height
MAP_LEGEND = "# is a wall, . a target, $ a box, * a box on a target, @ is you, and + is you on a target."
PROBLEM = ("{shown}This is a level of Sokoban. {legend} Push every box onto a target. Each move, Left, Right, Up or "
           "Down, takes you to the next cell. A box there is pushed, if the cell behind it is free; boxes cannot be "
           "pulled. Give all moves in their order, with commas between them.")  # fmt: skip


def main(args: list[str]) -> None:
    """Write the rows.

    Raises:
        UserError: OUT is something else, or cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m nanolmmr1.sokoban", description=__doc__.partition("Next:")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small-v0", help="of gym-sokoban: %(choices)s")
    parser.add_argument("--levels", type=_count, default=1000, help="training rows (%(default)s)")
    parser.add_argument("--test", type=_count, default=0, help="held-out rows (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--as", choices=["pictures", "text"], default="pictures", dest="form")
    parser.add_argument("--height", type=_count, default=HEIGHT, help="of pictures in pixels (%(default)s)")
    options = parser.parse_args(args)
    if not options.levels + options.test or options.height < max(rows for rows, _, _ in SIZES.values()):
        parser.error("at least one row, and a pixel for each cell, are needed")
    out = options.out
    settings = {"version": VERSION} | {name: value for name, value in vars(options).items() if name != "out"}
    if _is_finished(out, settings):
        print(f"{shown(out)} is finished: nothing to do")
        return
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.absolute().name}.", dir=out.absolute().parent) as scratch:
            folder = Path(scratch) / "rows"
            folder.mkdir()
            _write(folder, settings)
            os.replace(folder, out)
            sync(out.absolute().parent)
    except OSError as error:
        raise UserError(f"OUT={shown(out)} cannot be written: {reason(error)}") from error
    print(f"{options.levels:,} training and {options.test:,} test rows of {options.size}: {shown(out)}")


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether these rows are there already; False if nothing is."""
    try:
        if not out.exists() or out.is_dir() and not any(out.iterdir()):
            return False
        found = json.loads((out / SETTINGS).read_bytes())
    except (OSError, ValueError):
        found = None
    if found != settings:
        kind = "holds rows of other settings" if isinstance(found, dict) else "is no folder that this command wrote"
        raise UserError(f"OUT={shown(out)} {kind}: choose another output, or remove it")
    return True


def _write(folder: Path, settings: dict[str, Any]) -> None:
    for name, count in (("train", settings["levels"]), ("test", settings["test"])):
        if count:
            levels = generate(settings["size"], count, settings["seed"], name == "test")
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for solved in track(levels, f"{name} levels", count, transient=True):
                    file.write(json.dumps(_record(folder, solved, settings)) + "\n")
    (folder / SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    os.sync()  # the pictures too


def _record(folder: Path, solved: Solved, settings: dict[str, Any]) -> dict[str, Any]:
    text, name = str(solved.level), solved.key[:20]
    record = {OURS: 1, "id": name, "task": "sokoban", "answer": ",".join(solved.plan), "images": list[str](),
              "level": text, "size": settings["size"], "moves": len(solved.plan)}  # fmt: skip
    if settings["form"] == "text":
        return record | {"problem": PROBLEM.format(shown=f"{text}\n\n", legend=MAP_LEGEND)}
    path = Path("images") / f"{name}.png"
    (folder / path.parent).mkdir(exist_ok=True)
    (folder / path).write_bytes(png(solved.level, settings["height"]))
    return record | {"problem": PROBLEM.format(shown=MARKER, legend=LEGEND), "images": [str(path)]}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) > MOST:
        raise argparse.ArgumentTypeError(f"{shown(text, 40)} is no number up to {MOST:,}")
    return int(text)


if __name__ == "__main__":
    protect()
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
