"""Packed attention on a CPU: spans of similar size, gathered into padded batches for torch's SDPA.

The q heads that share a kv head are folded into the query axis, so keys are never repeated. Gather
indices and masks depend on the spans alone, so they are built once a pack, not once a layer.

Next: _varlen.py, attention by flash kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._spans import Span, Spans

MASK_ELEMENTS = 1 << 22  # of one padded batch's score matrix: 16 MB in fp32


class _Batch:
    """Gather indices and mask of B spans, padded to (B, Lq) queries and (B, Lk) keys."""

    shape: tuple[int, int, int]  # B, Lq, Lk
    causal: bool  # all spans are `_is_plain`: SDPA's own causal mask suffices
    q_index: Tensor  # (B * Lq,) query rows in the pack; 0 where padded
    k_index: Tensor  # (B * Lk,) key rows in the pack; 0 where padded
    rows: Tensor  # (n,) positions in q_index that are not padding
    full: bool  # no query is padding
    unseen: Tensor | None  # (B, Lq, Lk) bool: keys that a query must not see; None: SDPA needs no mask

    def __init__(self, spans: list[Span]) -> None:
        num_q, num_k = max(s.queries for s in spans), max(s.keys for s in spans)
        self.shape = (len(spans), num_q, num_k)
        self.causal = _is_plain(spans[0])
        q_index = torch.zeros(len(spans), num_q, dtype=torch.int64)
        k_index = torch.zeros(len(spans), num_k, dtype=torch.int64)
        rows, unseen = [], torch.zeros(len(spans), num_q, num_k, dtype=torch.bool)
        for b, s in enumerate(spans):
            n, m = s.queries, s.keys
            q_index[b, :n] = torch.arange(s.q0, s.q1)
            k_index[b, :m] = torch.cat([torch.arange(s.p0, s.p1), torch.arange(s.k0, s.k1)])
            rows.append(b * num_q + torch.arange(n))
            unseen[b, :, m:] = True
            if s.causal:
                unseen[b, :n, s.prefix_keys : m] |= ~torch.ones(n, n, dtype=torch.bool).tril()
        self.q_index, self.k_index, self.rows = q_index.flatten(), k_index.flatten(), torch.cat(rows)
        self.full = self.rows.numel() == self.q_index.numel()
        masked = any(s.keys < num_k or s.causal and s.queries > 1 for s in spans)
        self.unseen = unseen if masked and not self.causal else None
        self._masks: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def to(self, device: torch.device) -> "_Batch":
        if self.q_index.device != device:
            with torch.inference_mode(False):
                self.q_index, self.k_index, self.rows = (x.to(device) for x in (self.q_index, self.k_index, self.rows))
        return self

    def mask(self, group: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """(B, 1, group * Lq, Lk) additive mask, or None if every query sees every key."""
        if self.unseen is None:
            return None
        if (group, dtype, device) not in self._masks:
            with torch.inference_mode(False):  # training may use it next
                mask = torch.zeros(self.unseen.shape, dtype=dtype).masked_fill(self.unseen, float("-inf"))
                self._masks[group, dtype, device] = mask.repeat(1, group, 1).unsqueeze(1).to(device)
        return self._masks[group, dtype, device]


def _is_plain(span: Span) -> bool:
    """Causal without a prefix. Such a batch needs no mask: all padding is to the right of the real rows."""
    return bool(span.causal) and not span.prefix_keys


def padded_batches(spans: Spans) -> list[_Batch]:
    """Padded batches of similar spans."""
    batches: list[_Batch] = []
    members: list[Span] = []
    for span in sorted(spans.in_query_order(), key=lambda s: (_is_plain(s), s.queries, s.keys)):
        if members and not _fits(members, span):
            batches.append(_Batch(members))
            members = []
        members.append(span)
    return batches + ([_Batch(members)] if members else [])


def _fits(members: list[Span], span: Span) -> bool:
    """Whether to pad a span into a batch: if padding stays below half of the work, or the batch stays small."""
    batch = [*members, span]
    padded = len(batch) * max(s.queries for s in batch) * max(s.keys for s in batch)
    return (
        _is_plain(members[0]) == _is_plain(span)
        and padded <= MASK_ELEMENTS
        and padded <= max(1.5 * sum(s.queries * s.keys for s in batch), 1 << 16)
    )


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> Tensor:
    """`attention` by torch's SDPA over padded batches; differentiable."""
    kv_heads, group, dim = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    pieces, places = [], []
    for batch in spans.cached(padded_batches):
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
