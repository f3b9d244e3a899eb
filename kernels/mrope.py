"""Rotary embedding for 3-D positions (`mrope`), and the vision tower's 2-D one (`rope2d`).

    angle[t, j] = positions[axis(j), t] * freq[j],    j < D / 2
    (a, b) -> (a cos - b sin, b cos + a sin)          a, b: columns j and j + D / 2 of a head

Columns go to the axes by section: in `mrope` freq[j] = theta^(-2j / D) over all of them, in `rope2d` rows turn the
first half of the D / 2 columns and columns the second, each half with the frequencies theta^(-4j / D).

A rotation's transpose is the rotation by minus the angle, so backward is the same kernel with -sin, and q and k are
not saved. They are still not rotated in place: they are views of a Linear's output (which a fused qkv shares with v),
and autograd does not see writes by Triton, so saved values would be overwritten without an error.

Source: Su et al. 2021 (arXiv 2104.09864), eq. 34; Qwen2-VL (arXiv 2409.12191), section 2.1, M-RoPE.

Next: attention.py, packed attention with shared prefixes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _triton

# Bytes of each column in a program, warps: at 64 columns a thread then loads 16 bytes at once.
CONFIGS = {0: (16, 1), 80: (32, 4), 90: (32, 4), 100: (32, 4)}


def rotary_ref(
    q: Tensor, k: Tensor, positions: Tensor, freq: Tensor, section: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The definition: column j rotates by the angle positions[axis(j)] * freq[j]."""
    axis = torch.tensor([i for i, columns in enumerate(section) for _ in range(columns)], device=q.device)  # (D / 2,)
    angle = positions[axis].T.to(freq.dtype) * freq  # (T, D / 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # (T, 1, D / 2) each

    def rotate(x: Tensor) -> Tensor:
        a, b = x.to(cos.dtype).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    return rotate(q), rotate(k)


@triton.jit
def _cos_sin(angle):
    """cos and sin of fp32 angles to fp32 rounding, for angles up to 2^24.

    tl.sin and tl.cos compile to libdevice's, which are as exact (not sin.approx). But each reduces the angle again, and
    above 105,615 it loops over an array in local memory, which costs stack. In fp64 the reduction takes two lines.
    """
    wide = angle.to(tl.float64)
    quarter_turns = tl.floor(wide * 0.6366197723675814 + 0.5)  # 2 / pi
    r = (wide - quarter_turns * 1.5707963267948966).to(tl.float32)  # in [-pi / 4, pi / 4]
    z = r * r
    # Taylor series; the first omitted terms are below 2^-25, half a bit of the result.
    sin = r + r * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cos = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320))))
    quadrant = quarter_turns.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    return (
        tl.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0) * tl.where(odd, sin, cos),
        tl.where(quadrant >= 2, -1.0, 1.0) * tl.where(odd, cos, sin),
    )


@triton.jit
def _turn_heads(
    x, out, token_stride, head_stride, tokens, cols, mask, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr
):
    first = x + tokens[:, None] * token_stride + cols
    to = out + tokens[:, None] * (HEADS * 2 * HALF) + cols
    for head in range(HEADS):
        at = first + head * head_stride
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # (T, D / 2) of the block
        b = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
        tl.store(to + head * 2 * HALF, (a * cos - b * sin).to(out.dtype.element_ty), mask=mask)
        tl.store(to + head * 2 * HALF + HALF, (b * cos + a * sin).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rotary_kernel(
    q, k, q_out, k_out, positions, freq, q_token, q_head, k_token, k_head, position_axis, position_token, T,
    SIGN: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
    SECOND: tl.constexpr, THIRD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """A block of tokens, all heads: the cos and sin of an angle are computed once."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (tokens[:, None] < T) & (cols < HALF)
    at, kept = positions + tokens * position_token, tokens < T
    position = tl.load(at, mask=kept, other=0)[:, None]  # (T, 1) of the block, then (T, D / 2)
    position = tl.where(cols < SECOND, position, tl.load(at + position_axis, mask=kept, other=0)[:, None])
    if THIRD < HALF:
        position = tl.where(cols < THIRD, position, tl.load(at + 2 * position_axis, mask=kept, other=0)[:, None])
    # The product is rounded to fp32 before cos and sin, as in the reference: at 100,000 this rounding is visible.
    cos, sin = _cos_sin(position.to(tl.float32) * tl.load(freq + cols, mask=cols < HALF, other=0.0))
    _turn_heads(q, q_out, q_token, q_head, tokens, cols, mask, cos, SIGN * sin, Q_HEADS, HALF)
    _turn_heads(k, k_out, k_token, k_head, tokens, cols, mask, cos, SIGN * sin, K_HEADS, HALF)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, positions: Tensor, freq: Tensor, section: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(positions, freq)
        ctx.section = section
        return _launch(q, k, positions, freq, section, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        # The upstream gradient of a sum has strides of 0.
        dq, dk = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk))
        positions, freq = ctx.saved_tensors
        return *_launch(dq, dk, positions, freq, ctx.section, -1), None, None, None


def _launch(
    q: Tensor, k: Tensor, positions: Tensor, freq: Tensor, section: tuple[int, ...], sign: int
) -> tuple[Tensor, Tensor]:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))  # contiguous
    (T, q_heads, dim), k_heads = q.shape, k.shape[1]
    width, warps = CONFIGS[_triton.arch(q.device)]
    block = width // q.element_size()
    second, third = section[0], section[0] + section[1]  # first columns of these axes
    with _triton.on(q.device):
        _rotary_kernel[(triton.cdiv(T, block),)](
            q, k, q_out, k_out, positions, freq, *q.stride()[:2], *k.stride()[:2], *positions.stride(), T,
            SIGN=sign, Q_HEADS=q_heads, K_HEADS=k_heads, HALF=dim // 2, SECOND=second, THIRD=third,
            BLOCK_T=block, BLOCK_HALF=triton.next_power_of_2(dim // 2), num_warps=warps,
        )  # fmt: skip
    return q_out, k_out


def mrope(
    q: Tensor, k: Tensor, positions: Tensor, *, theta: float, section: Sequence[int], impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their tokens' 3-D positions, differentiable in q and k.

    Args:
        q: (T, Hq, D); k: (T, Hkv, D), one dtype; any strides but unit stride in D, as in slices of a fused qkv.
        positions: (3, T) int32 or int64, time / height / width, of magnitude below 2^24.
        theta: base of the frequencies.
        section: number of the D / 2 columns that rotate by time, height and width.
        impl: "auto" ("triton" for CUDA tensors except fp64, else "reference"), "triton" or "reference".

    Returns:
        Rotated q and k: new contiguous tensors in their dtype; cos, sin and products are fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not match each other, or an unknown impl.
    """
    if len(section) != 3 or min(section) < 0 or 2 * sum(section) != q.shape[-1]:
        raise ValueError(f"section {tuple(section)}: want three counts that add up to D / 2, D={q.shape[-1]}")
    return _rotary(q, k, positions, _freq(theta, q.shape[-1] // 2, 1, _dtype(q), q.device), tuple(section), impl)


def rope2d(
    q: Tensor, k: Tensor, places: Tensor, *, theta: float = 10000.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys of the vision tower by their patches' rows and columns, differentiable in q and k.

    Args:
        q, k: (P, heads, D), as in `mrope`.
        places: (P, 2) int32 or int64, row and column of each patch.
        theta, impl: as in `mrope`.

    Returns:
        As `mrope`.

    Raises:
        ValueError: as `mrope`, or D is no multiple of 4.
    """
    if q.shape[-1] % 4:
        raise ValueError(f"q {tuple(q.shape)}: D={q.shape[-1]} must be a multiple of 4")
    if places.ndim != 2:
        raise ValueError(f"places {tuple(places.shape)}: want (P, 2), row and column")
    quarter = q.shape[-1] // 4
    return _rotary(q, k, places.T, _freq(theta, quarter, 2, _dtype(q), q.device), (quarter, quarter), impl)


def _rotary(
    q: Tensor, k: Tensor, positions: Tensor, freq: Tensor, section: tuple[int, ...], impl: str
) -> tuple[Tensor, Tensor]:
    if q.ndim != 3 or k.ndim != 3 or k.shape[::2] != q.shape[::2] or q.dtype != k.dtype:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}: want (T, Hq, D), (T, Hkv, D), one dtype"
        )
    if positions.shape != (len(section), len(q)) or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions of {positions.shape[1:].numel()} tokens on {len(positions)} axes, {positions.dtype}: "
            f"want {len(q)} on {len(section)}, int32 or int64"
        )
    if _triton.resolve_impl(impl, ("triton", "reference"), "reference", q) == "reference":
        return rotary_ref(q, k, positions, freq, section)
    if q.dtype == torch.float64:
        raise ValueError('q and k are float64: impl="triton" computes in float32, use impl="reference"')
    _triton.check_device(dense_axes=1, q=q, k=k)
    _triton.check_device(dense_axes=0, q=q, positions=positions)
    return _Rotary.apply(q, k, positions, freq, section)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@lru_cache
def _freq(theta: float, count: int, copies: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(copies * count,) angles per position.

    fp32 powers, computed on the CPU: as in the published models, and equal on all devices. At position 100,000 one bit
    of a frequency changes a column's angle by 0.006.
    """
    with torch.inference_mode(False):  # a later caller may save it for backward
        return (1 / theta ** (torch.arange(count, dtype=dtype) / count)).repeat(copies).to(device)
