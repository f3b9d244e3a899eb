"""Who attends to whom in a pack, as a table that every attention backend reads.

Next: attention.py.
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class Spans:
    """Who attends to whom in a pack.

    Args:
        table: (S, 7) integers, one row a span: q0, q1 (query rows), k0, k1 (its own keys), p0, p1 (prefix keys;
            p0 = p1: none), causal (0 or 1: query row q0 + i sees own keys k0 ... k0 + i, and the whole prefix).
        num_tokens: T, the length of the packed axis.

    Raises:
        ValueError: a table of another shape or of fractions, a range that runs backwards or leaves [0, T), query
            ranges that overlap, queries without a key, or a causal span whose query and key ranges differ in length.
    """

    table: torch.Tensor
    num_tokens: int
    _plans: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        table = torch.as_tensor(self.table)
        if table.ndim != 2 or table.shape[1] != 7 or (table.is_floating_point() and len(table)):
            raise ValueError(
                f"span table {tuple(table.shape)} {table.dtype}: want (S, 7) integers, q0 q1 k0 k1 p0 p1 causal"
            )
        end = 0
        for row in sorted(table.tolist()):
            q0, q1, k0, k1, p0, p1, causal = row
            if causal not in (0, 1):
                raise ValueError(f"span {row}: causal is 0 or 1")
            for low, high in ((q0, q1), (k0, k1), (p0, p1)):
                if not 0 <= low <= high <= self.num_tokens:
                    raise ValueError(
                        f"span {row}: range {low}:{high} runs backwards or leaves the {self.num_tokens} packed tokens"
                    )
            if q0 < end and q1 > q0:
                raise ValueError(f"span {row}: its queries overlap those of the span before it, which end at {end}")
            if causal and q1 - q0 != k1 - k0:
                raise ValueError(f"span {row}: a causal span needs as many own keys as queries")
            if q1 > q0 and k1 == k0 and p1 == p0:
                raise ValueError(f"span {row}: queries without any key")
            end = max(end, q1)
        # A copy, since plans made of the table outlive what the caller does to it.
        object.__setattr__(self, "table", table.to(torch.int32, copy=True))

    def plan(self, make, *key):
        """`make(self, *key)`, made once: what a backend derives from the table serves every layer."""
        if (make, key) not in self._plans:
            with torch.inference_mode(False):  # it may serve training next
                self._plans[make, key] = make(self, *key)
        return self._plans[make, key]
