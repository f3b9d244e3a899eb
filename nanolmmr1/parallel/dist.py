"""Process group setup, and the few collectives used outside FSDP.

A run is one process, or the ranks that torchrun started. All ranks execute the same program, so everything that decides
its course (rows, rewards, checkpoints, errors) must be equal on all of them. Messages are bytes or CPU tensors, sent by
gloo; nothing is pickled.

Next: fsdp.py, sharding.
"""

import functools
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as td
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanolmmr1.errors import Preempted, SharedError, UserError

T = TypeVar("T")

launch: str | None = None  # random name of this torchrun launch, equal after restarts; on rank 0, None before start()
_shard_alone = False  # see start()
_PREEMPTED = b"\0preempted"  # message of a rank that was asked to stop


def start(device: str, timeout_s: float, shard_alone: bool = False) -> None:
    """Create the process group. Without torchrun there is none, unless FSDP needs one.

    Args:
        device: "cpu" or "cuda". timeout_s: a collective that takes longer ends the process.
        shard_alone: wrap the model of a single rank with FSDP too, which offloading needs. Otherwise it stays plain:
            FSDP on one rank would only cast and copy.

    Raises:
        UserError: fewer GPUs than processes on this host; a rank that did not arrive in time.
    """
    global launch, _shard_alone
    _shard_alone = shard_alone
    if td.is_initialized() or not (launched() or shard_alone):
        return
    if device == "cuda" and (local := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > torch.cuda.device_count():
        # Checked on every rank of the host, so that none waits for another.
        raise UserError(
            f"{local} processes on this host, and each sees {torch.cuda.device_count()} GPUs: lower --nproc_per_node, "
            "or let every process see all of them"
        )
    # gloo beside NCCL: for messages, and for tensors that are offloaded to the CPU.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store: td.Store = td.HashStore()
    own_rank, count, name = 0, 1, ""
    if launched():
        store, own_rank, count = next(td.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        if own_rank == 0:  # torchrun's store lives as long as the launch, through restarts of its ranks
            name = store.compare_set("launch", "", uuid.uuid4().hex).decode()
        store = td.PrefixStore(_fresh_prefix(store, own_rank, count, timeout_s), store)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    td.init_process_group(backend, store=store, rank=own_rank, world_size=count, timeout=timedelta(seconds=timeout_s))
    launch = name


def _fresh_prefix(store: td.Store, rank: int, count: int, timeout_s: float) -> str:
    """A key prefix of 32 hex digits that these ranks agree on and no earlier ones used.

    After a restart torchrun's store still holds the addresses of dead ranks, and connecting to one hangs. Therefore
    each group of ranks uses a new prefix. TORCHELASTIC_RESTART_COUNT would not do: each host counts its own restarts.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"new/{rank}", name)
        prefix = store.get(f"name/{name}").decode()  # waits until rank 0 answers this very process
        store.set(f"{prefix}/knows/{rank}", "")
        return prefix
    missing, deadline = list(range(1, count)), time.monotonic() + timeout_s
    while missing := [r for r in missing if not store.check([f"{name}/knows/{r}"])]:
        for request in [f"new/{r}" for r in missing if store.check([f"new/{r}"])]:
            store.set(f"name/{store.get(request).decode()}", name)  # answering a dead rank is harmless
        if time.monotonic() > deadline:
            raise UserError(f"ranks {missing} were not there within dist.timeout_s={timeout_s:g} s: see their output")
        time.sleep(0.02)
    return name


def leave(status: int = 0) -> NoReturn:
    """End this process, bypassing the interpreter's shutdown where there is a process group.

    gloo's threads may still hold the last message; freed while Python shuts down, it aborts a process that has finished
    its work (pytorch/pytorch#179291).
    """
    if not launched():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launched() -> bool:
    """Whether torchrun or a similar launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def sharded() -> bool:
    """Whether models are wrapped by FSDP."""
    return td.is_initialized() and (size() > 1 or _shard_alone)


def rank() -> int:
    """This process's rank; works before init_process_group and after destroy_process_group."""
    return td.get_rank() if td.is_initialized() else int(os.environ["RANK"]) if launched() else 0


def size() -> int:
    """Number of ranks."""
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes logs and files."""
    return rank() == 0


def is_host_main() -> bool:
    """Whether this is the first rank of its host, which downloads."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def mesh(device: str, over: str, timeout_s: float) -> DeviceMesh:
    """The DeviceMesh of FSDP: one axis, or with over="host" (HSDP) two: replicated over hosts, sharded inside each.

    Args:
        timeout_s: of the axes' process groups, which do not inherit it.

    Raises:
        SharedError: the hosts run different numbers of ranks.
    """
    return _mesh(td.group.WORLD, device, over, timeout_s)


@functools.lru_cache(1)  # policy and reference share one: every HSDP mesh creates communicators
def _mesh(world: td.ProcessGroup, device: str, over: str, timeout_s: float) -> DeviceMesh:
    if over == "all":
        return init_device_mesh(device, (size(),), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if len(set(gather(str(local).encode()))) > 1:
        raise SharedError("dist.shard=host: the hosts run different numbers of ranks; use dist.shard=all")
    ranks, timeout = torch.arange(size()).view(-1, local), timedelta(seconds=timeout_s)
    groups = []
    for axis in (ranks.T, ranks):  # all ranks create all groups in one order, and each keeps the one it is in
        created = [(members, td.new_group(members, timeout=timeout)) for members in axis.tolist()]
        groups.append(next(group for members, group in created if rank() in members))
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def my_slice(count: int, parts: int | None = None, part: int | None = None) -> slice:
    """The contiguous slice of `count` items for this rank, or for one of `parts`; sizes differ by one at most."""
    parts, part = size() if parts is None else parts, rank() if part is None else part
    return slice(count * part // parts, count * (part + 1) // parts)


def gather(data: bytes) -> list[bytes]:
    """All-gather bytes; one entry per rank."""
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


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a CPU tensor over ranks, in place."""
    if size() > 1:
        td.all_reduce(tensor)
    return tensor


def any_of(flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    return bool(all_reduce_sum(torch.tensor(int(flag))))


def barrier() -> None:
    """Wait for all ranks. td.barrier would choose a GPU, perhaps before one is set."""
    if size() > 1:
        td.all_reduce(torch.zeros(1))


def on_main(work: Callable[[], T]) -> T:
    """Run `work()` on rank 0 and broadcast its result, which must be JSON-able.

    Raises:
        SharedError: rank 0 raised a UserError. A single process raises that error itself.
    """
    if size() == 1:
        return work()
    data = together(lambda: json.dumps(work()) if is_main() else "").encode()
    count = torch.tensor(len(data))
    td.broadcast(count, 0)
    message = torch.empty(int(count), dtype=torch.uint8)
    if is_main():
        message.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    td.broadcast(message, 0)
    return json.loads(message.numpy().tobytes())


def on_host_main(work: Callable[[], T]) -> T:
    """Run `work()` on the first rank of every host and send its result, which must be JSON-able, to that host's ranks.

    Raises:
        SharedError: it raised a UserError on some host.
    """
    if size() == 1:
        return work()
    message = together(lambda: json.dumps(work()) if is_host_main() else "")
    return json.loads(gather(message.encode())[rank() - int(os.environ.get("LOCAL_RANK", 0))])


def together(work: Callable[[], T]) -> T:
    """Run `work()` on every rank; if it fails on one, raise on all, so that none waits in a collective for it.

    Raises:
        Preempted, SharedError: see `raise_together`.
    """
    try:
        result, error = work(), None
    except (UserError, Preempted) as caught:
        error = caught
    except torch.OutOfMemoryError as caught:
        error = UserError(str(caught).strip().partition("\n")[0])
        error.__cause__ = caught
    raise_together(error)
    return result


def raise_together(error: UserError | Preempted | None) -> None:
    """Raise the first rank's error on all ranks, if any rank has one. A collective: the only way errors are shared.

    Raises:
        Preempted: some rank was asked to stop. SharedError: some rank had a UserError; the message names the rank,
        unless all ranks failed. A single process raises its error itself.
    """
    if size() == 1:
        if error:
            raise error
        return
    message = b"" if error is None else _PREEMPTED if isinstance(error, Preempted) else str(error).encode()
    messages = gather(message)
    if _PREEMPTED in messages:
        raise Preempted
    failed = [(r, text.decode()) for r, text in enumerate(messages) if text]
    if failed:
        first, text = failed[0]
        raise SharedError(f"rank {first}: {text}" if first and len(failed) < len(messages) else text) from error
