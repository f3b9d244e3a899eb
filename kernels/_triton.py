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


def check_device(**tensors):
    """Refuse tensors that no Triton kernel could read.

    Raises:
        ValueError: naming the tensor, and what to do.
    """
    devices = {str(x.device) for x in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"{', '.join(tensors)} lie on {', '.join(sorted(devices))}: move them to one device")
    for name, x in tensors.items():
        if not x.is_cuda and not INTERPRETED:
            raise ValueError(f'{name} is on {x.device}: impl="triton" needs CUDA tensors; there is a CPU path')
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()} for shape {tuple(x.shape)}: call .contiguous() on it")


def arch(device):
    """Which column of a kernel's CONFIGS to use: 80, 90, 100, or 0 for the interpreter's small tiles."""
    if device.type != "cuda":
        return 0
    major = torch.cuda.get_device_capability(device)[0]
    return 100 if major >= 10 else 90 if major == 9 else 80


def num_sms(device):
    """Streaming multiprocessors; 4 for the interpreter, so that work splits there as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on(device):
    """Launch on the tensors' device, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
