"""Reading Hugging Face model folders: config.json and safetensors files.

Two layouts are read: the one published in 2025 (flat config.json; tensors `model.layers.*` and `visual.*`, which are
our module names) and the one that newer transformers writes (`text_config`; `model.language_model.*`,
`model.visual.*`). parallel/export.py writes the published layout, which transformers and vLLM both read.

config.json is untrusted: every value is checked before anything of that size is allocated. transformers' config
classes do not serve: they accept vocab_size=-1 and hang on a huge layer count. A key that config.json lacks has the
default of these classes, because some releases of transformers leave such keys out when they save.

Next: ../../kernels/_triton.py, how kernels are launched.
"""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from nanolmmr1.errors import UserError
from nanolmmr1.model.qwen import ModelConfig, Qwen25VL, VisionConfig

INDEX = "model.safetensors.index.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model")  # files of a model folder that are copied with the weights
# Defaults of transformers' Qwen2_5_VLTextConfig and Qwen2_5_VLVisionConfig.
TEXT = {"vocab_size": 152_064, "hidden_size": 8192, "intermediate_size": 29_568, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
VISION = {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3, "patch_size": 14,
          "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": 3584,
          "fullatt_block_indexes": [7, 15, 23, 31]}
# Upper limits of config values, far above any published model, and of those not named here.
MOST = {"vocab_size": 1 << 24, "num_hidden_layers": 1024, "depth": 1024, "num_attention_heads": 1024, "num_heads": 1024,
        "num_key_value_heads": 1024, "in_channels": 64, "in_chans": 64, "patch_size": 1024, "spatial_merge_size": 64,
        "temporal_patch_size": 64, "window_size": 1 << 16, "mrope_section": 1 << 16, "fullatt_block_indexes": 1024,
        "rms_norm_eps": 1.0, "rope_theta": 1e18}
MOST_SIZE = 1 << 20
SLACK = 1 << 28  # parameters
ROWS = 4096  # of two tensors, compared at a time


def find(model: str) -> Path:
    """The local folder of a model: a folder, or a hub id, which is downloaded without weights of other formats.

    Raises:
        UserError: neither a folder nor a reachable hub id.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", *COMPANIONS]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"model={model!r} is neither a folder here nor a hub id that can be fetched: {reason}"
        raise UserError(message) from error


def read_config(folder: str | Path) -> ModelConfig:
    """Read and check config.json of either layout.

    Raises:
        UserError: missing or unreadable file, another architecture, an unsupported option, or a wrong value.
    """
    path = Path(folder) / "config.json"
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: a Hugging Face model folder is needed") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error)!r:.300}") from error
    model_type = tree.get("model_type") if isinstance(tree, dict) else type(tree).__name__
    if not isinstance(tree, dict) or model_type != "qwen2_5_vl":
        raise UserError(f"{folder} holds a {model_type!r:.100} model: only Qwen2.5-VL (model_type qwen2_5_vl) is "
                        "supported")
    text, vision = _section(path, tree, "text_config") or tree, _section(path, tree, "vision_config")
    rope = (_section(path, text, "rope_parameters") or _section(path, text, "rope_scaling")
            or _section(path, tree, "rope_scaling"))
    for name, value, supported in (
        ("hidden_act=", text.get("hidden_act", "silu"), ["silu"]),
        ("hidden_act=", vision.get("hidden_act", "silu"), ["silu"]),
        ("use_sliding_window=", text.get("use_sliding_window", False), [False]),
        ("rope type ", rope.get("type", rope.get("rope_type", "mrope")), ["mrope", "default"]),
    ):
        if value not in supported:
            raise UserError(f"{path}: {name}{value!r:.100} is not supported, only {supported[0]!r}")
    text = TEXT | text
    ties = [part.get("tie_word_embeddings", False) for part in (tree, text)]  # either place ties, as in transformers
    text |= {
        "mrope_section": rope.get("mrope_section"),
        "rope_theta": rope.get("rope_theta") or text["rope_theta"],
        "tie_word_embeddings": next((tie for tie in ties if tie is not False), False),
    }
    tower = VisionConfig(**_values(path, VisionConfig, VISION | vision))
    cfg = ModelConfig(**_values(path, ModelConfig, text), vision=tower)
    _check_config(path, cfg)
    return cfg


def _section(path: Path, tree: dict[str, Any], key: str) -> dict[str, Any]:
    """A JSON object inside another one; {} if it is missing or empty."""
    value = tree.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key}={value!r:.100}: named values are needed")
    return value


def _values(path: Path, config: type, tree: dict[str, Any]) -> dict[str, Any]:
    """The numbers and flags of a config class, each of its field's type and within its limits."""
    values: dict[str, Any] = {}
    for name, required in ((field.name, field.type) for field in fields(config) if field.type is not VisionConfig):
        key = "in_chans" if name == "in_channels" and name not in tree else name
        value, most = tree[key], MOST.get(key, MOST_SIZE)
        if required is bool:
            valid, needed = isinstance(value, bool), "true or false"
        elif required is int:
            valid, needed = _is_number(value, int, 1, most), f"a whole number from 1 to {most}"
        elif required is float:
            valid = _is_number(value, int | float, 0, most) and 0 < value < most
            needed = f"a number above 0 and below {most:g}"
        else:
            valid = isinstance(value, list) and all(_is_number(item, int, 0, most) for item in value)
            needed = f"a list of whole numbers from 0 to {most}"
        if not valid:
            raise UserError(f"{path}: {key}={value!r:.100}: {needed} is needed")
        values[name] = tuple(value) if isinstance(value, list) else float(value) if required is float else value
    return values


def _is_number(value: Any, types: Any, least: int, most: float) -> bool:
    return isinstance(value, types) and not isinstance(value, bool) and least <= value <= most  # NaN is in no range


def _check_config(path: Path, cfg: ModelConfig) -> None:
    """Refuse values that do not fit each other."""
    heads, groups, rope, vision = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.mrope_section, cfg.vision
    for wrong, problem in (
        (cfg.hidden_size % heads, f"hidden_size={cfg.hidden_size} must be a multiple of num_attention_heads, {heads}"),
        (heads % groups, f"num_attention_heads={heads} must be a multiple of num_key_value_heads, {groups}"),
        (vision.hidden_size % (4 * vision.num_heads), f"vision_config.hidden_size={vision.hidden_size} must be a "
         f"multiple of four times num_heads, {4 * vision.num_heads}"),
        (vision.window_size < vision.patch_size * vision.spatial_merge_size,
         f"vision_config.window_size={vision.window_size} is less than patch_size={vision.patch_size} x "
         f"spatial_merge_size={vision.spatial_merge_size}"),
        (len(rope) != 3 or sum(rope) * 2 != cfg.head_dim or vision.out_hidden_size != cfg.hidden_size,
         f"mrope_section {str(rope):.100} must be three numbers that sum to half the head size {cfg.head_dim}, and "
         f"vision out_hidden_size {vision.out_hidden_size} must be hidden_size {cfg.hidden_size}"),
    ):
        if wrong:
            raise UserError(f"{path}: {problem}")


def check_size(model: Qwen25VL, folder: str | Path) -> None:
    """Refuse a model that has far more parameters than the folder's weight files can hold.

    Called before the model has memory. Each parameter takes at least one byte. A smaller excess is left to `fill`,
    which names the tensor, and a folder without weights is not checked.

    Args:
        model: on the meta device. folder: of the config.json that describes it.

    Raises:
        UserError: config.json and weights are of different models, or a shard is missing.
    """
    stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    parameters = sum(math.prod(p.shape) for p in model.parameters())
    if stored and parameters > stored + SLACK:
        raise UserError(f"{Path(folder) / 'config.json'} describes {parameters:,} parameters, but the .safetensors "
                        f"files beside it have {stored:,} bytes: they are of another model, or incomplete")


def published_name(name: str) -> str:
    """The tensor's name in the layout of 2025, from either layout."""
    for theirs, ours in (("model.language_model.", "model."), ("model.visual.", "visual."),
                         ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
         empty: bool = False) -> Qwen25VL:
    """Read a whole model; peak memory is the model and one tensor.

    Args:
        empty: leave the weights uninitialised, for a model that gets them from elsewhere.

    Raises:
        UserError: see `read_config`, `check_size` and `fill`.
    """
    with torch.device("meta"):
        model = Qwen25VL(read_config(folder)).to(dtype)
    check_size(model, folder)
    model.to_empty(device=device)
    if not empty:
        fill(model, folder)
    return model


def fill(model: Qwen25VL, folder: str | Path) -> None:
    """Read a folder's weights into an allocated model, tensor by tensor.

    With FSDP every rank reads all tensors and copies its own shards, without communication. So ranks may raise
    different errors.

    Some folders hold a tied head again, or in place of the embedding. A head that differs from the embedding is
    refused: transformers 5 would use it, but vLLM and older transformers would ignore it.

    Raises:
        UserError: missing shard; missing, unexpected or misshapen tensor; two tensors of one parameter that differ;
            damaged file.
    """
    folder = Path(folder)
    parameters = dict(model.named_parameters())
    missing, sources = dict.fromkeys(parameters), dict[str, tuple[Path, str]]()  # source: file, name in it
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, safe_open is no mapping
                    ours = published_name(name)
                    if tied := ours == HEAD and model.cfg.tie_word_embeddings:
                        ours = EMBED
                    if ours not in parameters:
                        raise UserError(f"{path}: unexpected tensor {name!r:.200}; the config describes another model")
                    given, shape = tuple(file.get_slice(name).get_shape()), tuple(parameters[ours].shape)
                    if given != shape:
                        raise UserError(f"{path}: {HEAD if tied else ours} is {given}, the config wants {shape}")
                    if ours in missing:
                        _copy(file.get_tensor(name), parameters[ours].detach())
                        sources[ours] = path, name
                        del missing[ours]
                    elif not _equal(sources[ours], (path, name)):
                        raise UserError(_twice(sources[ours][0], path, ours))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({str(error)!r:.300}): fetch the file again") from error
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of {len(parameters)} tensors, {next(iter(missing))} first: a "
                        "shard is missing")


def _equal(*sources: tuple[Path, str]) -> bool:
    """Whether two tensors (file, name), of one shape, are equal, or one is the other rounded to its dtype."""
    with safe_open(sources[0][0], framework="pt") as first, safe_open(sources[1][0], framework="pt") as second:
        one, two = first.get_slice(sources[0][1]), second.get_slice(sources[1][1])
        for start in range(0, one.get_shape()[0], ROWS):
            a, b = one[start : start + ROWS], two[start : start + ROWS]
            if not (torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a)):
                return False
    return True


def _twice(first: Path, second: Path, name: str) -> str:
    """The complaint about two different tensors of one parameter."""
    if name == EMBED:
        return (f"{second}: {HEAD} and {EMBED} differ, but config.json has tie_word_embeddings=true: set it to false "
                f"to train this head as the model's own, or remove {HEAD}")
    return f"{second}: {name} differs from the one in {first.name}: remove the file that is not of this model"


def _copy(tensor: torch.Tensor, out: torch.Tensor) -> None:
    """Copy a whole tensor into a parameter or, of a sharded one, this rank's shard; it may be offloaded to the CPU."""
    if isinstance(out, DTensor):
        tensor = distribute_tensor(tensor, out.device_mesh, out.placements, src_data_rank=None).to_local()
        out = out.to_local()
    out.copy_(tensor)


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of a folder's model: those of its index; without one `model.safetensors`, else
    `model-*-of-*.safetensors`, else all. So an adapter or optimizer state beside the weights is not read.

    Raises:
        UserError: no such file, or a damaged index, or one that names files which are missing or outside the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        for pattern in ("model.safetensors", "model-*-of-*.safetensors", "*.safetensors"):
            if paths := sorted(folder.glob(pattern)):
                return paths
        raise UserError(f"{folder} has no .safetensors file: other weight formats are not read")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not a weight index: {str(error)!r:.300}") from error
    if outside:
        raise UserError(f"{index} names files outside its folder")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {len(absent)} of {len(names)} shards: {str(absent[:3])[1:-1]:.300}")
    return [folder / name for name in names]
