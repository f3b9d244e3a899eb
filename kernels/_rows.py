"""Row kernels of the head: statistics and gradient of a chunk's logits, one program a row, in place.

Of a row's raw logits z, with target y and temperature T, everything is measured from the largest, m, in bits:
    d_j = (z_j - m) log2(e) / T <= 0,   e_j = 2^d_j,   rest = sum_{j != y} e_j,   total = rest + e_y
    logp    = ln(e_y / total) = -log1p(rest / e_y)
    entropy = ln(total) - ln(2) sum_j d_j e_j / total                     two terms that cannot cancel
The target stays out of the sums until the end, since beside a nearly certain target's e_y = 1 the others would
round away. The gradient of l(logp, entropy), with g = dl/dlogp, h = dl/dentropy and p_j = e_j / total:
    dz_j = -p_j (g + h (ln p_j + entropy)) / T
    dz_y = (g rest / total - h p_y (logp + entropy)) / T                  1 - p_y is rest / total, not a difference

`row_stats` and `row_dlogits` leave room for any objective in between; `row_objective` does all in one launch, with
the objective in registers.

Next: linear_loss.py, which puts matmuls around them.
"""

import torch
import triton
import triton.language as tl

from . import _triton

CONFIGS = {  # BLOCK columns at a time: 16 bytes of fp32 a thread take 32 registers, so four programs fill an SM
    0: dict(BLOCK=64, num_warps=1),
    80: dict(BLOCK=2048, num_warps=16),
    90: dict(BLOCK=2048, num_warps=16),
    100: dict(BLOCK=2048, num_warps=16),
}
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where maxima start, below any logit: finite, so that no difference is inf - inf
DEEP = tl.constexpr(-200.0)  # 2^-200 is 0 in fp32, and -200 * 0 is 0, where -inf * 0 were NaN


@triton.jit
def depth(z, top, scale):
    """d of logits z no larger than `top`; -inf becomes DEEP, NaN stays."""
    d = (z - top) * scale
    return tl.where(d < DEEP, DEEP, d)


@triton.jit
def lift(top, new, rest, moment, scale):
    """sum e and sum d e measured from `top`, measured from the larger `new` instead."""
    down = depth(top, new, scale)
    factor = tl.exp2(down)
    return factor * rest, factor * (moment + down * rest)


@triton.jit
def log1p(x):
    """ln(1 + x) for 0 <= x <= 1 to fp32's last digit: 2 artanh(t) at t = x / (2 + x) <= 1/3, to t^13."""
    t = x / (2 + x)
    s = t * t
    return 2 * t * (1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13)))))))


@triton.jit
def with_target(top, rest, moment, z_y, scale):
    """logp, entropy, m, rest, total of rows, from the sums over all columns but the target's."""
    peak = tl.maximum(top, z_y)
    rest, moment = lift(top, peak, rest, moment, scale)
    d = (z_y - peak) * scale  # not cut at DEEP: it is the log-prob of an unlikely target
    e = tl.exp2(d)
    total = e + rest
    likely = e >= rest
    surprise = tl.where(likely, log1p(rest / tl.maximum(e, rest)), tl.log(total) - LN2 * d)
    lse = tl.where(likely, surprise + LN2 * d, tl.log(total))
    return -surprise, lse - LN2 * (moment + d * e) / total, peak, rest, total


@triton.jit
def _stats(z_row, y, V, scale, BLOCK: tl.constexpr):
    """`with_target` of one row."""
    # Here, before the barriers of the sums below: once a warp is past them it may write dz over this very place.
    z_y = tl.load(z_row + y).to(tl.float32)
    top = tl.full((), LOWEST, tl.float32)
    rest, moment = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)  # summed over lanes at the end
    for start in tl.range(0, V, BLOCK, num_stages=2):  # the next columns travel while these are summed
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        z = tl.where(cols == y, float("-inf"), z)
        new = tl.maximum(top, tl.max(z, 0))
        rest, moment = lift(top, new, rest, moment, scale)
        d = depth(z, new, scale)
        e = tl.exp2(d)
        rest += e
        moment += d * e
        top = new
    return with_target(top, tl.sum(rest, 0), tl.sum(moment, 0), z_y, scale)


@triton.jit
def _dlogits(z_row, dz_row, y, V, scale, logp, entropy, peak, rest, total, g, h, BLOCK: tl.constexpr,
             HALVED: tl.constexpr):  # fmt: skip
    """dz over z. HALVED: z is fp32, dz 16-bit in the back half of the same row (`_halves`).

    The last columns come first, since they are the ones still in L2. A HALVED tile that starts at column c reads bytes
    from 4c on and writes bytes from 2V + 2c > 4c on: never what an earlier column still needs, but perhaps what
    another thread has yet to read of this tile or of one before it, hence the barrier between loads and stores.
    """
    inv_t = LN2 * scale
    at_target = inv_t * (g * rest / total - h * tl.exp(logp) * (logp + entropy))
    level = -inv_t / total * (g + h * (entropy - tl.log(total)))
    slope = -inv_t / total * LN2 * h
    tiles = tl.cdiv(V, BLOCK)
    for tile in range(tiles):
        cols = (tiles - 1 - tile) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(z_row + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        d = depth(z, peak, scale)
        dz = tl.where(cols == y, at_target, tl.exp2(d) * (level + slope * d))
        if HALVED:
            tl.debug_barrier()
        tl.store(dz_row + cols, dz.to(dz_row.dtype.element_ty), mask=cols < V)


# Chunks start anywhere and have any number of rows: what is read once a row must not compile a kernel for each case.
@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["target_ptr", "stats_ptr"])
def _row_stats(z_ptr, target_ptr, stats_ptr, C, V, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # row * V passes 2^31
    logp, entropy, peak, rest, total = _stats(z_ptr + row * V, tl.load(target_ptr + row), V, scale, BLOCK)
    tl.store(stats_ptr + row, logp)
    tl.store(stats_ptr + C + row, entropy)
    tl.store(stats_ptr + 2 * C + row, peak)
    tl.store(stats_ptr + 3 * C + row, rest)
    tl.store(stats_ptr + 4 * C + row, total)


@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["target_ptr", "stats_ptr", "g_ptr", "h_ptr"])
def _row_dlogits(z_ptr, dz_ptr, dz_stride, target_ptr, stats_ptr, g_ptr, h_ptr, C, V, scale, BLOCK: tl.constexpr,
                 HALVED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _dlogits(
        z_ptr + row * V, dz_ptr + row * dz_stride, tl.load(target_ptr + row), V, scale,
        tl.load(stats_ptr + row), tl.load(stats_ptr + C + row), tl.load(stats_ptr + 2 * C + row),
        tl.load(stats_ptr + 3 * C + row), tl.load(stats_ptr + 4 * C + row),
        tl.load(g_ptr + row), tl.load(h_ptr + row), BLOCK, HALVED,
    )  # fmt: skip


@triton.jit
def exp_less_line(x):
    """e^x - 1 - x, by its series where the terms would cancel."""
    series = 1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))))
    return tl.where(tl.abs(x) < 0.5, x * x * series, tl.exp(x) - 1 - x)


@triton.jit
def _clip(x, low, high):
    """Unlike tl.minimum and tl.maximum, keeps NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def token_loss(logp, entropy, advantage, weight, old, ref, sampler, low, high, dual, kl_coef, entropy_coef, tis_cap,
               LOSS: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, TIS: tl.constexpr):  # fmt: skip
    """l, dl/dlogp and dl/dentropy of tokens, as `linear_loss.FusedObjective` defines l.

    As in autograd, a clip passes the gradient at its bounds, and nothing flows into old, ref and sampler.
    """
    ratio = tl.exp(logp - old)
    if LOSS == "ppo":  # min(r A, clip(r) A) bounds r above where A > 0, else below; there `dual` bounds it above
        floor, ceiling = tl.where(advantage > 0, 0.0, low), tl.where(advantage > 0, high, dual)
        surrogate = _clip(ratio, floor, ceiling) * advantage
        slope = tl.where((ratio >= floor) & (ratio <= ceiling), ratio * advantage, 0.0)
    else:
        slope = _clip(ratio, low, high) * advantage
        surrogate = slope * logp
    if TIS:
        trust = _clip(tl.exp(old - sampler), 0.0, tis_cap)
        surrogate, slope = trust * surrogate, trust * slope
    loss, g = -surrogate - entropy_coef * entropy, -slope
    if KL != "none":
        x = logp - ref
        if KL == "k1":
            kl, dkl = x, 1.0
        elif KL == "k2":
            kl, dkl = x * x / 2, x
        else:
            kl = exp_less_line(-x)
            dkl = x - kl  # 1 - e^-x
        if KL_RATIO:
            kl, dkl = ratio * kl, ratio * (kl + dkl)
        loss, g = loss + kl_coef * kl, g + kl_coef * dkl
    return weight * loss, weight * g, -weight * entropy_coef


@triton.jit(do_not_specialize_on_alignment=[
    "target_ptr", "loss_ptr", "logp_ptr", "entropy_ptr", "advantage_ptr", "weight_ptr", "old_ptr", "ref_ptr",
    "sampler_ptr",
])  # fmt: skip
def _row_objective(z_ptr, dz_ptr, dz_stride, target_ptr, loss_ptr, logp_ptr, entropy_ptr, advantage_ptr, weight_ptr,
                   old_ptr, ref_ptr, sampler_ptr, V, scale, low, high, dual, kl_coef, entropy_coef, tis_cap,
                   LOSS: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, BLOCK: tl.constexpr,
                   HALVED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + row)
    logp, entropy, peak, rest, total = _stats(z_ptr + row * V, y, V, scale, BLOCK)
    old = logp if old_ptr is None else tl.load(old_ptr + row)
    ref = logp if ref_ptr is None else tl.load(ref_ptr + row)
    sampler = logp if sampler_ptr is None else tl.load(sampler_ptr + row)
    loss, g, h = token_loss(
        logp, entropy, tl.load(advantage_ptr + row), tl.load(weight_ptr + row), old, ref, sampler,
        low, high, dual, kl_coef, entropy_coef, tis_cap, LOSS, KL, KL_RATIO, sampler_ptr is not None,
    )  # fmt: skip
    tl.store(loss_ptr + row, loss)
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    _dlogits(z_ptr + row * V, dz_ptr + row * dz_stride, y, V, scale, logp, entropy, peak, rest, total, g, h, BLOCK,
             HALVED)  # fmt: skip


def row_stats(z, target, temperature, banned):
    """Log-prob, entropy, m, rest and total (5, C) of logits z (C, V), whose banned columns become -inf.

    z is fp32 or 16-bit, without temperature; target (C,) int64; banned: ids as a tensor, or None. All else is fp32.
    """
    if banned is not None:
        z.index_fill_(1, banned, float("-inf"))
    stats = torch.empty(5, len(z), dtype=torch.float32, device=z.device)  # (5, C)
    with _triton.on(z.device):
        _row_stats[(len(z),)](z, target, stats, *z.shape, LOG2E / temperature, **CONFIGS[_triton.arch(z.device)])
    return stats


def row_dlogits(z, stats, target, g, h, temperature, dtype):
    """dz (C, V) in `dtype`, in z's memory, from what `row_stats` gave and g, h (C,) fp32."""
    dz, halved = _halves(z, dtype)
    with _triton.on(z.device):
        _row_dlogits[(len(z),)](
            z, dz, dz.stride(0), target, stats, g, h, *z.shape, LOG2E / temperature,
            HALVED=halved, **CONFIGS[_triton.arch(z.device)],
        )  # fmt: skip
    return dz


def row_objective(z, target, fused, rows, temperature, banned, out, dtype):
    """One launch for all of it: dz as from `row_dlogits`; `out`, (3, N), gets loss, log-prob and entropy at `rows`.

    fused: linear_loss.FusedObjective of N tokens; rows: the slice of them that z holds.
    """
    if banned is not None:
        z.index_fill_(1, banned, float("-inf"))
    dz, halved = _halves(z, dtype)
    kl = fused.kl_estimator if fused.kl_coef else "none"
    used = (True, True, True, kl != "none", bool(fused.tis_cap))
    vectors = (fused.advantage, fused.weight, fused.old_logp, fused.ref_logp, fused.sampler_logp)
    with _triton.on(z.device):
        _row_objective[(len(z),)](
            z, dz, dz.stride(0), target, *out[:, rows],
            *(x[rows] if use and x is not None else None for x, use in zip(vectors, used, strict=True)),
            z.shape[1], LOG2E / temperature, 1 - fused.clip_ratio_low, 1 + fused.clip_ratio_high,
            fused.clip_ratio_dual or float("inf"), fused.kl_coef, fused.entropy_coef, fused.tis_cap,
            LOSS=fused.loss_type, KL=kl, KL_RATIO=fused.kl_ratio and kl != "none",
            HALVED=halved, **CONFIGS[_triton.arch(z.device)],
        )  # fmt: skip
    return dz


def _halves(z, dtype):
    """Where dz goes, and whether that is the back half of each of z's rows: 16-bit dz of fp32 z need no memory."""
    if z.dtype == dtype:
        return z, False
    assert z.element_size() == 2 * dtype.itemsize, (z.dtype, dtype)
    return z.view(dtype)[:, z.shape[1] :], True  # (C, V), a row every 2V
