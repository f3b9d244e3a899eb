"""Code shared by both head ops: input checks, chunks of tokens, matrix products, and softmax statistics in torch.

Rows are shifted by their maximum before exp. Statistics are fp32 (fp64 for fp64 inputs): rounding
logits to bf16 first would cost up to 0.1 nat.

Next: linear_logprob.py, log-probs without logits.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import _triton

IMPLS = "triton", "chunked", "reference"
# Bytes of the (C, V) buffer. On a GPU every chunk reads and writes an fp32 dW, so chunks are large: at V = 151,936 they
# have 2,048 tokens with fp32 logits, 4,096 with bf16. Sized by free memory, sums would depend on other processes.
CHUNK_BYTES = {"cpu": 128_000_000, "cuda": 1_245_000_000}
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # of a block of rows, whose exp is computed at once


def choose_impl(impl: str, hidden: Tensor, weight: Tensor, target: Tensor) -> str:
    """The implementation to run; "auto" is "triton" for CUDA tensors except fp64, else "chunked".

    Raises:
        ValueError: an unknown impl, or tensors that Triton kernels cannot read.
    """
    impl = _triton.resolve_impl(impl, IMPLS, "chunked", hidden)
    if impl == "triton":
        if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f'hidden is {hidden.dtype}: impl="triton" has bfloat16, float16, float32; use "chunked"')
        _triton.check_device(hidden=hidden, weight=weight, target=target)
    return impl


def check_head(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, banned: Sequence[int]) -> None:
    """Refuse inputs of a head op that would give garbage.

    On a CPU the values of targets are checked here. Reading them from a GPU would wait for all kernels in flight, so
    there a device-side assertion checks them and ends the process, as in torch's cross_entropy.

    Raises:
        ValueError: wrong shapes or dtypes (weight has hidden's dtype, or is the fp32 master of a 16-bit one), a sharded
            weight, a target or banned id out of range, a banned target, temperature <= 0.
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
        raise ValueError(f"banned={tuple(banned)}: ids must be in [0, {len(weight)})")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    inside = (target >= 0) & (target < len(weight))  # (N,)
    ids = banned_ids(tuple(banned), target.device)
    allowed = inside if ids is None else torch.isin(target, ids, invert=True)
    if target.device.type != "cpu":
        torch._assert_async((inside & allowed).all(), f"a target is banned, or not in [0, {len(weight)})")
    elif not inside.all():
        raise ValueError(
            f"targets run from {int(target.min())} to {int(target.max())}, the vocabulary has {len(weight)} rows"
        )
    elif not allowed.all():
        raise ValueError(f"a target is one of the banned tokens {tuple(banned)}: it has no log-probability")


def stats_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of log-probs, entropies and their sums."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunks(hidden: Tensor, weight: Tensor, chunk_tokens: int, dtype: torch.dtype) -> list[slice]:
    """Slices of the token axis, whose (C, V) logits of `dtype` fit into CHUNK_BYTES, or of `chunk_tokens`."""
    if chunk_tokens < 0:
        raise ValueError(f"chunk_tokens={chunk_tokens}: at least 1, or 0 to choose by device and vocabulary")
    fit = CHUNK_BYTES.get(hidden.device.type, 0) // (len(weight) * dtype.itemsize)
    return _cut(len(hidden), chunk_tokens or max(16, fit))


def blocks(z: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of a few rows of a chunk: (slice, those rows, scratch of their shape).

    All blocks share one scratch buffer: with a new one per block the heap grew by its size every time.
    """
    slices = _cut(len(z), max(1, BLOCK_ELEMENTS.get(z.device.type, 0) // z.shape[1]))
    scratch = torch.empty_like(z[slices[0]])  # (B, V)
    for rows in slices:
        yield rows, z[rows], scratch[: rows.stop - rows.start]


def _cut(count: int, size: int) -> list[slice]:
    """The fewest slices of range(count) of at most `size` each, of even lengths."""
    size = math.ceil(count / math.ceil(count / size)) if count else 1
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@functools.lru_cache
def banned_ids(banned: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The ids as a tensor for index_fill_, or None without any. Cached: the host waits for each copy to the device."""
    with torch.inference_mode(False):  # training may use it next
        return torch.tensor(banned, device=device) if banned else None


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, which is theirs or wider: for example fp32 logits of bf16 hidden states and weights."""
    a, b, options = _operands(a, b, dtype)
    return torch.mm(a, b, **options)


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b in total's dtype, which is theirs or wider; first: total = a @ b."""
    a, b, options = _operands(a, b, total.dtype)
    torch.addmm(total, a, b, beta=0 if first else 1, out=total, **options)


def _operands(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Operands and options of a product in `dtype`. A GPU's 16-bit products have an fp32 sum, and need no copies."""
    if a.dtype == dtype:
        return a, b, {}
    return (a, b, dict(out_dtype=dtype)) if a.is_cuda else (a.to(dtype), b.to(dtype), {})


def softmax_stats(z: Tensor, target: Tensor, temperature: float, banned: Tensor | None) -> Tensor:
    """Log-probs, entropies and log-sum-exps (3, C) of logits z (C, V), which become z / temperature - max in place."""
    logp, entropy, lse = stats = z.new_empty(3, len(z))  # (C,) each
    for rows, block, e in blocks(z):
        block.div_(temperature)
        if banned is not None:  # finite, so that 0 * z stays 0 in the entropy
            block.index_fill_(1, banned, -1e9)
        top, place = block.max(1, keepdim=True)  # (B, 1) twice
        torch.exp(block.sub_(top), out=e).scatter_(1, place, 0)
        rest = e.sum(1)  # (B,), without the maximum's own 1, beside which a small sum would be rounded away
        lse[rows] = rest.log1p()
        logp[rows] = block.gather(1, target[rows, None]).squeeze(1) - lse[rows]
        entropy[rows] = lse[rows] - e.mul_(block).sum(1) / (1 + rest)  # the maximum has z = 0 and adds nothing
    return stats
