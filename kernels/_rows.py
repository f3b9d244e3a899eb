"""Row kernels of the head: statistics and gradient of a chunk's logits, one program per row, in place.

For a row of raw logits z, with target y, temperature T and maximum m, in base 2:
    d_j = (z_j - m) log2(e) / T <= 0,   e_j = 2^d_j,   rest = sum_{j != y} e_j,   total = rest + e_y
    logp    = ln(e_y / total) = -log1p(rest / e_y)
    entropy = ln(total) - ln(2) sum_j d_j e_j / total                     the two terms cannot cancel
The target joins the sums last: beside the e_y = 1 of a nearly certain target the others would be rounded away. The
gradient of l(logp, entropy), with g = dl/dlogp, h = dl/dentropy and p_j = e_j / total:
    dz_j = -p_j (g + h (ln p_j + entropy)) / T
    dz_y = (g rest / total - h p_y (logp + entropy)) / T                  1 - p_y is rest / total, not a difference

`row_stats` and `row_dlogits` allow any objective in between; `row_objective` does everything in one launch, with the
objective in registers. nanolmmr1/update/objective.py is the definition of the loss; `token_loss` is tested equal to it.

Next: linear_loss.py, loss and gradients without logits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton

CONFIGS = {  # columns of a block: 16 bytes of fp32 per thread need 32 registers, so four programs fill an SM
    0: dict(BLOCK=64, num_warps=1),
    80: dict(BLOCK=2048, num_warps=16),
    90: dict(BLOCK=2048, num_warps=16),
    100: dict(BLOCK=2048, num_warps=16),
}
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # initial maximum, below any logit; finite, so that no difference is inf - inf
DEEP = tl.constexpr(-200.0)  # 2^-200 is 0 in fp32, and -200 * 0 is 0, while -inf * 0 would be NaN


@triton.jit
def depth(z, top, scale):
    """d of logits z no larger than `top`; -inf becomes DEEP, NaN stays."""
    d = (z - top) * scale
    return tl.where(d < DEEP, DEEP, d)


@triton.jit
def lift(top, new, rest, moment, scale):
    """sum e and sum d e, converted from maximum `top` to the larger `new`."""
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
    """logp, entropy, m, rest, total of rows, from the sums over all columns except the target's."""
    peak = tl.maximum(top, z_y)
    rest, moment = lift(top, peak, rest, moment, scale)
    d = (z_y - peak) * scale  # not limited to DEEP: it is the log-prob of an unlikely target
    e = tl.exp2(d)
    total = e + rest
    likely = e >= rest
    surprise = tl.where(likely, log1p(rest / tl.maximum(e, rest)), tl.log(total) - LN2 * d)
    lse = tl.where(likely, surprise + LN2 * d, tl.log(total))
    return -surprise, lse - LN2 * (moment + d * e) / total, peak, rest, total


@triton.jit
def _stats(z_row, y, V, scale, BLOCK: tl.constexpr):
    """`with_target` of one row."""
    # Load it before the barriers of the sums below: a warp past them may overwrite this place with dz.
    z_y = tl.load(z_row + y).to(tl.float32)
    top = tl.full((), LOWEST, tl.float32)
    rest, moment = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)  # summed over lanes at the end
    for start in tl.range(0, V, BLOCK, num_stages=2):  # prefetches the next columns
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
    """dz in z's memory. HALVED: z is fp32, dz 16-bit in the back half of the same row (`_dz_view`).

    The last columns come first, since they are still in L2. A HALVED tile that starts at column c reads bytes from 4c
    on and writes bytes from 2V + 2c > 4c on, so it never overwrites an earlier column. It may overwrite bytes of this
    tile or the tile before it that another thread has not read yet: hence the barrier between loads and stores.
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


# Chunks have any start and any number of rows. Do not compile a kernel per alignment of the vectors read once a row.
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


@dataclass(frozen=True)
class FusedObjective:
    """The objective of N tokens as numbers and flags, which `impl="triton"` evaluates inside its row kernel.

        loss = weight * (-trust * surrogate + kl_coef * kl - entropy_coef * entropy)

    With r = exp(logp - old_logp), sg[x] for x held constant, and A the advantage:
        ppo     surrogate = min(r A, clip(r, 1 - low, 1 + high) A), where A < 0 at least dual A    arXiv 1707.06347
        cispo   surrogate = sg[clip(r, 1 - low, 1 + high) A] logp                                  arXiv 2506.13585
        trust = min(exp(old_logp - sampler_logp), tis_cap), or 1 where tis_cap is 0
        kl = x, x^2 / 2 or exp(-x) - 1 + x with x = logp - ref_logp, by kl_estimator; times r with kl_ratio

    Args:
        advantage, weight, old_logp, ref_logp, sampler_logp: (N,) fp32, constants. old_logp None: sg[logp], as in the
            first update on a batch. kl_coef needs ref_logp, tis_cap needs sampler_logp.
        loss_type: "ppo" or "cispo". GSPO couples tokens: `two_pass`.
        clip_ratio_dual, kl_coef, tis_cap: 0 is off.
    """

    advantage: Tensor
    weight: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    sampler_logp: Tensor | None = None
    loss_type: str = "ppo"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_dual: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_ratio: bool = False
    entropy_coef: float = 0.0
    tis_cap: float = 0.0

    def check(self, target: Tensor) -> None:
        """Refuse values that the kernel would misread.

        Raises:
            ValueError: an unknown loss_type or kl_estimator, a negative number, a missing vector, or one that is not
                (N,) fp32 on target's device.
        """
        if self.loss_type not in ("ppo", "cispo"):
            raise ValueError(f"loss_type={self.loss_type!r}: ppo or cispo; leave `fused` out for any other objective")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator={self.kl_estimator!r}: one of k1, k2, k3")
        for name in ("clip_ratio_low", "clip_ratio_high", "clip_ratio_dual", "kl_coef", "entropy_coef", "tis_cap"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"FusedObjective.{name}={getattr(self, name)}: must be 0 or more")
        needs = dict(advantage=1, weight=1, old_logp=0, ref_logp=self.kl_coef, sampler_logp=self.tis_cap)
        for name, needed in needs.items():
            x = getattr(self, name)
            if x is None and needed:
                raise ValueError(f"FusedObjective.{name} is None: kl_coef needs ref_logp, tis_cap needs sampler_logp")
            if x is not None and not (
                x.shape == target.shape and x.dtype == torch.float32 and x.device == target.device and x.is_contiguous()
            ):
                raise ValueError(
                    f"FusedObjective.{name} is {tuple(x.shape)} {x.dtype} on {x.device}: "
                    f"want ({len(target)},) float32 on {target.device}, contiguous"
                )


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
    """l, dl/dlogp and dl/dentropy of tokens; l is the loss of `FusedObjective`.

    As in autograd, a clip passes the gradient at its bounds, and old, ref and sampler are constants.
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


def row_stats(z: Tensor, target: Tensor, temperature: float, banned: Tensor | None) -> Tensor:
    """Log-prob, entropy, m, rest and total (5, C) of logits z (C, V), whose banned columns become -inf.

    Args:
        z: fp32 or 16-bit, not yet divided by the temperature.
        target: (C,) int64.
        banned: token ids, int64.
    """
    if banned is not None:
        z.index_fill_(1, banned, float("-inf"))
    stats = torch.empty(5, len(z), dtype=torch.float32, device=z.device)  # (5, C)
    with _triton.on(z.device):
        _row_stats[(len(z),)](z, target, stats, *z.shape, LOG2E / temperature, **CONFIGS[_triton.arch(z.device)])
    return stats


def row_dlogits(
    z: Tensor, stats: Tensor, target: Tensor, g: Tensor, h: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """dz (C, V) in `dtype`, in z's memory, from the result of `row_stats` and g, h (C,) fp32."""
    dz, halved = _dz_view(z, dtype)
    with _triton.on(z.device):
        _row_dlogits[(len(z),)](
            z, dz, dz.stride(0), target, stats, g, h, *z.shape, LOG2E / temperature,
            HALVED=halved, **CONFIGS[_triton.arch(z.device)],
        )  # fmt: skip
    return dz


def row_objective(
    z: Tensor, target: Tensor, fused: FusedObjective, rows: slice, temperature: float, banned: Tensor | None,
    out: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Statistics, objective and dz in one launch; arguments and result as in `row_stats` and `row_dlogits`.

    Args:
        fused: the objective of N tokens.
        rows: the slice of the N tokens in z.
        out: (3, N), filled at `rows` with loss, log-prob and entropy.
    """
    if banned is not None:
        z.index_fill_(1, banned, float("-inf"))
    dz, halved = _dz_view(z, dtype)
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


def _dz_view(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """dz as a view of z's memory. If z is fp32 and dz 16-bit, dz is the back half of each row, and the flag is True."""
    if z.dtype == dtype:
        return z, False
    assert z.element_size() == 2 * dtype.itemsize, (z.dtype, dtype)
    return z.view(dtype)[:, z.shape[1] :], True  # (C, V), a row every 2V
