"""Packed variable-length attention for both towers, with an optional shared prefix.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j],   j over the keys that row i's span may see

A pack is one flat token axis. Each span is a query range with its own key range, and may have a
prefix range besides: G responses are G causal spans that share their prompt as prefix, so that the
prompt's keys and values exist once. Vision windows are non-causal spans without a prefix.

`attention_ref` is the definition, a loop over spans. `impl="sdpa"` is the CPU path, _sdpa.py.
"""

import math

import torch
import torch.nn.functional as F

from ._sdpa import attention_sdpa
from ._spans import Spans


def attention_ref(q, k, v, spans, scale):
    """The definition. Rows outside every span are zero."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for q0, q1, k0, k1, p0, p1, causal in spans.table.tolist():
        keys = torch.cat([k[p0:p1], k[k0:k1]]).repeat_interleave(group, 1)  # (L, Hq, D)
        values = torch.cat([v[p0:p1], v[k0:k1]]).repeat_interleave(group, 1)  # (L, Hq, D)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * scale  # (Hq, Lq, L)
        if causal:
            own = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q.device).tril()
            seen = F.pad(own, (p1 - p0, 0), value=True)
            scores = scores.masked_fill(~seen, float("-inf"))
        out[q0:q1] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out


__all__ = ["Spans", "attention", "attention_ref"]

IMPLS = {"reference": attention_ref, "sdpa": attention_sdpa}


def attention(q, k, v, spans, *, scale=None, impl="sdpa"):
    """Attention over a pack, differentiable in q, k and v.

    Args:
        q: (T, Hq, D); k, v: (T, Hkv, D) with Hq a multiple of Hkv; one dtype.
        spans: `Spans` over the same T. Rows in no span come out as zero.
        scale: of the scores; default 1 / sqrt(D).
        impl: "sdpa" (padded batches) or "reference" (the definition).

    Returns:
        (T, Hq, D) in q's dtype.

    Raises:
        ValueError: shapes, dtypes or spans that do not fit together, or an unknown impl.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: one of {', '.join(IMPLS)}")
    if q.ndim != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
            "want (T, Hq, D), (T, Hkv, D) twice, Hkv dividing Hq"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: cast them to one dtype")
    if spans.num_tokens != q.shape[0]:
        raise ValueError(f"spans describe {spans.num_tokens} tokens, q has {q.shape[0]}")
    return IMPLS[impl](q, k, v, spans, 1 / math.sqrt(q.shape[2]) if scale is None else scale)
