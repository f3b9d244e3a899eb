"""What test_weights.py does on several ranks."""

import json
from pathlib import Path

import torch
from ranks_checkpoint import Awkward, names
from torch.distributed.fsdp import fully_shard

from nanolmmr1.errors import SharedError, UserError
from nanolmmr1.model import weights
from nanolmmr1.parallel import dist, export, fsdp
from nanolmmr1.run import checkpoint

AWKWARD = {"one": (1,), "three": (3, 5), "seven": (7,), "deep": (2, 3, 4), "rounded": (10, 3), "again": (6, 2),
           "long": (1001, 4)}


def bits_equal(ours, theirs):
    return [name for name in ours | theirs if not torch.equal(ours[name], theirs[name])] == []


def hand_over(over, bucket_bytes):
    """An awkward sharded model, gathered in buckets: [[names of each bucket], equal, equal in bf16, contiguous]."""
    plain, model = (torch.nn.ModuleDict({"block": Awkward(AWKWARD)}) for _ in range(2))
    model["free"] = plain["free"] = torch.nn.Linear(2, 2)  # not FSDP's, amid those that are
    model["last"], plain["last"] = Awkward({"end": (5, 2)}), Awkward({"end": (5, 2)})
    for part in ("block", "last"):
        fully_shard(model[part], mesh=dist.mesh("cpu", over, 60))
    buckets, gather = [], export._gather

    def recording(bucket, *args):
        buckets.append([name for name, _ in bucket])
        return gather(bucket, *args)

    export._gather, export.BUCKET_BYTES = recording, bucket_bytes
    stored = {name: p.detach() for name, p in plain.named_parameters()}
    given = dict(export.published(model))
    calls = buckets.copy()
    half = dict(export.published(model, torch.bfloat16))
    export._gather = gather
    return [calls, list(given) == list(stored) and bits_equal(given, stored),
            bits_equal(half, {name: p.bfloat16() for name, p in stored.items()}),
            all(p.is_contiguous() for p in given.values())]


def folders(folder, out, over):
    """Load a folder sharded, write it from the shards: [equal, equal again, files that this rank wrote]."""
    whole = dict(weights.load(folder).named_parameters())
    model = fsdp.load_sharded(folder, dist.mesh("cpu", over, 60.0), "cpu", torch.float32)
    first = all(torch.equal(p.full_tensor(), whole[name]) for name, p in model.named_parameters())
    wrote, save_file = [], export.save_file

    def recording(tensors, path, metadata):
        wrote.append(path.name)
        save_file(tensors, path, metadata)

    export.save_file, export.FILE_BYTES = recording, 200_000
    checkpoint.write_folder(out / over, lambda path: export.save(model, path, folder, torch.bfloat16))
    export.save_file = save_file
    again = dict(weights.load(out / over).named_parameters())
    return [first, bits_equal(again, {name: p.detach().bfloat16().float() for name, p in whole.items()}), wrote]


def full_disk(folder, out):
    """The disk of one rank is full: what each rank says, and what is left."""
    model = fsdp.load_sharded(folder, dist.mesh("cpu", "all", 60.0), "cpu", torch.float32)
    save_file = export.save_file

    def failing(tensors, path, metadata):
        if dist.rank() == 1:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    export.save_file = failing
    try:
        checkpoint.write_folder(out / "full", lambda path: export.save(model, path, folder))
    except checkpoint.DiskError as error:
        said = str(error)
    export.save_file = save_file
    dist.barrier()
    return [said, names(out)]


def full_memory():
    """One rank has no memory left amid a hand-over: what each says, how far it came, and what they do next."""
    model, took = torch.nn.ModuleDict({"block": Awkward(AWKWARD)}), []
    fully_shard(model["block"], mesh=dist.mesh("cpu", "all", 60))
    zeros, calls, export.BUCKET_BYTES = torch.zeros, [], 1

    def failing(*args, **options):
        calls.append(args)
        if dist.rank() == 1 and len(calls) == 3:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return zeros(*args, **options)

    def take():
        for name, _ in export.published(model):
            took.append(name)

    torch.zeros = lambda *args, **options: (
        failing if "device" in options else zeros)(*args, **options)
    try:
        dist.together(take)
    except SharedError as error:
        said = str(error)
    torch.zeros = zeros
    return [said, len(took), len(set(export.published(model)))]


def damaged(folder):
    """A sharded model is as strict as a whole one."""
    try:
        fsdp.load_sharded(folder, dist.mesh("cpu", "all", 60.0), "cpu", torch.float32)
    except UserError as error:
        return str(error)


def main(folder, broken, own_head, out):
    dist.start("cpu", 60.0)
    folder, out = Path(folder), Path(out)
    said = {"hand_over": [hand_over(over, size) for over in ("all", "host") for size in (1 << 20, 150, 1)]}
    said["folders"] = [folders(folder, out, over) for over in ("all", "host")]
    said["full_disk"] = full_disk(folder, out)
    said["full_memory"] = full_memory()
    said["damaged"] = [damaged(Path(broken)), damaged(Path(own_head))]
    print(json.dumps(said))
