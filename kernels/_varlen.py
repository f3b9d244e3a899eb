"""Packed attention through flash kernels that others ship: torch's own ("varlen") or the flash-attn package ("flash").

Those kernels know sequences, each with one range of keys, and no shared prefixes. So a pack is cut into calls,
and every query row gets its softmax from at most two of them, a and b, over disjoint keys:
    causal     a span's own keys, for the causal spans
    full       a span's own keys, for the others; all queries of one key range are one sequence
    prefix     the prefix's keys, which all G responses of a prompt see as one long sequence of queries
    lse = log(e^lse_a + e^lse_b),   out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b,   in fp32

The gradient needs no more than the merged out and lse. With p_ij = e^(s_ij - lse_i) and delta_i = dout_i . out_i,
    ds_ij = p_ij (dout_i . v_j - delta_i)
holds for every key j of the union, and a flash backward makes p and delta from the out and lse that it is given. So
each call's backward runs on the merged ones; dq adds up over calls, and so do dk and dv: a prompt's keys get one
term from the prompt and one from its responses. Ring attention (Liu et al. 2023, arXiv:2310.01889) splits likewise.

Key ranges of one call are disjoint, so nothing is added twice at one place within a call and sums keep their order.
What the kernels themselves do follows `torch.use_deterministic_algorithms`: without it dq depends on scheduling.
"""

import functools
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

ALL = slice(None)


class Call(NamedTuple):
    """One launch of a flash kernel: sequences, and where their rows lie in the pack."""

    q_rows: Any  # ALL, a slice, or an index (n,) int64 without duplicates
    k_rows: Any
    cu_q: torch.Tensor  # (sequences + 1,) int32, where sequences begin among the call's query rows
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    causal: bool


def calls(spans, device):
    """The calls that make a pack's attention: [Call]; rows in no span are in none."""
    live = sorted(row for row in spans.table.tolist() if row[1] > row[0])
    own = [row for row in live if row[3] > row[2]]
    causal = [((k0, k1), [(q0, q1)]) for q0, q1, k0, k1, _, _, flag in own if flag]
    full, prefix = {}, {}
    for q0, q1, k0, k1, _, _, flag in own:
        if not flag:
            full.setdefault((k0, k1), []).append((q0, q1))
    for q0, q1, _, _, p0, p1, _ in live:
        if p1 > p0:
            prefix.setdefault((p0, p1), []).append((q0, q1))
    found = []
    for sequences, flag in ((causal, True), (full.items(), False), (prefix.items(), False)):
        found += [_call(members, flag, spans.num_tokens, device) for members in _disjoint(sequences)]
    return found


def _disjoint(sequences):
    """Sequences in as few lists as their keys can be disjoint in: one, in a pack of prompts and responses."""
    lists = []
    for sequence in sorted(sequences):
        for members in lists:
            if members[-1][0][1] <= sequence[0][0]:
                members.append(sequence)
                break
        else:
            lists.append([sequence])
    return lists


def _call(sequences, causal, num_tokens, device):
    num_q = [sum(q1 - q0 for q0, q1 in queries) for _, queries in sequences]
    num_k = [k1 - k0 for (k0, k1), _ in sequences]
    # With equal lengths it does not matter which corner a kernel aligns its causal mask to.
    assert not causal or num_q == num_k
    return Call(
        _rows([piece for _, queries in sequences for piece in queries], num_tokens, device),
        _rows([keys for keys, _ in sequences], num_tokens, device),
        torch.tensor([0, *accumulate(num_q)], dtype=torch.int32, device=device),
        torch.tensor([0, *accumulate(num_k)], dtype=torch.int32, device=device),
        max(2, *num_q),  # a maximum of 1 would select the decoding kernels, which are not for training
        max(num_k),
        causal,
    )


def _rows(ranges, num_tokens, device):
    """Ranges, in their order, as what indexes a tensor at the least cost."""
    if any(before[1] != after[0] for before, after in pairwise(ranges)):
        return torch.cat([torch.arange(*r) for r in ranges]).to(device)
    start, end = ranges[0][0], ranges[-1][1]
    return ALL if (start, end) == (0, num_tokens) else slice(start, end)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, engine):
        out = lse = None
        for call in plan:
            rows, keys = call.q_rows, call.k_rows
            new, new_lse = engine.forward(q[rows], k[keys], v[keys], *call[2:], scale)  # (n, Hq, D), (Hq, n)
            if lse is None and rows is ALL:
                out, lse = new, new_lse
                continue
            if lse is None:
                out, lse = torch.zeros_like(q), new_lse.new_full((q.shape[1], len(q)), float("-inf"))
            _merge_(out, lse, rows, new, new_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.engine = plan, scale, engine
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.contiguous()
        dq = dk = dv = None
        for call in ctx.plan:
            rows, keys = call.q_rows, call.k_rows
            new_dq, new_dk, new_dv = ctx.engine.backward(
                dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows].contiguous(), *call[2:], ctx.scale
            )
            if len(ctx.plan) > 2:  # keys may get a third term: a bf16 sum of two rounds once, of three twice
                new_dk, new_dv = new_dk.to(lse.dtype), new_dv.to(lse.dtype)
            dq, dk, dv = _plus(dq, rows, new_dq, q), _plus(dk, keys, new_dk, k), _plus(dv, keys, new_dv, v)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _merge_(out, lse, rows, new, new_lse):
    """Bring a softmax over more keys into `out` and `lse` at `rows`."""
    total = torch.logaddexp(lse[:, rows], new_lse)  # (Hq, n)
    share = (new_lse - total).exp().T.unsqueeze(2)  # (n, Hq, 1)
    out[rows] = torch.addcmul(new * share, out[rows], 1 - share).to(out.dtype)
    lse[:, rows] = total


def _plus(total, rows, new, like):
    """`total` with `new` added at `rows`; None stands for zeros, `like` for their shape."""
    if total is None and rows is ALL:
        return new
    if total is None:
        total = torch.zeros_like(like, dtype=new.dtype)
    total[rows] += new
    return total


class Engine(NamedTuple):
    """Flash attention over sequences.

    forward(q (n, Hq, D), k, v (m, Hkv, D), cu_q, cu_k, max_q, max_k, causal, scale) -> out (n, Hq, D), lse (Hq, n)
    backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale) -> dq, dk, dv
    """

    forward: Any
    backward: Any


def _torch_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    # The operators under torch.nn.attention.varlen: its public function gives no gradient through a merged lse.
    forward = torch.ops.aten._flash_attention_forward
    return forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale)[:2]


def _torch_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    backward = torch.ops.aten._flash_attention_backward
    no_rng = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, *no_rng, scale=scale)


def _flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    forward = _flash_package()._flash_attn_varlen_forward
    return forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=scale, causal=causal)[:2]


def _flash_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_package()._flash_attn_varlen_backward(
        *(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv


@functools.cache
def _flash_package():
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


def _check(impl, **tensors):
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


def attend(q, k, v, spans, scale, engine):
    """`attention_ref` by a flash engine; differentiable."""
    plan = spans.plan(calls, q.device)
    return _Attention.apply(q, k, v, plan, scale, engine) if plan else torch.zeros_like(q)


def attention_varlen(q, k, v, spans, scale):
    """`attention_ref` by the flash kernels that torch ships (torch.nn.attention.varlen); differentiable.

    Raises:
        ValueError: tensors not on CUDA, not fp16 or bf16, a head dim that is no multiple of 8 or above 256, a GPU
            older than compute capability 8.0, or a torch built without flash attention.
    """
    _check("varlen", q=q, k=k, v=v)
    if not torch.backends.cuda.is_flash_attention_available():
        raise ValueError(f'torch {torch.__version__} was built without flash attention: impl="triton" needs none')
    return attend(q, k, v, spans, scale, TORCH)


def attention_flash(q, k, v, spans, scale):
    """`attention_ref` by the flash-attn package, 2.7 or later; differentiable.

    Raises:
        ValueError: as `attention_varlen`, or a package that is missing or too old.
    """
    _flash_package()
    _check("flash", q=q, k=k, v=v)
    return attend(q, k, v, spans, scale, FLASH)
