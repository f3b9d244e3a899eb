"""Host-side helpers of all Triton kernels: choice of the implementation, device checks, chip generation.

Under `TRITON_INTERPRET=1` kernels run on CPU tensors, one program after another, in Python: slow, but the
same code. The interpreter computes garbage in bf16 and truncates instead of rounding to it, so kernels
upcast operands of `tl.dot` if `INTERPRETED` (a constexpr), and tests compare values in fp32.

Next: swiglu.py, the smallest kernel.
"""

import contextlib
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def resolve_impl(impl: str, allowed: Iterable[str], otherwise: str, *tensors: Tensor) -> str:
    """The implementation to run: `impl`, or for "auto" a choice by device and dtype.

    Args:
        allowed: all values of `impl` except "auto".
        otherwise: "auto" is "triton" if the first tensor is on CUDA and none is float64, otherwise this.

    Raises:
        ValueError: an unknown impl.
    """
    if impl == "auto":
        float64 = any(x.dtype == torch.float64 for x in tensors)
        return "triton" if tensors[0].is_cuda and not float64 else otherwise
    if impl not in allowed:
        raise ValueError(f"impl={impl!r}: one of auto, {', '.join(allowed)}")
    return impl


def check_device(impl: str = "triton", dense_axes: int | None = None, **operands: Tensor | None) -> None:
    """Refuse tensors that a Triton kernel cannot read.

    Args:
        dense_axes: number of last axes that must be dense; None: all.
        operands: by name; None is ignored.

    Raises:
        ValueError: with the tensor's name and the cure.
    """
    tensors = {name: x for name, x in operands.items() if x is not None}
    devices = {str(x.device) for x in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"{', '.join(tensors)} lie on {', '.join(sorted(devices))}: move them to one device")
    for name, x in tensors.items():
        if not x.is_cuda and not (INTERPRETED and impl == "triton"):
            raise ValueError(f'{name} is on {x.device}: impl="{impl}" needs CUDA tensors; "auto" takes any')
        dense = x if dense_axes is None else x[(slice(1),) * (x.ndim - dense_axes)]
        if not dense.is_contiguous():
            what = "all axes" if dense_axes is None else f"the last {dense_axes}"
            raise ValueError(
                f"{name} {tuple(x.shape)} has strides {x.stride()}: {what} must be dense, call .contiguous() on it"
            )


def arch(device: torch.device) -> int:
    """The key of a kernel's CONFIGS: 80, 90, 100, or 0 for the interpreter's small tiles."""
    if device.type != "cuda":
        return 0
    # Consumer Blackwell (12) has neither the tensor memory nor the shared memory of 10, so it gets the tiles of 80.
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors; 4 for the interpreter, so that it splits work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launch on the tensors' device, even if another one is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
