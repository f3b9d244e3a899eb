"""What every Triton kernel's host side needs: where it runs, for which chip, and whether it is interpreted.

Under `TRITON_INTERPRET=1` kernels run on CPU tensors, program after program, in Python: slow, but the
kernels' own code. The interpreter computes garbage in bf16 and truncates when it rounds to it, so
kernels upcast operands of `tl.dot` where `INTERPRETED` (a constexpr), and tests of values are in fp32.

Next: swiglu.py, the smallest kernel.
"""

import contextlib

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def check_device(impl="triton", dense_axes=None, **tensors):
    """Refuse tensors that no Triton kernel could read.

    Args:
        dense_axes: how many last axes must be dense; None: all.

    Raises:
        ValueError: naming the tensor, and what to do.
    """
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


def arch(device):
    """Which column of a kernel's CONFIGS to use: 80, 90, 100, or 0 for the interpreter's small tiles."""
    if device.type != "cuda":
        return 0
    # Consumer Blackwell (12) has neither the tensor memory nor the shared memory of 10, so it gets the tiles of 80.
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def num_sms(device):
    """Streaming multiprocessors; 4 for the interpreter, so that work splits there as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on(device):
    """Launch on the tensors' device, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
