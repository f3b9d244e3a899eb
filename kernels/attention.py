"""Packed variable-length attention for both towers, with an optional shared prefix.

    out[i] = sum_j p[i,j] v[j],   p[i,:] = softmax_j(scale * q[i] . k[j]) over the keys that row i's span may see

A pack is one flat token axis. Each span is a query range with its own key range and an optional prefix
range: G responses are G causal spans that share their prompt as prefix, so that the prompt's keys and
values exist once. Vision windows are non-causal spans without a prefix.

The gradients, for upstream gradient do, with delta[i] = sum_j p[i,j] dp[i,j] = out[i] . do[i]:
    dv[j] = sum_i p[i,j] do[i],   dp[i,j] = do[i] . v[j],   ds[i,j] = p[i,j] (dp[i,j] - delta[i])
    dq[i] = scale sum_j ds[i,j] k[j],   dk[j] = scale sum_i ds[i,j] q[i]
Forward saves the log-sum-exp of each row, from which backward recomputes p (FlashAttention-2,
arXiv:2307.08691, algorithms 1 and 2). dQ and dK/dV are separate kernels: that computes the scores twice, but
needs no atomics, so equal inputs give equal bits. Softmax is in base 2; log2(e) is folded into the scale.

`attention_ref` is the definition, a loop over spans. `impl="triton"` runs the kernels below on the work lists of
_tiles.py. `impl="sdpa"` is the CPU path, _sdpa.py; "varlen" and "flash" call external flash kernels, _varlen.py.

Next: _spans.py, which tokens attend to which.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import _triton
from ._sdpa import attention_sdpa
from ._spans import Spans
from ._tiles import key_block, key_tiles, load_rows, longest, query_tile, query_tiles, store_rows
from ._varlen import attention_flash, attention_varlen

__all__ = ["Spans", "attention", "attention_ref"]


def attention_ref(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> Tensor:
    """The definition. Rows outside every span are zero."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for s in spans.rows:
        keys = torch.cat([k[s.p0 : s.p1], k[s.k0 : s.k1]]).repeat_interleave(group, 1)  # (L, Hq, D)
        values = torch.cat([v[s.p0 : s.p1], v[s.k0 : s.k1]]).repeat_interleave(group, 1)  # (L, Hq, D)
        scores = torch.einsum("qhd,khd->hqk", q[s.q0 : s.q1], keys) * scale  # (Hq, Lq, L)
        if s.causal:
            own = torch.ones(s.queries, s.own_keys, dtype=torch.bool, device=q.device).tril()
            visible = F.pad(own, (s.prefix_keys, 0), value=True)
            scores = scores.masked_fill(~visible, float("-inf"))
        out[s.q0 : s.q1] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out


class Tile(NamedTuple):
    rows: int  # queries
    keys: int
    warps: int
    stages: int


LOG2_E = math.log2(math.e)
WINDOW = 64
SUM_ROWS = 16  # keys of a program that adds partial sums: few keys, because few tiles are split
CONFIGS = {  # chip -> kernel -> tile if D = 2^n; if D is padded to 2^n; if spans have at most WINDOW queries and keys
    0: dict(forward=(Tile(32, 16, 4, 1),) * 3, dq=(Tile(32, 16, 4, 1),) * 3, dkv=(Tile(16, 32, 4, 1),) * 3),
    80: dict(
        forward=(Tile(128, 32, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2)),
        dq=(Tile(64, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        dkv=(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    ),
    90: dict(
        forward=(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
        dq=(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
        dkv=(Tile(64, 128, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    ),
    100: dict(
        forward=(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2)),
        dq=(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        dkv=(Tile(32, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    ),
}
FP32 = Tile(16, 16, 8, 1)  # on any chip: exact fp32 products use no tensor core, and larger tiles spill


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    q, k, v, out, lse, tiles, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, tokens, qk_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % HEADS).to(tl.int64)  # heads that share keys are neighbours, and share them in L2
    row0, row1, whole, total, blocks = query_tile(tiles, tl.program_id(0) // HEADS, BLOCK_N)
    rows = row0 + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q + head * stride_qh, rows, stride_qt, row1, D, BLOCK_D, True, UPCAST)  # (BLOCK_M, BLOCK_D)
    k += head // GROUP * stride_kh
    v += head // GROUP * stride_vh
    # The first block holds a key that every row sees, so after it no maximum is -inf.
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for MASKED in tl.static_range(2):
        for i in range(whole if MASKED else 0, total if MASKED else whole):
            first, end, shift = key_block(i, blocks, BLOCK_N, MASKED)
            keys = first + tl.arange(0, BLOCK_N)
            k_tile = load_rows(k, keys, stride_kt, end, D, BLOCK_D, MASKED, UPCAST)  # (BLOCK_N, BLOCK_D)
            v_tile = load_rows(v, keys, stride_vt, end, D, BLOCK_D, MASKED, UPCAST)  # (BLOCK_N, BLOCK_D)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            if MASKED:
                s = tl.where((keys < end)[None, :] & (keys[None, :] <= rows[:, None] + shift), s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1) * qk_scale)
            p = tl.exp2(s * qk_scale - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            norm = norm * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
            top = new_top
    store_rows(out + head * D, rows, HEADS * D, row1, acc / norm[:, None], D, BLOCK_D)
    tl.store(lse + head * tokens + rows, top + tl.log2(norm), mask=rows < row1)


@triton.jit(do_not_specialize=["tokens"])
def _dq_kernel(
    q, k, v, out, do, lse, delta, dq, tiles, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    tokens, qk_scale, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    row0, row1, whole, total, blocks = query_tile(tiles, tl.program_id(0) // HEADS, BLOCK_N)
    rows = row0 + tl.arange(0, BLOCK_M)
    o_tile = load_rows(out + head * D, rows, HEADS * D, row1, D, BLOCK_D, True, UPCAST)  # (BLOCK_M, BLOCK_D)
    do_tile = load_rows(do + head * D, rows, HEADS * D, row1, D, BLOCK_D, True, UPCAST)  # (BLOCK_M, BLOCK_D)
    # delta needs only these rows of out and do. Computed here, it costs dK/dV no extra pass.
    delta_row = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + head * tokens + rows, delta_row, mask=rows < row1)
    lse_row = tl.load(lse + head * tokens + rows, mask=rows < row1, other=float("inf"))
    q_tile = load_rows(q + head * stride_qh, rows, stride_qt, row1, D, BLOCK_D, True, UPCAST)  # (BLOCK_M, BLOCK_D)
    k += head // GROUP * stride_kh
    v += head // GROUP * stride_vh
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for MASKED in tl.static_range(2):
        for i in range(whole if MASKED else 0, total if MASKED else whole):
            first, end, shift = key_block(i, blocks, BLOCK_N, MASKED)
            keys = first + tl.arange(0, BLOCK_N)
            k_tile = load_rows(k, keys, stride_kt, end, D, BLOCK_D, MASKED, UPCAST)  # (BLOCK_N, BLOCK_D)
            v_tile = load_rows(v, keys, stride_vt, end, D, BLOCK_D, MASKED, UPCAST)  # (BLOCK_N, BLOCK_D)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            p = tl.exp2(s * qk_scale - lse_row[:, None])
            if MASKED:
                p = tl.where((keys < end)[None, :] & (keys[None, :] <= rows[:, None] + shift), p, 0.0)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            ds = p * (dp - delta_row[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    store_rows(dq + head * D, rows, HEADS * D, row1, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["tokens"])
def _dkv_kernel(
    q, k, v, do, lse, delta, dk, dv, partial, pieces, visits, stride_qt, stride_qh, stride_kt, stride_kh,
    stride_vt, stride_vh, tokens, qk_scale, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) % KV_HEADS
    piece = pieces + tl.program_id(0) // KV_HEADS * 6
    key0, key1, slot = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    keys = key0 + tl.arange(0, BLOCK_N)
    k += kv_head.to(tl.int64) * stride_kh
    v += kv_head.to(tl.int64) * stride_vh
    k_tile = load_rows(k, keys, stride_kt, key1, D, BLOCK_D, True, UPCAST)  # (BLOCK_N, BLOCK_D)
    v_tile = load_rows(v, keys, stride_vt, key1, D, BLOCK_D, True, UPCAST)  # (BLOCK_N, BLOCK_D)
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for WHOLE in tl.static_range(2):
        for visit in range(tl.load(piece + 3 + WHOLE), tl.load(piece + 4 + WHOLE)):
            at = visits + visit * 3
            row0, row1, shift = tl.load(at), tl.load(at + 1), tl.load(at + 2)
            # One loop over blocks and heads, not two: the pipeline fills once a visit.
            for i in range(0, tl.cdiv(row1 - row0, BLOCK_M) * GROUP):
                rows = row0 + i // GROUP * BLOCK_M + tl.arange(0, BLOCK_M)
                head = (kv_head * GROUP + i % GROUP).to(tl.int64)
                q_tile = load_rows(q + head * stride_qh, rows, stride_qt, row1, D, BLOCK_D, True, UPCAST)
                do_tile = load_rows(do + head * D, rows, KV_HEADS * GROUP * D, row1, D, BLOCK_D, True, UPCAST)
                # Past the range lse is inf, so p is 0 there and needs no mask.
                lse_row = tl.load(lse + head * tokens + rows, mask=rows < row1, other=float("inf"))
                s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
                p = tl.exp2(s * qk_scale - lse_row[None, :])
                if not WHOLE:
                    p = tl.where(keys[:, None] <= rows[None, :] + shift, p, 0.0)
                dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
                dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
                delta_row = tl.load(delta + head * tokens + rows, mask=rows < row1, other=0.0)
                ds = p * (dp - delta_row[None, :])
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    dk_acc *= scale
    if slot < 0:
        store_rows(dk + kv_head * D, keys, KV_HEADS * D, key1, dk_acc, D, BLOCK_D)
        store_rows(dv + kv_head * D, keys, KV_HEADS * D, key1, dv_acc, D, BLOCK_D)
    else:
        partial += (slot.to(tl.int64) * KV_HEADS + kv_head) * 2 * BLOCK_N * D
        store_rows(partial, keys - key0, D, key1 - key0, dk_acc, D, BLOCK_D)
        store_rows(partial + BLOCK_N * D, keys - key0, D, key1 - key0, dv_acc, D, BLOCK_D)


@triton.jit
def _sum_kernel(
    partial, dk, dv, sums,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dK and dV of ROWS keys of a split tile: the sum of its slots, in order."""
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    part = tl.program_id(0) // KV_HEADS
    tile = sums + part // (BLOCK_N // ROWS) * 4
    key0, key1, slot0, slot1 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    keys = part % (BLOCK_N // ROWS) * ROWS + tl.arange(0, ROWS)
    partial += (slot0.to(tl.int64) * KV_HEADS + kv_head) * 2 * BLOCK_N * D
    dk_acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for _ in range(slot0, slot1):
        dk_acc += load_rows(partial, keys, D, key1 - key0, D, BLOCK_D, True, False)
        dv_acc += load_rows(partial + BLOCK_N * D, keys, D, key1 - key0, D, BLOCK_D, True, False)
        partial += KV_HEADS * 2 * BLOCK_N * D
    store_rows(dk + kv_head * D, key0 + keys, KV_HEADS * D, key1, dk_acc, D, BLOCK_D)
    store_rows(dv + kv_head * D, key0 + keys, KV_HEADS * D, key1, dv_acc, D, BLOCK_D)


def _options(kernel: str, q: Tensor, spans: Spans) -> dict[str, Any]:
    """Constants of a launch."""
    dim, block_d = q.shape[2], max(16, triton.next_power_of_2(q.shape[2]))
    column = 2 if spans.cached(longest) <= WINDOW else int(dim < block_d)
    arch = _triton.arch(q.device)
    tile = FP32 if arch and q.dtype == torch.float32 else CONFIGS[arch][kernel][column]
    return dict(
        D=dim, BLOCK_D=block_d, BLOCK_M=tile.rows, BLOCK_N=tile.keys, UPCAST=_triton.INTERPRETED,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _output(x: Tensor, holes: bool) -> Tensor:
    """Contiguous, shaped like x, for kernels to fill. With holes it starts at zero: no tile writes those rows."""
    return (torch.zeros if holes else torch.empty)(x.shape, dtype=x.dtype, device=x.device)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> Tensor:
        tokens, heads, _ = q.shape
        strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
        options = _options("forward", q, spans)
        tiles, holes = spans.cached(query_tiles, q.device, options["BLOCK_M"])
        out = _output(q, holes)  # (T, Hq, D)
        lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)  # (Hq, T), base 2
        with _triton.on(q.device):
            _forward_kernel[(len(tiles) * heads,)](
                q, k, v, out, lse, tiles, *strides, tokens, scale * LOG2_E,
                HEADS=heads, GROUP=heads // k.shape[1], **options,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        (tokens, heads, dim), kv_heads, device = q.shape, k.shape[1], q.device
        group, scale, spans = heads // kv_heads, ctx.scale, ctx.spans
        strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
        do = do.contiguous()  # no copy in the model; the gradient of out.sum() is an expanded scalar
        delta = torch.empty_like(lse)  # (Hq, T)
        with _triton.on(device):
            options = _options("dq", q, spans)
            tiles, holes = spans.cached(query_tiles, device, options["BLOCK_M"])
            dq = _output(q, holes)  # (T, Hq, D)
            _dq_kernel[(len(tiles) * heads,)](
                q, k, v, out, do, lse, delta, dq, tiles, *strides, tokens, scale * LOG2_E, scale,
                HEADS=heads, GROUP=group, **options,
            )  # fmt: skip

            options = _options("dkv", q, spans)
            rows, keys, sms = options["BLOCK_M"], options["BLOCK_N"], _triton.num_sms(device)
            work = spans.cached(key_tiles, device, rows, keys, group, kv_heads, sms)
            dk, dv = _output(k, work.holes), _output(v, work.holes)  # (T, Hkv, D)
            partial = torch.empty(work.slots, kv_heads, 2, keys, dim, dtype=torch.float32, device=device)
            _dkv_kernel[(len(work.pieces) * kv_heads,)](
                q, k, v, do, lse, delta, dk, dv, partial, work.pieces, work.visits, *strides, tokens,
                scale * LOG2_E, scale, KV_HEADS=kv_heads, GROUP=group, **options,
            )  # fmt: skip
            if work.slots:
                _sum_kernel[(len(work.sums) * (keys // SUM_ROWS) * kv_heads,)](
                    partial, dk, dv, work.sums, kv_heads, dim, options["BLOCK_D"], keys, SUM_ROWS
                )
        return dq, dk, dv, None, None


def attention_triton(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> Tensor:
    """`attention` by the kernels above. Only the last axis must be dense, so slices of a fused qkv need no copy."""
    _triton.check_device(dense_axes=1, q=q, k=k, v=v)
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f'{q.dtype}: impl="triton" takes float32, bfloat16, float16; "sdpa" takes any')
    if q.shape[2] % 8 or not 8 <= q.shape[2] <= 128:
        raise ValueError(f'head dim {q.shape[2]}: impl="triton" takes multiples of 8 up to 128; "sdpa" takes any')
    return _Attention.apply(q, k, v, spans, scale)


IMPLS = {
    "triton": attention_triton,
    "varlen": attention_varlen,
    "flash": attention_flash,
    "sdpa": attention_sdpa,
    "reference": attention_ref,
}


def attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Attention over a pack, differentiable in q, k and v.

    Args:
        q: (T, Hq, D); k, v: (T, Hkv, D) with Hq a multiple of Hkv; one dtype.
        spans: over the same T. Rows outside of all spans are zero in the result.
        scale: of the scores, positive; default 1 / sqrt(D).
        impl: "auto": "triton" for CUDA tensors except fp64, else "sdpa".
            "triton": fp32, bf16 or fp16; D a multiple of 8 up to 128; unit stride in D, other strides are free.
            "varlen" (torch's flash kernels), "flash" (the flash-attn package): fp16 or bf16 on a GPU.
            "sdpa": padded batches. "reference": the definition.

    Returns:
        (T, Hq, D) in q's dtype.

    Raises:
        ValueError: shapes, dtypes, devices, strides or spans that do not match each other or the impl; an unknown impl.
    """
    impl = _triton.resolve_impl(impl, IMPLS, "sdpa", q)
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape and k.shape[::2] == q.shape[::2]
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
            "want (T, Hq, D), (T, Hkv, D) twice, Hkv dividing Hq"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: cast them to one dtype")
    if spans.num_tokens != q.shape[0]:
        raise ValueError(f"spans describe {spans.num_tokens} tokens, q has {q.shape[0]}")
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    if not 1e-30 < scale < 1e30:  # outside, fp32 rounds it to 0 or infinity
        raise ValueError(f"scale={scale}: want a positive finite number")
    return IMPLS[impl](q, k, v, spans, scale)
