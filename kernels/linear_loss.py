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

An objective that couples tokens (GSPO's sequence ratio) needs every log-prob first:
`two_pass=True` adds a forward-only pass, a fourth matmul.

Saved for backward: dhidden and dweight, which backward scales by the upstream gradient. dweight is
accumulated in fp32; a bf16 running sum would lose two digits over 64 chunks. The target column
uses -expm1(logp), since p - 1 cancels when p is near 1.
"""

import torch

from ._head import blocks, check_head, chunks, scores, softmax_stats, stats_dtype
from .linear_logprob import linear_logprob, linear_logprob_ref


def linear_loss_ref(hidden, weight, target, objective, temperature=1.0, banned=()):
    """The definition: whole logits and autograd."""
    logp, entropy = linear_logprob_ref(hidden, weight, target, temperature, banned)
    return objective(logp, entropy, slice(0, len(target))).sum(), logp.detach(), entropy.detach()


def linear_loss(
    hidden, weight, target, objective, *, temperature=1.0, banned=(), chunk_tokens=0, two_pass=False, impl="chunked"
):
    """Sum of per-token losses of sampled tokens, differentiable in `hidden` and `weight`.

    Args:
        hidden: (N, H) last hidden states of the positions that predict `target`.
        weight: (V, H) head, same dtype; not a DTensor.
        target: (N,) int64 in [0, V), none of them banned.
        objective: (logp (C,), entropy (C,), slice of the N tokens) -> (C,) losses; differentiable.
        temperature: the sampler's, > 0.
        banned: token ids that leave the distribution.
        chunk_tokens: C; 0 chooses by device and V.
        two_pass: the objective is called once, on all N tokens.
        impl: "chunked" or "reference".

    Returns:
        loss: 0-d; logp, entropy: (N,) without gradient; fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: see `check_head`.
    """
    check_head(hidden, weight, target, temperature, banned)
    if impl == "reference":
        return linear_loss_ref(hidden, weight, target, objective, temperature, banned)
    if impl != "chunked":
        raise ValueError(f"impl={impl!r}: one of chunked, reference")
    return _LinearLoss.apply(hidden, weight, target, objective, temperature, tuple(banned), chunk_tokens, two_pass)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, objective, temperature, banned, chunk_tokens, two_pass):
        kind = stats_dtype(hidden)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        logp = torch.empty(len(hidden), dtype=kind, device=hidden.device)  # (N,)
        entropy = torch.empty_like(logp)  # (N,)
        loss = torch.zeros((), dtype=kind, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None  # (N, H)
        grad_weight = torch.empty(weight.shape, dtype=kind, device=weight.device) if need_weight else None  # (V, H)
        if two_pass:
            whole = linear_logprob(
                hidden, weight, target, temperature=temperature, banned=banned, chunk_tokens=chunk_tokens
            )
            loss, g_all, h_all = _objective_grads(objective, *whole, slice(0, len(target)))
        for rows in chunks(hidden, weight, chunk_tokens):
            x = hidden[rows]
            z = scores(x, weight)  # (C, V)
            logp[rows], entropy[rows], lse = softmax_stats(z, target[rows], temperature, banned)
            if two_pass:
                g, h = g_all[rows], h_all[rows]
            else:
                part, g, h = _objective_grads(objective, logp[rows], entropy[rows], rows)
                loss += part
            if need_hidden or need_weight:
                _dlogits_(z, lse, logp[rows], entropy[rows], target[rows], g / temperature, h / temperature)
                dz = z.to(hidden.dtype)
                if need_hidden:
                    torch.mm(dz, weight, out=grad_hidden[rows])
                if need_weight:
                    _accumulate(grad_weight, dz, x, first=rows.start == 0)
                del dz
            del z  # before the next chunk's is made
        if need_weight and not len(hidden):
            grad_weight.zero_()
        ctx.grads = (grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    def backward(ctx, grad_loss, _logp, _entropy):
        if ctx.grads is None:
            raise RuntimeError("linear_loss scales its gradients in place, so it has one backward: call it again")
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _objective_grads(objective, logp, entropy, rows):
    """Loss of these tokens, and its gradient in their log-probs and entropies."""
    with torch.enable_grad():
        logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
        loss = objective(logp, entropy, rows).sum()
        g, h = torch.autograd.grad(loss, (logp, entropy), allow_unused=True) if loss.requires_grad else (None, None)
    return loss.detach(), *(torch.zeros_like(logp) if x is None else x for x in (g, h))


def _dlogits_(z, lse, logp, entropy, target, g, h):
    """dz in place of z: -p (g + h (log p + entropy)), and the target's column apart."""
    at_target = -g * torch.expm1(logp) - h * logp.exp() * (logp + entropy)  # (C,)
    entropy_counts = bool(h.any())
    for rows, block, p in blocks(z):
        torch.sub(block, lse[rows, None], out=p).exp_()
        if entropy_counts:
            block.add_((entropy - lse)[rows, None]).mul_(-h[rows, None]).sub_(g[rows, None]).mul_(p)
        else:
            torch.mul(p, -g[rows, None], out=block)
    z.scatter_(1, target[:, None], at_target[:, None])


def _accumulate(grad_weight, dz, x, first):
    if dz.dtype == grad_weight.dtype:
        torch.addmm(grad_weight, dz.T, x, beta=0 if first else 1, out=grad_weight)
    else:
        part = (
            torch.mm(dz.T, x, out_dtype=grad_weight.dtype)
            if dz.is_cuda
            else dz.T.to(grad_weight.dtype) @ x.to(grad_weight.dtype)
        )
        grad_weight.copy_(part) if first else grad_weight.add_(part)
