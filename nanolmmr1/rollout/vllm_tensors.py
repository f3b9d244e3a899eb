"""Tensors of vLLM's Qwen2.5-VL: their names, and how to read them back for a comparison.

The functions that take a model run inside the engine.

Next: server.py, vLLM servers.
"""

import zlib
from typing import Any

import torch
from torch import nn

EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
# Module of the engine -> the published modules that are fused in it, in this order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def engine_tensor(name: str) -> tuple[str, int]:
    """The engine's tensor that holds a published tensor, and its index among those fused in it."""
    if name.startswith(("model.", "lm_head.")):
        name = f"language_model.{name}"
    path, layer, parameter = name.rsplit(".", 2)
    for fused, layers in FUSED.items():
        if layer in layers:
            return f"{path}.{fused}.{parameter}", layers.index(layer)
    return name, 0


def column(target: str, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is compared: one column of a matrix, chosen by its name, or a whole vector."""
    matrix = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    return matrix[:, zlib.crc32(target.encode()) % matrix.shape[1]]


def read(model: nn.Module, target: str) -> torch.Tensor:
    """The same column of the engine's tensor."""
    path, parameter = target.rsplit(".", 1)
    module: Any = model.get_submodule(path)
    tensor = getattr(module, parameter)
    if parameter != "weight" or target == EMBED or not hasattr(module, "cpu_linear"):
        return column(target, tensor)
    # On a CPU vLLM keeps a weight only in the packed form of its matrix product. A product with a unit vector is exact.
    unit = tensor.new_zeros(1, module.embedding_dim if target == HEAD else module.input_size_per_partition)
    column(target, unit).fill_(1)
    return module.cpu_linear(unit, tensor, None)[0]


def digests(model: nn.Module) -> dict[str, int]:
    """Name -> checksum of every buffer."""
    bytes_of = {name: b.detach().cpu().contiguous().flatten().view(torch.uint8) for name, b in model.named_buffers()}
    return {name: zlib.crc32(b.numpy().data) for name, b in bytes_of.items()}


def repack_tied_head(model: nn.Module) -> None:
    """Update the packed copy of the embedding that serves as a tied head on a CPU; vLLM 0.32 does not, on a reload."""
    head: Any = model.get_submodule(HEAD.removesuffix(".weight"))
    if hasattr(head, "cpu_linear") and head.weight is model.get_parameter(EMBED):
        head.quant_method.process_weights_after_loading(head)
