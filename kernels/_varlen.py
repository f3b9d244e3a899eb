"""Packed attention through external flash kernels: torch's own ("varlen") or the flash-attn package ("flash").

Those kernels take sequences with one key range each, and no shared prefixes. So a pack is split into calls, and every
query row gets its softmax from at most two of them, a and b, over disjoint keys:
    causal     own keys of the causal spans
    full       own keys of the others; all queries of one key range are one sequence
    prefix     prefix keys, visible to all G responses of a prompt, which form one long sequence of queries
    lse = log(e^lse_a + e^lse_b),   out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b,   in fp32

The gradient needs no more than the merged out and lse. With p_ij = e^(s_ij - lse_i) and delta_i = dout_i . out_i,
    ds_ij = p_ij (dout_i . v_j - delta_i)
holds for every key j of the union, and a flash backward computes p and delta from the out and lse passed to it. So each
call's backward gets the merged ones. dq is summed over calls, and so are dk and dv: a prompt's keys get one term from
the prompt and one from its responses. Ring attention (Liu et al. 2023, arXiv:2310.01889) splits in the same way.

Key ranges of one call are disjoint, so within a call nothing is added twice at one place and sums have a fixed order.
Inside a kernel the order follows `torch.use_deterministic_algorithms`: without it dq depends on scheduling.

Next: _head.py, code shared by both head ops.
"""

import functools
from collections.abc import Callable, Iterable
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._spans import Spans

ALL = slice(None)

Rows = slice | Tensor  # ALL, another slice, or an index (n,) int64 without duplicates
Range = tuple[int, int]  # first row, end
FlashSequence = tuple[Range, list[Range]]  # keys, and the queries that see them


class Call(NamedTuple):
    """One launch of a flash kernel on several sequences."""

    q_rows: Rows  # of the pack
    k_rows: Rows
    cu_q: Tensor  # (sequences + 1,) int32, bounds of the sequences among the call's query rows
    cu_k: Tensor
    max_q: int  # queries of the longest sequence
    max_k: int
    causal: bool


def calls(spans: Spans, device: torch.device) -> list[Call]:
    """The calls that compute a pack's attention. Rows outside of all spans are in no call."""
    causal: list[FlashSequence] = []
    full: dict[Range, list[Range]] = {}
    prefix: dict[Range, list[Range]] = {}
    for s in spans.in_query_order():
        if s.own_keys and s.causal:
            causal.append(((s.k0, s.k1), [(s.q0, s.q1)]))
        elif s.own_keys:
            full.setdefault((s.k0, s.k1), []).append((s.q0, s.q1))
        if s.prefix_keys:
            prefix.setdefault((s.p0, s.p1), []).append((s.q0, s.q1))
    return [
        _call(members, mask, spans.num_tokens, device)
        for sequences, mask in ((causal, True), (full.items(), False), (prefix.items(), False))
        for members in _disjoint(sequences)
    ]


def _disjoint(sequences: Iterable[FlashSequence]) -> list[list[FlashSequence]]:
    """Sequences in as few lists of disjoint key ranges as possible; one list, for a pack of prompts and responses."""
    lists: list[list[FlashSequence]] = []
    for sequence in sorted(sequences):
        for members in lists:
            if members[-1][0][1] <= sequence[0][0]:
                members.append(sequence)
                break
        else:
            lists.append([sequence])
    return lists


def _call(sequences: list[FlashSequence], causal: bool, num_tokens: int, device: torch.device) -> Call:
    num_q = [sum(q1 - q0 for q0, q1 in queries) for _, queries in sequences]
    num_k = [k1 - k0 for (k0, k1), _ in sequences]
    # With equal lengths it does not matter which corner a kernel aligns its causal mask to.
    assert not causal or num_q == num_k
    return Call(
        _rows([rows for _, queries in sequences for rows in queries], num_tokens, device),
        _rows([keys for keys, _ in sequences], num_tokens, device),
        torch.tensor([0, *accumulate(num_q)], dtype=torch.int32, device=device),
        torch.tensor([0, *accumulate(num_k)], dtype=torch.int32, device=device),
        max(2, *num_q),  # a maximum of 1 would select the decoding kernels, which have no backward
        max(num_k),
        causal,
    )


def _rows(ranges: list[Range], num_tokens: int, device: torch.device) -> Rows:
    """The cheapest index of these ranges, in their order."""
    if any(before[1] != after[0] for before, after in pairwise(ranges)):
        return torch.cat([torch.arange(*r) for r in ranges]).to(device)
    start, end = ranges[0][0], ranges[-1][1]
    return ALL if (start, end) == (0, num_tokens) else slice(start, end)


class Engine(NamedTuple):
    """Flash attention over sequences.

    forward(q (n, Hq, D), k, v (m, Hkv, D), cu_q, cu_k, max_q, max_k, causal, scale) -> out (n, Hq, D), lse (Hq, n)
    backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale) -> dq, dk, dv
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, todo: list[Call], scale: float, engine: Engine) -> Tensor:
        out = lse = None
        for call in todo:
            rows, keys = call.q_rows, call.k_rows
            new, new_lse = engine.forward(q[rows], k[keys], v[keys], *call[2:], scale)  # (n, Hq, D), (Hq, n)
            if lse is None and rows is ALL:
                out, lse = new, new_lse
                continue
            if out is None or lse is None:
                out, lse = torch.zeros_like(q), new_lse.new_full((q.shape[1], len(q)), float("-inf"))
            _merge_(out, lse, rows, new, new_lse)
        assert out is not None
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.scale, ctx.engine = todo, scale, engine
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        dq: Tensor | None = None
        dk: Tensor | None = None
        dv: Tensor | None = None
        for call in ctx.calls:
            rows, keys = call.q_rows, call.k_rows
            new_dq, new_dk, new_dv = ctx.engine.backward(
                dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows].contiguous(), *call[2:], ctx.scale
            )
            if len(ctx.calls) > 2:  # keys may get a third term: a bf16 sum of two rounds once, of three twice
                new_dk, new_dv = new_dk.to(lse.dtype), new_dv.to(lse.dtype)
            dq, dk, dv = _plus(dq, rows, new_dq, q), _plus(dk, keys, new_dk, k), _plus(dv, keys, new_dv, v)
        assert dk is not None and dv is not None
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _merge_(out: Tensor, lse: Tensor, rows: Rows, new: Tensor, new_lse: Tensor) -> None:
    """Merge the softmax over more keys into `out` and `lse` at `rows`."""
    total = torch.logaddexp(lse[:, rows], new_lse)  # (Hq, n)
    share = (new_lse - total).exp().T.unsqueeze(2)  # (n, Hq, 1)
    out[rows] = torch.addcmul(new * share, out[rows], 1 - share).to(out.dtype)
    lse[:, rows] = total


def _plus(total: Tensor | None, rows: Rows, new: Tensor, like: Tensor) -> Tensor:
    """`total` with `new` added at `rows`; None: zeros of the shape of `like`."""
    if total is None and rows is ALL:
        return new
    if total is None:
        total = torch.zeros_like(like, dtype=new.dtype)
    total[rows] += new
    return total


def _torch_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    # The operators below torch.nn.attention.varlen, whose public function has no gradient through a merged lse.
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale)[:2]


def _torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    backward = torch.ops.aten._flash_attention_backward
    no_rng = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, *no_rng, scale=scale)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    forward = _flash_package()._flash_attn_varlen_forward
    return forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=scale, causal=causal)[:2]


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_package()._flash_attn_varlen_backward(
        *(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k),
        dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


@functools.cache
def _flash_package() -> Any:
    try:
        package, interface = (import_module(name) for name in ("flash_attn", "flash_attn.flash_attn_interface"))
    except ImportError as error:
        raise ValueError(
            'impl="flash" needs the flash-attn package (pip install flash-attn); impl="varlen" has torch\'s own kernels'
        ) from error
    version = package.__version__
    if tuple(int(number) for number in version.split(".")[:2]) < (2, 7):
        raise ValueError(f'flash-attn is {version}: impl="flash" needs 2.7 or later; impl="varlen" needs no package')
    return interface


TORCH = Engine(_torch_forward, _torch_backward)
FLASH = Engine(_flash_forward, _flash_backward)


def _check(impl: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f'{name} is {x.dtype}: impl="{impl}" takes float16 and bfloat16; impl="sdpa" takes any')
        if x.shape[2] % 8 or x.shape[2] > 256:
            raise ValueError(f'{name} has head dim {x.shape[2]}: impl="{impl}" takes multiples of 8 up to 256')
        if x.stride(2) != 1:
            raise ValueError(f"{name} has strides {x.stride()}: the last one must be 1, so call .contiguous() on it")
        if not x.is_cuda:
            raise ValueError(f'{name} is on {x.device}: impl="{impl}" needs CUDA tensors; impl="sdpa" runs on a CPU')
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        raise ValueError(f'{torch.cuda.get_device_name(x.device)}: impl="{impl}" needs compute capability 8.0 or later')


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, engine: Engine) -> Tensor:
    """`attention_ref` by a flash engine; differentiable."""
    todo = spans.cached(calls, q.device)
    return _Attention.apply(q, k, v, todo, scale, engine) if todo else torch.zeros_like(q)


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> Tensor:
    """`attention_ref` by torch's own flash kernels (torch.nn.attention.varlen); differentiable.

    Raises:
        ValueError: tensors are not on CUDA or not fp16 or bf16, the head dim is no multiple of 8 or above 256, the GPU
            is older than compute capability 8.0, or torch was built without flash attention.
    """
    _check("varlen", q=q, k=k, v=v)
    if not torch.backends.cuda.is_flash_attention_available():
        raise ValueError(f'torch {torch.__version__} was built without flash attention: impl="triton" needs none')
    return attend(q, k, v, spans, scale, TORCH)


def attention_flash(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> Tensor:
    """`attention_ref` by the flash-attn package, 2.7 or later; differentiable.

    Raises:
        ValueError: as `attention_varlen`, or the package is missing or too old.
    """
    _flash_package()
    _check("flash", q=q, k=k, v=v)
    return attend(q, k, v, spans, scale, FLASH)
