"""Fused linear -> log-prob -> objective -> gradient: logits live for one chunk only.

Per chunk of C tokens, while its logits are hot:
    z = hidden @ weight.T / temperature               matmul 1
    logp, entropy                                     row statistics
    l = objective(logp, entropy)                      (C,) vectors, any torch code
    g = dl/dlogp, h = dl/dentropy                     autograd on those vectors
    dz = g (onehot - p) / T  -  h p (log p + entropy) / T
    dhidden = dz @ weight,  dweight += dz.T @ hidden  matmuls 2 and 3
So the loss and both gradients cost three matmuls, and no (N, V) tensor exists. The objective is
called between the statistics and dz and knows nothing of logits: any loss of per-token
log-probs and entropies works, and there is one definition of it (nanolmmr1/objective.py).

`impl="triton"` makes statistics and dz with row kernels (_rows.py), dz in the logits' own memory. A
`FusedObjective` says the same as the objective in numbers, and then one launch does statistics,
objective and dz.

An objective that couples tokens (GSPO's sequence ratio) needs every log-prob first:
`two_pass=True` adds a forward-only pass, a fourth matmul.

Saved for backward: dhidden and dweight, which backward scales by the upstream gradient. dweight is
accumulated in fp32; a bf16 running sum would lose two digits over 64 chunks. Where one chunk is all, there is no sum:
dz is kept and dweight is made in backward, in its own dtype, without a pass over an fp32 one. The target column
takes 1 - p from -expm1(logp) or from sums without the target, since p - 1 cancels when p is near 1.

An fp32 weight beside 16-bit hidden states is rounded here, once a call, and its dweight stays fp32;
a cast outside would round that as well, on its way back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._head import banned_ids, blocks, check_head, choose_impl, chunks, product, softmax_stats, stats_dtype
from ._rows import row_dlogits, row_objective, row_stats
from .linear_logprob import linear_logprob, linear_logprob_ref


@dataclass(frozen=True)
class FusedObjective:
    """The objective of N tokens as `impl="triton"` can evaluate it inside its row kernel.

        loss = weight * (-trust * surrogate + kl_coef * kl - entropy_coef * entropy)

    With r = exp(logp - old_logp), sg[x] for x held constant, and A the advantage:
        ppo     surrogate = min(r A, clip(r, 1 - low, 1 + high) A), where A < 0 at least dual A    arXiv 1707.06347
        cispo   surrogate = sg[clip(r, 1 - low, 1 + high) A] logp                                  arXiv 2506.13585
        trust = min(exp(old_logp - sampler_logp), tis_cap), or 1 where tis_cap is 0
        kl = x, x^2 / 2 or exp(-x) - 1 + x with x = logp - ref_logp, by kl_estimator; times r with kl_ratio

    Args:
        advantage, weight, old_logp, ref_logp, sampler_logp: (N,) fp32, constants; old_logp None: sg[logp], as in the
            first update on a batch; ref_logp is needed with kl_coef, sampler_logp with tis_cap.
        loss_type: "ppo" or "cispo". GSPO couples tokens: `two_pass`.
        clip_ratio_dual, kl_coef, tis_cap: 0 is off.
    """

    advantage: torch.Tensor
    weight: torch.Tensor
    old_logp: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    sampler_logp: torch.Tensor | None = None
    loss_type: str = "ppo"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_dual: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_ratio: bool = False
    entropy_coef: float = 0.0
    tis_cap: float = 0.0

    def check(self, target):
        """Refuse what the kernel would misread.

        Raises:
            ValueError: an unknown loss_type or kl_estimator, a negative number, a vector that is missing, or not (N,)
                fp32 beside target.
        """
        if self.loss_type not in ("ppo", "cispo"):
            raise ValueError(f"loss_type={self.loss_type!r}: ppo or cispo; leave `fused` out for any other objective")
        if self.kl_estimator not in ("k1", "k2", "k3"):
            raise ValueError(f"kl_estimator={self.kl_estimator!r}: one of k1, k2, k3")
        for name in ("clip_ratio_low", "clip_ratio_high", "clip_ratio_dual", "kl_coef", "entropy_coef", "tis_cap"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"FusedObjective.{name}={getattr(self, name)}: a number of 0 or more is wanted")
        for name, needed in (
            ("advantage", True),
            ("weight", True),
            ("old_logp", False),
            ("ref_logp", self.kl_coef),
            ("sampler_logp", self.tis_cap),
        ):
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


def linear_loss_ref(hidden, weight, target, objective, temperature=1.0, banned=()):
    """The definition: whole logits and autograd."""
    logp, entropy = linear_logprob_ref(hidden, weight, target, temperature, banned)
    return objective(logp, entropy, slice(0, len(target))).sum(), logp.detach(), entropy.detach()


def linear_loss(
    hidden, weight, target, objective, *, fused=None, temperature=1.0, banned=(), chunk_tokens=0, two_pass=False,
    logits_dtype=None, impl="auto",
):  # fmt: skip
    """Sum of per-token losses of sampled tokens, differentiable in `hidden` and `weight`.

    dlogits and dhidden are rounded to hidden's dtype before backward scales them, so a loss scale against fp16's
    underflow belongs into the objective. Checking targets waits for the device once a call; nothing in a chunk does.

    Args:
        hidden: (N, H) last hidden states of the positions that predict `target`; for "triton" contiguous.
        weight: (V, H) head, same dtype, or the fp32 master of a head in hidden's 16 bits; not a DTensor.
        target: (N,) int64 in [0, V), none of them banned.
        objective: (logp (C,), entropy (C,), slice of the N tokens) -> (C,) losses; differentiable.
        fused: FusedObjective that says the same as `objective`; "triton" evaluates it instead, the others ignore it.
        temperature: the sampler's, > 0.
        banned: token ids that leave the distribution.
        chunk_tokens: C; 0 chooses by device and V.
        two_pass: the objective is called once, on all N tokens.
        logits_dtype: of "triton"; None: float32. hidden's own 16 bits halve the logits' memory and traffic, and cost
            log-probs up to 0.1 nat.
        impl: "auto" ("triton" for CUDA tensors but fp64, else "chunked"), "triton", "chunked" or "reference".

    Returns:
        loss: 0-d; logp, entropy: (N,) without gradient; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: see `check_head`, `choose_impl`, `FusedObjective.check`; fused with two_pass; another logits_dtype.
    """
    check_head(hidden, weight, target, temperature, banned)
    impl = choose_impl(impl, hidden, weight, target)
    if fused is not None and two_pass:
        raise ValueError("fused has a token's loss read that token alone, two_pass all of them: give one of the two")
    kind = stats_dtype(hidden)
    if logits_dtype not in (None, kind) and (impl, logits_dtype) != ("triton", hidden.dtype):
        also = "" if hidden.dtype == kind else f', or with impl="triton" also {hidden.dtype}'
        raise ValueError(f"logits_dtype={logits_dtype}: it can be {kind}{also}")
    if impl == "chunked":
        fused = None
    if fused is not None:
        fused.check(target)
    # Autocast, where the caller is inside it, would round the logits to 16 bits.
    with torch.autocast(hidden.device.type, enabled=False):
        if impl == "reference":
            return linear_loss_ref(hidden, weight, target, objective, temperature, banned)
        whole = None
        if two_pass:
            options = dict(temperature=temperature, banned=banned, chunk_tokens=chunk_tokens, impl=impl)
            whole = linear_logprob(hidden, weight, target, **options)
        job = _Job(
            target, objective, fused, temperature, tuple(banned), chunk_tokens, whole, logits_dtype or kind, impl,
            torch.is_grad_enabled(),
        )  # fmt: skip
        return _LinearLoss.apply(hidden, weight, job)


@dataclass
class _Job:
    """What autograd need not know of."""

    target: torch.Tensor
    objective: Callable
    fused: FusedObjective | None
    temperature: float
    banned: tuple
    chunk_tokens: int
    whole: tuple | None  # all log-probs and entropies, where the objective reads them at once
    logits_dtype: torch.dtype
    impl: str
    grad: bool  # under no_grad autograd still says which inputs would need one


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, job):
        kind, device = stats_dtype(hidden), hidden.device
        ctx.weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        need_hidden, need_weight = (need and job.grad for need in ctx.needs_input_grad[:2])
        out = torch.empty(3, len(hidden), dtype=kind, device=device)
        losses, logp, entropy = out  # (N,) each
        parts = chunks(hidden, weight, job.chunk_tokens, job.logits_dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None  # (N, H)
        summed = need_weight and len(parts) > 1
        grad_weight = torch.empty(weight.shape, dtype=kind, device=device) if summed else None  # (V, H)
        make_stats, make_dlogits = (row_stats, row_dlogits) if job.impl == "triton" else (softmax_stats, _dlogits)
        banned = banned_ids(job.banned, device)
        if job.whole:
            losses[:], g_all, h_all = _objective_grads(job.objective, *job.whole, slice(0, len(hidden)))
            logp[:], entropy[:] = job.whole  # what the objective saw, even where this pass rounds its logits
        dz = hidden.new_empty(0, len(weight))
        for rows in parts:
            x, y = hidden[rows], job.target[rows]
            dz = None  # before the next chunk's logits are made
            z = product(x, weight.T, job.logits_dtype)  # (C, V)
            if job.fused:
                dz = row_objective(z, y, job.fused, rows, job.temperature, banned, out, hidden.dtype)
            else:
                stats = make_stats(z, y, job.temperature, banned)
                if job.whole:
                    g, h = g_all[rows], h_all[rows]
                else:
                    logp[rows], entropy[rows] = stats[:2]
                    losses[rows], g, h = _objective_grads(job.objective, logp[rows], entropy[rows], rows)
                if need_hidden or need_weight:
                    dz = make_dlogits(z, stats, y, g, h, job.temperature, hidden.dtype)
            if need_hidden:
                torch.mm(dz, weight, out=grad_hidden[rows])
            if summed:
                _accumulate(grad_weight, dz, x, first=rows.start == 0)
            z = None
        ctx.grads = (grad_hidden, grad_weight, (dz, hidden.detach()) if need_weight and not summed else None)
        ctx.mark_non_differentiable(logp, entropy)
        return losses.sum(), logp, entropy

    @staticmethod
    def backward(ctx, grad_loss, _logp, _entropy):
        if ctx.grads is None:
            raise RuntimeError("linear_loss scales its gradients in place, so it has one backward: call it again")
        (grad_hidden, grad_weight, only), ctx.grads = ctx.grads, None

        def scaled(x, out):
            # In the statistics' precision, as 1/3 itself is off by 0.2 % in bf16, and rounded as it is written.
            return torch.mul(x.to(grad_loss.dtype), grad_loss, out=out)

        if grad_hidden is not None:
            grad_hidden = scaled(grad_hidden, grad_hidden)
        if only:
            dz, x = only
            with torch.autocast(x.device.type, enabled=False):
                grad_weight = product(dz.T, scaled(x, torch.empty_like(x)), ctx.weight_dtype)
        elif grad_weight is not None:
            same = grad_weight.dtype == ctx.weight_dtype
            grad_weight = scaled(grad_weight, grad_weight if same else grad_weight.new_empty(
                grad_weight.shape, dtype=ctx.weight_dtype))  # fmt: skip
        return grad_hidden, grad_weight, None


def _objective_grads(objective, logp, entropy, rows):
    """Losses of these tokens, and the gradient of their sum in log-probs and entropies."""
    with torch.enable_grad():
        logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
        losses = objective(logp, entropy, rows)  # (C,)
        g = h = None
        if losses.requires_grad:
            g, h = torch.autograd.grad(losses.sum(), (logp, entropy), allow_unused=True)
    # A sum's gradient is one expanded number, and kernels read memory.
    return losses.detach(), *(torch.zeros_like(logp) if x is None else x.contiguous() for x in (g, h))


def _dlogits(z, stats, target, g, h, temperature, dtype):
    """dz over z, then in `dtype`: -p (g + h (log p + entropy)) / T, and the target's column apart."""
    logp, entropy, lse = stats
    g, h = g / temperature, h / temperature
    at_target = -g * torch.expm1(logp) - h * logp.exp() * (logp + entropy)  # (C,)
    entropy_counts = bool(h.any())
    for rows, block, p in blocks(z):
        torch.sub(block, lse[rows, None], out=p).exp_()
        if entropy_counts:
            block.add_((entropy - lse)[rows, None]).mul_(-h[rows, None]).sub_(g[rows, None]).mul_(p)
        else:
            torch.mul(p, -g[rows, None], out=block)
    return z.scatter_(1, target[:, None], at_target[:, None]).to(dtype)


def _accumulate(grad_weight, dz, x, first):
    """grad_weight (V, H) += dz.T @ x, or = for the first chunk; in grad_weight's precision."""
    options = dict(beta=0 if first else 1, out=grad_weight)
    if dz.dtype == grad_weight.dtype:
        torch.addmm(grad_weight, dz.T, x, **options)
    elif dz.is_cuda:  # 16-bit products, fp32 sum, and no second (V, H)
        torch.addmm(grad_weight, dz.T, x, out_dtype=grad_weight.dtype, **options)
    else:
        torch.addmm(grad_weight, dz.T.to(grad_weight.dtype), x.to(grad_weight.dtype), **options)
