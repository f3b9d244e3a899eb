"""Spans of a pack: the table of visible keys that every attention backend reads.

Next: _tiles.py, work lists of the attention kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, TypeVarTuple

import torch
from torch import Tensor

Key = TypeVarTuple("Key")
Value = TypeVar("Value")


class Span(NamedTuple):
    """Query rows [q0, q1) of a pack see their own keys [k0, k1) and the prefix keys [p0, p1)."""

    q0: int  # first query row
    q1: int  # one past the last query row
    k0: int  # first own key; causal: as many own keys as queries
    k1: int
    p0: int  # first prefix key; all queries see the whole prefix
    p1: int  # p0 if there is no prefix
    causal: int  # 1: row q0 + i sees own keys k0 ... k0 + i; 0: every row sees all own keys

    @property
    def queries(self) -> int:
        return self.q1 - self.q0

    @property
    def own_keys(self) -> int:
        return self.k1 - self.k0

    @property
    def prefix_keys(self) -> int:
        return self.p1 - self.p0

    @property
    def keys(self) -> int:
        return self.own_keys + self.prefix_keys


class Spans:
    """The spans of a pack, and a cache of the work lists that backends derive from them.

    Args:
        table: (S, 7) integers, one `Span` per row; it is copied.
        num_tokens: T, the length of the packed axis.

    Raises:
        ValueError: a table of another shape or of fractions, a range that runs backwards or leaves [0, T), query
            ranges that overlap, queries without a key, or a causal span whose query and key ranges differ in length.
    """

    table: Tensor  # (S, 7) int32
    rows: list[Span]  # the table on the host, so that reading it never waits for a device
    num_tokens: int

    def __init__(self, table: Tensor | Sequence[Sequence[int]], num_tokens: int) -> None:
        tensor = torch.as_tensor(table)
        if tensor.ndim != 2 or tensor.shape[1] != 7 or (tensor.is_floating_point() and len(tensor)):
            raise ValueError(
                f"span table {tuple(tensor.shape)} {tensor.dtype}: want (S, 7) integers, {' '.join(Span._fields)}"
            )
        self.rows = [Span(*row) for row in (table.tolist() if isinstance(table, Tensor) else table)]
        self.num_tokens = num_tokens
        self._check()
        self.table = tensor.to(torch.int32, copy=True)
        self._cache: dict[tuple[Any, ...], Any] = {}

    def _check(self) -> None:
        end = 0
        for span in sorted(self.rows):
            if span.causal not in (0, 1):
                raise ValueError(f"{span}: causal is 0 or 1")
            for low, high in ((span.q0, span.q1), (span.k0, span.k1), (span.p0, span.p1)):
                if not 0 <= low <= high <= self.num_tokens:
                    raise ValueError(
                        f"{span}: range {low}:{high} runs backwards or leaves the {self.num_tokens} packed tokens"
                    )
            if span.q0 < end and span.queries:
                raise ValueError(f"{span}: its queries overlap those of the span before it, which end at {end}")
            if span.causal and span.queries != span.own_keys:
                raise ValueError(f"{span}: a causal span needs as many own keys as queries")
            if span.queries and not span.keys:
                raise ValueError(f"{span}: queries without any key")
            end = max(end, span.q1)

    def in_query_order(self) -> list[Span]:
        """Spans that have queries. Sorted, so that the order of the table changes no bits of the results."""
        return sorted(span for span in self.rows if span.queries)

    def cached(self, build: Callable[["Spans", *Key], Value], *key: *Key) -> Value:
        """`build(self, *key)`, computed on the first call: one work list serves all layers."""
        if (build, key) not in self._cache:
            with torch.inference_mode(False):  # training may use it next
                self._cache[build, key] = build(self, *key)
        return self._cache[build, key]
