"""Checkpoints that are whole or absent: `checkpoints/step_N/` under the run folder.

    model/                 a Hugging Face folder (fp32)
    optimizer.safetensors  AdamW's moments, by tensor name
    state.json             where the run stands: phase, steps, rows taken, accuracies, log position

A checkpoint is written under a temporary name, synced, then renamed; older ones are deleted only
after that. Everything random in a run is a function of (seed, phase, row, response), so no
generator state is kept, and a resumed run repeats the uninterrupted one bit for bit on a CPU.
"""

import contextlib
import fcntl
import json
import os
import shutil

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanolmmr1 import weights
from nanolmmr1.config import UserError


class DiskError(UserError):
    """The disk is full or cannot be written."""


def save(run, step, policy, state, source, keep):
    """Write `checkpoints/step_N`, then drop all but the newest `keep`.

    A step that has its checkpoint keeps it: replacing one would leave a moment without.

    Raises:
        DiskError: nothing was written; earlier checkpoints are untouched.
    """
    folder = run / "checkpoints" / f"step_{step}"
    if folder in listed(run):
        return

    def write(folder):
        weights.save(policy.model, folder / "model", source)
        save_file(
            {name: t.cpu().contiguous() for name, t in policy.optimizer_tensors().items()},
            folder / "optimizer.safetensors",
        )
        (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")

    write_folder(folder, write)
    for old in listed(run)[keep:]:
        shutil.rmtree(old)


def write_folder(folder, write):
    """Make a folder whole or not at all: `write(temporary)`, sync, rename.

    Raises:
        DiskError: nothing is left behind, and what had the folder's name is untouched.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskError(f"{folder} cannot be written ({error}): free some space, or choose another output") from error


def listed(run):
    """Finished checkpoints, newest first."""
    folders = [f for f in (run / "checkpoints").glob("step_*") if f.name[5:].isdigit() and (f / "state.json").is_file()]
    return sorted(folders, key=lambda f: -int(f.name[5:]))


def read_state(folder, kind):
    """state.json of a checkpoint as a `kind`, the dataclass whose fields were saved.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return kind(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({error}): delete it to go on from the one before"
        ) from error


def load_optimizer(folder, policy):
    """Fill the policy's optimiser from a checkpoint of the same phase.

    Raises:
        UserError: the file is damaged or of other parameters.
    """
    path = folder / "optimizer.safetensors"
    try:
        policy.load_optimizer_tensors(load_file(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{path} cannot be used ({error}): delete {folder} to go on from the checkpoint before"
        ) from error


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(run):
    """Hold the run folder, so that two processes never write one run.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / ".lock", "w")
    except OSError as error:
        raise UserError(f"output={run} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output={run}: another process is writing this run; wait for it or choose another output"
            ) from None
        yield
