"""What test_checkpoint_ranks.py does on several ranks.

The model is small and awkward: rows that no number of ranks divides, fewer rows than ranks, two dtypes.
"""

import json
import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from small import small_model, small_recipe
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nanolmmr1.errors import SharedError
from nanolmmr1.parallel import dist, fsdp
from nanolmmr1.run import checkpoint, manifest, run_folder
from nanolmmr1.schema import Checkpoint
from nanolmmr1.update import policy as policy_of_trainer

SHAPES = {"one": (1,), "three": (3, 5), "seven": (7,), "deep": (2, 3, 4), "rounded": (10, 3), "long": (1001, 4)}


@dataclass
class Progress:
    step: int = 0
    accuracy: dict = field(default_factory=dict)


class Awkward(nn.Module):
    def __init__(self, shapes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            dtype = torch.bfloat16 if name == "rounded" else torch.float32
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


class Policy:
    """As policy.Policy, as far as checkpoints care; every step moves every weight in a way of its own."""

    def __init__(self, over=None, shapes=SHAPES):
        self.model = nn.ModuleDict({"block": Awkward(shapes)})
        if dist.sharded():
            fully_shard(self.model["block"], mesh=dist.mesh("cpu", over or "all", 60))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, foreach=False)

    def step(self, number):
        for i, p in enumerate(self.model.parameters()):
            generator = torch.Generator().manual_seed(100 * number + i)
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None) if sharded else grad
        self.optimizer.step()

    def optimizer_tensors(self):
        for p in self.model.parameters():
            if not self.optimizer.state[p]:
                moments = {key: torch.zeros_like(p, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.zeros(())} | moments
        named = self.model.named_parameters()
        return {f"{name}/{key}": t for name, p in named for key, t in self.optimizer.state[p].items()}

    def whole(self):
        """Name -> [dtype, values] of all tensors, gathered."""
        tensors = dict(self.model.named_parameters()) | self.optimizer_tensors()
        whole = {name: t.detach().full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        return {name: [str(t.dtype), t.detach().double().flatten().tolist()] for name, t in whole.items()}


def checkpoints(run, keep=2, background=False):
    notes = []
    own = checkpoint.Checkpoints(run, Checkpoint(keep=keep, background=background), notes.append, 60.0)
    own.told = notes
    return own


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def go_on(run, over="all", steps="1"):
    """Resume, take steps, save each. The state after it, and where it began."""
    policy, own = Policy(over), checkpoints(run)
    progress, folder = own.newest(Progress)
    progress = progress or Progress()
    began = progress.step
    if folder:
        own.load(folder, policy)
    for _ in range(int(steps)):
        progress.step += 1
        policy.step(progress.step)
        own.save(progress.step, policy, {"step": progress.step})
    return {"began": began, "state": policy.whole(), "notes": own.told}


def background(run):
    """A write that is held back until the weights have changed, beside one in the foreground."""
    policy, front, own = Policy(), checkpoints(run / "front"), checkpoints(run / "behind", background=True)
    policy.step(1)
    front.save(1, policy, {"step": 1})
    saved, changed, write_data = policy.whole(), threading.Event(), manifest.Writer.write_data

    def held_back(*args):
        assert changed.wait(60)
        return write_data(*args)

    manifest.Writer.write_data = held_back
    own.save(1, policy, {"step": 1})
    writing = own.thread.is_alive()
    policy.step(2)
    # Messages of training pass those of the write.
    assert dist.gather(b"x" * (dist.rank() + 1)) == [b"x" * (r + 1) for r in range(dist.size())]
    changed.set()
    stands = own.wait()
    back = []
    for each in (front, own):
        policy.step(3)
        each.load(each.newest(Progress)[1], policy)
        back.append(policy.whole() == saved)
    return {"writing": writing, "stands": stands, "back": back, "seconds": [own.held_s, own.write_s]}


def full_disk(run, ballast, behind):
    """A second checkpoint that has no room."""
    policy, own = Policy(shapes=SHAPES | {"long": (50_000, 2)}), checkpoints(run, background=behind == "background")
    own.save(1, policy, {"step": 1})
    first = own.wait()
    if dist.is_main():
        (run / "ballast").write_bytes(bytes(int(ballast)))
    dist.barrier()
    own.save(2, policy, {"step": 2})
    second = own.wait()
    after = names(run / "checkpoints")
    dist.barrier()
    if dist.is_main():
        (run / "ballast").unlink()
    own.save(3, policy, {"step": 3})
    return {"stands": [first, second, own.wait()], "notes": own.told, "after": after,
            "end": names(run / "checkpoints")}


def die(run, victim, moment):
    """Kill a rank amid the second write, or amid the deletion of the first."""
    policy, own = Policy(), checkpoints(run, keep=1)
    policy.step(1)
    own.save(1, policy, {"step": 1})

    def kill(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.rank() == int(victim):
        if moment == "deleting":  # what is renamed is about to be deleted
            rename = os.replace
            os.replace = lambda old, new: (rename(old, new), kill() if new.name == "step_1.tmp" else None)
        else:
            setattr(manifest, moment, kill)
    policy.step(2)
    own.save(2, policy, {"step": 2})


def folders(run):
    """write_folder and the lock, on all ranks."""
    said = []
    with run_folder.locked(run):
        checkpoint.write_folder(run / "made", lambda path: (path / f"of_{dist.rank()}").write_text("good"))

        def fail(path):
            (path / f"of_{dist.rank()}").write_text("bad")
            if dist.rank() == dist.size() - 1:
                raise OSError(28, "No space left on device")

        try:
            checkpoint.write_folder(run / "made", fail)
        except checkpoint.DiskError as error:
            said.append(str(error))
        dist.barrier()
        said.append([names(run), {path.name: path.read_text() for path in (run / "made").iterdir()}])
        dist.barrier()
        (run / "file").write_text("")
        try:
            with run_folder.locked(run / "file"):
                pass
        except SharedError as error:
            said.append(str(error))
    return said


def trained(run):
    """A checkpoint of the trainer's own policy, its model sharded as FSDP does it."""
    model = small_model()
    if dist.sharded():
        fsdp.shard(model, dist.mesh("cpu", "all", 60), torch.float32)
    cfg = small_recipe()
    policy, own = policy_of_trainer.Policy(model, cfg.pack, cfg.optim, device="cpu"), checkpoints(run)
    policy.start_phase(cfg.phases["train"])
    progress, folder = own.newest(Progress)
    if folder:
        own.load(folder, policy)
    for p in policy.trained.values():
        p.grad = p.detach() * 1e-4  # no clipping: a norm depends on the order of its sum
    policy.optimizer_step(1e-3, 0.0)
    step = progress.step + 1 if progress else 1
    own.save(step, policy, {"step": step})
    tensors = dict(model.named_parameters()) | policy.optimizer_tensors()
    whole = {name: t.detach().full_tensor() if isinstance(t, DTensor) else t.detach() for name, t in tensors.items()}
    return {name: [float(t.double().sum()), float(t.double().square().sum())] for name, t in whole.items()}


def load_other(run):
    """A checkpoint of another model: the complaint of each rank."""
    policy, own = Policy(shapes=SHAPES | {"three": (3, 6)}), checkpoints(run)
    progress, folder = own.newest(Progress)
    try:
        own.load(folder, policy)
    except SharedError as error:
        return str(error)


TASKS = {f.__name__: f for f in (go_on, background, full_disk, die, folders, trained, load_other)}

def main(task, run, *args):
    dist.start("cpu", 60.0, shard_alone=True)
    print(json.dumps(TASKS[task](Path(run), *args)))
