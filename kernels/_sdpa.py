"""Packed attention on a CPU: spans of like size gathered into padded batches for torch's SDPA.

The q heads that share a kv head are folded into the query axis, so keys are never repeated. The gather
indices and masks depend on the spans alone, so they are built once a pack, not once a layer.
"""

import torch
import torch.nn.functional as F

MASK_ELEMENTS = 1 << 22  # of one padded batch's score matrix: 16 MB in fp32


def padded_batches(spans):
    """Padded batches of like spans: [_Batch]."""
    todo = [row for row in spans.table.tolist() if row[1] > row[0]]
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
            with torch.inference_mode(False):
                self.q_index, self.k_index, self.rows = (x.to(device) for x in (self.q_index, self.k_index, self.rows))
        return self

    def mask(self, group, dtype, device):
        """(B, 1, group * Lq, Lk) additive mask, or None where nothing is hidden."""
        if self.hidden is None:
            return None
        if (group, dtype, device) not in self._masks:
            with torch.inference_mode(False):  # it may serve training next
                mask = torch.zeros(self.hidden.shape, dtype=dtype).masked_fill(self.hidden, float("-inf"))
                self._masks[group, dtype, device] = mask.repeat(1, group, 1).unsqueeze(1).to(device)
        return self._masks[group, dtype, device]


def attention_sdpa(q, k, v, spans, scale):
    """`attention` by torch's SDPA over padded batches; differentiable."""
    kv_heads, group, dim = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    pieces, places = [], []
    for batch in spans.plan(padded_batches):
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
