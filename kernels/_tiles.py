"""Work lists of the attention kernels, built on the host once a pack, and the device functions that read them.

A query tile is a few queries of one span: one program of the forward and dQ kernels.

A key tile is a run of keys that are visible to the same spans, so the key axis is cut wherever any key range begins
or ends: a prompt's keys serve the prompt and all of its responses. Its visits are the query ranges that see it. Usually
one program of the dK/dV kernel computes them all. If that would leave SMs idle, or one tile would outlast all others,
visits are split into pieces: each piece writes fp32 partial sums to a buffer slot, and a last kernel adds a tile's
slots in order. So no result depends on the order in which programs run.

Causality is a shift: row r sees key j of a range if j <= r + shift; UNBOUNDED if it sees all of them.

Next: _sdpa.py, attention on a CPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._spans import Spans

UNBOUNDED = 1 << 30  # plus any row still fits int32
_UNBOUNDED = tl.constexpr(UNBOUNDED)  # for kernels
PROGRAMS_PER_SM = 2  # of dK/dV, the goal of splitting: then the longest program takes at most half of an SM's share
MIN_WORK = 16  # (query block, head) pairs of a piece: with fewer, its partial sums cost more than the split saves


class QueryTile(NamedTuple):
    row0: int  # query rows [row0, row1)
    row1: int
    p0: int  # prefix keys [p0, p1)
    p1: int
    k0: int  # own keys [k0, k1) that any of the rows sees
    k1: int
    shift: int  # over own keys


class QueryTiles(NamedTuple):
    tiles: Tensor  # (n, 7) int32 on the device: `QueryTile` rows, those with most keys first
    holes: bool  # some rows of the pack are in no tile


class Visit(NamedTuple):
    """Query rows [row0, row1) that see a key tile."""

    row0: int
    row1: int
    shift: int

    def blocks(self, block_m: int) -> int:
        return -(-(self.row1 - self.row0) // block_m)


class Piece(NamedTuple):
    """The visits of a key tile that one program of the dK/dV kernel computes."""

    key0: int  # keys [key0, key1)
    key1: int
    slot: int  # of its partial sums; -1: the only piece, which writes dK and dV itself
    diagonal: list[Visit]  # need a causal mask
    whole: list[Visit]  # see every key of the tile
    blocks: int  # query blocks of all visits


class KeyTiles(NamedTuple):
    """The work list of the dK/dV kernel, on the device."""

    pieces: Tensor  # (n, 6) int32: key0, key1, slot, and rows of `visits`: diagonal [a, b), whole [b, c)
    visits: Tensor  # (m, 3) int32: `Visit` rows
    sums: Tensor  # (s, 4) int32, the split tiles: key0, key1, slots [a, b)
    slots: int
    holes: bool  # some keys of the pack are in no tile


def _table(rows: Sequence[Sequence[int]], fields: int, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).view(-1, fields).to(device)


def longest(spans: Spans) -> int:
    """The largest number of queries or keys of a span."""
    return max((max(s.queries, s.keys) for s in spans.in_query_order()), default=0)


def query_tiles(spans: Spans, device: torch.device, block_m: int) -> QueryTiles:
    """Tiles of up to `block_m` queries."""
    assert spans.num_tokens < UNBOUNDED
    tiles = []
    for s in spans.in_query_order():
        shift = s.k0 - s.q0 if s.causal else UNBOUNDED
        for row0 in range(s.q0, s.q1, block_m):
            row1 = min(row0 + block_m, s.q1)
            tiles.append(QueryTile(row0, row1, s.p0, s.p1, s.k0, row1 + shift if s.causal else s.k1, shift))
    tiles.sort(key=lambda tile: tile.p0 - tile.p1 + tile.k0 - tile.k1)
    return QueryTiles(_table(tiles, 7, device), sum(tile.row1 - tile.row0 for tile in tiles) < spans.num_tokens)


def _segments(spans: Spans) -> list[tuple[int, int, list[Visit]]]:
    """Key ranges [first, end) whose keys are all visible to the same query ranges."""
    ranges = []  # (first key, end, visit)
    for s in spans.in_query_order():
        if s.prefix_keys:
            ranges.append((s.p0, s.p1, Visit(s.q0, s.q1, UNBOUNDED)))
        if s.own_keys:
            ranges.append((s.k0, s.k1, Visit(s.q0, s.q1, s.k0 - s.q0 if s.causal else UNBOUNDED)))
    cuts = sorted({cut for low, high, _ in ranges for cut in (low, high)})
    index = {cut: i for i, cut in enumerate(cuts)}
    visits: list[list[Visit]] = [[] for _ in cuts]
    for low, high, visit in ranges:
        for i in range(index[low], index[high]):
            visits[i].append(visit)
    return [(low, high, seen_by) for low, high, seen_by in zip(cuts, cuts[1:], visits, strict=False) if seen_by]


def _visits(key0: int, key1: int, seen_by: list[Visit], block_m: int) -> tuple[list[Visit], list[Visit]]:
    """Visits of keys [key0, key1): those crossed by the diagonal, and those that see every key."""
    diagonal, whole = [], []
    for q0, q1, shift in seen_by:
        if shift != UNBOUNDED:
            row0 = key0 - shift  # the first row that sees any of these keys
            q0 = min(row0 + -(-(key1 - 1 - key0) // block_m) * block_m, q1)
            diagonal += [Visit(row0, q0, shift)] if q0 > row0 else []
        whole += [Visit(q0, q1, UNBOUNDED)] if q1 > q0 else []
    return diagonal, whole


def _cut(visits: list[Visit], first: int, last: int, block_m: int) -> list[Visit]:
    """The query blocks [first, last) of `visits`."""
    selected = []
    for visit in visits:
        low, high = max(visit.row0, visit.row0 + first * block_m), min(visit.row1, visit.row0 + last * block_m)
        selected += [Visit(low, high, visit.shift)] if low < high else []
        blocks = visit.blocks(block_m)
        first, last = first - blocks, last - blocks
    return selected


def _split(tile: Piece, limit: int, slot: int, block_m: int) -> list[Piece]:
    """Pieces of a key tile, of even work and at most `limit` blocks; slots are numbered from `slot`."""
    size = -(-tile.blocks // -(-tile.blocks // limit))
    starts = range(0, tile.blocks, size)
    if len(starts) == 1:
        return [tile]
    crossed = sum(visit.blocks(block_m) for visit in tile.diagonal)
    pieces = []
    for i, first in enumerate(starts):
        diagonal = _cut(tile.diagonal, first, first + size, block_m)
        whole = _cut(tile.whole, first - crossed, first + size - crossed, block_m)
        pieces.append(Piece(tile.key0, tile.key1, slot + i, diagonal, whole, min(size, tile.blocks - first)))
    return pieces


def key_tiles(
    spans: Spans, device: torch.device, block_m: int, block_n: int, group: int, kv_heads: int, num_sms: int
) -> KeyTiles:
    """Tiles of up to `block_n` keys, visited by blocks of `block_m` queries.

    Args:
        group: q heads per kv head; a program computes all of them.
    """
    assert spans.num_tokens < UNBOUNDED
    tiles = []
    for low, high, seen_by in _segments(spans):
        for key0 in range(low, high, block_n):
            key1 = min(key0 + block_n, high)
            diagonal, whole = _visits(key0, key1, seen_by, block_m)
            blocks = sum(visit.blocks(block_m) for visit in diagonal + whole)
            tiles.append(Piece(key0, key1, -1, diagonal, whole, blocks))
    work = sum(tile.blocks for tile in tiles) * group * kv_heads
    limit = max(1, max(MIN_WORK, -(-work // (PROGRAMS_PER_SM * num_sms))) // group)  # blocks of a program
    pieces, sums, slots = list[Piece](), [], 0
    for tile in tiles:
        split = _split(tile, limit, slots, block_m)
        pieces += split
        if len(split) > 1:
            sums.append((tile.key0, tile.key1, slots, slots + len(split)))
            slots += len(split)
    table, visits = [], list[Visit]()
    for piece in sorted(pieces, key=lambda piece: -piece.blocks):
        a, b = len(visits), len(visits) + len(piece.diagonal)
        visits += piece.diagonal + piece.whole
        table.append((piece.key0, piece.key1, piece.slot, a, b, len(visits)))
    holes = sum(tile.key1 - tile.key0 for tile in tiles) < spans.num_tokens
    return KeyTiles(_table(table, 6, device), _table(visits, 3, device), _table(sums, 4, device), slots, holes)


@triton.jit
def query_tile(tiles, index, BLOCK_N: tl.constexpr):
    """Rows of a query tile, number of its key blocks that need no mask, number of all, and the input of `key_block`."""
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
    """First key, end and causal shift of block i.

    Order: whole blocks of the prefix, whole blocks of own keys, tail of the prefix, diagonal and tail of own keys. So a
    loop without masks is followed by one with masks.
    """
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
