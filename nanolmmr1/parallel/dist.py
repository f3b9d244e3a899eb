"""Ranks: who is one, and the little that they tell each other outside of FSDP.

A run is one process, or what torchrun started: then every rank walks through the same program, and what decides its
way (rows, rewards, checkpoints, errors) is known to all of them in the same words. Messages are bytes or numbers on the
CPU, by gloo; nothing is pickled.

Next: shard.py, how a model lies on the ranks.
"""

import functools
import json
import os
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as td
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanolmmr1.errors import SharedError, UserError

launch = None  # a name of what started these ranks, kept over restarts, on rank 0; None until they have met
_shard_alone = False  # see start


def start(device, timeout_s, shard_alone=False):
    """Join the other ranks. Without torchrun there are none, and a group only where FSDP needs one.

    Args:
        device: "cpu" or "cuda". timeout_s: a collective that takes longer ends the process.
        shard_alone: let FSDP have the model of a single rank too, as offloading needs it. Else it stays plain: over one
            rank FSDP would cast, copy and divide for nothing.
    """
    global launch, _shard_alone
    _shard_alone = shard_alone
    if td.is_initialized() or not (launched() or shard_alone):
        return
    if device == "cuda" and (local := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > torch.cuda.device_count():
        # Of all ranks of the host, so that none waits for another.
        raise UserError(
            f"{local} processes on this host, and each sees {torch.cuda.device_count()} GPUs: lower --nproc_per_node, "
            "or let every process see all of them"
        )
    # gloo beside NCCL: for messages, and for what is offloaded to the CPU.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store, own, count, name = td.HashStore(), 0, 1, ""
    if launched():
        store, own, count = next(td.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        if own == 0:  # torchrun's store lives as long as the launch, whatever the ranks do
            name = store.compare_set("launch", "", uuid.uuid4().hex).decode()
        store = td.PrefixStore(_new_name(store, own, count, timeout_s), store)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    td.init_process_group(backend, store=store, rank=own, world_size=count, timeout=timedelta(seconds=timeout_s))
    launch = name


def _new_name(store, rank, count, timeout_s):
    """A name that these ranks agree on and none before them had, 32 hex digits.

    torchrun keeps one store over its restarts. In it lie the addresses of the ranks it has ended, and who reads one of
    these too early waits for a process that is gone. How often it has restarted them is no name: hosts count apart.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"new/{rank}", own)
        name = store.get(f"name/{own}").decode()  # waits for rank 0's answer to this very process
        store.set(f"{name}/knows/{rank}", "")
        return name
    others, deadline = range(1, count), time.monotonic() + timeout_s
    while others := [r for r in others if not store.check([f"{own}/knows/{r}"])]:
        for asking in [f"new/{r}" for r in others if store.check([f"new/{r}"])]:
            store.set(f"name/{store.get(asking).decode()}", own)  # perhaps of an old one, which nobody reads
        if time.monotonic() > deadline:
            raise UserError(f"ranks {others} were not there within dist.timeout_s={timeout_s:g} s: see their output")
        time.sleep(0.02)
    return own


def leave(status=0):
    """End this process, and leave the others if it has met any.

    Without the interpreter's own way out: gloo's threads may still hold the last message, free it while Python is being
    taken down, and abort a process that has done all its work (pytorch/pytorch#179291).
    """
    if not launched():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launched():
    """Whether torchrun, or something like it, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def sharded():
    """Whether models are FSDP's."""
    return td.is_initialized() and (size() > 1 or _shard_alone)


def rank():
    """Also before the others are met, and after they are left."""
    return td.get_rank() if td.is_initialized() else int(os.environ["RANK"]) if launched() else 0


def size():
    return td.get_world_size() if td.is_initialized() else 1


def is_main():
    """Whether this rank writes what is written once."""
    return rank() == 0


def is_host_main():
    """Whether this rank does what is done once a host."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def mesh(device, over, timeout_s):
    """The DeviceMesh of FSDP: one axis, or for over="host" two: replicated over hosts, sharded inside each.

    Args:
        timeout_s: of the axes' own groups, which would not have it from `start`.

    Raises:
        SharedError: the hosts run different numbers of ranks.
    """
    return _mesh(td.group.WORLD, device, over, timeout_s)


@functools.lru_cache(1)  # a reference lies on the policy's: every mesh of hosts has communicators of its own
def _mesh(world, device, over, timeout_s):
    if over == "all":
        return init_device_mesh(device, (size(),), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if len(set(gather(str(local).encode()))) > 1:
        raise SharedError("dist.shard=host: the hosts run different numbers of ranks; use dist.shard=all")
    ranks, timeout = torch.arange(size()).view(-1, local), timedelta(seconds=timeout_s)
    groups = []
    for axis in (ranks.T, ranks):  # all ranks make all groups, in one order, and keep their own
        made = [(own, td.new_group(own, timeout=timeout)) for own in axis.tolist()]
        groups.append(next(group for own, group in made if rank() in own))
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def my_slice(count, parts=None, part=None):
    """The slice of `count` things that falls to this rank, or to one of `parts`: contiguous, and as even as can be."""
    parts, part = size() if parts is None else parts, rank() if part is None else part
    return slice(count * part // parts, count * (part + 1) // parts)


def gather(data):
    """Every rank's bytes, in order of rank."""
    if size() == 1:
        return [data]
    own = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
    sizes = torch.zeros(size(), dtype=torch.int64)
    sizes[rank()] = len(data)
    td.all_reduce(sizes)
    padded = torch.zeros(max(1, int(sizes.max())), dtype=torch.uint8)
    padded[: len(data)] = own[: len(data)]
    blobs = [torch.empty_like(padded) for _ in range(size())]
    td.all_gather(blobs, padded)
    return [blob[:n].numpy().tobytes() for blob, n in zip(blobs, sizes.tolist(), strict=True)]


def all_reduce_sum(tensor):
    """The sum over ranks of a CPU tensor, in place."""
    if size() > 1:
        td.all_reduce(tensor)
    return tensor


def any_of(flag):
    """Whether the flag is set on some rank."""
    return bool(all_reduce_sum(torch.tensor(int(flag))))


def barrier():
    if size() > 1:
        td.all_reduce(torch.zeros(1))  # td.barrier would pick a GPU, perhaps before there is one


def on_main(work):
    """What `work()` gives on the main rank, JSON-able, on all; what is wrong there is wrong everywhere.

    Raises:
        SharedError: the main rank had a UserError. Of a single process it is that error itself.
    """
    if size() == 1:
        return work()
    done = together(lambda: json.dumps(work()) if is_main() else "")
    return json.loads(gather(done.encode())[0])


def together(work):
    """Every rank's own `work()`; where one has a UserError, or no memory, all raise the first, and none waits for
    another.

    Raises:
        SharedError: of a single process it is a UserError.
    """
    done, error = None, None
    try:
        done = work()
    except UserError as caught:
        error = caught
    except torch.OutOfMemoryError as caught:
        error = UserError(str(caught).strip().partition("\n")[0])
        error.__cause__ = caught
    if size() > 1:
        share_error(str(error or ""))
    elif error:
        raise error
    return done


def share_error(text):
    """Raises SharedError on all ranks where some rank's text is not empty."""
    share_errors([told.decode() for told in gather(text.encode())])


def share_errors(texts):
    """Raises SharedError with the first text that is not empty; texts: one a rank."""
    wrong = [(r, text) for r, text in enumerate(texts) if text]
    if wrong:
        first, text = wrong[0]
        raise SharedError(f"rank {first}: {text}" if first and len(wrong) < len(texts) else text)
