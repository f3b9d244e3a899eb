"""What both head ops share: input checks, cutting tokens into chunks, and a chunk's softmax statistics in torch.

Rows are shifted by their maximum before exp. Statistics are fp32 (fp64 for fp64 inputs): rounding
logits to bf16 first would cost up to 0.1 nat.

Next: linear_logprob.py, linear_loss.py.
"""

import functools
import math

import torch
from torch.distributed.tensor import DTensor

from . import _triton

IMPLS = "auto", "triton", "chunked", "reference"
# Of the (C, V) buffer. On a GPU each chunk reads and writes an fp32 dW, so they are few: at V = 151,936 of 2,048 tokens
# with fp32 logits, of 4,096 with bf16. Not by free memory: sums would then depend on what else is on the GPU.
CHUNK_BYTES = {"cpu": 128_000_000, "cuda": 1_245_000_000}
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # of the rows whose exp is held at a time


def choose_impl(impl, hidden, weight, target):
    """What "auto" stands for: "triton" for CUDA tensors, unless they are fp64, else "chunked".

    Raises:
        ValueError: no such impl, or tensors that Triton kernels cannot read.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: one of {', '.join(IMPLS)}")
    if impl == "auto":
        impl = "triton" if hidden.is_cuda and hidden.dtype != torch.float64 else "chunked"
    if impl == "triton":
        if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f'hidden is {hidden.dtype}: impl="triton" has bfloat16, float16, float32; use "chunked"')
        _triton.check_device(hidden=hidden, weight=weight, target=target)
    return impl


def check_head(hidden, weight, target, temperature, banned):
    """Refuse what would compute garbage. The weight has hidden's dtype, or is the fp32 master of a 16-bit one.

    Values of targets are read where that costs nothing, on a CPU. Elsewhere the device checks them when it comes to
    them, and ends the process as torch's cross_entropy would: to read them here, the host had to wait for all that is
    in flight.

    Raises:
        ValueError: wrong shapes or dtypes, a sharded weight, a target or banned id out of range, a banned target,
            temperature <= 0.
    """
    if isinstance(weight, DTensor) or isinstance(hidden, DTensor):
        raise ValueError("the head's weight is sharded (DTensor): gather it first, as in weight.full_tensor()")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: want (N, H) and (V, H)")
    master = weight.dtype == torch.float32 and hidden.dtype in (torch.bfloat16, torch.float16)
    if hidden.dtype != weight.dtype and not master:
        raise ValueError(
            f"hidden is {hidden.dtype}, weight {weight.dtype}: cast one of them; only 16-bit hidden states go with a "
            "float32 weight"
        )
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target {tuple(target.shape)} {target.dtype}: want ({len(hidden)},) int64")
    if any(not 0 <= token < len(weight) for token in banned):
        raise ValueError(f"banned={tuple(banned)}: ids in [0, {len(weight)}) are wanted")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    outside = (target < 0) | (target >= len(weight))  # (N,)
    forbidden = torch.isin(target, banned_ids(tuple(banned), target.device)) if banned else torch.zeros_like(outside)
    if target.device.type != "cpu":
        torch._assert_async(~(outside | forbidden).any(), f"a target is banned, or not in [0, {len(weight)})")
    elif outside.any():
        raise ValueError(
            f"targets run from {int(target.min())} to {int(target.max())}, the vocabulary has {len(weight)} rows"
        )
    elif forbidden.any():
        raise ValueError(f"a target is one of the banned tokens {tuple(banned)}: it has no log-probability")


def stats_dtype(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunks(hidden, weight, chunk_tokens, dtype):
    """Slices of the token axis, each small enough for its (C, V) buffer of `dtype`."""
    if chunk_tokens < 0:
        raise ValueError(f"chunk_tokens={chunk_tokens}: at least 1, or 0 to choose by device and vocabulary")
    fit = CHUNK_BYTES.get(hidden.device.type, 0) // (len(weight) * dtype.itemsize)
    return _cut(len(hidden), chunk_tokens or max(16, fit))


def blocks(z):
    """(slice, those rows of a chunk, scratch of their shape), a few rows at a time.

    One scratch serves all, since the heap would grow by one a block if each were made anew.
    """
    parts = _cut(len(z), max(1, BLOCK_ELEMENTS.get(z.device.type, 0) // z.shape[1]))
    scratch = torch.empty_like(z[parts[0]])  # (B, V)
    for rows in parts:
        yield rows, z[rows], scratch[: rows.stop - rows.start]


def _cut(count, size):
    """Slices of range(count), as few as can be at no more than `size` each, and then even."""
    size = math.ceil(count / math.ceil(count / size)) if count else 1
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@functools.lru_cache
def banned_ids(banned, device):
    """The ids, a tuple, as a tensor for index_fill_, or None. Made once: the host waits for each copy to the device."""
    with torch.inference_mode(False):  # it may serve training next
        return torch.tensor(banned, device=device) if banned else None


def product(a, b, dtype):
    """a @ b in `dtype`, which is theirs or wider; logits before temperature, for one."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:  # keep the matmul's fp32 accumulator
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def softmax_stats(z, target, temperature, banned):
    """Log-probs, entropies and log-sum-exps (3, C) of logits z (C, V), which become z / temperature - max in place."""
    logp, entropy, lse = stats = z.new_empty(3, len(z))  # (C,) each
    for rows, block, e in blocks(z):
        block.div_(temperature)
        if banned is not None:  # finite, so that 0 * z stays 0 in the entropy
            block.index_fill_(1, banned, -1e9)
        top, place = block.max(1, keepdim=True)  # (B, 1) twice
        torch.exp(block.sub_(top), out=e).scatter_(1, place, 0)
        rest = e.sum(1)  # (B,), without the largest's 1, next to which a small sum would round away
        lse[rows] = rest.log1p()
        logp[rows] = block.gather(1, target[rows, None]).squeeze(1) - lse[rows]
        entropy[rows] = lse[rows] - e.mul_(block).sum(1) / (1 + rest)  # the largest's z is 0 and adds nothing
    return stats
