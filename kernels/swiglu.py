"""The gated activation of both towers' MLPs.

    out = silu(gate) * up,   silu(x) = x s,  s = sigmoid(x)
    dup = dout silu(gate),   dgate = dout up s (1 + gate (1 - s))

Only gate and up are saved; s is recomputed, so a layer holds two tensors of (T, intermediate) instead of torch's three.
Each direction is one kernel over the elements, of any shape: no row is padded to a power of two.

`impl="liger"` is Liger's, for comparison. Its backward overwrites the saved gate and up with their gradients, which
autograd does not see: half the memory, but a second backward through the same graph, or any other reader of gate or up,
gets gradients instead of activations, without an error. Triton's interpreter cannot run it because of its scalars, so
it cannot be tested without a GPU. Hence "auto" never selects it.

Source: Shazeer 2020 (arXiv 2002.05202), eq. 6.

Next: rmsnorm.py, a reduction over a row.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _triton

# Elements per program, warps: each thread loads 2 x 16 bytes of bf16.
CONFIGS = {0: (32, 1), 80: (2048, 4), 90: (2048, 4), 100: (2048, 4)}


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The definition. In bf16 silu(gate) is rounded before the product."""
    return F.silu(gate) * up


@triton.jit
def _forward_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(out.dtype.element_ty).to(tl.float32)  # rounded as in the reference
    tl.store(out + at, (silu * u).to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _backward_kernel(dout, gate, up, dgate, dup, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dout + at, mask=at < size, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate + at, (d * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), mask=at < size)
    tl.store(dup + at, (d * g * s).to(dup.dtype.element_ty), mask=at < size)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _launch(_forward_kernel, gate, up, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _launch(_backward_kernel, dout.contiguous(), gate, up, dgate, dup)  # a sum's gradient has strides of 0
        return dgate, dup


def _launch(kernel: Any, *tensors: Tensor) -> None:
    size, device = tensors[0].numel(), tensors[0].device
    block, warps = CONFIGS[_triton.arch(device)]
    with _triton.on(device):
        kernel[(triton.cdiv(size, block),)](*tensors, size, BLOCK=block, num_warps=warps)


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up, differentiable in both.

    Args:
        gate, up: one shape (T, intermediate), one dtype; for "triton" contiguous and not fp64.
        impl: "auto" ("triton" for CUDA tensors except fp64, else "reference"), "triton", "reference", or "liger",
            whose backward overwrites gate and up.

    Returns:
        Like gate.

    Raises:
        ValueError: gate and up do not match, an unknown impl, or one that does not support them.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}: want one shape and one dtype"
        )
    impl = _triton.resolve_impl(impl, ("triton", "liger", "reference"), "reference", gate)
    if impl == "reference":
        return swiglu_ref(gate, up)
    if gate.dtype == torch.float64:
        raise ValueError(f'gate and up are float64: impl="{impl}" computes in float32, use impl="reference"')
    if impl == "triton":
        _triton.check_device(gate=gate, up=up)
        return _SwiGLU.apply(gate, up)
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        raise ValueError('impl="liger" needs the package: pip install liger-kernel') from error
    _triton.check_device("liger", gate=gate, up=up)
    return LigerSiLUMulFunction.apply(gate, up)
