"""Fused linear -> log-prob -> objective -> gradient: logits live for one chunk only.

For each chunk of C tokens:
    z = hidden @ weight.T / temperature               matmul 1
    logp, entropy                                     row statistics
    l = objective(logp, entropy)                      (C,) vectors, any torch code
    g = dl/dlogp, h = dl/dentropy                     autograd on those vectors
    dz = g (onehot - p) / T  -  h p (log p + entropy) / T
    dhidden = dz @ weight,  dweight += dz.T @ hidden  matmuls 2 and 3
So the loss and both gradients cost three matmuls, and the (N, V) logits are never allocated. The objective is
called between the statistics and dz and does not see logits: any loss of per-token log-probs and entropies works.

`impl="triton"` computes statistics and dz with row kernels (_rows.py), dz in the logits' memory. With a
`FusedObjective`, the same objective as numbers, one launch computes statistics, objective and dz.

An objective that couples tokens (GSPO's sequence ratio) needs all log-probs first: `two_pass=True` adds a
forward-only pass, a fourth matmul.

Saved for backward: dhidden and dweight, which backward scales by the upstream gradient. dweight is accumulated in
fp32; a bf16 running sum would lose two digits over 64 chunks. A single chunk needs no sum: its dz is saved, and
backward computes dweight in the weight's dtype, without an fp32 copy. The target column gets 1 - p from
-expm1(logp) or from sums without the target, since p - 1 cancels when p is near 1.

An fp32 weight with 16-bit hidden states is rounded here, once a call, and its dweight stays fp32. A cast by the
caller would round dweight as well.

Next: ../nanolmmr1/parallel/dist.py, several ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._head import accumulate, banned_ids, blocks, check_head, choose_impl, chunks, product, softmax_stats, stats_dtype
from ._rows import FusedObjective, row_dlogits, row_objective, row_stats
from .linear_logprob import linear_logprob, linear_logprob_ref

# Log-probs (C,), entropies (C,), and the slice of the N tokens that they are -> losses (C,).
LossFunction = Callable[[Tensor, Tensor, slice], Tensor]


def linear_loss_ref(
    hidden: Tensor, weight: Tensor, target: Tensor, objective: LossFunction,
    temperature: float = 1.0, banned: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition: all logits in memory, and autograd."""
    logp, entropy = linear_logprob_ref(hidden, weight, target, temperature, banned)
    return objective(logp, entropy, slice(0, len(target))).sum(), logp.detach(), entropy.detach()


def linear_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, objective: LossFunction, *, fused: FusedObjective | None = None,
    temperature: float = 1.0, banned: Sequence[int] = (), chunk_tokens: int = 0, two_pass: bool = False,
    logits_dtype: torch.dtype | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of per-token losses of sampled tokens, differentiable in `hidden` and `weight`.

    dlogits and dhidden are rounded to hidden's dtype before backward scales them: apply a loss scale against fp16
    underflow inside the objective. On a GPU the host never waits for the device.

    Args:
        hidden: (N, H) last hidden states of the positions that predict `target`; for "triton" contiguous.
        weight: (V, H) head, same dtype, or the fp32 master of a head in hidden's 16-bit dtype; not a DTensor.
        target: (N,) int64 in [0, V), none of them banned.
        objective: differentiable.
        fused: the same objective; "triton" evaluates it instead, the others ignore it.
        temperature: of the sampler, > 0.
        banned: token ids excluded from the distribution.
        chunk_tokens: C; 0: chosen by device and V.
        two_pass: call the objective once, on all N tokens.
        logits_dtype: for "triton"; None: float32. hidden's 16-bit dtype halves the logits' memory and traffic, and
            moves log-probs by up to 0.1 nat.
        impl: "auto" ("triton" for CUDA tensors except fp64, else "chunked"), "triton", "chunked" or "reference".

    Returns:
        loss: 0-d; logp, entropy: (N,) without gradient; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: see `check_head`, `choose_impl`, `FusedObjective.check`; fused with two_pass; another logits_dtype.
    """
    check_head(hidden, weight, target, temperature, banned)
    impl = choose_impl(impl, hidden, weight, target)
    if fused is not None and two_pass:
        raise ValueError("fused is for losses of single tokens, two_pass for losses that couple tokens: pass only one")
    exact = stats_dtype(hidden)
    if logits_dtype not in (None, exact) and (impl, logits_dtype) != ("triton", hidden.dtype):
        also = "" if hidden.dtype == exact else f', or with impl="triton" also {hidden.dtype}'
        raise ValueError(f"logits_dtype={logits_dtype}: it can be {exact}{also}")
    if impl == "chunked":
        fused = None
    if fused is not None:
        fused.check(target)
    # The caller's autocast would round the logits to 16 bits.
    with torch.autocast(hidden.device.type, enabled=False):
        if impl == "reference":
            return linear_loss_ref(hidden, weight, target, objective, temperature, banned)
        whole = None
        if two_pass:
            whole = linear_logprob(
                hidden, weight, target, temperature=temperature, banned=banned, chunk_tokens=chunk_tokens, impl=impl
            )
        job = _Job(
            target, objective, fused, temperature, tuple(banned), chunk_tokens, whole, logits_dtype or exact, impl,
            torch.is_grad_enabled(),
        )  # fmt: skip
        return _LinearLoss.apply(hidden, weight, job)


@dataclass
class _Job:
    """Arguments of `_LinearLoss` that have no gradient, as in `linear_loss`."""

    target: Tensor
    objective: LossFunction
    fused: FusedObjective | None
    temperature: float
    banned: tuple[int, ...]
    chunk_tokens: int
    whole: tuple[Tensor, Tensor] | None  # with two_pass: all log-probs and entropies (N,)
    logits_dtype: torch.dtype
    impl: str
    grad: bool  # is grad mode on? ctx.needs_input_grad ignores torch.no_grad()


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, job: _Job) -> tuple[Tensor, Tensor, Tensor]:
        dtype, device = stats_dtype(hidden), hidden.device
        ctx.weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)
        need_hidden, need_weight = (need and job.grad for need in ctx.needs_input_grad[:2])
        out = torch.empty(3, len(hidden), dtype=dtype, device=device)
        losses, logp, entropy = out  # (N,) each
        slices = chunks(hidden, weight, job.chunk_tokens, job.logits_dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None  # (N, H)
        summed = need_weight and len(slices) > 1
        grad_weight = torch.empty(weight.shape, dtype=dtype, device=device) if summed else None  # (V, H)
        make_stats, make_dlogits = (row_stats, row_dlogits) if job.impl == "triton" else (softmax_stats, _dlogits)
        banned = banned_ids(job.banned, device)
        if job.whole:
            losses[:], g_all, h_all = _objective_grads(job.objective, *job.whole, slice(0, len(hidden)))
            logp[:], entropy[:] = job.whole  # the objective's inputs, even if this pass rounds its logits
        z = dz = empty = hidden.new_empty(0, len(weight))
        for rows in slices:
            x, y = hidden[rows], job.target[rows]
            z = dz = empty  # free the last chunk's memory before these logits are computed
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
            if grad_hidden is not None:
                torch.mm(dz, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                accumulate(grad_weight, dz.T, x, first=rows.start == 0)
        ctx.grads = (grad_hidden, grad_weight, (dz, hidden.detach()) if need_weight and not summed else None)
        ctx.mark_non_differentiable(logp, entropy)
        return losses.sum(), logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _logp: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_loss scales its gradients in place, so it has one backward: call it again")
        (grad_hidden, grad_weight, single_chunk), ctx.grads = ctx.grads, None

        def scaled(x: Tensor, out: Tensor) -> Tensor:
            # Multiplied in the statistics' precision (1/3 is off by 0.2 % in bf16), rounded once when written.
            return torch.mul(x.to(grad_loss.dtype), grad_loss, out=out)

        if grad_hidden is not None:
            grad_hidden = scaled(grad_hidden, grad_hidden)
        if single_chunk:
            dz, x = single_chunk
            with torch.autocast(x.device.type, enabled=False):
                grad_weight = product(dz.T, scaled(x, torch.empty_like(x)), ctx.weight_dtype)
        elif grad_weight is not None:
            same = grad_weight.dtype == ctx.weight_dtype
            out = grad_weight if same else torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = scaled(grad_weight, out)
        return grad_hidden, grad_weight, None


def _objective_grads(
    objective: LossFunction, logp: Tensor, entropy: Tensor, rows: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of these tokens, and the gradient of their sum with respect to log-probs and entropies."""
    with torch.enable_grad():
        logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
        losses = objective(logp, entropy, rows)  # (C,)
        grads: tuple[Tensor | None, ...] = (None, None)
        if losses.requires_grad:
            grads = torch.autograd.grad(losses.sum(), (logp, entropy), allow_unused=True)
    # The gradient of a sum is an expanded scalar; kernels need real memory.
    g, h = (torch.zeros_like(logp) if x is None else x.contiguous() for x in grads)
    return losses.detach(), g, h


def _dlogits(
    z: Tensor, stats: Tensor, target: Tensor, g: Tensor, h: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """dz in z's memory, then in `dtype`: -p (g + h (log p + entropy)) / T, except for the target's column."""
    logp, entropy, lse = stats
    g, h = g / temperature, h / temperature
    at_target = -g * torch.expm1(logp) - h * logp.exp() * (logp + entropy)  # (C,)
    entropy_counts = h.is_cuda or bool(h.any())  # reading it would stall a GPU
    for rows, block, p in blocks(z):
        torch.sub(block, lse[rows, None], out=p).exp_()
        if entropy_counts:
            block.add_((entropy - lse)[rows, None]).mul_(-h[rows, None]).sub_(g[rows, None]).mul_(p)
        else:
            torch.mul(p, -g[rows, None], out=block)
    return z.scatter_(1, target[:, None], at_target[:, None]).to(dtype)
