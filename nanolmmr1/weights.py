"""Hugging Face folder <-> our model, whole or sharded, tensor by tensor, by safetensors alone.

Two layouts are read: the one published in 2025 (flat config.json; tensors `model.layers.*`,
`visual.*`, which are our module names) and the one that newer transformers writes (`text_config`;
`model.language_model.*`, `model.visual.*`). We always write the published names: transformers and
vLLM both read them. Everything in the folder but weights (config, tokenizer, processor) is copied.
"""

import json
import math
import shutil
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as td
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nanolmmr1 import dist
from nanolmmr1.config import UserError
from nanolmmr1.model import ModelConfig, Qwen25VL, VisionConfig

SHARD_BYTES = 4 << 30  # of a file
BUCKET_BYTES = 256 << 20  # gathered at once
INDEX = "model.safetensors.index.json"
all_gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor  # the name that torch 2.11 knows
COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model")
# What a config may claim, so that it is refused before anything of that size is made. Published models are far below.
MOST = {"vocab_size": 1 << 24, "num_hidden_layers": 1024, "depth": 1024, "num_attention_heads": 1024, "num_heads": 1024,
        "num_key_value_heads": 1024, "in_channels": 64, "in_chans": 64, "patch_size": 1024, "spatial_merge_size": 64,
        "temporal_patch_size": 64, "window_size": 1 << 16}  # fmt: skip
MOST_SIZE = 1 << 20  # any other whole number, as hidden_size
SLACK = 1 << 28  # parameters


def find(model):
    """The local folder of a model given as a folder or a hub id (downloaded without weights of other formats).

    Raises:
        UserError: neither a folder nor a reachable hub id.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", *COMPANIONS]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model={model!r} is neither a folder here nor a hub id that can be fetched: {reason}"
        ) from error


def read_config(folder):
    """config.json of either layout as a ModelConfig.

    Raises:
        UserError: missing or unreadable file, another architecture, or an option we do not compute.
    """
    path = Path(folder) / "config.json"
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: a Hugging Face model folder is needed") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error)!r:.300}") from error
    if not isinstance(tree, dict) or tree.get("model_type") != "qwen2_5_vl":
        kind = tree.get("model_type") if isinstance(tree, dict) else type(tree).__name__
        raise UserError(f"{folder} holds a {kind!r:.100} model: only Qwen2.5-VL (model_type qwen2_5_vl) is supported")
    for key in ("text_config", "vision_config", "rope_parameters", "rope_scaling"):
        for part in (tree, tree.get("text_config")):
            if isinstance(part, dict) and not isinstance(part.get(key) or {}, dict):
                raise UserError(f"{path}: {key}={part[key]!r:.100}: named values are needed")
    text, vision = tree.get("text_config") or tree, tree.get("vision_config") or {}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or tree.get("rope_scaling") or {}
    for where, key, wanted in (
        (text, "hidden_act", "silu"),
        (vision, "hidden_act", "silu"),
        (text, "use_sliding_window", False),
    ):
        if where.get(key, wanted) != wanted:
            raise UserError(f"{path}: {key}={where[key]!r:.100} is not supported, only {wanted!r}")
    if rope.get("type", rope.get("rope_type", "mrope")) not in ("mrope", "default"):
        kind = rope.get("type", rope.get("rope_type"))
        raise UserError(f"{path}: rope type {kind!r:.100} is not supported, only mrope")
    try:
        cfg = _config(path, tree, text, vision, rope)
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: a complete Qwen2.5-VL config is needed") from error
    _check_config(path, cfg)
    return cfg


def _config(path, tree, text, vision, rope):
    """The ModelConfig of the parts of a config.json. Raises UserError for a value of the wrong kind, KeyError."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    seen = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size",
            "spatial_merge_size", "temporal_patch_size", "window_size")  # fmt: skip
    channels = "in_channels" if "in_channels" in vision else "in_chans"
    theta = rope if rope.get("rope_theta") else text
    tied = tree if "tie_word_embeddings" in tree else text
    if not isinstance(tied.get("tie_word_embeddings", False), bool):
        raise UserError(f"{path}: tie_word_embeddings={tied['tie_word_embeddings']!r:.100}: true or false is needed")
    return ModelConfig(
        **{key: _whole(path, text, key) for key in (*sizes, "vocab_size")},
        rms_norm_eps=_real(path, text, "rms_norm_eps", 1.0),
        rope_theta=_real(path, theta, "rope_theta", 1e18),
        mrope_section=_wholes(path, rope, "mrope_section", 1 << 16),
        tie_word_embeddings=tied.get("tie_word_embeddings", False),
        vision=VisionConfig(
            **{key: _whole(path, vision, key) for key in seen},
            in_channels=_whole(path, vision, channels) if channels in vision else 3,
            fullatt_block_indexes=_wholes(path, vision, "fullatt_block_indexes", MOST["depth"]),
        ),
    )


def _whole(path, tree, key):
    value, most = tree[key], MOST.get(key, MOST_SIZE)
    if not _is_whole(value, 1, most):
        raise UserError(f"{path}: {key}={value!r:.100}: a whole number from 1 to {most} is needed")
    return value


def _wholes(path, tree, key, most):
    value = tree[key]
    if not isinstance(value, list) or not all(_is_whole(item, 0, most) for item in value):
        raise UserError(f"{path}: {key}={value!r:.100}: a list of whole numbers from 0 to {most} is needed")
    return tuple(value)


def _real(path, tree, key, most):
    value = tree[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < most:  # NaN is refused too
        raise UserError(f"{path}: {key}={value!r:.100}: a number above 0 and below {most:g} is needed")
    return float(value)


def _is_whole(value, least, most):
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _check_config(path, cfg):
    """Refuse numbers that do not fit each other, each of which may be right."""
    heads, vision = cfg.num_attention_heads, cfg.vision
    for whole, key, part, other in (
        (cfg.hidden_size, "hidden_size", heads, "num_attention_heads"),
        (heads, "num_attention_heads", cfg.num_key_value_heads, "num_key_value_heads"),
        (vision.hidden_size, "vision_config.hidden_size", vision.num_heads * 4, "four times num_heads"),
    ):
        if whole % part:
            raise UserError(f"{path}: {key}={whole} must be a multiple of {other}, {part}")
    if vision.window_size < vision.patch_size * vision.spatial_merge_size:
        raise UserError(
            f"{path}: vision_config.window_size={vision.window_size} is less than patch_size={vision.patch_size} "
            f"x spatial_merge_size={vision.spatial_merge_size}"
        )
    rope = cfg.mrope_section
    if len(rope) != 3 or sum(rope) * 2 != cfg.head_dim or vision.out_hidden_size != cfg.hidden_size:
        raise UserError(
            f"{path}: mrope_section {str(rope):.100} must be three numbers that sum to half the head size "
            f"{cfg.head_dim}, and vision out_hidden_size {vision.out_hidden_size} must be hidden_size {cfg.hidden_size}"
        )


def check_size(model, folder):
    """Refuse a model that has far more parameters than its folder's files can hold, before it has memory.

    Args:
        model: on the meta device, say. folder: whose config.json described it; without weights there, nothing is known.

    Raises:
        UserError: a parameter takes a byte at least. What is a little too large for its files, `fill` tells better.
    """
    held = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    wanted = sum(math.prod(p.shape) for p in model.parameters())
    if held and wanted > held + SLACK:
        raise UserError(
            f"{Path(folder) / 'config.json'} describes {wanted:,} parameters, but the .safetensors files beside it "
            f"have {held:,} bytes: they are of another model, or incomplete"
        )


def published_name(name):
    """Tensor name as published in 2025, from either layout."""
    for ours, theirs in (
        ("model.", "model.language_model."),
        ("visual.", "model.visual."),
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def load(folder, dtype=torch.float32, device="cpu", empty=False):
    """The whole model of a folder; the peak is the model and one tensor.

    Args:
        empty: read its config alone, for a model whose weights are about to come from elsewhere.

    Raises:
        UserError: see `fill`.
    """
    with torch.device("meta"):
        model = Qwen25VL(read_config(folder)).to(dtype)
    check_size(model, folder)
    model.to_empty(device=device)
    if not empty:
        fill(model, folder)
    return model


def fill(model, folder):
    """Read a folder's weights into a Qwen25VL that has its memory: whole, or of FSDP's, then each rank its own shards.

    Tensors are read one at a time, and the ranks say nothing to each other: an error of one is its own.

    Raises:
        UserError: missing shard, missing, unexpected or misshapen tensor, or a damaged file.
    """
    folder = Path(folder)
    wanted = dict(model.named_parameters())
    missing = dict.fromkeys(wanted)
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118, safe_open is no mapping
                    ours = published_name(name)
                    if ours == "lm_head.weight" and model.cfg.tie_word_embeddings:
                        continue  # some folders write the tied head once more
                    if ours not in wanted:
                        raise UserError(f"{path}: unexpected tensor {name!r:.200}; the config describes another model")
                    tensor, shape = shard.get_tensor(name), wanted[ours].shape
                    if tensor.shape != shape:
                        raise UserError(f"{path}: {ours} is {tuple(tensor.shape)}, the config wants {tuple(shape)}")
                    _copy(tensor, wanted[ours].detach())
                    missing.pop(ours, None)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({str(error)!r:.300}): fetch the file again") from error
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(wanted)} tensors, {next(iter(missing))} first: a shard is missing"
        )


def _copy(tensor, out):
    """A whole tensor into one that may hold a shard of it: without communication, and also where that is offloaded."""
    if isinstance(out, DTensor):
        tensor = distribute_tensor(tensor, out.device_mesh, out.placements, src_data_rank=None).to_local()
        out = out.to_local()
    out.copy_(tensor)


def _shards(folder):
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            outside = [name for name in names if Path(name).name != name]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} is not a weight index: {str(error)!r:.300}") from error
        if outside:
            raise UserError(f"{index} names files outside its folder")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(f"{folder} lacks {len(absent)} of {len(names)} shards: {str(absent[:3])[1:-1]:.300}")
        return [folder / name for name in names]
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} has no .safetensors file: other weight formats are not read")
    return paths


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
