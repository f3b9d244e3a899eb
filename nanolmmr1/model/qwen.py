"""Qwen2.5-VL on packed sequences: vision tower, merger and language model.

There is no batch axis. Prompts, responses and images are concatenated on a token axis (T) and a patch axis (P). The
caller decides which tokens attend to which: it passes `attend(layer, q, k, v)`, which is packed attention in training
and a KV cache in sampling. One forward pass serves both, so their log-probs agree.

Modules are named like the tensors of the published folders (`model.layers.0.self_attn.q_proj.weight`,
`visual.blocks.0.attn.qkv.weight`), so loading weights is a plain name match.

Letters: T packed tokens, P image patches, H hidden size, D head dim.
Source: Qwen2.5-VL technical report (arXiv 2502.13923), sections 2.1 and 2.2.

Next: weights.py, config.json and safetensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanolmmr1.kernels.attention import Spans, attention
from nanolmmr1.kernels.mrope import mrope, rope2d
from nanolmmr1.kernels.rmsnorm import rmsnorm
from nanolmmr1.kernels.swiglu import swiglu

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # layer, q, k, v (T, heads, D)
Head = Callable[[torch.Tensor, torch.Tensor], Any]  # normed hidden states (T, H), weight (V, H) -> result


class Images(NamedTuple):
    """The images of a forward pass."""

    patches: torch.Tensor  # (P, patch_dim)
    grid: Sequence[Sequence[int]]  # per image: t, h, w in patches
    slots: torch.Tensor  # (K,) int64, tokens replaced by the first K image embeddings; a dummy image has none


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower, under the names of config.json."""

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
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model, under the names of config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    vision: VisionConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def product_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts operands of matrix products on x's device; None: autocast is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class RMSNorm(nn.Module):
    """kernels/rmsnorm.py with a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """y = norm(x), (T, H); given a residual: norm(x + residual) and x + residual. dtype: of y; None: autocast's."""
        # y is cast once here; otherwise every projection that reads it would cast it and save its own copy.
        return rmsnorm(x, self.weight, self.eps, residual=residual, dtype=dtype or product_dtype(x))


class MLP(nn.Module):
    """SwiGLU. With `recompute` the product silu(gate) up, a third of the saved memory, is recomputed in backward.

    The vision tower's width of 3,420 is 6,840 bytes in bf16, not a multiple of the 16 bytes that Hopper's matrix
    kernels copy, so cuBLAS would fall back to slower kernels. Weights are therefore zero-padded to a multiple of 8:
    silu(0) * 0 is 0, and nothing else changes.
    """

    recompute = False

    def __init__(self, hidden: int, intermediate: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias)
        self.padding = -intermediate % 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (self.padded(x, proj) for proj in (self.gate_proj, self.up_proj))  # (T, intermediate + padding)
        if self.recompute and torch.is_grad_enabled():
            # Recomputation ends at the last tensor that backward reads, before the matrix product.
            return checkpoint(self.down, gate, up, use_reentrant=False, preserve_rng_state=False)
        return self.down(gate, up)

    def padded(self, x: torch.Tensor, proj: nn.Linear) -> torch.Tensor:
        if not self.padding:
            return proj(x)
        rows = 0, self.padding
        bias = None if proj.bias is None else F.pad(_rounded(proj.bias), rows)
        return F.linear(x, F.pad(_rounded(proj.weight), (0, 0, *rows)), bias)

    def down(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        product, proj = swiglu(gate, up), self.down_proj
        if not self.padding:
            return proj(product)
        return F.linear(product, F.pad(_rounded(proj.weight), (0, self.padding)), proj.bias)


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    """Cast as autocast would. Before padding: casting the padded copy would create one more copy."""
    return weight.to(product_dtype(weight) or weight.dtype)


class LanguageAttention(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dim, self.theta, self.section = cfg.head_dim, cfg.rope_theta, cfg.mrope_section
        width, kv_width = cfg.num_attention_heads * self.dim, cfg.num_key_value_heads * self.dim
        self.q_proj = nn.Linear(cfg.hidden_size, width, bias=True)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_width, bias=True)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_width, bias=True)
        self.o_proj = nn.Linear(width, cfg.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (T, heads, D)
        q, k = mrope(q, k, positions, theta=self.theta, section=self.section)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))


class Block(nn.Module):
    """A transformer block. With `recompute` it is recomputed in backward, inside FSDP's gather; `mlp.recompute` does so
    for the MLP's product alone."""

    recompute = False
    run: Callable[..., torch.Tensor]  # the block itself

    def forward(self, *args: Any) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False)  # nothing is random
        return self.run(*args)


class LanguageBlock(Block):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = LanguageAttention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, bias=False)

    def run(self, x: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        # The second add could be fused with the next block's norm, but then recomputation would save two tensors.
        y, x = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), positions, attend), residual=x)
        return x + self.mlp(y)


class LanguageModel(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(LanguageBlock(cfg, layer) for layer in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class VisionAttention(nn.Module):
    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.proj = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: torch.Tensor, places: torch.Tensor, spans: Spans, impl: str) -> torch.Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)  # (P, heads, D)
        q, k = rope2d(q, k, places)
        return self.proj(attention(q, k, v, spans, impl=impl).flatten(1))


class VisionBlock(Block):
    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.hidden_size, 1e-6)
        self.attn = VisionAttention(cfg)
        self.norm2 = RMSNorm(cfg.hidden_size, 1e-6)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, bias=True)

    def run(self, x: torch.Tensor, places: torch.Tensor, spans: Spans, impl: str) -> torch.Tensor:
        y, x = self.norm2(self.attn(self.norm1(x), places, spans, impl), residual=x)
        return x + self.mlp(y)


class PatchEmbed(nn.Module):
    """A convolution whose stride equals its kernel size: one matrix product per flattened patch."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        kernel = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
        self.proj = nn.Conv3d(cfg.in_channels, cfg.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return F.linear(patches, self.proj.weight.flatten(1))  # (P, hidden)


class Merger(nn.Module):
    """Four neighbouring patches to one token of the language model."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.width = cfg.hidden_size * cfg.spatial_merge_size**2
        self.ln_q = RMSNorm(cfg.hidden_size, 1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, cfg.out_hidden_size)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))  # (P / 4, H)


@lru_cache(maxsize=4096)
def _layout(t: int, h: int, w: int, window: int, merge: int) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """One image: the order of its merge units by window, window sizes in units, and the (h, w) position per patch.

    Patches are sorted by merge unit, so that `merge * merge` consecutive patches form one unit.
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
    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.depth))
        self.merger = Merger(cfg)

    def forward(self, patches: torch.Tensor, grid: Sequence[Sequence[int]], impl: str = "auto") -> torch.Tensor:
        """Image embeddings (P / 4, H).

        Args:
            patches: (P, patch_dim). grid: t, h, w in patches, per image. impl: of `attention`.
        """
        cfg, unit = self.cfg, self.cfg.spatial_merge_size**2
        window = cfg.window_size // cfg.spatial_merge_size // cfg.patch_size
        layouts = [_layout(t, h, w, window, cfg.spatial_merge_size) for t, h, w in grid]
        starts = accumulate((len(order) for order, _, _ in layouts), initial=0)
        order = torch.cat([order + start for (order, _, _), start in zip(layouts, starts, strict=False)])
        order = order.to(patches.device)  # (P / 4,)
        places = torch.cat([at for _, _, at in layouts]).to(patches.device)
        places = places.view(-1, unit, 2)[order].flatten(0, 1)  # (P, 2)
        windows = [size * unit for _, sizes, _ in layouts for size in sizes]
        frames = [h * w for t, h, w in grid for _ in range(t)]

        x = self.patch_embed(patches).view(len(order), unit, -1)[order].flatten(0, 1)  # (P, hidden)
        full, local = _even_spans(frames), _even_spans(windows)
        for index, block in enumerate(self.blocks):
            spans = full if index in cfg.fullatt_block_indexes else local
            x = block(x, places, spans, impl)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return self.merger(x)[back]


def _even_spans(lengths: list[int]) -> Spans:
    """Consecutive spans without causal mask."""
    ends = list(accumulate(lengths))
    return Spans([[end - n, end, end - n, end, 0, 0, 0] for n, end in zip(lengths, ends, strict=True)], ends[-1])


class Qwen25VL(nn.Module):
    """The whole model. `head` is the LM head's weight; the kernels compute logits."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.visual = VisionTower(cfg.vision)
        self.model = LanguageModel(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    @property
    def head(self) -> torch.Tensor:
        """(V, H)"""
        return self.model.embed_tokens.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        attend: Attend,
        images: Images | None = None,
        *,
        impl: str = "auto",
        head: Head | None = None,
    ) -> Any:
        """Normed last hidden states (T, H), or the result of `head`.

        The head is called in here because FSDP gathers a sharded model's weights for the time of its forward pass.

        Args:
            ids: (T,) int64. positions: (3, T) int64, time / height / width.
            attend: attention of the language model, see the module docstring.
            images: None or empty: none. A rank without images runs the tower on a dummy image with zero gradient if
                other ranks have images, since FSDP's collectives need every rank.
            impl: of the vision tower's attention.
            head: (hidden (T, H) in fp32 or wider, weight (V, H)) -> result.
        """
        x = self.model.embed_tokens(ids)  # (T, H)
        if images is not None and len(images.grid):
            # A frozen tower saves no activations.
            trained = any(p.requires_grad for p in self.visual.parameters())
            with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
                embedded = self.visual(images.patches, images.grid, impl)  # (P / 4, H)
            x = x.index_copy(0, images.slots, embedded[: len(images.slots)].to(x.dtype))
        for block in self.model.layers:
            x = block(x, positions, attend)
        if head is None:
            return self.model.norm(x)
        return head(self.model.norm(x, dtype=torch.promote_types(x.dtype, torch.float32)), self.head)
