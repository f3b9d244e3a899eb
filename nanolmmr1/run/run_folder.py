"""Ownership of the output folder, and changes since the last start of a resumed run.

A run writes only to a folder that was empty or contains its marker file MARK. It replaces the names in REPLACED and
nothing else; the run's model and data must not be under one of these.

Next: plan.py, memory before anything runs.
"""

import contextlib
import fcntl
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from nanolmmr1 import config, files
from nanolmmr1.benchmarks.choose import choose_task
from nanolmmr1.errors import SharedError, UserError
from nanolmmr1.model import weights
from nanolmmr1.parallel import dist
from nanolmmr1.run import manifest
from nanolmmr1.run.checkpoint import Checkpoints
from nanolmmr1.run.trainer import Progress
from nanolmmr1.schema import Recipe

MARK = ".nanolmmr1"  # contains the torchrun launch (dist.launch) that started the run
LOCK_WAIT_S = 60.0  # how long to wait for the lock of a run that was just killed
REPLACED = ("checkpoints", "reference", "model", "recipe.yaml", "metrics.jsonl", "samples.jsonl", "summary.json",
            "report.html", "server.key")  # fmt: skip
SILENT = ("resume", "output", "plan.")  # keys that a resumed run may change without a note


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Claim and lock the run folder, so that no other run writes to it; the main rank does it for all.

    Ranks that torchrun restarted wait until the killed ones have released the lock.

    Raises:
        UserError: the folder contains files of no run, another run is writing it, or it is not writable.
    """
    with contextlib.ExitStack() as held:
        dist.on_main(lambda: held.enter_context(_lock(run)))
        yield


@contextlib.contextmanager
def _lock(run: Path) -> Iterator[None]:
    try:
        claim(run)
        file = open(run / ".lock", "w")
    except OSError as error:
        raise UserError(f"output={run} cannot be written: {error}") from error
    deadline = time.monotonic() + (LOCK_WAIT_S if dist.launched() else 0)
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"output={run}: another process is writing this run; wait for it or choose another output"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                raise UserError(f"output={run}: its disk knows no locks ({error}); choose another output") from error
        yield


def claim(run: Path) -> None:
    """Mark a new or empty folder as a run's.

    Raises:
        UserError: it contains files of no run, or is inside a folder that another run replaces. OSError: disk error.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"output={run} cannot be written, as it is a file: give a folder, or the name of a new one")
    here = Path(os.path.realpath(run))
    for parent in here.parents:
        if (parent / MARK).is_file() and here.relative_to(parent).parts[0] in (*REPLACED, "world"):
            raise UserError(f"output={run} lies in what the run in {parent} replaces: choose another output")
    run.mkdir(parents=True, exist_ok=True)
    if (run / MARK).is_file():
        return
    foreign = {path.name for path in run.iterdir()} - {"lost+found"}  # every new ext4 disk has it
    if foreign:
        some = ", ".join(map(repr, sorted(foreign)[:3]))
        raise UserError(
            f"output={run} is not empty ({some}{', ...' * (len(foreign) > 3)}) and no run has made it, so nothing in "
            f"it is touched: give a new or empty folder, as in output={run / 'run'}"
        )
    files.write_atomically(run / MARK, b"")


def check_sources(cfg: Recipe) -> None:
    """Refuse a model, data or reward functions under a path that this run replaces.

    Raises:
        UserError: naming key and path.
    """
    run = Path(os.path.realpath(cfg.output))  # Path.resolve raises on a loop of links
    for key, source in _sources(cfg):
        name = os.path.expanduser(source)
        path = Path(os.path.realpath(name if os.path.exists(name) else name.rpartition("@")[0] or name))
        inside = path.relative_to(run).parts[:1] if path.is_relative_to(run) else None
        if inside == () or (inside and inside[0] in REPLACED):
            raise UserError(f"{key}={source} lies in output={cfg.output}, where this run replaces files: "
                            "choose another output")


def _sources(cfg: Recipe) -> Iterator[tuple[str, str]]:
    """Key and path of everything that a recipe reads; a hub id looks like a path that does not exist."""
    yield "model", cfg.model
    listed = [(f"phases.{name}.data", phase.data) for name, phase in cfg.phases.items()]
    listed += [(f"evaluate.tasks.{name}.data", choose_task(task["data"]).sources)
               for name, task in cfg.evaluate.tasks.items()]
    for key, data in listed:
        yield from ((key, str(one)) for one in ([data] if isinstance(data, str) else data))
    yield from (("reward.functions", str(spec).rpartition(":")[0]) for spec in cfg.reward.functions)


def find_progress(
    cfg: Recipe, run: Path, checkpoints: Checkpoints, note: Callable[[str], None]
) -> tuple[Progress, Path | None, dict[str, str]]:
    """Position of the run, from its newest complete checkpoint; notes changes of the recipe since.

    Returns:
        Position, the checkpoint's folder, and its row hashes by phase; Progress(), None, {} if there is no checkpoint.

    Raises:
        UserError: the folder contains another run, or a run that must not be resumed.
    """
    progress, latest = checkpoints.newest(Progress)
    mark = run / MARK  # ranks restarted by torchrun resume even with resume=never
    ours = dist.on_main(lambda: bool(dist.launch) and mark.read_bytes() == (dist.launch or "").encode())
    if latest and cfg.resume == "never" and not ours:
        raise SharedError(
            f"output={run} holds a run already ({latest.name}): choose another output, or resume=auto to go on"
        )
    if progress is None or latest is None:
        dist.on_main(lambda: files.write_atomically(mark, (dist.launch or "").encode()))
        return Progress(), None, {}
    then = dist.on_main(lambda: {key: manifest.read(latest)[key] for key in ("recipe", "rows")})
    changed = changes(then["recipe"], config.dump(cfg))
    for key, was, now in changed:
        if key == "seed" or (key == "model" and cfg.resume != "changed"):
            cure = f"give the same {key}" + (", or resume=changed" if key == "model" else "")
            raise SharedError(f"output={run} holds a run with {key}={was}, not {now}: choose another output, or {cure}")
    was, now = list(yaml.safe_load(then["recipe"])["phases"]), list(cfg.phases)
    if was != now:
        raise SharedError(f"output={run} holds a run with phases={was}, not {now}: choose another output, or give the "
                          "same phases")
    for key, was, now in changed:
        note(f"since {latest.name}: {key} was {was}, is now {now}")
    return progress, latest, then["rows"]


def changes(old: str, new: str) -> list[tuple[str, Any, Any]]:
    """Dotted keys whose values differ between two recipes in YAML, with both values, except SILENT keys."""
    was, now = (dict(_flat(yaml.safe_load(text), "")) for text in (old, new))
    keys = [key for key in {**was, **now} if was.get(key, _flat) != now.get(key, _flat)]
    keys = [key for key in keys if not key.startswith(SILENT)]
    return [(key, was.get(key, "absent"), now.get(key, "absent")) for key in keys]


def _flat(tree: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def check_rows(
    then: dict[str, str], now: dict[str, str], cfg: Recipe, progress: Progress, note: Callable[[str], None]
) -> None:
    """Compare row hashes by phase with those of the last checkpoint.

    Raises:
        SharedError: an unfinished phase has other rows, without resume=changed.
    """
    for name in (name for name in then if then[name] != now[name]):
        text = f"phases.{name} has other rows than when the last checkpoint was written"
        if not progress.phase_done(name, cfg.phases) and cfg.resume != "changed":
            raise SharedError(
                f"{text} (phases.{name}.data, or what is dropped of it): give the same rows, choose another output, or "
                "go on with these by resume=changed"
            )
        note(text)


def write_recipe(run: Path, text: str, step: int, note: Callable[[str], None]) -> None:
    """Write recipe.yaml. A different one is kept as recipe_until_step_N.yaml."""
    path = run / "recipe.yaml"
    try:
        old = path.read_bytes() if path.is_file() else None
        if old is not None and old != text.encode():
            stem = f"recipe_until_step_{step}"
            names = itertools.chain([f"{stem}.yaml"], (f"{stem}_{n}.yaml" for n in itertools.count(2)))
            kept = next(run / name for name in names if not (run / name).exists())
            os.replace(path, kept)
            note(f"the recipe until now is kept as {kept.name}")
        files.write_atomically(path, text.encode())
    except OSError as error:
        note(f"{path} cannot be written ({error}); checkpoints hold the recipe too")


def is_finished(cfg: Recipe, run: Path, progress: Progress) -> bool:
    """Whether all steps are taken and model/ was exported after them."""
    *_, (name, last) = cfg.phases.items()
    return dist.on_main(
        lambda: progress.phase == name
        and progress.phase_step >= last.steps
        and _summary(run).get("steps") == progress.step
        and _is_model(run / "model")
    )


def _summary(run: Path) -> dict[str, Any]:
    """summary.json, or {} if it is missing or damaged: then the export is repeated, which writes it again."""
    try:
        summary = json.loads((run / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _is_model(folder: Path) -> bool:
    try:
        weights.read_config(folder)
        return bool(weights.weight_files(folder))
    except UserError:
        return False
