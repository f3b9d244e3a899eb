"""Log-probability and entropy of sampled tokens, without keeping logits.

    z = hidden @ weight.T / temperature        (banned columns: -inf)
    logp[t] = z[t, y[t]] - lse(z[t]),    entropy[t] = lse(z[t]) - sum_v p[t, v] z[t, v]

Only a chunk of tokens meets the vocabulary at a time, so the extra memory is one (C, V) buffer
whatever N is; what its statistics need besides is made for a few rows at a time, while they are in
cache. Rows are shifted by their maximum before exp. Statistics are fp32 (fp64 for fp64 inputs):
rounding logits to bf16 first would cost up to 0.1 nat.

Next: linear_loss.py, which makes gradients out of the same chunks.
"""

import math

import torch
from torch.distributed.tensor import DTensor

CHUNK_ELEMENTS = {"cpu": 32_000_000, "cuda": 320_000_000}  # of the (C, V) buffer
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # of the rows whose exp is held at a time


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
            z = scores(hidden[rows], weight)  # (C, V)
            logp[rows], entropy[rows], _ = softmax_stats(z, target[rows], temperature, banned)
            del z  # before the next chunk's is made
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
    """Slices of the token axis, each small enough for its (C, V) buffer."""
    return _cut(len(hidden), chunk_tokens or max(16, CHUNK_ELEMENTS.get(hidden.device.type, 0) // len(weight)))


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


def scores(hidden, weight):
    """Logits (C, V) before temperature, in the statistics' dtype."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    if hidden.device.type == "cuda":  # keep the matmul's fp32 accumulator
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def softmax_stats(z, target, temperature, banned):
    """Log-prob, entropy and log-sum-exp (C,) of a chunk's logits z, which become z / temperature - max in place."""
    logp, entropy, lse = z.new_empty(3, len(z))  # (C,) each
    for rows, block, e in blocks(z):
        block.div_(temperature)
        if banned:  # finite, so that 0 * z stays 0 in the entropy
            block.index_fill_(1, torch.tensor(banned, device=z.device), -1e9)
        top, place = block.max(1, keepdim=True)  # (B, 1) twice
        torch.exp(block.sub_(top), out=e).scatter_(1, place, 0)
        rest = e.sum(1)  # (B,), without the largest's 1, next to which a small sum would round away
        lse[rows] = rest.log1p()
        logp[rows] = block.gather(1, target[rows, None]).squeeze(1) - lse[rows]
        entropy[rows] = lse[rows] - e.mul_(block).sum(1) / (1 + rest)  # the largest's z is 0 and adds nothing
    return logp, entropy, lse
