"""Log-probability and entropy of sampled tokens, without keeping logits.

    z = hidden @ weight.T / temperature        (banned columns: -inf)
    logp[t] = z[t, y[t]] - lse(z[t]),    entropy[t] = lse(z[t]) - sum_v p[t, v] z[t, v]

Only a chunk of tokens meets the vocabulary at a time, so the extra memory is one (C, V) buffer
whatever N is; what its statistics need besides is made for a few rows at a time, while they are in
cache. Rows are shifted by their maximum before exp. Statistics are fp32 (fp64 for fp64 inputs):
rounding logits to bf16 first would cost up to 0.1 nat.

Next: linear_loss.py, which makes gradients out of the same chunks.
"""

import torch

from ._head import check_head, chunks, scores, softmax_stats, stats_dtype


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
