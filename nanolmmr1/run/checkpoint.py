"""Checkpoints that are whole or absent: `checkpoints/step_N/` under the run folder.

    tensors/*.safetensors  the shards of model and optimiser: `model/<name>`, `optimizer/<parameter>/<key>`
    state.json             where the run stands: phase, steps, rows taken, accuracies, log position
    manifest.json          what was written: every file's size and hash, every tensor's dtype and shape

torch.distributed.checkpoint writes and reads the tensors, each rank its own shards, so a checkpoint is resumed on any
number of ranks. A folder is written under a temporary name, synced, then renamed; older ones are deleted only after
that. At a start the newest is verified; one that is damaged is named, set aside, and the one before is used.

Everything random in a run is a function of (seed, phase, row, response), so no generator state is kept, and a resumed
run repeats the uninterrupted one bit for bit on a CPU.

Next: manifest.py, what a checkpoint says of itself.
"""

import json
import os
import shutil
import threading
import time
import warnings
from datetime import timedelta

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

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, and it says so by no_dist

SCORES = "scores.json"  # of checkpoints that were evaluated only after they were written


class DiskError(SharedError):
    """The disk is full or cannot be written: of one rank, and so of all."""


class Checkpoints:
    """A run's checkpoints. All methods are collective: every rank calls them, in the same order.

    Args:
        run: the run folder. cfg: schema.Checkpoint. note: told on the main rank what a user should know.
        timeout_s: a rank that keeps the others waiting for longer, while all write, ends the run.

    Attributes:
        about: what each manifest also says of the run: its recipe, and the hash of each phase's rows.
        held_s: how long the last `save` kept training waiting. write_s: how long its writing took; known after `wait`.
    """

    def __init__(self, run, cfg, note, timeout_s=1800.0):
        self.run, self.cfg, self.note = run, cfg, note
        # A group of its own: messages of a write in the background must never meet those of training.
        timeout = timedelta(seconds=timeout_s)
        self.group = td.new_group(backend="gloo", timeout=timeout) if dist.size() > 1 else None
        self.thread, self.stands, self.notes, self.crash = None, True, [], None
        self.about, self.held_s, self.write_s, self.last = {"recipe": "", "rows": {}}, 0.0, 0.0, time.monotonic()

    def is_old(self):
        """Whether `every_minutes` have passed on the main rank since the last `save`, or since this was made."""
        limit = 60 * self.cfg.every_minutes
        return limit > 0 and dist.any_of(dist.is_main() and time.monotonic() - self.last >= limit)

    def save(self, step, policy, state, score=None):
        """Write step_N, then delete all but the newest `keep` and the best.

        With cfg.background, this returns when the tensors have been copied; what became of them is told by the next
        call, or by `wait`. A full disk ends no training: it is noted, and earlier checkpoints stay.
        A step that has its checkpoint keeps it: replacing one would leave a moment without. It may still get a score,
        as after an evaluation that was cut short.

        Args:
            policy: has `model`, and `optimizer_tensors()`: name -> tensor of all its state, to read from and into.
            state: JSON-able. score: higher is better; None: not known.
        """
        began = self.last = time.monotonic()
        self.wait()
        folder = self.run / "checkpoints" / f"step_{step}"
        due, wrong = dist.on_main(lambda: self._begin(folder))
        self.stands = not wrong
        self.notes += [wrong] if wrong else []
        if not due and not wrong and score is not None:
            dist.on_main(lambda: self._rate(folder.name, score))
        if due:
            tensors = _tensors(policy)
            about = self.about | {"step": step, "ranks": dist.size(), "score": score}
            about["tensors"] = manifest.table(tensors)
            gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
            if self.cfg.background:
                tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
                job = (folder, tensors, about, state, gpu)
                # A daemon: a process that has to end does not wait for a write.
                self.thread = threading.Thread(target=self._write, args=job, daemon=True)
                self.thread.start()
            else:
                self._write(folder, tensors, about, state, gpu)
        if not self.cfg.background:
            self.wait()
        self.held_s = time.monotonic() - began

    def wait(self):
        """Wait until nothing is being written. Returns whether the last `save` stands."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.crash:
            raise self.crash
        for text in self.notes if dist.is_main() else ():
            self.note(text)
        self.notes.clear()
        return self.stands

    def newest(self, kind):
        """The newest whole checkpoint, as (its state as a `kind`, its folder), or (None, None).

        What killed runs left half written is removed. A damaged checkpoint is noted with what is wrong, and renamed.

        Args:
            kind: the dataclass whose fields were saved.

        Raises:
            SharedError: it was written by another version, or the folder cannot be changed.
        """
        dist.on_main(self._sweep)
        lost = []
        while found := dist.on_main(self._read_newest):
            name, files, state, wrong = found
            folder = self.run / "checkpoints" / name
            # Dealt like cards, the largest first: each rank reads about as much as the others.
            dealt = sorted(files.items(), key=lambda item: -item[1][0])[dist.rank() :: dist.size()]
            reports = dist.gather((wrong or manifest.damage(folder, dealt)).encode())
            wrong = next((report.decode() for report in reports if report), "")
            if not wrong:
                try:
                    return kind(**state), folder
                except TypeError as error:
                    raise _another_version(folder, error) from error
            dist.on_main(lambda folder=folder, wrong=wrong: self._set_aside(folder, wrong))
            lost.append(f"{name}: {wrong}")
        if lost:  # to begin anew here would write over what the run has left
            raise SharedError(
                f"{self.run} has no whole checkpoint left ({'; '.join(lost)}): choose another output to begin anew, or "
                "delete this one"
            )
        return None, None

    def load(self, folder, policy, model=True, optimizer=True):
        """Read a checkpoint that `newest` found into the policy's model and its optimiser's state, or one of them.

        Raises:
            SharedError: it is of another model, or of other trained parameters.
        """
        tensors = _tensors(policy, model, optimizer)
        ours, saved = manifest.table(tensors), dist.on_main(lambda: manifest.read(folder)["tensors"])
        wanted = ("model/",) * model + ("optimizer/",) * optimizer
        saved = {name: what for name, what in saved.items() if name.startswith(wanted)}
        for name in ours | saved:
            if ours.get(name) != saved.get(name):
                there, here = (" ".join(map(str, table.get(name, ["absent"]))) for table in (saved, ours))
                raise SharedError(
                    f"checkpoint {folder} is of another model or recipe: {name} is {there} there and {here} here; "
                    "choose another output, or go on with the model and recipe of this one"
                )
        try:
            reader = dcp.HuggingFaceStorageReader(str(folder / "tensors"))
            dcp.load(tensors, storage_reader=reader, process_group=self.group, no_dist=self.group is None)
        except dcp.CheckpointException as error:
            raise SharedError(f"checkpoint {folder} cannot be read ({_cause(error)})") from error

    def _begin(self, folder):
        """Whether the step is to be written, then its temporary folder is there; and what is wrong."""
        if folder.is_dir():
            return False, ""
        try:
            shutil.rmtree(temporary_name(folder), ignore_errors=True)
            (temporary_name(folder) / "tensors").mkdir(parents=True)
        except OSError as error:
            return False, _no_checkpoint(folder, error)
        return True, ""

    def _write(self, folder, tensors, about, state, gpu):
        """Write, rename, delete older ones. Whatever goes wrong is left for `wait`, on the thread that trains."""
        began = time.monotonic()
        try:
            writer = manifest.Writer(folder, tensors, about, state)
            with torch.cuda.device(gpu):  # a new thread stands on GPU 0, and each rank would leave a context there
                dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            if dist.is_main():
                self._prune()
        except dcp.CheckpointException as error:  # the same one on every rank
            if dist.is_main():
                shutil.rmtree(temporary_name(folder), ignore_errors=True)
            if isinstance(_cause(error), OSError):
                self.stands = False
                self.notes.append(_no_checkpoint(folder, _cause(error)))
            else:
                self.crash = error
        except BaseException as error:  # another rank is gone
            self.crash = error
        self.write_s = time.monotonic() - began

    def _rate(self, name, score):
        """Give a checkpoint that has none a score."""
        path = self.run / "checkpoints" / SCORES
        try:
            files.write_atomically(path, json.dumps(_late_scores(path) | {name: score}).encode())
        except OSError as error:
            self.notes.append(f"{name} evaluated at {score:.3f}, which cannot be written down: {error}")

    def _prune(self):
        """Delete all but the newest `keep`, and the newest of those with the best score."""
        folders = listed(self.run)
        scores = [(score, -i) for i, folder in enumerate(folders) if (score := _score(folder)) is not None]
        best = folders[-max(scores)[1]] if scores else None
        try:
            for old in folders[self.cfg.keep :]:
                if old != best:
                    os.replace(old, temporary_name(old))  # killed amid the deletion, no half checkpoint has its name
                    shutil.rmtree(temporary_name(old))
        except OSError as error:
            self.notes.append(f"an old checkpoint cannot be deleted: {error}")

    def _sweep(self):
        try:
            for left in (self.run / "checkpoints").glob("step_*.tmp"):
                shutil.rmtree(left)
        except OSError as error:
            raise UserError(f"{self.run / 'checkpoints'} cannot be tidied ({error}): see to its permissions") from error

    def _read_newest(self):
        """(name, files, state, what is wrong) of the newest finished checkpoint; None where there is none."""
        folder = next(iter(listed(self.run)), None)
        if not folder:
            return None
        try:
            saved = manifest.read(folder)
        except ValueError as error:
            return folder.name, {}, {}, str(error)
        if saved["format"] != manifest.FORMAT:
            raise _another_version(folder, f"its format is {saved['format']}, not {manifest.FORMAT}")
        wrong = manifest.damage(folder, [("state.json", saved["files"].pop("state.json"))])
        # What reads the tensors reads every file there is.
        strange = {f"tensors/{path.name}" for path in (folder / "tensors").glob("*")} - saved["files"].keys()
        wrong = wrong or (f"{min(strange)} was not written with it" if strange else "")
        state = {} if wrong else json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return folder.name, saved["files"], state, wrong

    def _set_aside(self, folder, wrong):
        names = (folder.with_name(f"{folder.name}.damaged{n}") for n in ("", *range(2, 1000)))
        aside = next(name for name in names if not name.exists())
        try:
            os.replace(folder, aside)
        except OSError as error:
            raise UserError(f"checkpoint {folder} is damaged: {wrong}; and cannot be renamed: {error}") from error
        self.note(f"checkpoint {folder} is damaged: {wrong}. It is kept as {aside.name}; the one before is looked at")


def listed(run):
    """Folders of finished checkpoints, newest first. Whether they are whole, `newest` says."""
    folders = [f for f in (run / "checkpoints").glob("step_*") if f.name[5:].isdigit() and f.is_dir()]
    return sorted(folders, key=lambda f: -int(f.name[5:]))


def _tensors(policy, model=True, optimizer=True):
    """Name -> tensor, live, of all that a checkpoint holds, or of a part."""
    weights = {f"model/{name}": p.detach() for name, p in policy.model.named_parameters()} if model else {}
    return weights | ({f"optimizer/{name}": t for name, t in policy.optimizer_tensors().items()} if optimizer else {})


def _late_scores(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _score(folder):
    try:
        score = manifest.read(folder)["score"]
        return _late_scores(folder.parent / SCORES).get(folder.name) if score is None else score
    except ValueError:
        return None  # damaged, and not the best then


def _cause(error):
    """The first exception of the lowest rank, from a CheckpointException."""
    return error.failures[min(error.failures)][0]


def _another_version(folder, what):
    return SharedError(f"checkpoint {folder} was written by another version ({what}): choose another output")


def _no_checkpoint(folder, error):
    step = folder.name.removeprefix("step_")
    return f"no checkpoint at step {step}, the last good one stays: {_disk_error(folder, error)}"


def _disk_error(folder, error):
    return DiskError(f"{folder} cannot be written ({error}): free some space, or choose another output")


def write_folder(folder, write):
    """Make a folder whole or not at all: `write(temporary)` on every rank, sync, rename.

    Raises:
        DiskError: on all ranks. Nothing is left behind, and what had the folder's name is untouched.
    """
    temporary = temporary_name(folder)

    def clear():
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def flush():  # when all have written: each rank has what it wrote in its own host's memory
        mode = temporary.stat().st_mode & 0o666  # as the umask has it; safetensors lets nobody but the owner read
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file():
                path.chmod(mode)
            sync(path)

    def publish():
        if dist.is_main():
            old = folder.with_name(f"{folder.name}.old.tmp")
            _remove(old)
            if os.path.lexists(folder):
                os.replace(folder, old)  # there is a moment without it, but never a part of it
            os.replace(temporary, folder)
            sync(folder.parent)
            _remove(old)

    for work in (clear, lambda: write(temporary), flush, publish):

        def attempt(work=work):
            try:
                work()
            except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
                return str(error)
            return ""

        wrong = [text.decode() for text in dist.gather(dist.together(attempt).encode()) if text]
        if wrong:
            if dist.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise _disk_error(folder, wrong[0])


def _remove(path):
    """Remove a folder, a file, or a link, of which the target stays; nothing if there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
