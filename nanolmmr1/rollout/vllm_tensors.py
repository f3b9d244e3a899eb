"""Where a published tensor lies in vLLM's Qwen2.5-VL, and what is read back of it."""

import zlib

import torch

EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # engine's -> published


def engine_tensor(name):
    """The engine's tensor that holds a published one, and its place among those fused there."""
    if name.startswith(("model.", "lm_head.")):
        name = f"language_model.{name}"
    path, layer, kind = name.rsplit(".", 2)
    for fused, parts in FUSED.items():
        if layer in parts:
            return f"{path}.{fused}.{kind}", parts.index(layer)
    return name, 0


def column(target, tensor):
    """What is compared of a tensor: one column, chosen by name, or all of a vector."""
    matrix = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    return matrix[:, zlib.crc32(target.encode()) % matrix.shape[1]]


def read(model, target):
    """The same column of the engine's tensor."""
    path, kind = target.rsplit(".", 1)
    module = model.get_submodule(path)
    tensor = getattr(module, kind)
    if kind != "weight" or target == EMBED or not hasattr(module, "cpu_linear"):
        return column(target, tensor)
    # On a CPU a weight is packed for its matrix product and kept in no other form. A unit vector times it is exact.
    unit = tensor.new_zeros(1, module.embedding_dim if target == HEAD else module.input_size_per_partition)
    column(target, unit).fill_(1)
    return module.cpu_linear(unit, tensor, None)[0]


def digests(model):
    """Name -> checksum of every buffer."""
    bytes_of = {name: b.detach().cpu().contiguous().flatten().view(torch.uint8) for name, b in model.named_buffers()}
    return {name: zlib.crc32(b.numpy()) for name, b in bytes_of.items()}


def repack_tied_head(model):
    """On a CPU a tied head packs a copy of the embedding, and vLLM 0.32 forgets that copy when it reloads weights."""
    head = model.language_model.lm_head
    if hasattr(head, "cpu_linear") and head.weight is model.get_parameter(EMBED):
        head.quant_method.process_weights_after_loading(head)
