"""Weights leaving the policy: gathered tensor by tensor for a sampler, or written as a Hugging Face folder.

Next: signals.py, SIGTERM and hang detection.
"""

import json
import shutil
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nanolmmr1.errors import UserError
from nanolmmr1.model.weights import COMPANIONS, INDEX
from nanolmmr1.parallel import dist

FILE_BYTES = 4 << 30  # largest size of a weight file
BUCKET_BYTES = 256 << 20  # gathered by one collective
# torch 2.11 has the second name only.
all_gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor

Named = tuple[str, torch.Tensor]
Layout = tuple[DeviceMesh, int, torch.dtype]  # mesh, sharded axis of it, dtype


def published(
    model: nn.Module, dtype: torch.dtype | None = None, names: Collection[str] | None = None
) -> Iterator[Named]:
    """All weights as (published name, whole tensor), in order.

    Sharded weights are gathered on demand in buckets of at most BUCKET_BYTES, so every rank has to exhaust the
    iterator. A tensor may be the model's own memory; it is on the device that computes even if the shards are
    offloaded. A head tied to the embedding is the embedding, and appears once, under the embedding's name.

    Args:
        dtype: cast to this before gathering; None: as stored. names: only these; None: all.

    Raises:
        SharedError: on all ranks, if one has no memory for a bucket.
    """
    bucket: list[tuple[str, DTensor]] = []
    bucket_layout: Layout | None = None
    bucket_bytes = 0
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        p = parameter.detach()
        layout = _sharded_layout(p)
        nbytes = p.numel() * (dtype or p.dtype).itemsize
        if bucket_layout and bucket and (layout != bucket_layout or bucket_bytes + nbytes > BUCKET_BYTES):
            yield from _gather(bucket, *bucket_layout, dtype)
            bucket, bucket_bytes = [], 0
        if layout is None or not isinstance(p, DTensor):
            whole = p.full_tensor().to(p.device_mesh.device_type) if isinstance(p, DTensor) else p
            yield name, whole.to(dtype or p.dtype)
        else:
            bucket.append((name, p))
            bucket_layout, bucket_bytes = layout, bucket_bytes + nbytes
    if bucket_layout and bucket:
        yield from _gather(bucket, *bucket_layout, dtype)


def _sharded_layout(p: torch.Tensor) -> Layout | None:
    """Layout of a tensor whose rows are sharded over one mesh axis; None for any other."""
    if not isinstance(p, DTensor):
        return None
    spread = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if len(spread) != 1 or p.placements[spread[0]] != Shard(0) or p.device_mesh.size(spread[0]) == 1:
        return None
    return p.device_mesh, spread[0], p.dtype


def _gather(
    bucket: list[tuple[str, DTensor]], mesh: DeviceMesh, axis: int, stored: torch.dtype, dtype: torch.dtype | None
) -> Iterator[Named]:
    """All-gather DTensors of one layout by a single collective; yields (name, whole tensor)."""
    ranks, shapes = mesh.size(axis), [p.shape for _, p in bucket]
    rows = [-(-shape[0] // ranks) for shape in shapes]  # per rank, padded: the last ranks may have fewer, or none
    sizes = [n * shape[1:].numel() for n, shape in zip(rows, shapes, strict=True)]

    def allocate() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        try:  # on the mesh's device even where the shards are offloaded: its network is the fast one
            options: dict[str, Any] = dict(dtype=dtype or stored, device=mesh.device_type)
            own, all_ranks = torch.zeros(sum(sizes), **options), torch.empty(ranks, sum(sizes), **options)
            return own, all_ranks, [torch.empty(shape, **options) for shape in shapes]
        except torch.OutOfMemoryError as error:
            raise UserError(f"no memory to gather weights: {error}") from error

    own, all_ranks, wholes = dist.together(allocate)
    for (_, p), padded in zip(bucket, own.split(sizes), strict=True):
        local = p.to_local().flatten()
        padded[: len(local)].copy_(local)
    all_gather(all_ranks.view(-1), own, group=mesh.get_group(axis))
    for (name, _), shards, whole in zip(bucket, all_ranks.split(sizes, 1), wholes, strict=True):
        yield name, whole.copy_(shards.unflatten(1, (-1, *whole.shape[1:])).flatten(0, 1)[: len(whole)])


def save(model: nn.Module, folder: Path, source: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a Hugging Face folder: weights under their published names, everything else copied from `source`.

    A sharded model is saved by all ranks together, each calling this with the same folder: files are dealt out to
    ranks, and a rank holds one file at most beside its shards. A plain model is saved by the rank that calls.
    torch.distributed.checkpoint's Hugging Face writer gives the same files, but writes every byte twice.

    Args:
        folder: to create. source: the folder the model was loaded from. dtype: of the weights written.

    Raises:
        OSError, SafetensorError: the disk failed; raised after all gathering is done, so no rank waits for this one.
    """
    folder, source = Path(folder), Path(source)
    files = _assign_to_files(model, dtype)
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    rank, ranks = (mesh.get_rank(), mesh.size()) if mesh else (0, 1)
    error: OSError | SafetensorError | None = None
    stream = published(model, dtype)
    for i, (file, names) in enumerate(files.items()):
        mine = i % ranks == rank and error is None
        tensors = {name: tensor.cpu().contiguous() for name, tensor in islice(stream, len(names)) if mine}
        if mine:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except (OSError, SafetensorError) as caught:
                error = caught
    if error:
        raise error
    if rank == 0:
        _save_companions(folder, source, dtype, files, sum(p.numel() for p in model.parameters()) * dtype.itemsize)


def _assign_to_files(model: nn.Module, dtype: torch.dtype) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order, each file within FILE_BYTES unless one tensor exceeds that."""
    files: list[list[str]] = [[]]
    size = 0
    for name, p in model.named_parameters():
        nbytes = p.numel() * dtype.itemsize
        if files[-1] and size + nbytes > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += nbytes
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, 1)}


def _save_companions(
    folder: Path, source: Path, dtype: torch.dtype, files: dict[str, list[str]], total_size: int
) -> None:
    """Write everything beside the weights: index, config, tokenizer and image processor."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
        # transformers would look for the adapter of an adapter_config.json, which is not part of this model.
        if path.name in ("config.json", "adapter_config.json", INDEX) or (folder / path.name).exists():
            continue
        with open(path, "rb") as file:
            encoding = json.detect_encoding(file.read(4)) if path.suffix == ".json" else "utf-8"
        if encoding == "utf-8":
            shutil.copyfile(path, folder / path.name)
        else:  # a byte-order mark or UTF-16: we read these, transformers and vLLM do not
            (folder / path.name).write_text(path.read_bytes().decode(encoding), encoding="utf-8")
    config = json.loads((source / "config.json").read_bytes())
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
