"""Memory that autograd saves for the backward pass, from shapes alone, and how much of it to recompute instead.

`Policy` asks this before every micro-batch, so it has to be cheap. It counts the storages that a block saves. A 16-bit
pass saves inputs of matrix products in 16 bits, and the residual stream of the language model in the precision of the
master weights. Triton kernels save their inputs and a number per row; plain torch, on a CPU, saves intermediates too.
The head and temporary tensors are not counted.

Next: ../model/qwen.py, the model.
"""

import bisect
from typing import NamedTuple

from nanolmmr1.model.qwen import ModelConfig, VisionConfig


class Kind(NamedTuple):
    """Device and precision of a pass."""

    device: str  # "cuda": Triton kernels; "cpu": the reference of each in plain torch
    compute: int  # bytes of a number in matrix products
    master: int  # bytes of a stored weight

    @property
    def stream(self) -> int:
        """Bytes of a number in the language model's residual stream: 16-bit branches are added to the embedding."""
        return max(self.master, self.compute)


class Block(NamedTuple):
    """Bytes that a transformer block saves for backward."""

    input: int  # if it is recomputed
    kept: int  # if nothing is recomputed, its input included
    product: int  # of these, saved by recomputing SwiGLU's product


def language_block(cfg: ModelConfig, tokens: int, kind: Kind) -> Block:
    """A block of the language model."""
    heads, c = cfg.num_attention_heads, kind.compute
    q, kv = heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim  # widths
    if kind.device == "cuda":
        # Rotated q and k, v, the output, which the output projection reads as well, and its log-sum-exps.
        attention = tokens * (c * (2 * q + 2 * kv) + 4 * heads)
    else:
        # cos and sin; q, the outputs of padded batches, these concatenated and in place; keys and values of the
        # batches, log-sum-exps and row indices. A prompt's keys are repeated for responses, which is not counted.
        attention = tokens * (4 * cfg.head_dim + c * (4 * q + 2 * kv) + 4 * heads + 8)
    return _block(tokens, cfg.hidden_size, cfg.intermediate_size, attention, kind.stream, kind)


def vision_block(cfg: VisionConfig, patches: int, kind: Kind) -> Block:
    """A block of the vision tower, whose residual stream has the precision of its products."""
    h, heads, c = cfg.hidden_size, cfg.num_heads, kind.compute
    # On a GPU v is a slice of qkv and keeps all three alive. On a CPU cos and sin, and row indices.
    attention = patches * (6 * h * c + 4 * heads + (0 if kind.device == "cuda" else 4 * (h // heads) + 8))
    return _block(patches, h, cfg.intermediate_size, attention, c, kind)


def _block(rows: int, width: int, inner: int, attention: int, stream: int, kind: Kind) -> Block:
    """A block of two normed branches; rows: tokens or patches, stream: bytes of a number of the residual stream."""
    entry, product = rows * width * stream, rows * inner * kind.compute * (1 if kind.device == "cuda" else 2)
    mlp = 2 * rows * inner * kind.compute + product  # gate and up; plain torch saves silu(gate) as well
    return Block(entry, max(2 * _norm(rows, width, stream, kind) + attention + mlp, entry), product)


def _norm(rows: int, width: int, stream: int, kind: Kind) -> int:
    """An RMSNorm: its input, its result, which projections read, and a number per row."""
    plain = 0 if kind.device == "cuda" else 4  # the input in fp32, and the normed one before the weight
    return rows * (width * (stream + kind.compute + plain) + 4)


def kept(
    cfg: ModelConfig, tokens: int, patches: int, kind: Kind, products: int = 0, blocks: int = 0, vision: bool = True
) -> int:
    """Bytes that all blocks save; products, blocks: numbers of recomputed ones, see `to_recompute`."""

    def saved(block: Block, depth: int, before: int) -> int:
        """Of a tower's blocks; `before`: number of blocks counted before them."""
        whole, some = (min(max(0, count - before), depth) for count in (blocks, products))
        return whole * block.input + (depth - whole) * block.kept - max(0, some - whole) * block.product

    layers = cfg.num_hidden_layers
    total = saved(language_block(cfg, tokens, kind), layers, 0) + _norm(tokens, cfg.hidden_size, kind.stream, kind)
    if not (vision and patches):
        return total
    tower, c = cfg.vision, kind.compute
    # Patch embedding and merger: patches, the norm, the merger's two products.
    ends = patches * tower.patch_dim * (4 + (c if c < 4 else 0)) + 2 * patches * tower.hidden_size * c
    ends += _norm(patches, tower.hidden_size, c, kind)
    return total + ends + saved(vision_block(tower, patches, kind), tower.depth, layers)


def to_recompute(
    cfg: ModelConfig, tokens: int, patches: int, budget: float, kind: Kind, vision: bool = True
) -> tuple[int, int]:
    """Choose the recomputation in backward with which the saved memory fits a budget as well as possible.

    SwiGLU's product comes first: a fifth of a block's saved memory for a fiftieth of its forward time. Whole blocks are
    recomputed only when all products are. Blocks are counted from the language model's first, and after its last from
    the vision tower's first: backward reaches the first blocks last, when most other memory is free.

    Args:
        tokens, patches: of the micro-batch. budget: bytes. vision: whether the tower is trained.

    Returns:
        (products, blocks), each from 0 to num_hidden_layers + vision.depth: of how many blocks the product is
        recomputed, and how many blocks are recomputed whole.
    """
    most = cfg.num_hidden_layers + (cfg.vision.depth if vision and patches else 0)
    choices = [(n, 0) for n in range(most)] + [(most, n) for n in range(most + 1)]
    # Each choice saves less than the one before.
    first = bisect.bisect_left(choices, -budget, key=lambda c: -kept(cfg, tokens, patches, kind, c[0], c[1], vision))
    return choices[min(first, len(choices) - 1)]
