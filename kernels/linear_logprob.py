"""Log-probability and entropy of sampled tokens; the (N, V) logits are never allocated.

    z = hidden @ weight.T / temperature        (banned columns: -inf)
    logp[t] = z[t, y[t]] - lse(z[t]),    entropy[t] = lse(z[t]) - sum_v p[t, v] z[t, v]

`impl="triton"` never writes logits to memory. A program owns a tile of tokens and loops over a split of the
vocabulary; it adds each tile of logits, an fp32 accumulator, to running sums of the rows (formulas: _rows.py).
A small second kernel merges the splits in a fixed order, so equal inputs give equal bits.

`impl="chunked"` is plain torch, one chunk of tokens at a time: the extra memory is one (C, V) buffer for any N,
and the temporaries of its statistics cover a few rows, which stay in cache.

Next: _rows.py, statistics and gradients of a row of logits.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _triton
from ._head import banned_ids, check_head, choose_impl, chunks, product, softmax_stats, stats_dtype
from ._rows import LOG2E, LOWEST, depth, lift, with_target

CONFIGS = {
    0: dict(BLOCK_N=16, BLOCK_V=32, BLOCK_H=16, TMA=True, num_warps=4, num_stages=2),
    80: dict(BLOCK_N=128, BLOCK_V=128, BLOCK_H=64, TMA=False, num_warps=8, num_stages=3),
    90: dict(BLOCK_N=128, BLOCK_V=256, BLOCK_H=64, TMA=True, num_warps=8, num_stages=3),
    100: dict(BLOCK_N=128, BLOCK_V=128, BLOCK_H=64, TMA=True, num_warps=8, num_stages=4),
}
RAGGED_CONFIG = dict(BLOCK_N=64, BLOCK_V=64, BLOCK_H=32, TMA=False, num_warps=4, num_stages=2)  # unaligned rows
FP32_CONFIG = dict(BLOCK_N=32, BLOCK_V=64, BLOCK_H=16, TMA=False, num_warps=4, num_stages=2)  # without tensor cores
GROUP = 32  # token tiles that share slabs of the weight: at H = 2048 their bf16 rows, 17 MB, stay in L2


def linear_logprob_ref(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, banned: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The definition, with all logits in memory; differentiable."""
    if hidden.dtype != weight.dtype:  # use the values of the rounded weight, but do not round its gradient
        hidden, weight = hidden.to(weight.dtype), weight + (weight.to(hidden.dtype) - weight).detach()
    logits = (hidden @ weight.T).to(stats_dtype(hidden)) / temperature  # (N, V)
    if banned:
        logits = logits.index_fill(1, torch.tensor(banned, device=logits.device), float("-inf"))
    logp = logits.log_softmax(-1)  # (N, V)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)
    return logp.gather(1, target[:, None]).squeeze(1), entropy  # (N,), (N,)


@triton.jit(do_not_specialize=["N", "splits", "mask_from"])
def _logprob_partials(x, w, target_ptr, allowed_ptr, partials_ptr, N, V, H, mask_from, splits, scale,
                      GROUP: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, TMA: tl.constexpr,
                      PRECISION: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Largest logit, rest, moment and target's logit of every row in every split: partials (splits, 4, N)."""
    # All token tiles of a group come before the next split, so programs that run together read the same slabs.
    pid = tl.program_id(0)
    first = pid // (GROUP * splits) * GROUP
    members = tl.minimum(tl.cdiv(N, BLOCK_N) - first, GROUP)
    tile_n = first + pid % (GROUP * splits) % members
    split = pid % (GROUP * splits) // members

    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    inside = tl.minimum(rows, N - 1)  # rows past the end repeat the last one and are not stored
    y = tl.load(target_ptr + inside).to(tl.int32)  # (BLOCK_N,)
    hs = tl.arange(0, BLOCK_H)
    top = tl.full((BLOCK_N,), LOWEST, tl.float32)
    rest, moment, z_y = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    tiles = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(split * tiles // splits, (split + 1) * tiles // splits, flatten=True):
        cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        w_rows = tl.minimum(cols, V - 1).to(tl.int64)
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for h in range(0, H, BLOCK_H):
            if TMA:
                a, b = x.load([tile_n * BLOCK_N, h]), w.load([tile * BLOCK_V, h])
            else:
                a = tl.load(x + inside[:, None] * H + h + hs[None, :], mask=h + hs[None, :] < H, other=0.0)
                b = tl.load(w + w_rows[:, None] * H + h + hs[None, :], mask=h + hs[None, :] < H, other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            z = tl.dot(a, b.T, z, input_precision=PRECISION)
        if tl.max((y // BLOCK_V == tile).to(tl.int32), 0):  # few tiles contain the target of any row
            hit = cols[None, :] == y[:, None]
            z_y += tl.sum(tl.where(hit, z, 0.0), 1)
            z = tl.where(hit, float("-inf"), z)
        if (tile + 1) * BLOCK_V > mask_from:  # only the last tiles need the table and its registers
            allowed = tl.load(allowed_ptr + cols, mask=cols < V, other=0)
            z = tl.where(allowed[None, :] != 0, z, float("-inf"))
        new = tl.maximum(top, tl.max(z, 1))
        rest, moment = lift(top, new, rest, moment, scale)
        d = depth(z, new[:, None], scale)
        e = tl.exp2(d)
        rest += tl.sum(e, 1)
        moment += tl.sum(d * e, 1)
        top = new
    out = partials_ptr + split.to(tl.int64) * 4 * N + rows
    tl.store(out, top, mask=rows < N)
    tl.store(out + N, rest, mask=rows < N)
    tl.store(out + 2 * N, moment, mask=rows < N)
    tl.store(out + 3 * N, z_y, mask=rows < N)


@triton.jit(do_not_specialize=["N", "splits"])
def _merge_partials(partials_ptr, logp_ptr, entropy_ptr, N, splits, scale, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    rest, moment, z_y = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    for split in range(splits):
        part = partials_ptr + split * 4 * N + rows
        part_top = tl.load(part, mask=rows < N, other=0.0)
        part_rest = tl.load(part + N, mask=rows < N, other=0.0)
        part_moment = tl.load(part + 2 * N, mask=rows < N, other=0.0)
        z_y += tl.load(part + 3 * N, mask=rows < N, other=0.0)  # 0 in all splits except the target's
        new = tl.maximum(top, part_top)
        rest, moment = lift(top, new, rest, moment, scale)
        part_rest, part_moment = lift(part_top, new, part_rest, part_moment, scale)
        rest, moment, top = rest + part_rest, moment + part_moment, new
    logp, entropy, _, _, _ = with_target(top, rest, moment, z_y, scale)
    tl.store(logp_ptr + rows, logp, mask=rows < N)
    tl.store(entropy_ptr + rows, entropy, mask=rows < N)


def count_splits(token_tiles: int, vocab_tiles: int, sms: int) -> int:
    """Number of splits of the vocabulary, chosen so that the last wave of programs ends soonest.

    The least number that fills all SMs with one group of token tiles, or up to four times as many.
    """
    least = max(1, sms // min(token_tiles, GROUP))
    choices = range(min(least, vocab_tiles), min(4 * least, vocab_tiles) + 1)
    return min(choices, key=lambda s: (triton.cdiv(token_tiles * s, sms) * triton.cdiv(vocab_tiles, s), s))


def _logprob_triton(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, banned: Sequence[int]
) -> tuple[Tensor, Tensor]:
    (N, H), V, device = hidden.shape, len(weight), hidden.device
    logp, entropy = torch.empty(2, N, dtype=torch.float32, device=device)  # (N,) each
    if not N:
        return logp, entropy
    arch = _triton.arch(device)
    config = FP32_CONFIG if arch and hidden.dtype == torch.float32 else CONFIGS[arch]
    # Bulk copies need rows aligned to 16 bytes, and without alignment large tiles spill. No model has such rows.
    if any(t.data_ptr() % 16 for t in (hidden, weight)) or H * hidden.element_size() % 16:
        config = config | dict(TMA=False) if not arch or hidden.dtype == torch.float32 else RAGGED_CONFIG
    x: Any = hidden
    w: Any = weight
    if config["TMA"]:
        x = TensorDescriptor.from_tensor(hidden, [config["BLOCK_N"], config["BLOCK_H"]])
        w = TensorDescriptor.from_tensor(weight, [config["BLOCK_V"], config["BLOCK_H"]])
    allowed = torch.ones(V, dtype=torch.int8, device=device)  # (V,)
    if (ids := banned_ids(tuple(banned), device)) is not None:
        allowed.index_fill_(0, ids, 0)
    token_tiles = triton.cdiv(N, config["BLOCK_N"])
    splits = count_splits(token_tiles, triton.cdiv(V, config["BLOCK_V"]), _triton.num_sms(device))
    partials = torch.empty(splits, 4, N, dtype=torch.float32, device=device)  # (splits, 4, N)
    with _triton.on(device):
        _logprob_partials[(token_tiles * splits,)](
            x, w, target, allowed, partials, N, V, H, min([V, *banned]), splits, LOG2E / temperature, GROUP,
            PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32", UPCAST=_triton.INTERPRETED, **config,
        )  # fmt: skip
        _merge_partials[(triton.cdiv(N, 128),)](
            partials, logp, entropy, N, splits, LOG2E / temperature, BLOCK=128, num_warps=4
        )
    return logp, entropy


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = 1.0, banned: Sequence[int] = (),
    chunk_tokens: int = 0, impl: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability of `target` and entropy of its distribution; no gradient.

    Args:
        hidden: (N, H) last hidden states; for "triton" fp32, bf16 or fp16, contiguous.
        weight: (V, H) head, same dtype, or fp32 with 16-bit hidden states (it is rounded to theirs); not a DTensor.
        target: (N,) int64 in [0, V), none of them banned.
        temperature: of the sampler, > 0.
        banned: token ids that the sampler may not draw, excluded from the distribution.
        chunk_tokens: C of "chunked"; 0: chosen by device and V.
        impl: "auto" ("triton" for CUDA tensors except fp64, else "chunked"), "triton", "chunked" or "reference".

    Returns:
        logp, entropy: (N,) fp32 (fp64 for fp64 inputs), nats.

    Raises:
        ValueError: see `check_head` and `choose_impl`.
    """
    check_head(hidden, weight, target, temperature, banned)
    impl = choose_impl(impl, hidden, weight, target)
    # The caller's autocast would round the logits to 16 bits.
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        if impl == "reference":
            return linear_logprob_ref(hidden, weight, target, temperature, banned)
        weight = weight.to(hidden.dtype)
        if impl == "triton":
            return _logprob_triton(hidden, weight, target, temperature, banned)
        dtype, ids = stats_dtype(hidden), banned_ids(tuple(banned), hidden.device)
        logp = torch.empty(len(hidden), dtype=dtype, device=hidden.device)  # (N,)
        entropy = torch.empty_like(logp)  # (N,)
        for rows in chunks(hidden, weight, chunk_tokens, dtype):
            z = product(hidden[rows], weight.T, dtype)  # (C, V)
            logp[rows], entropy[rows] = softmax_stats(z, target[rows], temperature, ids)[:2]
            del z  # free it before the next chunk's logits are computed
    return logp, entropy
