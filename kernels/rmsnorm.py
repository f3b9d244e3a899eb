"""RMSNorm, with an optional residual add before it.

    s = x + residual                          (s = x without one)
    n = s r,   r = 1 / sqrt(mean(s^2) + eps)  in fp32, then rounded to s's dtype
    y = weight n

With m = weight dy, by row:
    ds = r (m - n mean(m n)) + ds_upstream,   dx = dresidual = ds,   dweight = sum over rows of dy n

Saved: s, weight and r. In backward a fixed number of programs loop over the rows, each sums its part of dweight, and
torch adds the parts: no atomics, so equal inputs give equal bits.

Dtypes follow torch's promotion, because under autocast they differ: the language model's residual stream is fp32 and
its branches are bf16; the vision tower's stream is bf16 and all weights are fp32. The kernels round y to `dtype` and
dx to x's dtype as they write: a cast after the kernel would read and write the tensor once more.
Liger's functions return everything in x's dtype, so a bf16 branch would silently round the fp32 residual stream to bf16
at every layer. Its fused add also launches on the current device instead of the tensors', and neither runs under
Triton's interpreter. Hence "auto" never selects it; `impl="liger"`, for comparison, requires one dtype.

Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4.

Next: mrope.py, rotary positions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _triton

MAX_SIZE = 16384  # of H: a row is held in registers
# Columns per warp: 8 per thread are 16 bytes of bf16. Programs per SM in backward: at H = 2,048 they have 256 threads
# of up to 80 registers, and three of them load 60 KB at once.
CONFIGS = {0: (256, 1), 80: (256, 3), 90: (256, 3), 100: (256, 3)}


def rmsnorm_ref(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, statistics in fp32 or better."""
    s = x if residual is None else x + residual
    n = s.float() if s.dtype.itemsize < 4 else s
    n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    y = weight * n.to(s.dtype)
    y = y if dtype is None else y.to(dtype)
    return y if residual is None else (y, s)


@triton.jit
def _forward_kernel(
    x, residual, weight, y, s, r, EPS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr, ADD: tl.constexpr
):
    """One row. Without a residual, s is x."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    at, mask = row * H + cols, cols < H
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)  # (H,)
    if ADD:
        v += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        total = v.to(s.dtype.element_ty)
        tl.store(s + at, total, mask=mask)
        v = total.to(tl.float32)  # normalize the rounded sum, which the next layer gets
    rstd = tl.rsqrt(tl.sum(v * v, 0) / H + EPS)
    tl.store(r + row, rstd)
    n = (v * rstd).to(s.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, (w * n).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy, ds, s, weight, r, dx, dresidual, dweight, T,
    H: tl.constexpr, BLOCK_H: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th row, and the sum of dweight over these. BOTH: dx and dresidual differ in dtype."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    mask = cols < H
    w = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_H,), tl.float32)
    for row in range(program, T, tl.num_programs(0)):
        at = row * H + cols
        d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)  # (H,)
        rstd = tl.load(r + row)
        n = tl.load(s + at, mask=mask, other=0.0).to(tl.float32) * rstd  # (H,)
        m = w * d
        dv = rstd * (m - n * (tl.sum(m * n, 0) / H))
        if ADD:
            dv += tl.load(ds + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, dv.to(dx.dtype.element_ty), mask=mask)
        if BOTH:
            tl.store(dresidual + at, dv.to(dresidual.dtype.element_ty), mask=mask)
        if WEIGHT:
            dw += d * n.to(s.dtype.element_ty).to(tl.float32)
    if WEIGHT:
        tl.store(dweight + program * H + cols, dw, mask=mask)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        T, H = x.shape
        s = x
        if residual is not None:
            s = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
        dtype = dtype or torch.promote_types(s.dtype, weight.dtype)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)  # (T, H)
        r = torch.empty(T, dtype=torch.float32, device=x.device)
        with _triton.on(x.device):
            _forward_kernel[(T,)](x, residual, weight, y, s, r, EPS=eps, ADD=residual is not None, **_shape(x))
        ctx.save_for_backward(s, weight, r)
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return y if residual is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        s, weight, r = ctx.saved_tensors
        (T, H), (x_dtype, residual_dtype) = s.shape, ctx.dtypes
        # The upstream gradient of a sum has strides of 0.
        dy, ds = dy.contiguous(), None if ds is None else ds.contiguous()
        programs = min(T, CONFIGS[_triton.arch(s.device)][1] * _triton.num_sms(s.device))
        dx = torch.empty_like(s, dtype=x_dtype)  # (T, H)
        both = residual_dtype not in (None, x_dtype)
        dresidual = torch.empty_like(s, dtype=residual_dtype) if both else None  # (T, H)
        partial = torch.empty(programs, H, dtype=torch.float32, device=s.device) if ctx.needs_input_grad[1] else None
        with _triton.on(s.device):
            _backward_kernel[(programs,)](
                dy, ds, s, weight, r, dx, dresidual, partial, T, ADD=ds is not None, WEIGHT=partial is not None,
                BOTH=both, **_shape(s),
            )  # fmt: skip
        dweight = None if partial is None else partial.sum(0).to(weight.dtype)
        return dx, dweight, None, dresidual if both or residual_dtype is None else dx, None


def _shape(x: Tensor) -> dict[str, int]:
    """Constants of a launch."""
    block = triton.next_power_of_2(x.shape[1])
    warps = block // CONFIGS[_triton.arch(x.device)][0]
    return dict(H=x.shape[1], BLOCK_H=block, num_warps=min(32, max(1, warps)))


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """weight * s / sqrt(mean(s^2) + eps) with s = x + residual, differentiable in all three tensors.

    Args:
        x: (T, H); weight: (H,); residual: (T, H) or None. Dtypes may differ; for "triton" contiguous and not fp64.
        eps: a constant of the compiled kernel.
        dtype: of y; None: that of weight * s.
        impl: "auto" ("triton" for CUDA tensors except fp64, else "reference"), "triton", "reference", or "liger".

    Returns:
        y (T, H) in `dtype`; with a residual (y, s), where s is the next residual.

    Raises:
        ValueError: shapes that do not match, an unknown impl, or one that does not support these tensors.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:] or residual is not None and residual.shape != x.shape:
        more = "" if residual is None else f", residual {tuple(residual.shape)}"
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}{more}: want (T, H), (H,) and like x")
    tensors = dict(x=x, weight=weight) | ({} if residual is None else dict(residual=residual))
    impl = _triton.resolve_impl(impl, ("triton", "liger", "reference"), "reference", *tensors.values())
    if impl == "reference":
        return rmsnorm_ref(x, weight, eps, residual, dtype)
    if any(t.dtype == torch.float64 for t in tensors.values()):
        raise ValueError(f'{", ".join(tensors)}: one is float64, impl="{impl}" computes in float32, use "reference"')
    if x.shape[1] > MAX_SIZE:
        raise ValueError(f'H={x.shape[1]}: impl="{impl}" holds rows of up to {MAX_SIZE}, use "reference"')
    if impl == "liger":
        return _liger(x, weight, eps, residual, dtype)
    _triton.check_device(x=x, weight=weight, residual=residual)
    return _RMSNorm.apply(x, weight, eps, residual, dtype)


def _liger(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dtype: torch.dtype | None
) -> Tensor | tuple[Tensor, Tensor]:
    if {t.dtype for t in (x, weight, residual) if t is not None} | {dtype or x.dtype} != {x.dtype}:
        raise ValueError(f'x is {x.dtype}: impl="liger" rounds all to it, so weight, residual and y must be as well')
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError as error:
        raise ValueError('impl="liger" needs the package: pip install liger-kernel') from error
    _triton.check_device("liger", x=x, weight=weight, residual=residual)
    with _triton.on(x.device):
        # in_place=False: otherwise dx overwrites the upstream gradient, which may have other readers.
        if residual is None:
            return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False, True)
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)
