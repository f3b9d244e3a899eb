"""Packed variable-length attention for both towers, with an optional shared prefix.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j],   j over the keys that row i's span may see

A pack is one flat token axis. Each span is a query range with its own key range, and may have a
prefix range besides: G responses are G causal spans that share their prompt as prefix, so that the
prompt's keys and values exist once. Vision windows are non-causal spans without a prefix.

`attention_ref` is the definition, a loop over spans. `impl="sdpa"` is the CPU path: spans of like
size are gathered into padded batches for torch's `scaled_dot_product_attention`; the q heads that
share a kv head are folded into the query axis, so keys are never repeated. The gather indices and
masks depend on the spans alone, so they are built once a pack, not once a layer.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

MASK_ELEMENTS = 1 << 22  # of one padded batch's score matrix: 16 MB in fp32


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


@dataclass(frozen=True)
class Spans:
    """Who attends to whom in a pack.

    Args:
        table: (S, 7) integers, one row a span: q0, q1 (query rows), k0, k1 (its own keys), p0, p1 (prefix keys;
            p0 = p1: none), causal (0 or 1: query row q0 + i sees own keys k0 ... k0 + i, and the whole prefix).
        num_tokens: T, the length of the packed axis.

    Raises:
        ValueError: a table of another shape, a range that runs backwards or leaves [0, T), query ranges that
            overlap, queries without a key, or a causal span whose query and key ranges differ in length.
    """

    table: torch.Tensor
    num_tokens: int

    def __post_init__(self):
        table = torch.as_tensor(self.table, dtype=torch.int32)
        if table.ndim != 2 or table.shape[1] != 7:
            raise ValueError(f"span table {tuple(table.shape)}: want (S, 7), q0 q1 k0 k1 p0 p1 causal")
        object.__setattr__(self, "table", table)
        end = 0
        for row in sorted(table.tolist()):
            q0, q1, k0, k1, p0, p1, causal = row
            for low, high in ((q0, q1), (k0, k1), (p0, p1)):
                if not 0 <= low <= high <= self.num_tokens:
                    raise ValueError(
                        f"span {row}: range {low}:{high} runs backwards or leaves the {self.num_tokens} packed tokens"
                    )
            if q0 < end:
                raise ValueError(f"span {row}: its queries overlap those of the span before it, which end at {end}")
            if causal and q1 - q0 != k1 - k0:
                raise ValueError(f"span {row}: a causal span needs as many own keys as queries")
            if q1 > q0 and k1 == k0 and p1 == p0:
                raise ValueError(f"span {row}: queries without any key")
            end = q1

    @cached_property
    def batches(self):
        """Padded batches of like spans: [_Batch]."""
        todo = [row for row in self.table.tolist() if row[1] > row[0]]
        # Pure causal spans need no mask (padding lies to the right of all real rows), so they go apart.
        todo.sort(key=lambda s: (s[6] and s[4] == s[5], s[1] - s[0], s[3] - s[2] + s[5] - s[4]))
        batches, members = [], []
        for span in todo:
            if members and not _fits(members, span):
                batches.append(_Batch(members))
                members = []
            members.append(span)
        return batches + ([_Batch(members)] if members else [])


def _sizes(span):
    q0, q1, k0, k1, p0, p1, _ = span
    return q1 - q0, k1 - k0 + p1 - p0


def _fits(members, span):
    """Joining pays while padding stays below half of the work, or the batch is small anyway."""
    plain = [s[6] and s[4] == s[5] for s in (members[0], span)]
    sizes = [_sizes(s) for s in (*members, span)]
    padded = len(sizes) * max(n for n, _ in sizes) * max(m for _, m in sizes)
    return (
        plain[0] == plain[1] and padded <= MASK_ELEMENTS and padded <= max(1.5 * sum(n * m for n, m in sizes), 1 << 16)
    )


class _Batch:
    """Gather indices and mask of B spans, padded to (B, Lq) queries and (B, Lk) keys."""

    def __init__(self, spans):
        sizes = [_sizes(s) for s in spans]
        num_q, num_k = max(n for n, _ in sizes), max(m for _, m in sizes)
        self.shape = (len(spans), num_q, num_k)
        self.causal = bool(spans[0][6] and spans[0][4] == spans[0][5])
        q_index = torch.zeros(len(spans), num_q, dtype=torch.int64)
        k_index = torch.zeros(len(spans), num_k, dtype=torch.int64)
        rows, hidden = [], torch.zeros(len(spans), num_q, num_k, dtype=torch.bool)
        for b, ((q0, q1, k0, k1, p0, p1, causal), (n, m)) in enumerate(zip(spans, sizes, strict=True)):
            q_index[b, :n] = torch.arange(q0, q1)
            k_index[b, :m] = torch.cat([torch.arange(p0, p1), torch.arange(k0, k1)])
            rows.append(b * num_q + torch.arange(n))
            hidden[b, :, m:] = True
            if causal:
                hidden[b, :n, p1 - p0 : m] |= ~torch.ones(n, n, dtype=torch.bool).tril()
        self.q_index, self.k_index, self.rows = q_index.flatten(), k_index.flatten(), torch.cat(rows)
        self.full = self.rows.numel() == self.q_index.numel()
        self.hidden = hidden if hidden.any() and not self.causal else None
        self._masks = {}

    def to(self, device):
        if self.q_index.device != device:
            self.q_index, self.k_index, self.rows = (x.to(device) for x in (self.q_index, self.k_index, self.rows))
        return self

    def mask(self, group, dtype, device):
        """(B, 1, group * Lq, Lk) additive mask, or None where nothing is hidden."""
        if self.hidden is None:
            return None
        if (group, dtype, device) not in self._masks:
            mask = torch.zeros(self.hidden.shape, dtype=dtype).masked_fill(self.hidden, float("-inf"))
            self._masks[group, dtype, device] = mask.repeat(1, group, 1).unsqueeze(1).to(device)
        return self._masks[group, dtype, device]


def _sdpa(q, k, v, spans, scale):
    kv_heads, group, dim = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    pieces, places = [], []
    for batch in spans.batches:
        (B, Lq, Lk), batch = batch.shape, batch.to(q.device)
        bq = q.index_select(0, batch.q_index).view(B, Lq, kv_heads, group, dim)
        bk = k.index_select(0, batch.k_index).view(B, Lk, kv_heads, dim).transpose(1, 2)  # (B, Hkv, Lk, D)
        bv = v.index_select(0, batch.k_index).view(B, Lk, kv_heads, dim).transpose(1, 2)  # (B, Hkv, Lk, D)
        if batch.causal:
            bq = bq.flatten(2, 3).transpose(1, 2)  # (B, Hq, Lq, D)
            bk, bv = (x.repeat_interleave(group, 1) for x in (bk, bv))
            out = F.scaled_dot_product_attention(bq, bk, bv, is_causal=True, scale=scale).transpose(1, 2)
        else:
            bq = bq.permute(0, 2, 3, 1, 4).reshape(B, kv_heads, group * Lq, dim)
            mask = batch.mask(group, q.dtype, q.device)
            out = F.scaled_dot_product_attention(bq, bk, bv, attn_mask=mask, scale=scale)
            out = out.view(B, kv_heads, group, Lq, dim).permute(0, 3, 1, 2, 4)
        out = out.reshape(B * Lq, kv_heads * group, dim)
        pieces.append(out if batch.full else out.index_select(0, batch.rows))
        places.append(batch.q_index if batch.full else batch.q_index[batch.rows])
    if not pieces:
        return torch.zeros_like(q)
    return torch.zeros_like(q).index_copy(0, torch.cat(places), torch.cat(pieces))  # (T, Hq, D)


IMPLS = {"reference": attention_ref, "sdpa": _sdpa}


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
