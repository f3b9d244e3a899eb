"""Weights that leave the policy: gathered for a sampler, or written as a Hugging Face folder."""

import json
import shutil
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as td
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard

from nanolmmr1.errors import UserError
from nanolmmr1.model.weights import COMPANIONS, INDEX
from nanolmmr1.parallel import dist

SHARD_BYTES = 4 << 30  # of a file
BUCKET_BYTES = 256 << 20  # gathered at once
all_gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor  # the name that torch 2.11 knows


def published(model, dtype=None, names=None):
    """(published name, whole tensor) of all weights, one after another, for whoever takes the model over.

    Sharded weights are gathered when their turn comes, consecutive ones by one collective of at most BUCKET_BYTES, so
    all ranks have to walk through all of it. What is given may be the model's own memory, and lies where the model
    computes even if its shards are offloaded.
    A head tied to the embedding is the embedding, and comes once, under that name.

    Args:
        dtype: cast to, before gathering; None: as stored. names: of the only ones wanted; None: all.
    """
    bucket, held, size = [], None, 0  # what waits to be gathered, of which kind, bytes
    for name, p in model.named_parameters():
        if names is not None and name not in names:
            continue
        p, kind = p.detach(), _kind(p)
        nbytes = p.numel() * (dtype or p.dtype).itemsize
        if bucket and (kind != held or size + nbytes > BUCKET_BYTES):
            yield from _gather(bucket, *held, dtype)
            bucket, size = [], 0
        if kind is None:
            whole = p.full_tensor().to(p.device_mesh.device_type) if isinstance(p, DTensor) else p
            yield name, whole.to(dtype or p.dtype)
        else:
            bucket.append((name, p))
            held, size = kind, size + nbytes
    if bucket:
        yield from _gather(bucket, *held, dtype)


def _kind(p):
    """Mesh, its axis and dtype of a tensor whose rows are spread over that axis; None of any other."""
    spread = [i for i, placement in enumerate(getattr(p, "placements", ())) if not placement.is_replicate()]
    if len(spread) != 1 or p.placements[spread[0]] != Shard(0) or p.device_mesh.size(spread[0]) == 1:
        return None
    return p.device_mesh, spread[0], p.dtype


def _gather(bucket, mesh, axis, stored, dtype):
    """(name, whole tensor) of [(name, DTensor)] of one kind, by one collective.

    Raises:
        SharedError: on all ranks, where one has no memory for it: the others would wait for that one in vain.
    """
    ranks, shapes = mesh.size(axis), [p.shape for _, p in bucket]
    rows = [-(-shape[0] // ranks) for shape in shapes]  # of a rank; the last ranks may have fewer, or none
    sizes = [n * shape[1:].numel() for n, shape in zip(rows, shapes, strict=True)]

    def room():
        try:  # on the mesh's device even where the shards are offloaded: that is where the fast network is
            options = dict(dtype=dtype or stored, device=mesh.device_type)
            own, every = torch.zeros(sum(sizes), **options), torch.empty(ranks, sum(sizes), **options)
            return own, every, [torch.empty(shape, **options) for shape in shapes]
        except torch.OutOfMemoryError as error:
            raise UserError(f"no memory to gather weights: {error}") from error

    own, every, whole = dist.together(room)
    for (_, p), part in zip(bucket, own.split(sizes), strict=True):
        local = p.to_local().flatten()
        part[: len(local)].copy_(local)
    all_gather(every.view(-1), own, group=mesh.get_group(axis))
    for (name, _), part, out in zip(bucket, every.split(sizes, 1), whole, strict=True):
        yield name, out.copy_(part.unflatten(1, (-1, *out.shape[1:])).flatten(0, 1)[: len(out)])


def save(model, folder, source, dtype=torch.float32):
    """Write a Hugging Face folder: weights in published names, everything else copied from `source`.

    A sharded model is saved by all ranks together, each calling this with the same folder: a rank writes every so many
    files, and holds no more than one at a time beside its shards. A plain model is saved by whoever calls.

    Args:
        model: Qwen25VL; folder: to create; source: the folder that the model was loaded from.
        dtype: of the weights written.

    Raises:
        OSError, SafetensorError: the disk's. All gathering has been done by then, so no rank waits for this one.
    """
    folder, source = Path(folder), Path(source)
    files, size = [[]], 0
    for name, p in model.named_parameters():
        nbytes = p.numel() * dtype.itemsize
        if files[-1] and size + nbytes > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += nbytes
    names = (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    )
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    rank, ranks = (mesh.get_rank(), mesh.size()) if mesh else (0, 1)
    wrong = None
    stream = published(model, dtype)
    for i, (file, wanted) in enumerate(zip(names, files, strict=True)):
        mine = i % ranks == rank and not wrong
        tensors = {}
        for name, tensor in islice(stream, len(wanted)):
            if mine:
                tensors[name] = tensor.cpu().contiguous()
        if mine:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                wrong = error
    if wrong:
        raise wrong
    if rank == 0:
        total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        _save_companions(folder, source, dtype, dict(zip(names, files, strict=True)), total)


def _save_companions(folder, source, dtype, files, total_size):
    """All that a folder holds beside its weights: index, configuration, tokenizer, processor."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
        if path.name not in ("config.json", INDEX) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_bytes())
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
