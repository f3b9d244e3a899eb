"""Atomic checkpoints with hashes, in `checkpoints/step_N/` of the run folder.

    tensors/*.safetensors  shards of model and optimizer: `model/<name>`, `optimizer/<parameter>/<key>`
    state.json             position of the run: phase, steps, row cursor, accuracies
    manifest.json          size and hash of every file, dtype and shape of every tensor

torch.distributed.checkpoint writes and reads the tensors, each rank its shards, so a run can be resumed on any number
of ranks. A folder is written under a temporary name, fsynced, then renamed; older ones are pruned only after that. At
start the newest is verified; a damaged one is reported and renamed, and the one before is used.

Everything random in a run is a function of (seed, phase, row, response). No generator state is stored, and on a CPU a
resumed run repeats the uninterrupted one bit for bit.

Next: manifest.py, hashes and verification.
"""

import functools
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

from nanolmmr1 import files
from nanolmmr1.errors import SharedError, UserError
from nanolmmr1.files import sync
from nanolmmr1.parallel import dist
from nanolmmr1.run import manifest
from nanolmmr1.run.manifest import temporary_name
from nanolmmr1.schema import Checkpoint
from nanolmmr1.update.policy import Policy

State = TypeVar("State")

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process passes no_dist

SCORES = "scores.json"  # scores of checkpoints that were evaluated after they were written


class DiskError(SharedError):
    """The disk of some rank is full or cannot be written."""


class Checkpoints:
    """A run's checkpoints. All methods are collectives: every rank calls them, in the same order.

    Args:
        run: the run folder. note: prints a line, on the main rank.
        timeout_s: of the collectives of a write; a rank that blocks them for longer ends the run.

    Attributes:
        about: recipe and row hashes, written into every manifest.
        held_s: seconds that the last `save` blocked training. write_s: seconds that it wrote; valid after `wait`.
    """

    def __init__(
        self, run: Path, cfg: Checkpoint, note: Callable[[str], None], timeout_s: float = 1800.0
    ) -> None:
        self.run, self.cfg, self.note = run, cfg, note
        # A separate process group: collectives of a background write must not mix with those of training.
        timeout = timedelta(seconds=timeout_s)
        self.group = td.new_group(backend="gloo", timeout=timeout) if dist.size() > 1 else None
        self.thread: threading.Thread | None = None
        self.crash: BaseException | None = None  # of the background write, raised by `wait`
        self.notes: list[str] = []
        self.written = True  # whether the last `save` succeeded
        self.about: dict[str, Any] = {"recipe": "", "rows": {}}
        self.held_s, self.write_s, self.last = 0.0, 0.0, time.monotonic()

    def is_old(self) -> bool:
        """Whether `every_minutes` have passed on the main rank since the last `save`, or since the start."""
        limit = 60 * self.cfg.every_minutes
        return limit > 0 and dist.any_of(dist.is_main() and time.monotonic() - self.last >= limit)

    def save(self, step: int, policy: Policy, state: dict[str, Any], score: float | None = None) -> None:
        """Write step_N, then prune all but the newest `keep` and the best.

        With cfg.background this returns when the tensors are copied to memory; the next call, or `wait`, reports the
        outcome of the write. A full disk does not stop training: it is noted, and earlier checkpoints stay. An existing
        checkpoint is never overwritten, since a crash while replacing it would lose both; only its score may be added,
        after an evaluation that was interrupted.

        Args:
            state: JSON-able. score: higher is better; None: unknown.
        """
        began = self.last = time.monotonic()
        self.wait()
        folder = self.run / "checkpoints" / f"step_{step}"
        created, error = dist.on_main(lambda: self._create_folder(folder))
        self.written = not error
        self.notes += [error] if error else []
        if not created and not error and score is not None:
            dist.on_main(lambda: self._add_score(folder.name, score))
        if created:
            tensors = _tensors(policy)
            about = self.about | {"step": step, "ranks": dist.size(), "score": score}
            about["tensors"] = manifest.table(tensors)
            gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
            if self.cfg.background:
                tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
                job = (folder, tensors, about, state, gpu)
                # A daemon thread: a process that must exit does not wait for the write.
                self.thread = threading.Thread(target=self._write, args=job, daemon=True)
                self.thread.start()
            else:
                self._write(folder, tensors, about, state, gpu)
        if not self.cfg.background:
            self.wait()
        self.held_s = time.monotonic() - began

    def wait(self) -> bool:
        """Wait for the background write. Returns whether the last `save` succeeded."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.crash:
            raise self.crash
        for text in self.notes if dist.is_main() else ():
            self.note(text)
        self.notes.clear()
        return self.written

    def newest(self, state_class: type[State]) -> tuple[State, Path] | tuple[None, None]:
        """State and folder of the newest complete checkpoint, or (None, None).

        Removes incomplete folders of killed runs. A damaged checkpoint is noted with the reason, and renamed.

        Args:
            state_class: dataclass whose fields were saved.

        Raises:
            SharedError: another version wrote it, the folder cannot be changed, or all checkpoints are damaged.
        """
        dist.on_main(self._sweep)
        damaged = []
        while found := dist.on_main(self._read_newest):
            name, files, state, damage = found
            folder = self.run / "checkpoints" / name
            # Ranks share the hashing: files sorted by size, dealt out in turn.
            mine = sorted(files.items(), key=lambda item: -item[1][0])[dist.rank() :: dist.size()]
            reports = dist.gather((damage or manifest.damage(folder, mine)).encode())
            damage = next((report.decode() for report in reports if report), "")
            if not damage:
                try:
                    return state_class(**state), folder
                except TypeError as error:
                    raise _another_version(folder, error) from error
            dist.on_main(functools.partial(self._set_aside, folder, damage))
            damaged.append(f"{name}: {damage}")
        if damaged:  # a fresh start here would overwrite the run's other results
            raise SharedError(
                f"{self.run} has no whole checkpoint left ({'; '.join(damaged)}): choose another output to begin anew, "
                "or delete this one"
            )
        return None, None

    def load(self, folder: Path, policy: Policy, model: bool = True, optimizer: bool = True) -> None:
        """Read a checkpoint into the policy's model, its optimizer state, or both.

        Raises:
            SharedError: it belongs to another model, or to other trained parameters.
        """
        tensors = _tensors(policy, model, optimizer)
        present, saved = manifest.table(tensors), dist.on_main(lambda: manifest.read(folder)["tensors"])
        prefixes = ("model/",) * model + ("optimizer/",) * optimizer
        saved = {name: layout for name, layout in saved.items() if name.startswith(prefixes)}
        for name in present | saved:
            if present.get(name) != saved.get(name):
                there, here = (" ".join(map(str, table.get(name, ["absent"]))) for table in (saved, present))
                raise SharedError(
                    f"checkpoint {folder} is of another model or recipe: {name} is {there} there and {here} here; "
                    "choose another output, or go on with the model and recipe of this one"
                )
        try:
            reader = dcp.HuggingFaceStorageReader(str(folder / "tensors"))
            dcp.load(tensors, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        except dcp.CheckpointException as error:
            raise SharedError(f"checkpoint {folder} cannot be read ({_cause(error)})") from error

    def _create_folder(self, folder: Path) -> tuple[bool, str]:
        """Create the temporary folder, unless the checkpoint exists. Returns whether it did, and an error message."""
        if folder.is_dir():
            return False, ""
        try:
            shutil.rmtree(temporary_name(folder), ignore_errors=True)
            (temporary_name(folder) / "tensors").mkdir(parents=True)
        except OSError as error:
            return False, _no_checkpoint(folder, error)
        return True, ""

    def _write(
        self, folder: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any], state: dict[str, Any], gpu: int
    ) -> None:
        """Write, rename, prune. Errors are kept for `wait`, which raises them on the training thread."""
        began = time.monotonic()
        try:
            writer = manifest.Writer(folder, tensors, about, state)
            with torch.cuda.device(gpu):  # a new thread uses GPU 0: every rank would create a context there
                dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            if dist.is_main():
                self._prune()
        except dcp.CheckpointException as error:  # dcp raises it on every rank
            if dist.is_main():
                shutil.rmtree(temporary_name(folder), ignore_errors=True)
            if isinstance(_cause(error), OSError):
                self.written = False
                self.notes.append(_no_checkpoint(folder, _cause(error)))
            else:
                self.crash = error
        except BaseException as error:  # another rank died
            self.crash = error
        self.write_s = time.monotonic() - began

    def _add_score(self, name: str, score: float) -> None:
        """Record the score of a checkpoint that was written without one."""
        path = self.run / "checkpoints" / SCORES
        try:
            files.write_atomically(path, json.dumps(_late_scores(path) | {name: score}).encode())
        except OSError as error:
            self.notes.append(f"{name} evaluated at {score:.3f}, which cannot be written: {error}")

    def _prune(self) -> None:
        """Delete all but the newest `keep` and the best-scored one."""
        folders = listed(self.run)
        scores = [(score, -i) for i, folder in enumerate(folders) if (score := _score(folder)) is not None]
        best = folders[-max(scores)[1]] if scores else None
        try:
            for old in folders[self.cfg.keep :]:
                if old != best:
                    os.replace(old, temporary_name(old))  # a kill while deleting leaves no partial checkpoint
                    shutil.rmtree(temporary_name(old))
        except OSError as error:
            self.notes.append(f"an old checkpoint cannot be deleted: {error}")

    def _sweep(self) -> None:
        """Remove the temporary folders of killed runs."""
        try:
            for folder in (self.run / "checkpoints").glob("step_*.tmp"):
                shutil.rmtree(folder)
        except OSError as error:
            raise UserError(f"{self.run / 'checkpoints'} cannot be tidied ({error}): see to its permissions") from error

    def _read_newest(self) -> tuple[str, dict[str, Any], dict[str, Any], str] | None:
        """Name, files, state and damage of the newest checkpoint; None if there is none."""
        folder = next(iter(listed(self.run)), None)
        if not folder:
            return None
        try:
            saved = manifest.read(folder)
        except ValueError as error:
            return folder.name, {}, {}, str(error)
        if saved["format"] != manifest.FORMAT:
            raise _another_version(folder, f"its format is {saved['format']}, not {manifest.FORMAT}")
        damage = manifest.damage(folder, [("state.json", saved["files"].pop("state.json"))])
        # dcp reads every file in the folder, so there must be no other ones.
        strange = {f"tensors/{path.name}" for path in (folder / "tensors").glob("*")} - saved["files"].keys()
        damage = damage or (f"{min(strange)} was not written with it" if strange else "")
        state = {} if damage else json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return folder.name, saved["files"], state, damage

    def _set_aside(self, folder: Path, damage: str) -> None:
        """Rename a damaged checkpoint."""
        names = (folder.with_name(f"{folder.name}.damaged{n}") for n in ("", *range(2, 1000)))
        aside = next(name for name in names if not name.exists())
        try:
            os.replace(folder, aside)
        except OSError as error:
            raise UserError(f"checkpoint {folder} is damaged: {damage}; and cannot be renamed: {error}") from error
        self.note(f"checkpoint {folder} is damaged: {damage}. It is kept as {aside.name}; the one before is looked at")


def listed(run: Path) -> list[Path]:
    """Checkpoint folders, newest first, not yet verified."""
    folders = [f for f in (run / "checkpoints").glob("step_*") if f.name[5:].isdigit() and f.is_dir()]
    return sorted(folders, key=lambda f: -int(f.name[5:]))


def _tensors(policy: Policy, model: bool = True, optimizer: bool = True) -> dict[str, torch.Tensor]:
    """Name -> live tensor of everything that a checkpoint stores, or of a part of it."""
    weights = {f"model/{name}": p.detach() for name, p in policy.model.named_parameters()} if model else {}
    return weights | ({f"optimizer/{name}": t for name, t in policy.optimizer_tensors().items()} if optimizer else {})


def _late_scores(path: Path) -> dict[str, float]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _score(folder: Path) -> float | None:
    try:
        score = manifest.read(folder)["score"]
        return _late_scores(folder.parent / SCORES).get(folder.name) if score is None else score
    except ValueError:
        return None  # damaged: never the best


def _cause(error: dcp.CheckpointException) -> BaseException:
    """The exception of the lowest rank that failed."""
    return error.failures[min(error.failures)][0]


def _another_version(folder: Path, reason: object) -> SharedError:
    return SharedError(f"checkpoint {folder} was written by another version ({reason}): choose another output")


def _no_checkpoint(folder: Path, error: BaseException) -> str:
    step = folder.name.removeprefix("step_")
    return f"no checkpoint at step {step}, the last good one stays: {_disk_error(folder, error)}"


def _disk_error(folder: Path, error: object) -> DiskError:
    return DiskError(f"{folder} cannot be written ({error}): free some space, or choose another output")


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Create a folder atomically: `write(temporary)` on every rank, fsync, rename.

    Raises:
        DiskError: on all ranks. Nothing is left behind, and an existing folder of this name is untouched.
    """
    temporary = temporary_name(folder)

    def create() -> None:
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def flush() -> None:  # on every rank: the files that a rank wrote are in its host's page cache
        mode = temporary.stat().st_mode & 0o666  # the umask's; safetensors makes files private to the owner
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file():
                path.chmod(mode)
            sync(path)

    def publish() -> None:
        if dist.is_main():
            old = folder.with_name(f"{folder.name}.old.tmp")
            _remove(old)
            if os.path.lexists(folder):
                os.replace(folder, old)  # for a moment there is no folder of the name, but never a partial one
            os.replace(temporary, folder)
            sync(folder.parent)
            _remove(old)

    for work in (create, lambda: write(temporary), flush, publish):

        def attempt(work: Callable[[], None] = work) -> str:
            try:
                work()
            except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
                return str(error)
            return ""

        errors = [text.decode() for text in dist.gather(dist.together(attempt).encode()) if text]
        if errors:
            if dist.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise _disk_error(folder, errors[0])


def _remove(path: Path) -> None:
    """Remove a folder, a file, or a link but not its target, if it exists."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
