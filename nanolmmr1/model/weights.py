"""Hugging Face folder <-> our model, whole or sharded, tensor by tensor, by safetensors alone.

Two layouts are read: the one published in 2025 (flat config.json; tensors `model.layers.*`,
`visual.*`, which are our module names) and the one that newer transformers writes (`text_config`;
`model.language_model.*`, `model.visual.*`). We always write the published names: transformers and
vLLM both read them. Everything in the folder but weights (config, tokenizer, processor) is copied.
"""

import json
import math
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from nanolmmr1.errors import UserError
from nanolmmr1.model.qwen import ModelConfig, Qwen25VL, VisionConfig

INDEX = "model.safetensors.index.json"
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
