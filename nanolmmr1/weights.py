"""Hugging Face folder <-> our model, tensor by tensor, by safetensors alone.

Two layouts are read: the one published in 2025 (flat config.json; tensors `model.layers.*`,
`visual.*`, which are our module names) and the one that newer transformers writes (`text_config`;
`model.language_model.*`, `model.visual.*`). We always write the published names: transformers and
vLLM both read them. Everything in the folder but weights (config, tokenizer, processor) is copied.
"""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanolmmr1.config import UserError
from nanolmmr1.model import ModelConfig, Qwen25VL, VisionConfig

SHARD_BYTES = 4 << 30
COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model")


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
        reason = str(error).strip().splitlines()[0]
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
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: a Hugging Face model folder is needed") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict) or tree.get("model_type") != "qwen2_5_vl":
        kind = tree.get("model_type") if isinstance(tree, dict) else type(tree).__name__
        raise UserError(f"{folder} holds a {kind!r} model: only Qwen2.5-VL (model_type qwen2_5_vl) is supported")
    text, vision = tree.get("text_config") or tree, tree.get("vision_config") or {}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or tree.get("rope_scaling") or {}
    for where, key, wanted in (
        (text, "hidden_act", "silu"),
        (vision, "hidden_act", "silu"),
        (text, "use_sliding_window", False),
    ):
        if where.get(key, wanted) != wanted:
            raise UserError(f"{path}: {key}={where[key]!r} is not supported, only {wanted!r}")
    if rope.get("type", rope.get("rope_type", "mrope")) not in ("mrope", "default"):
        raise UserError(f"{path}: rope type {rope.get('type', rope.get('rope_type'))!r} is not supported, only mrope")
    try:
        cfg = ModelConfig(
            **{
                key: text[key]
                for key in (
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "vocab_size",
                    "rms_norm_eps",
                )
            },
            rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
            mrope_section=tuple(rope["mrope_section"]),
            tie_word_embeddings=bool(tree.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vision=VisionConfig(
                **{
                    key: vision[key]
                    for key in (
                        "depth",
                        "hidden_size",
                        "intermediate_size",
                        "num_heads",
                        "out_hidden_size",
                        "patch_size",
                        "spatial_merge_size",
                        "temporal_patch_size",
                        "window_size",
                    )
                },
                in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
                fullatt_block_indexes=tuple(vision["fullatt_block_indexes"]),
            ),
        )
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: a complete Qwen2.5-VL config is needed") from error
    if sum(cfg.mrope_section) * 2 != cfg.head_dim or cfg.vision.out_hidden_size != cfg.hidden_size:
        raise UserError(
            f"{path}: mrope_section {cfg.mrope_section} must sum to half the head size {cfg.head_dim}, and vision "
            f"out_hidden_size {cfg.vision.out_hidden_size} must be hidden_size {cfg.hidden_size}"
        )
    return cfg


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


def load(folder, dtype=torch.float32, device="cpu"):
    """The model of a folder. Tensors are read one at a time: the peak is the model and one tensor.

    Raises:
        UserError: missing shard, missing, unexpected or misshapen tensor, or a damaged file.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    with torch.device("meta"):
        model = Qwen25VL(cfg)
    wanted = dict(model.named_parameters())
    state = {}
    with ExitStack() as stack:
        for path in _shards(folder):
            try:
                shard = stack.enter_context(safe_open(path, framework="pt"))
                for name in shard.keys():  # noqa: SIM118, safe_open is no mapping
                    ours = published_name(name)
                    if ours == "lm_head.weight" and cfg.tie_word_embeddings:
                        continue  # some folders write the tied head once more
                    if ours not in wanted:
                        raise UserError(f"{path}: unexpected tensor {name}; the config describes another model")
                    tensor = shard.get_tensor(name)
                    if tensor.shape != wanted[ours].shape:
                        raise UserError(
                            f"{path}: {name} is {tuple(tensor.shape)}, the config wants {tuple(wanted[ours].shape)}"
                        )
                    state[ours] = tensor.to(device, dtype)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}): fetch the file again") from error
    missing = [name for name in wanted if name not in state]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(wanted)} tensors, {missing[0]} first: a shard is missing"
        )
    model.load_state_dict(state, assign=True)
    return model.requires_grad_()


def _shards(folder):
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [name for name in names if Path(name).name != name]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not a weight index: {error}") from error
        if outside:
            raise UserError(f"{index} names files outside its folder")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise UserError(f"{folder} lacks {len(absent)} of {len(names)} shards: {', '.join(absent[:3])}")
        return [folder / name for name in names]
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{folder} has no .safetensors file: other weight formats are not read")
    return paths


def published(model):
    """(published name, whole tensor) of all weights, one at a time: a sharded one is gathered when its turn comes.

    A head tied to the embedding is the embedding, and comes once, under that name.
    """
    for name, p in model.named_parameters():
        yield name, p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()


def save(model, folder, source, dtype=torch.float32):
    """Write a Hugging Face folder: weights in published names, everything else copied from `source`.

    Args:
        model: Qwen25VL; folder: to create; source: the folder that the model was loaded from.
        dtype: of the weights written.
    """
    folder, source = Path(folder), Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    for path in (path for pattern in COMPANIONS for path in source.glob(pattern)):
        if path.name not in ("config.json", "model.safetensors.index.json") and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {t: name for name, shard in zip(names, shards, strict=True) for t in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
