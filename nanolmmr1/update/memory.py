"""What the parts of a pass hold in memory, in bytes, from shapes alone: blocks, head, vision tower, sampler.

Counted is what autograd keeps for the backward pass, storage by storage, and beside it the most that is alive for a
moment. A 16-bit pass keeps the residual stream of the language model in the master weights' precision and what
matrix products read in 16 bits. Triton kernels keep their inputs and a number a row; the plain torch of a CPU keeps
intermediates too, and for attention its padded copies. Small things (row indices, positions, schedules) are left out.

Next: plan.py, which adds it all up.
"""

import bisect
import math
from functools import lru_cache
from typing import NamedTuple

import torch

from nanolmmr1.kernels._head import BLOCK_ELEMENTS, CHUNK_BYTES
from nanolmmr1.model.qwen import Qwen25VL

FIRST_CACHE = 32  # tokens that the embedded sampler's own cache begins with; it doubles (rollout/local.py)


class Kind(NamedTuple):
    """How a pass computes."""

    device: str  # "cuda": Triton kernels; "cpu": the reference of each in plain torch
    compute: int  # bytes of a number in matrix products
    master: int  # bytes of a stored weight

    @property
    def stream(self):
        """Bytes of a number in the language model's residual stream: a branch's 16 bits are added to the embedding."""
        return max(self.master, self.compute)


class Load(NamedTuple):
    """What one micro-batch holds at most. `keys` and `masked` matter to a CPU alone, whose attention pads."""

    tokens: int  # T
    scored: int  # N
    patches: int  # P
    prompt: int = 0  # of the tokens, those of prompts
    keys: int = 0  # rows of keys over all responses, each with its prompt's
    masked: int = 0  # (query, key) pairs of responses


class Block(NamedTuple):
    """A transformer block."""

    input: int  # kept in any case
    kept: int  # with what it keeps for backward where nothing is recomputed, its input included
    product: int  # of it, what recomputing SwiGLU's product spares
    work: int  # alive for a moment in backward, beside `kept`
    forward: int  # alive for a moment in forward where nothing is kept, its input included


def micro_batch(prompt, response, group_size, patches, prompts, budget):
    """The largest Load of `prompts` groups in packs of `budget` tokens: responses at their longest fill it with
    tokens, at their shortest with prompts, and so with pictures.

    Args:
        prompt, response: tokens of the longest. patches: of a prompt. prompts: those that a rank may get in an update.
    """
    group = prompt + group_size * (response - 1)
    if group <= budget:
        tokens = min(prompts * group, budget)
        groups, responses = tokens / group, tokens / group * group_size
    else:  # a group is split: its prompt stands in each part
        tokens = max(budget, prompt + response - 1)
        groups, responses = 1, max(1, (tokens - prompt) / max(1, response - 1))
    return Load(
        tokens=int(tokens),
        scored=int(responses * response),
        patches=patches * max(1, min(prompts, budget // prompt)),
        prompt=int(groups * prompt),
        keys=int(responses * (prompt + response - 1)),
        masked=int(responses * (response - 1) * (prompt + response - 1)),
    )


def language_block(cfg, load, kind):
    """One of the language model's blocks on T tokens."""
    T, H, heads, c = load.tokens, cfg.hidden_size, cfg.num_attention_heads, kind.compute
    q, kv = heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim  # widths
    if kind.device == "cuda":
        # Turned q and k, v, the output, which the output projection reads as well, and its log-sum-exps.
        attention = T * (c * (2 * q + 2 * kv) + 4 * heads)
    else:
        # cos and sin; q, the outputs of the batches, these in one, and in their places; keys and values: a prompt's
        # once for each q head, a response's with those of its prompt; log-sum-exps and where the rows go.
        keys = 2 * (load.prompt * q + (load.keys or T - load.prompt) * kv)
        attention = T * (4 * cfg.head_dim + c * 4 * q + 4 * heads + 8) + c * keys
    return _block(T, H, cfg.intermediate_size, attention, T * c * (q + 2 * kv), kind.stream, kind)


def vision_block(cfg, patches, kind):
    """One of the vision tower's blocks on P patches. Its residual stream is as wide as its matrix products' results."""
    h, heads, c = cfg.hidden_size, cfg.num_heads, kind.compute
    if kind.device == "cuda":
        attention = patches * (c * 6 * h + 4 * heads)  # v is a slice of qkv and keeps all three alive
    else:
        attention = patches * (4 * (h // heads) + c * 6 * h + 4 * heads + 8)
    return _block(patches, h, cfg.intermediate_size, attention, patches * c * 3 * h, c, kind)


def _block(rows, width, inner, attention, projected, stream, kind):
    """A block of two normed branches.

    Args:
        rows: tokens or patches. width, inner: of the stream, of the MLP. stream: bytes of its numbers.
        attention: bytes kept between the projections. projected: bytes of these before they are turned.
    """
    c, entry = kind.compute, rows * width * stream
    product = rows * inner * c * (1 if kind.device == "cuda" else 2)  # plain torch keeps silu(gate) as well
    mlp = rows * inner * c * 2 + product  # gate and up besides
    kept = 2 * norm(rows, width, stream, kind) + attention + mlp
    # SwiGLU's backward holds its upstream gradient and two of its own, when the product is no longer needed; the
    # gradients of the stream and of what the MLP has read are there as well.
    work = rows * (2 * inner * c + width * (2 * stream + c))
    # The stream, what a branch reads of it, and the larger branch.
    forward = 2 * entry + rows * width * c + max(mlp, attention + projected)
    return Block(entry, max(kept, entry), product, work, forward)


def norm(rows, width, stream, kind):
    """What an RMSNorm keeps, with its input and with what the projections behind it read."""
    if kind.device == "cuda":
        return rows * (width * (stream + kind.compute) + 4)
    # In plain torch the input in fp32, and the normed one before the weight in the input's precision.
    return rows * (width * (4 + stream + kind.compute) + 4)


def vision_ends(cfg, patches, kind):
    """What patch embedding and merger keep: patches, the norm, the merger's two products. P patches."""
    c = kind.compute
    pixels = patches * cfg.patch_dim * (4 + (c if c < 4 else 0))
    return pixels + norm(patches, cfg.hidden_size, c, kind) + 2 * patches * cfg.hidden_size * c


class Head(NamedTuple):
    """The LM head and its loss on N tokens."""

    scoring: int
    learning: int
    gradient: int  # of it, what waits for the backward pass
    weight: int  # of that, dW (V, H)


def head(cfg, scored, kind, trained=True, chunk_tokens=0, split=1):
    """See kernels/linear_loss.py: a chunk of logits, dX, and dW in fp32; the weight in the precision of products."""
    V, H, c = cfg.vocab_size, cfg.hidden_size, kind.compute
    rows = chunk_tokens or max(16, CHUNK_BYTES[kind.device] // (4 * V))
    rows = math.ceil(scored / math.ceil(scored / rows)) if scored else 0
    logits = rows * V * 4
    weight = V * H * c if kind.master != c else 0
    hidden = scored * H * c
    if kind.device == "cpu":
        scratch = max(1, min(rows, BLOCK_ELEMENTS["cpu"] // V)) * V * 4
        # 16-bit products on a CPU are made of fp32 copies: of the weight for logits, of their gradient for dW.
        copies = 0 if c == 4 else V * H * 4
        scoring = weight + logits + scratch + copies
        chunk = logits + scratch + copies + (0 if c == 4 else logits * 3 // 2)
    else:
        scoring, chunk = weight, logits  # a forward pass alone keeps no logits, a backward pass puts dz in their place
    dw = V * H * 4 if trained else 0
    return Head(hidden + scoring, 2 * hidden + dw + weight + chunk, hidden + dw, dw)


def kept(cfg, load, kind, products=0, blocks=0, vision=True):
    """Bytes that wait for the backward pass in all blocks and between them: (language, vision).

    Args:
        products, blocks: what is recomputed, see `to_recompute`. vision: whether the tower is trained.
    """

    def waiting(block, depth, before):
        """Of a tower's blocks, `before` others being counted first."""
        whole, some = (min(max(0, count - before), depth) for count in (blocks, products))
        return whole * block.input + (depth - whole) * block.kept - max(0, some - whole) * block.product

    layers = cfg.num_hidden_layers
    total = waiting(language_block(cfg, load, kind), layers, 0)
    total += norm(load.tokens, cfg.hidden_size, kind.stream, kind)  # the last one
    total += masks(cfg, load, kind)
    if not (vision and load.patches):
        return total, 0
    tower = waiting(vision_block(cfg.vision, load.patches, kind), cfg.vision.depth, layers)
    return total, tower + vision_ends(cfg.vision, load.patches, kind)


def masks(cfg, load, kind):
    """Of the padded batches of a CPU's attention: for each q head of a group, and once as what is hidden."""
    group = cfg.num_attention_heads // cfg.num_key_value_heads
    return load.masked * (group * kind.compute + 1) if kind.device == "cpu" else 0


def to_recompute(cfg, tokens, patches, budget, kind, vision=True):
    """What to recompute in the backward pass, so that what is kept of all fits a budget as well as can be.

    SwiGLU's product first, a fifth of what a block keeps for a fiftieth of its time; only when that is recomputed in
    all of them, whole blocks. Blocks are counted from the language model's first; once these are all taken, from the
    vision tower's first. Of either tower the first ones are recomputed last, when most else has been freed.

    Args:
        cfg: ModelConfig. tokens, patches: of the largest micro-batch. budget: bytes. vision: is the tower trained?

    Returns:
        (products, blocks), 0 ... num_hidden_layers + vision.depth each: of how many blocks the product is made again,
        and how many are as a whole.
    """
    load, most = Load(tokens, 0, patches), cfg.num_hidden_layers + (cfg.vision.depth if vision and patches else 0)
    choices = [(n, 0) for n in range(most)] + [(most, n) for n in range(most + 1)]
    # Each choice keeps less than the one before.
    first = bisect.bisect_left(choices, -budget, key=lambda choice: -sum(kept(cfg, load, kind, *choice, vision)))
    return choices[min(first, len(choices) - 1)]


def local_sampling(cfg, kind, prompts, prompt, response, group_size, patches):
    """The most that the embedded sampler holds, prefilling or decoding: (keys and values, what it works with).

    Args:
        prompts: decoded together. prompt, response: tokens of the longest. patches: of a prompt.
    """
    n, kv, c = prompts * group_size, cfg.num_key_value_heads * cfg.head_dim, kind.compute
    capacity = FIRST_CACHE
    while capacity < response - 1:
        capacity *= 2
    row = 2 * cfg.num_hidden_layers * kv * c  # keys and values of a token
    load = Load(prompts * prompt, prompts, prompts * patches, prompts * prompt)
    prefill = language_block(cfg, load, kind).forward
    pixels = load.patches * cfg.vision.patch_dim * 4
    if patches:
        prefill = max(prefill, vision_block(cfg.vision, load.patches, kind).forward) + pixels
    # A cache grows layer by layer. Logits, and in 16 bits also those and the head before they are converted.
    converted = c if c < 4 else 0
    logits = cfg.vocab_size * (n * (4 + converted) + cfg.hidden_size * converted)
    growth = 2 * n * kv * c * capacity // 2
    prefix = row * prompts * prompt
    return max((prefix, prefill), (prefix + row * n * capacity, max(logits, growth)), key=sum)


class Parameters(NamedTuple):
    """Numbers of parameters. Root, blocks and the vision tower's ends are the units that FSDP gathers (shard.py)."""

    root: int
    block: int
    tower: int  # the vision tower without its blocks
    vision_block: int
    trained_root: int
    trained_language: int  # all blocks
    trained_vision: int  # the tower and its blocks
    total: int

    @property
    def trained(self):
        return self.trained_root + self.trained_language + self.trained_vision


@lru_cache
def parameters(cfg, frozen=()):
    """Counted on the meta device. frozen: prefixes of the names of what is not trained, a tuple."""
    with torch.device("meta"):
        model = Qwen25VL(cfg)

    def count(*prefixes, trained=False):
        return sum(
            p.numel()
            for name, p in model.named_parameters()
            if name.startswith(prefixes) and not (trained and name.startswith(frozen))
        )

    blocks, tower = ("model.layers.",), ("visual.",)
    root = tuple(n for n, _ in model.named_parameters() if not n.startswith(blocks + tower))
    return Parameters(
        root=count(*root),
        block=count("model.layers.0."),
        tower=count("visual.patch_embed.", "visual.merger."),
        vision_block=count("visual.blocks.0."),
        trained_root=count(*root, trained=True),
        trained_language=count(*blocks, trained=True),
        trained_vision=count(*tower, trained=True),
        total=count(""),
    )
