"""Work lists of the attention kernels, built on the host once a pack, and how kernels read them.

A query tile is a span's row of the table, cut to a few queries: one program of the forward and dQ kernels.

A key tile is a run of keys that the same spans see, so the key axis is cut wherever any key range begins or
ends: a prompt's keys serve the prompt and all of its responses. A tile lists the query ranges that see it, its
visits. One program of the dK/dV kernel takes all of them, or, where the tiles alone would leave the chip idle
or one tile would outlast the rest, a piece of them: pieces write fp32 partial sums to slots of their own, and a
tile's slots are added in order. Nothing depends on which program runs first.

Causality is a shift: row r sees key j of a range if j <= r + shift, UNBOUNDED where it sees them all.

Next: attention.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

UNBOUNDED = 1 << 30  # added to any row it still fits int32
_UNBOUNDED = tl.constexpr(UNBOUNDED)  # as kernels read it
PROGRAMS_PER_SM = 2  # what dK/dV is split for: the longest program is then at most half of an SM's share
MIN_WORK = 16  # (query block, head) pairs of a piece, below which writing and adding its partial sums costs too much


class QueryTiles(NamedTuple):
    tiles: torch.Tensor  # (n, 7) int32: row0, row1, p0, p1, k0, k1, shift; the longest first
    holes: bool  # rows that no tile covers


class KeyTiles(NamedTuple):
    pieces: torch.Tensor  # (n, 6) int32: key0, key1, slot or -1, visits [a, b) cut by the diagonal, [b, c) whole
    visits: torch.Tensor  # (m, 3) int32: row0, row1, shift
    sums: torch.Tensor  # (s, 4) int32: key0, key1 of a tile in several pieces, and its slots [a, b)
    slots: int
    holes: bool  # keys that no piece covers


def _spans(spans):
    """Spans that have queries, in query order, so that the order of the table changes no bit."""
    assert spans.num_tokens < UNBOUNDED
    return sorted(row for row in spans.table.tolist() if row[1] > row[0])


def _table(rows, fields, device):
    return torch.tensor(rows, dtype=torch.int32).view(-1, fields).to(device)


def longest(spans):
    """The largest number of queries or keys that a span has."""
    sizes = [max(q1 - q0, k1 - k0 + p1 - p0) for q0, q1, k0, k1, p0, p1, _ in _spans(spans)]
    return max(sizes, default=0)


def query_tiles(spans, device, block_m):
    tiles = []
    for q0, q1, k0, k1, p0, p1, causal in _spans(spans):
        for row0 in range(q0, q1, block_m):
            row1, shift = min(row0 + block_m, q1), k0 - q0 if causal else UNBOUNDED
            tiles.append((row0, row1, p0, p1, k0, row1 + shift if causal else k1, shift))
    tiles.sort(key=lambda t: t[2] - t[3] + t[4] - t[5])
    return QueryTiles(_table(tiles, 7, device), sum(t[1] - t[0] for t in tiles) < spans.num_tokens)


def _segments(spans):
    """Runs of keys that the same spans see: [(key0, key1, [(q0, q1, shift)])]."""
    ranges = []  # (first key, end, q0, q1, shift)
    for q0, q1, k0, k1, p0, p1, causal in _spans(spans):
        ranges += [(p0, p1, q0, q1, UNBOUNDED)] if p1 > p0 else []
        ranges += [(k0, k1, q0, q1, k0 - q0 if causal else UNBOUNDED)] if k1 > k0 else []
    cuts = sorted({cut for low, high, *_ in ranges for cut in (low, high)})
    index = {cut: i for i, cut in enumerate(cuts)}
    seen_by = [[] for _ in cuts]
    for low, high, *visit in ranges:
        for i in range(index[low], index[high]):
            seen_by[i].append(visit)
    return [(low, high, by) for low, high, by in zip(cuts, cuts[1:], seen_by, strict=False) if by]


def _visits(key0, key1, seen_by, block_m):
    """Query ranges that see keys [key0, key1): those that the diagonal crosses, and those that see every key."""
    diagonal, whole = [], []
    for q0, q1, shift in seen_by:
        if shift != UNBOUNDED:
            row0 = key0 - shift  # the first row that sees any of these keys
            q0 = min(row0 + -(-(key1 - 1 - key0) // block_m) * block_m, q1)
            diagonal += [(row0, q0, shift)] if q0 > row0 else []
        whole += [(q0, q1, UNBOUNDED)] if q1 > q0 else []
    return diagonal, whole


def _blocks(visits, block_m):
    return sum(-(-(row1 - row0) // block_m) for row0, row1, _ in visits)


def _cut(visits, first, last, block_m):
    """The part of `visits` that makes up their query blocks [first, last)."""
    part = []
    for row0, row1, shift in visits:
        low, high = max(row0, row0 + first * block_m), min(row1, row0 + last * block_m)
        part += [(low, high, shift)] if low < high else []
        blocks = _blocks([(row0, row1, shift)], block_m)
        first, last = first - blocks, last - blocks
    return part


def key_tiles(spans, device, block_m, block_n, group, kv_heads, num_sms):
    """For `group` q heads a kv head, all of which a program goes through."""
    tiles = []  # (key0, key1, diagonal, whole, blocks)
    for low, high, seen_by in _segments(spans):
        for key0 in range(low, high, block_n):
            key1 = min(key0 + block_n, high)
            diagonal, whole = _visits(key0, key1, seen_by, block_m)
            tiles.append((key0, key1, diagonal, whole, _blocks(diagonal + whole, block_m)))
    work = sum(tile[4] for tile in tiles) * group * kv_heads
    limit = max(1, max(MIN_WORK, -(-work // (PROGRAMS_PER_SM * num_sms))) // group)  # blocks of a program
    todo, sums, slots = [], [], 0  # todo: (blocks, key0, key1, slot, diagonal, whole)
    for key0, key1, diagonal, whole, blocks in tiles:
        size = -(-blocks // -(-blocks // limit))  # of even pieces
        crossed = _blocks(diagonal, block_m)
        starts = range(0, blocks, size)
        for piece, first in enumerate(starts):
            parts = [_cut(diagonal, first, first + size, block_m)]
            parts += [_cut(whole, first - crossed, first + size - crossed, block_m)]
            todo.append((min(size, blocks - first), key0, key1, slots + piece if len(starts) > 1 else -1, *parts))
        if len(starts) > 1:
            sums.append((key0, key1, slots, slots + len(starts)))
            slots += len(starts)
    pieces, visits = [], []
    for _, key0, key1, slot, diagonal, whole in sorted(todo, key=lambda piece: -piece[0]):
        a, b = len(visits), len(visits) + len(diagonal)
        visits += diagonal + whole
        pieces.append((key0, key1, slot, a, b, len(visits)))
    holes = sum(tile[1] - tile[0] for tile in tiles) < spans.num_tokens
    return KeyTiles(_table(pieces, 6, device), _table(visits, 3, device), _table(sums, 4, device), slots, holes)


@triton.jit
def query_tile(tiles, index, BLOCK_N: tl.constexpr):
    """A query tile's rows, how many of its key blocks need no mask, how many blocks it has, and what names them."""
    tile = tiles + index * 7
    row0, row1, p0, p1 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    k0, k1, shift = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
    whole_p = (p1 - p0) // BLOCK_N
    whole_k = (tl.minimum(k1, row0 + shift + 1) - k0) // BLOCK_N  # the first row sees the fewest keys
    tail_p = tl.cdiv(p1 - p0, BLOCK_N) - whole_p
    total = whole_p + tail_p + tl.cdiv(k1 - k0, BLOCK_N)
    return row0, row1, whole_p + whole_k, total, (p0, p1, k0, k1, shift, whole_p, whole_k, tail_p)


@triton.jit
def key_block(i, blocks, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """First key, end and causal shift of block i. The order is: whole blocks of the prefix, whole blocks of the own
    keys, the prefix's tail, the own diagonal and tail; so one loop without masks is followed by one with."""
    p0, p1, k0, k1, shift, whole_p, whole_k, tail_p = blocks
    if MASKED:
        in_prefix = i < whole_p + whole_k + tail_p
        first = tl.where(in_prefix, p0 + whole_p * BLOCK_N, k0 + (i - whole_p - tail_p) * BLOCK_N)
    else:
        in_prefix = i < whole_p
        first = tl.where(in_prefix, p0 + i * BLOCK_N, k0 + (i - whole_p) * BLOCK_N)
    return first, tl.where(in_prefix, p1, k1), tl.where(in_prefix, _UNBOUNDED, shift)


@triton.jit
def load_rows(x, rows, stride, end, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a (T, D) matrix, zero past column D and, with CHECK, from row `end` on."""
    dims = tl.arange(0, BLOCK_D)
    at = x + rows[:, None].to(tl.int64) * stride + dims[None, :]
    if CHECK:
        x = tl.load(at, mask=(rows < end)[:, None] & (dims < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        x = tl.load(at, mask=(dims < D)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store_rows(x, rows, stride, end, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    at = x + rows[:, None].to(tl.int64) * stride + dims[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(rows < end)[:, None] & (dims < D)[None, :])
