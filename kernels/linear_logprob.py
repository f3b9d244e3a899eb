"""Log-probability and entropy of sampled tokens, without keeping logits.

    z = hidden @ weight.T / temperature        (banned columns: -inf)
    logp[t] = z[t, y[t]] - lse(z[t]),    entropy[t] = lse(z[t]) - sum_v p[t, v] z[t, v]

Only a chunk of tokens meets the vocabulary at a time, so the extra memory is two (C, V) buffers
whatever N is. Rows are shifted by their maximum before exp. Statistics are fp32 (fp64 for fp64
inputs): rounding logits to bf16 first would cost up to 0.1 nat.

Next: linear_loss.py, which makes gradients out of the same chunks.
"""

import torch
from torch.distributed.tensor import DTensor

CHUNK_ELEMENTS = {"cpu": 20_000_000, "cuda": 320_000_000}  # of one (C, V) buffer


def linear_logprob_ref(hidden, weight, target, temperature=1.0, banned=()):
    """The definition, with whole logits; differentiable."""
    logits = (hidden @ weight.T).to(stats_dtype(hidden)) / temperature  # (N, V)
    if banned:
        logits = logits.index_fill(1, torch.tensor(banned, device=logits.device), float("-inf"))
    logp = logits.log_softmax(-1)  # (N, V)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)
    return logp.gather(1, target[:, None]).squeeze(1), entropy  # (N,), (N,)


def linear_logprob(hidden, weight, target, *, temperature=1.0, banned=(), chunk_tokens=0, impl="chunked"):
    """Log-probability of `target` and entropy of its distribution; no gradient.

    Args:
        hidden: (N, H) last hidden states.
        weight: (V, H) head, same dtype; not a DTensor.
        target: (N,) int64 in [0, V), none of them banned.
        temperature: the sampler's, > 0.
        banned: token ids that the sampler may not draw; they leave the distribution.
        chunk_tokens: C; 0 chooses by device and V.
        impl: "chunked" or "reference".

    Returns:
        logp, entropy: (N,) fp32 (fp64 for fp64 inputs), nats.

    Raises:
        ValueError: see `check_head`.
    """
    check_head(hidden, weight, target, temperature, banned)
    with torch.no_grad():
        if impl == "reference":
            return linear_logprob_ref(hidden, weight, target, temperature, banned)
        if impl != "chunked":
            raise ValueError(f"impl={impl!r}: one of chunked, reference")
        logp = torch.empty(len(hidden), dtype=stats_dtype(hidden), device=hidden.device)  # (N,)
        entropy = torch.empty_like(logp)  # (N,)
        for rows in chunks(hidden, weight, chunk_tokens):
            _, _, logp[rows], entropy[rows], _ = softmax_stats(hidden[rows], weight, target[rows], temperature, banned)
    return logp, entropy


def check_head(hidden, weight, target, temperature, banned):
    """Refuse what would compute garbage.

    Raises:
        ValueError: wrong shapes or dtypes, a sharded weight, a target out of range or banned, temperature <= 0.
    """
    if isinstance(weight, DTensor) or isinstance(hidden, DTensor):
        raise ValueError("the head's weight is sharded (DTensor): gather it first, as in weight.full_tensor()")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: want (N, H) and (V, H)")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: cast one of them")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target {tuple(target.shape)} {target.dtype}: want ({len(hidden)},) int64")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0")
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < len(weight):
        raise ValueError(
            f"targets run from {int(target.min())} to {int(target.max())}, the vocabulary has {len(weight)} rows"
        )
    if banned and torch.isin(target, torch.tensor(banned, device=target.device)).any():
        raise ValueError(f"a target is one of the banned tokens {tuple(banned)}: it has no log-probability")


def stats_dtype(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunks(hidden, weight, chunk_tokens):
    """Slices of the token axis, each small enough for its (C, V) buffers."""
    size = chunk_tokens or max(16, CHUNK_ELEMENTS.get(hidden.device.type, 0) // len(weight))
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def softmax_stats(hidden, weight, target, temperature, banned):
    """One chunk's z - max, exp of it, log-prob, entropy and log-sum-exp (of z - max)."""
    z = _scores(hidden, weight)  # (C, V)
    z.div_(temperature)
    if banned:  # finite, so that 0 * z stays 0 in the entropy
        z.index_fill_(1, torch.tensor(banned, device=z.device), -1e9)
    z.sub_(z.amax(1, keepdim=True))
    e = z.exp()  # (C, V)
    total = e.sum(1)  # (C,)
    lse = total.log()
    logp = z.gather(1, target[:, None]).squeeze(1) - lse  # (C,)
    mean_z = torch.bmm(e[:, None, :], z[:, :, None]).view(-1) / total  # (C,), no (C, V) product is stored
    return z, e, logp, lse - mean_z, lse


def _scores(hidden, weight):
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    if hidden.device.type == "cuda":  # keep the matmul's fp32 accumulator
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T
