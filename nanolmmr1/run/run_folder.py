"""The run folder: a run owns it, resumes in it, and says what has changed since.

A run writes only to a folder that was empty or carries its mark, the file MARK. What it replaces there are the names in
REPLACED and nothing else; no model or data of the run may lie under one of these.

Next: setup.py, what must be there before the first step.
"""

import contextlib
import fcntl
import itertools
import json
import os
import time
from pathlib import Path

import yaml

from nanolmmr1 import config, files
from nanolmmr1.errors import SharedError, UserError
from nanolmmr1.model import weights
from nanolmmr1.parallel import dist
from nanolmmr1.run import manifest
from nanolmmr1.run.trainer import Progress

MARK = ".nanolmmr1"  # holds the launch (see dist.launch) that began the run
LOCK_WAIT_S = 60.0  # for the lock of a run that was killed a moment ago
REPLACED = ("checkpoints", "reference", "model", "recipe.yaml", "metrics.jsonl", "samples.jsonl", "summary.json",
            "report.html", "server.key")  # fmt: skip
SILENT = ("resume", "output", "plan.")  # keys that a resumed run may change without a word


@contextlib.contextmanager
def locked(run):
    """Own the run folder and lock it, so that two runs never write one: the main rank does it for all.

    Ranks that torchrun may have started anew wait for what is left of their forerunners.

    Raises:
        UserError: it holds what no run has left, another run holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        dist.on_main(lambda: held.enter_context(_lock(run)))
        yield


@contextlib.contextmanager
def _lock(run):
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


def claim(run):
    """Mark an empty or new folder as a run's.

    Raises:
        UserError: it holds files that no run has left, or lies in what another run replaces. OSError: the disk's.
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
    foreign = {path.name for path in run.iterdir()} - {"lost+found"}  # of an empty disk
    if foreign:
        some = ", ".join(map(repr, sorted(foreign)[:3]))
        raise UserError(
            f"output={run} is not empty ({some}{', ...' * (len(foreign) > 3)}) and no run has made it, so nothing in "
            f"it is touched: give a new or empty folder, as in output={run / 'run'}"
        )
    files.write_atomically(run / MARK, b"")


def check_sources(cfg):
    """Refuse a model, data or reward functions that lie where this run replaces files.

    Raises:
        UserError: naming key and path.
    """
    run = Path(os.path.realpath(cfg.output))  # Path.resolve raises at a loop of links
    for key, source in _sources(cfg):
        path = os.path.expanduser(source)
        path = Path(os.path.realpath(path if os.path.exists(path) else path.rpartition("@")[0] or path))
        inside = path.relative_to(run).parts[:1] if path.is_relative_to(run) else None
        if inside == () or (inside and inside[0] in REPLACED):
            raise UserError(f"{key}={source} lies in output={cfg.output}, where this run replaces files: "
                            "choose another output")


def _sources(cfg):
    """(key, path) of all that a recipe reads; what is no path here is one that does not exist."""
    yield "model", cfg.model
    listed = [(f"phases.{name}.data", phase.data) for name, phase in cfg.phases.items()]
    listed += [(f"evaluate.tasks.{name}.data", task["data"]) for name, task in cfg.evaluate.tasks.items()]
    for key, data in listed:
        yield from ((key, str(one)) for one in ([data] if isinstance(data, str) else data))
    yield from (("reward.functions", str(spec).rpartition(":")[0]) for spec in cfg.reward.functions)


def find_progress(cfg, run, checkpoints, note):
    """Where the run stands, from its newest whole checkpoint; says what the recipe has changed since.

    Returns:
        Progress, the checkpoint's folder, {phase: hash of its rows} as it was; Progress(), None, {} where there is none

    Raises:
        UserError: the folder holds another run, or one that is not to be resumed.
    """
    progress, latest = checkpoints.newest(Progress)
    mark = run / MARK  # torchrun's ranks, started anew, go on even with resume=never
    ours = dist.on_main(lambda: bool(dist.launch) and mark.read_bytes() == dist.launch.encode())
    if latest and cfg.resume == "never" and not ours:
        raise SharedError(
            f"output={run} holds a run already ({latest.name}): choose another output, or resume=auto to go on"
        )
    if not latest:
        dist.on_main(lambda: files.write_atomically(mark, (dist.launch or "").encode()))
        return Progress(), None, {}
    then = dist.on_main(lambda: {key: manifest.read(latest)[key] for key in ("recipe", "rows")})
    changed = changes(then["recipe"], config.dump(cfg))
    for key, was, now in changed:
        if key == "seed" or (key == "model" and cfg.resume != "changed"):
            raise SharedError(f"output={run} holds a run with {key}={was}, not {now}: choose another output, or "
                                   f"give the same {key}" + (", or resume=changed" if key == "model" else ""))
    was, now = list(yaml.safe_load(then["recipe"])["phases"]), list(cfg.phases)
    if was != now:
        raise SharedError(f"output={run} holds a run with phases={was}, not {now}: choose another output, or give "
                               "the same phases")
    for key, was, now in changed:
        note(f"since {latest.name}: {key} was {was}, is now {now}")
    return progress, latest, then["rows"]


def changes(old, new):
    """[(dotted key, its value before, its value now)] of two recipes as YAML text, but for SILENT keys."""
    was, now = (dict(_flat(yaml.safe_load(text), "")) for text in (old, new))
    keys = [key for key in {**was, **now} if was.get(key, _flat) != now.get(key, _flat)]
    keys = [key for key in keys if not key.startswith(SILENT)]
    return [(key, was.get(key, "absent"), now.get(key, "absent")) for key in keys]


def _flat(tree, where):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def check_rows(then, now, cfg, progress, note):
    """Compare the rows of each phase with those that the run has been trained on so far.

    Args:
        then, now: {phase: hash of its rows}.

    Raises:
        SharedError: a phase that is not over has other rows, and the recipe does not say resume=changed.
    """
    for name in (name for name in then if then[name] != now[name]):
        text = f"phases.{name} has other rows than when the last checkpoint was written"
        if not progress.phase_done(name, cfg.phases) and cfg.resume != "changed":
            raise SharedError(
                f"{text} (phases.{name}.data, or what is dropped of it): give the same rows, choose another output, or "
                "go on with these by resume=changed"
            )
        note(text)


def write_recipe(run, text, step, note):
    """Write recipe.yaml. One that says otherwise stays beside it, as recipe_until_step_N.yaml."""
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


def is_finished(cfg, run, progress):
    """Whether nothing is left to do: all steps are taken, and model/ was exported after them."""
    *_, (name, last) = cfg.phases.items()
    return dist.on_main(
        lambda: progress.phase == name
        and progress.phase_step >= last.steps
        and _summary(run).get("steps") == progress.step
        and _is_model(run / "model")
    )


def _summary(run):
    """summary.json, or {} where it is missing or torn: then the end of the run is repeated, which writes it anew."""
    try:
        summary = json.loads((run / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _is_model(folder):
    try:
        weights.read_config(folder)
        return bool(weights._shards(folder))
    except UserError:
        return False
