"""Qwen2.5-VL on packed tokens: vision tower, merger and language model, nothing else.

There is no batch axis. Prompts, responses and images lie one after another on a token axis (T) or
a patch axis (P), and who attends to whom is the caller's choice: the language model is handed
`attend(layer, q, k, v)`, which is packed attention in training and a KV cache in sampling. So one
forward pass serves both, and their log-probs agree.

Modules are named as the tensors of the published folders (`model.layers.0.self_attn.q_proj.weight`,
`visual.blocks.0.attn.qkv.weight`), so loading is a plain name match.

Letters: T packed tokens, P image patches, H hidden size, D head dim.
Source: Qwen2.5-VL technical report (arXiv 2502.13923), sections 2.1 and 2.2.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanolmmr1.kernels.attention import Spans, attention
from nanolmmr1.kernels.mrope import mrope, rope2d
from nanolmmr1.kernels.rmsnorm import rmsnorm
from nanolmmr1.kernels.swiglu import swiglu


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple = (7, 15, 23, 31)

    @property
    def patch_dim(self):
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ModelConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    vision: VisionConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple = (16, 24, 24)
    tie_word_embeddings: bool = True

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


def product_dtype(x):
    """What autocast rounds a matrix product's operands to where x lies; None: it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, residual=None, dtype=None):
        """Normed x; given a residual, normed x + residual, and that sum. dtype: of y; None: what products read."""
        # Rounded once here; else each projection that reads y would cast it anew and keep a copy of its own.
        return rmsnorm(x, self.weight, self.eps, residual=residual, dtype=dtype or product_dtype(x))


class MLP(nn.Module):
    """SwiGLU. With `recompute` its product, a third of what it keeps for backward, is made again there.

    The vision tower's 3,420 columns are 6,840 bytes in bf16, no multiple of the 16 that Hopper's matrix kernels copy
    by, and slower kernels would run. So the products see weights with zero rows and columns up to a multiple of 8:
    silu(0) 0 is 0, and nothing else changes.
    """

    recompute = False

    def __init__(self, hidden, intermediate, bias):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias)
        self.missing = -intermediate % 8

    def forward(self, x):
        gate, up = (self.widened(x, proj) for proj in (self.gate_proj, self.up_proj))  # (T, intermediate + missing)
        if self.recompute and torch.is_grad_enabled():
            # Recomputing stops at the last tensor that backward reads, before the matrix product.
            return checkpoint(self.down, gate, up, use_reentrant=False, preserve_rng_state=False)
        return self.down(gate, up)

    def widened(self, x, proj):
        if not self.missing:
            return proj(x)
        rows = 0, self.missing
        bias = None if proj.bias is None else F.pad(_rounded(proj.bias), rows)
        return F.linear(x, F.pad(_rounded(proj.weight), (0, 0, *rows)), bias)

    def down(self, gate, up):
        product, proj = swiglu(gate, up), self.down_proj
        if not self.missing:
            return proj(product)
        return F.linear(product, F.pad(_rounded(proj.weight), (0, self.missing)), proj.bias)


def _rounded(weight):
    """As autocast would round it; before it is padded, since rounding the wider copy takes one copy more."""
    return weight.to(product_dtype(weight) or weight.dtype)


class LanguageAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.dim, self.theta, self.section = cfg.head_dim, cfg.rope_theta, cfg.mrope_section
        width, kv_width = cfg.num_attention_heads * self.dim, cfg.num_key_value_heads * self.dim
        self.q_proj = nn.Linear(cfg.hidden_size, width, bias=True)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_width, bias=True)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_width, bias=True)
        self.o_proj = nn.Linear(width, cfg.hidden_size, bias=False)

    def forward(self, x, positions, attend):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (T, heads, D)
        q, k = mrope(q, k, positions, theta=self.theta, section=self.section)
        return self.o_proj(attend(q, k, v).flatten(1))


class Block(nn.Module):
    """What can be recomputed in the backward pass instead of being kept, inside FSDP's gather: all of it by
    `recompute`, or the MLP's product by `mlp.recompute`."""

    recompute = False

    def forward(self, *args):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False)  # nothing is random
        return self.run(*args)


class LanguageBlock(Block):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = LanguageAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, bias=False)

    def run(self, x, positions, attend):
        # The second add could join the next block's norm, but then a checkpoint between blocks would keep two tensors.
        y, x = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), positions, attend), residual=x)
        return x + self.mlp(y)


class LanguageModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(LanguageBlock(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class VisionAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x, places, spans, impl):
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)  # (P, heads, D)
        q, k = rope2d(q, k, places)
        return self.proj(attention(q, k, v, spans, impl=impl).flatten(1))


class VisionBlock(Block):
    def __init__(self, cfg):
        super().__init__()
        self.norm1 = RMSNorm(cfg.hidden_size, 1e-6)
        self.attn = VisionAttention(cfg)
        self.norm2 = RMSNorm(cfg.hidden_size, 1e-6)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, bias=True)

    def run(self, x, places, spans, impl):
        y, x = self.norm2(self.attn(self.norm1(x), places, spans, impl), residual=x)
        return x + self.mlp(y)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, that is, one matrix applied to each flat patch."""

    def __init__(self, cfg):
        super().__init__()
        kernel = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
        self.proj = nn.Conv3d(cfg.in_channels, cfg.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches):
        return F.linear(patches, self.proj.weight.flatten(1))  # (P, hidden)


class Merger(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.width = cfg.hidden_size * cfg.spatial_merge_size**2
        self.ln_q = RMSNorm(cfg.hidden_size, 1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, cfg.out_hidden_size)
        )

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.width))  # (P / 4, H)


@lru_cache(maxsize=4096)
def _layout(t, h, w, window, merge):
    """One image: order of its merged units by window, window sizes in units, and (h, w) of each patch.

    Patches arrive merge block by merge block, so a unit is `merge * merge` neighbours on the axis.
    """
    units = torch.arange(t * (h // merge) * (w // merge)).view(t, h // merge, w // merge)
    pieces = [
        units[frame, top : top + window, left : left + window].flatten()
        for frame in range(t)
        for top in range(0, h // merge, window)
        for left in range(0, w // merge, window)
    ]
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    at = torch.stack([rows, columns], -1)  # (h, w, 2)
    at = at.view(h // merge, merge, w // merge, merge, 2).transpose(1, 2).reshape(1, h * w, 2).expand(t, -1, -1)
    return torch.cat(pieces), [len(p) for p in pieces], at.reshape(-1, 2)


class VisionTower(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.depth))
        self.merger = Merger(cfg)

    def forward(self, patches, grid, impl="auto"):
        """Image embeddings (P / 4, H).

        Args:
            patches: (P, patch_dim); grid: (num_images, 3) t, h, w in patches, a tensor or lists.
            impl: of `attention`.
        """
        cfg, unit = self.cfg, self.cfg.spatial_merge_size**2
        window = cfg.window_size // cfg.spatial_merge_size // cfg.patch_size
        orders, places, windows, frames, start = [], [], [], [], 0
        for t, h, w in torch.as_tensor(grid).tolist():
            order, sizes, at = _layout(t, h, w, window, cfg.spatial_merge_size)
            orders.append(order + start)
            places.append(at)
            windows += [size * unit for size in sizes]
            frames += [h * w] * t
            start += len(order)
        order = torch.cat(orders).to(patches.device)  # (P / 4,)
        places = torch.cat(places).to(patches.device).view(-1, unit, 2)[order].flatten(0, 1)  # (P, 2)

        x = self.patch_embed(patches).view(len(order), unit, -1)[order].flatten(0, 1)  # (P, hidden)
        full, local = _even_spans(frames), _even_spans(windows)
        for index, block in enumerate(self.blocks):
            spans = full if index in cfg.fullatt_block_indexes else local
            x = block(x, places, spans, impl)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return self.merger(x)[back]


def _even_spans(lengths):
    """Non-causal spans that follow one another."""
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    zero = torch.zeros_like(ends)
    return Spans(torch.stack([starts, ends, starts, ends, zero, zero, zero], 1), int(ends[-1]))


class Qwen25VL(nn.Module):
    """The whole model. `head` is the LM head's weight; logits are the kernels' business."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.visual = VisionTower(cfg.vision)
        self.model = LanguageModel(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    @property
    def head(self):
        """(V, H)"""
        return self.model.embed_tokens.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def forward(self, ids, positions, attend, patches=None, grid=None, image_slots=None, *, impl="auto", then=None):
        """Last hidden states, normed, or what `then` makes of them.

        All of a pass happens in here, pictures and head included: this is where a sharded model has its weights.

        Args:
            ids: (T,) int64.
            positions: (3, T) int64, time / height / width.
            attend: (layer, q (T, Hq, D), k (T, Hkv, D), v (T, Hkv, D)) -> (T, Hq, D).
            patches: (P, patch_dim), grid: (num_images, 3), of the images; None or empty: there are none.
            image_slots: (K,) int64, the tokens that the first K image embeddings replace. There may be more of these:
                a rank without images runs the tower on an idle one, whose gradient is zero, since the others do.
            impl: of the tower's attention.
            then: (hidden (T, H), fp32 or wider, head (V, H)) -> anything.

        Returns:
            (T, H), or what `then` returned.
        """
        x = self.model.embed_tokens(ids)  # (T, H)
        if grid is not None and len(grid):
            # A frozen tower's activations need not be kept.
            trained = any(p.requires_grad for p in self.visual.parameters())
            with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
                images = self.visual(patches, grid, impl)
            x = x.index_copy(0, image_slots, images[: len(image_slots)].to(x.dtype))
        for layer, block in enumerate(self.model.layers):
            x = block(x, positions, lambda q, k, v, layer=layer: attend(layer, q, k, v))
        if then is None:
            return self.model.norm(x)
        return then(self.model.norm(x, dtype=torch.promote_types(x.dtype, torch.float32)), self.head)
