"""Packed attention: equal to one dense softmax under a mask, for any spans, in any order and however batched."""

import pytest
import torch

from nanolmmr1.kernels import _sdpa, _tiles, _triton
from nanolmmr1.kernels import attention as kernel

pytestmark = pytest.mark.usefixtures("poisoned_empty")
attention, Spans = kernel.attention, kernel.Spans


def chain(lengths, causal, start=0):
    """Spans one after another, each seeing itself."""
    rows = []
    for length in lengths:
        rows.append([start, start + length, start, start + length, 0, 0, causal])
        start += length
    return rows


def shared_prefix(prompt, responses, start=0):
    """A prompt, and responses that see it and themselves."""
    end = start + prompt
    rows = chain([prompt, *responses], 1, start)
    return rows[:1] + [[*row[:4], start, end, 1] for row in rows[1:]]


TABLES = {  # name -> (T, table)
    "one token": (1, chain([1], 1)),
    "causal": (130, chain([130], 1)),
    "ragged causal": (194, chain([1, 63, 130], 1)),
    "windows": (210, chain([16, 16, 12, 16, 4, 1, 63, 82], 0)),
    "shared prefix": (63, shared_prefix(40, [9, 1, 13])),
    "pack of groups": (93, shared_prefix(30, [5, 1, 0, 9]) + shared_prefix(1, [3, 20], 45) + chain([24], 1, 69)),
    "keys elsewhere": (40, [[30, 32, 0, 9, 0, 0, 0], [32, 33, 9, 20, 3, 5, 0], [33, 40, 20, 27, 0, 20, 1]]),
    "only a prefix": (12, [[8, 12, 8, 8, 0, 8, 0]]),
    "holes": (20, [[3, 8, 3, 8, 0, 0, 1], [9, 9, 9, 9, 0, 0, 1], [11, 15, 11, 15, 3, 6, 1]]),
}
HEADS = {"16:2": (16, 2), "4:4": (4, 4), "6:1": (6, 1)}  # q heads, kv heads


def dense(q, k, v, spans, scale):
    """softmax over all T keys under a mask that is filled pair by pair from the table."""
    T, heads, _ = q.shape
    seen = torch.zeros(T, T, dtype=torch.bool)
    for q0, q1, k0, k1, p0, p1, causal in spans.table.tolist():
        for i in range(q1 - q0):
            seen[q0 + i, p0:p1] = True
            seen[q0 + i, k0 : k0 + i + 1 if causal else k1] = True
    seen, attending = seen.to(q.device), seen.any(1).to(q.device)
    k, v = (x[:, torch.arange(heads) // (heads // x.shape[1])] for x in (k, v))  # (T, Hq, D)
    scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)) * scale  # (Hq, T, T)
    p = scores[:, attending].masked_fill(~seen[attending], float("-inf")).softmax(-1)
    return torch.zeros_like(q).index_put((attending.nonzero()[:, 0],), (p @ v.transpose(0, 1)).transpose(0, 1))


def qkv(tokens, q_heads, kv_heads, dtype=torch.float64, dim=16):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, dim) for heads in (q_heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [(2 * q).to(dtype), k.to(dtype), v.to(dtype)]


def run(function, tensors, upstream=None):
    """Output and gradients of q, k, v under an upstream gradient of both signs, by default a fixed one."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    if upstream is None:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out))]


def error(ours, gold):
    """Of the worst tensor, in units of the largest value of all: a gradient may be exactly zero."""
    scale = max(float(b.abs().max()) for b in gold)
    # torch's maximum, unlike Python's, lets no NaN pass.
    worst = torch.stack([(a.double().cpu() - b.cpu()).abs().max() for a, b in zip(ours, gold, strict=True)]).max()
    return float(worst) / scale


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", TABLES)
def test_output_and_gradients_equal_a_dense_softmax(name, heads, impl):
    tokens, table = TABLES[name]
    spans, tensors = Spans(table, tokens), qkv(tokens, *HEADS[heads])
    ours = run(lambda q, k, v: attention(q, k, v, spans, impl=impl), tensors)
    gold = run(lambda q, k, v: dense(q, k, v, spans, 16**-0.5), tensors)
    assert error(ours, gold) <= 1e-12
    assert ours[0].dtype == torch.float64


@pytest.mark.parametrize("name", TABLES)
def test_fp32_errs_at_most_twice_as_much_as_a_dense_softmax(name):
    tokens, table = TABLES[name]
    spans, tensors = Spans(table, tokens), qkv(tokens, 16, 2, torch.float32)
    gold = run(lambda q, k, v: dense(q, k, v, spans, 0.3), [t.double() for t in tensors])
    ours = run(lambda q, k, v: attention(q, k, v, spans, scale=0.3), tensors)
    plain = run(lambda q, k, v: dense(q, k, v, spans, 0.3), tensors)
    assert error(ours, gold) <= 2 * error(plain, gold) + 1e-6


DTYPES = {"reference": torch.float64, "sdpa": torch.float64, "triton": torch.float32}


@pytest.mark.parametrize("impl", DTYPES)
def test_rows_in_no_span_are_zero_and_get_no_gradient(impl, device):
    tokens, table = TABLES["holes"]
    spans, tensors = Spans(table, tokens), [x.to(device, DTYPES[impl]) for x in qkv(tokens, 4, 2)]
    out, dq, dk, dv = run(lambda q, k, v: attention(q, k, v, spans, impl=impl), tensors)
    idle = [0, 1, 2, 8, 9, 10, 15, 16, 17, 18, 19]
    assert all(x[idle].abs().sum() == 0 for x in (out, dq, dk, dv))
    busy = [row for row in range(tokens) if row not in idle]
    assert all((x[busy].abs().sum((1, 2)) > 0).all() for x in (out, dv))


@pytest.mark.parametrize("impl", DTYPES)
@pytest.mark.parametrize("tokens", [5, 0])
def test_no_span_at_all_gives_zeros(tokens, impl, device):
    spans, (q, k, v) = Spans(torch.zeros(0, 7), tokens), [x.to(device, DTYPES[impl]) for x in qkv(tokens, 4, 2)]
    assert torch.equal(attention(q, k, v, spans, impl=impl), torch.zeros_like(q))
    if impl == "triton":
        assert all((x == 0).all() for x in run(triton(spans), (q, k, v)))


@pytest.mark.parametrize("elements", [1, 300, 5000])
def test_spans_split_into_many_batches_give_the_same(monkeypatch, elements):
    tokens, table = TABLES["pack of groups"]
    table, tensors = torch.tensor(table), qkv(tokens, 4, 2)
    gold = run(lambda q, k, v: dense(q, k, v, Spans(table, tokens), 0.25), tensors)
    monkeypatch.setattr(_sdpa, "MASK_ELEMENTS", elements)
    spans = Spans(table, tokens)
    assert error(run(lambda q, k, v: attention(q, k, v, spans), tensors), gold) <= 1e-12
    sizes = [batch.shape for batch in spans.cached(_sdpa.padded_batches)]
    assert sum(count for count, _, _ in sizes) == 8  # of 9 spans one is empty
    assert all(count == 1 or count * queries * keys <= elements for count, queries, keys in sizes)
    assert len(sizes) == 8 if elements == 1 else 1 < len(sizes) < 8


def test_like_spans_share_a_batch_and_unlike_ones_do_not_pad_each_other():
    spans = Spans(chain([8] * 20 + [400], 1), 8 * 20 + 400)
    assert [batch.shape for batch in spans.cached(_sdpa.padded_batches)] == [(20, 8, 8), (1, 400, 400)]


def test_the_order_of_spans_changes_nothing():
    tokens, table = TABLES["pack of groups"]
    table, tensors = torch.tensor(table), qkv(tokens, 4, 2)
    gold = run(lambda q, k, v: attention(q, k, v, Spans(table, tokens)), tensors)
    for seed in range(3):
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
        shuffled = Spans(table[order], tokens)
        assert error(run(lambda q, k, v, spans=shuffled: attention(q, k, v, spans), tensors), gold) <= 1e-12


def test_spans_built_once_serve_several_dtypes_and_head_counts():
    tokens, table = TABLES["shared prefix"]
    spans = Spans(table, tokens)
    for dtype, heads in ((torch.float32, (4, 2)), (torch.float64, (4, 2)), (torch.float64, (6, 1))):
        q, k, v = qkv(tokens, *heads, dtype)
        bound = 1e-12 if dtype == torch.float64 else 1e-5
        assert error([attention(q, k, v, spans)], [dense(q, k, v, spans, 0.25)]) <= bound


def test_what_no_row_may_see_changes_nothing():
    tokens, table = TABLES["pack of groups"]
    spans, (q, k, v) = Spans(table, tokens), qkv(tokens, 4, 2)
    before = attention(q, k, v, spans)
    k[34], v[34] = 1e3, 1e3  # the last token of a 5-token response: its siblings and earlier tokens are blind to it
    changed = (attention(q, k, v, spans) != before).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [34]


def triton(spans, scale=None):
    return lambda q, k, v: attention(q, k, v, spans, scale=scale, impl="triton")


TRITON = [  # table, q heads, kv heads, D, scale: each mask, group and padding of D once; the interpreter is slow
    ("one token", 16, 2, 128, None),
    ("causal", 2, 1, 8, None),
    ("ragged causal", 2, 1, 16, 0.3),
    ("windows", 2, 2, 80, None),
    ("shared prefix", 16, 2, 128, None),
    ("pack of groups", 6, 1, 16, None),
    ("keys elsewhere", 8, 1, 24, 1.0),
    ("only a prefix", 6, 1, 128, None),
    ("holes", 4, 4, 80, None),
]


@pytest.mark.parametrize(("name", "q_heads", "kv_heads", "dim", "scale"), TRITON, ids=lambda x: str(x))
def test_triton_equals_a_dense_softmax(name, q_heads, kv_heads, dim, scale, device):
    tokens, table = TABLES[name]
    spans, tensors = Spans(table, tokens), qkv(tokens, q_heads, kv_heads, torch.float32, dim)
    dense_scale = dim**-0.5 if scale is None else scale
    gold = run(lambda q, k, v: dense(q, k, v, spans, dense_scale), [t.double() for t in tensors])
    plain = run(lambda q, k, v: dense(q, k, v, spans, dense_scale), tensors)
    ours = run(triton(spans, scale), [t.to(device) for t in tensors])
    assert error(ours, gold) <= 2 * error(plain, gold) + 1e-6
    for a, b in zip(ours, gold, strict=True):
        assert a.dtype == torch.float32 and torch.isfinite(a).all()
        assert b.abs().max() == 0 or error([a], [b]) <= 1e-5  # with one key to see, dq and dk are zero


def test_triton_in_half_precision_errs_at_most_twice_as_much_as_a_dense_softmax(device):
    tokens, table = TABLES["shared prefix"]
    spans, tensors = Spans(table, tokens), qkv(tokens, 4, 2, torch.float16)
    gold = run(lambda q, k, v: dense(q, k, v, spans, 0.25), [t.double() for t in tensors])
    plain = run(lambda q, k, v: dense(q, k, v, spans, 0.25), tensors)
    ours = run(triton(spans), [t.to(device) for t in tensors])
    assert ours[0].dtype == ours[2].dtype == torch.float16
    assert error(ours, gold) <= 2 * error(plain, gold) + 1e-6


def small_pack(device):
    tokens, table = TABLES["pack of groups"]
    return tokens, torch.tensor(table), [x.to(device) for x in qkv(tokens, 4, 1, torch.float32)]


def test_triton_gives_the_same_bits_again_and_whatever_the_order_of_spans(device):
    tokens, table, tensors = small_pack(device)
    first = run(triton(Spans(table, tokens)), tensors)
    again = run(triton(Spans(table, tokens)), tensors)
    shuffled = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    other = run(triton(Spans(shuffled, tokens)), tensors)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_triton_permuting_the_responses_permutes_their_rows_and_nothing_else(device):
    lengths, prompt = [9, 1, 13], 21
    tensors = [x.to(device) for x in qkv(prompt + sum(lengths), 4, 2, torch.float32)]
    upstream = qkv(prompt + sum(lengths), 4, 2, torch.float32)[0].to(device)
    pieces = torch.arange(len(upstream)).split([prompt, *lengths])
    order = torch.cat([pieces[0], pieces[3], pieces[1], pieces[2]]).to(device)
    gold = run(triton(Spans(shared_prefix(prompt, lengths), len(order))), tensors, upstream)
    permuted = Spans(shared_prefix(prompt, [13, 9, 1]), len(order))
    ours = run(triton(permuted), [x[order] for x in tensors], upstream[order])
    assert all(error([a], [b[order].double()]) <= 1e-6 for a, b in zip(ours, gold, strict=True))


def test_triton_reads_slices_of_a_fused_qkv(device):
    tokens, table = TABLES["holes"]
    spans, fused = Spans(table, tokens), torch.cat(qkv(tokens, 4, 4, torch.float32, 24), 1).to(device)  # (T, 12, D)
    apart = run(triton(spans), [x.contiguous() for x in fused.split(4, 1)])
    fused.requires_grad_()
    out = triton(spans)(*fused.split(4, 1))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
    (grad,) = torch.autograd.grad(out, fused, upstream)
    assert torch.equal(out, apart[0]) and torch.equal(grad, torch.cat(apart[1:], 1))
    by_head = fused.detach().split(4, 1)[0].transpose(0, 1).contiguous().transpose(0, 1)  # strides (D, T D, 1)
    assert torch.equal(triton(spans)(by_head, *fused.split(4, 1)[1:]), apart[0])


def test_triton_takes_an_expanded_upstream_gradient_and_has_no_second_derivative(device):
    tokens, table = TABLES["only a prefix"]
    q, k, v = (x.to(device).requires_grad_() for x in qkv(tokens, 2, 1, torch.float32))
    out = triton(Spans(table, tokens))(q, k, v)
    (ones,) = torch.autograd.grad(out, v, torch.ones_like(out), retain_graph=True)
    (summed,) = torch.autograd.grad(out.sum(), v, retain_graph=True)
    assert torch.equal(summed, ones)
    (grad,) = torch.autograd.grad(out, v, torch.ones_like(out).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_triton_never_reads_what_no_span_holds(device):
    tokens, table = TABLES["holes"]
    spans, tensors = Spans(table, tokens), [x.to(device) for x in qkv(tokens, 4, 2, torch.float32)]
    clean = run(triton(spans), tensors)
    for x in tensors:
        x[[0, 1, 2, 8, 9, 10, 15, 16, 17, 18, 19]] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(run(triton(spans), tensors), clean, strict=True))


def test_triton_sums_of_split_key_tiles_equal_unsplit_ones(monkeypatch, device):
    tokens, table = 54, [*chain([20], 1), [20, 54, 20, 54, 0, 20, 1]]
    tensors = qkv(tokens, 4, 1, torch.float32)
    gold = run(lambda q, k, v: dense(q, k, v, Spans(table, tokens), 0.25), [t.double() for t in tensors])
    monkeypatch.setattr(_triton, "num_sms", lambda _: 1000)
    results = []
    for min_work in (10**6, 1, 1):
        monkeypatch.setattr(_tiles, "MIN_WORK", min_work)
        spans = Spans(table, tokens)
        results.append(run(triton(spans), [t.to(device) for t in tensors]))
        (plan,) = [plan for plan in spans._cache.values() if isinstance(plan, _tiles.KeyTiles)]
        assert (plan.slots == 0) == (min_work > 1)
    whole, split, again = results
    assert all(error([x], [g]) <= 1e-6 for ours in (whole, split) for x, g in zip(ours, gold, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(split, again, strict=True))


def pairs(table, tokens):
    """(T, T) how often each query sees each key."""
    seen = torch.zeros(tokens, tokens, dtype=torch.int32)
    for q0, q1, k0, k1, p0, p1, causal in torch.as_tensor(table).tolist():
        for i in range(q1 - q0):
            seen[q0 + i, p0:p1] += 1
            seen[q0 + i, k0 : k0 + i + 1 if causal else k1] += 1
    return seen


@pytest.mark.parametrize(("block_m", "block_n", "sms"), [(16, 32, 1), (32, 16, 4), (4, 8, 100)])
@pytest.mark.parametrize("name", TABLES)
def test_tiles_cover_every_visible_pair_once_longest_first(name, block_m, block_n, sms):
    tokens, table = TABLES[name]
    spans, seen = Spans(table, tokens), pairs(table, tokens)
    forward, holes = _tiles.query_tiles(spans, "cpu", block_m)
    counts, sizes = torch.zeros_like(seen), []
    for row0, row1, p0, p1, k0, k1, shift in forward.tolist():
        assert 0 < row1 - row0 <= block_m
        sizes.append(p1 - p0 + k1 - k0)
        for row in range(row0, row1):
            counts[row, p0:p1] += 1
            counts[row, k0 : min(k1, row + shift + 1)] += 1
    assert torch.equal(counts, seen) and sizes == sorted(sizes, reverse=True)
    assert holes == bool((seen.sum(1) == 0).any())

    plan = _tiles.key_tiles(spans, "cpu", block_m, block_n, 2, 3, sms)
    counts, sizes, slots = torch.zeros_like(seen), [], {}
    for key0, key1, slot, a, b, c in plan.pieces.tolist():
        assert 0 < key1 - key0 <= block_n and a <= b <= c and c > a
        sizes.append(sum(-(-(row1 - row0) // block_m) for row0, row1, _ in plan.visits[a:c].tolist()))
        slots.setdefault((key0, key1), []).append(slot)
        for i, (row0, row1, shift) in enumerate(plan.visits[a:c].tolist()):
            assert row0 < row1 and (i < b - a or key1 - 1 <= row0 + shift)  # past the diagonal no key needs a mask
            for row in range(row0, row1):
                counts[row, key0 : min(key1, row + shift + 1)] += 1
    assert torch.equal(counts, seen) and sizes == sorted(sizes, reverse=True)
    assert plan.holes == bool((seen.sum(0) == 0).any())
    split = {(key0, key1): list(range(a, b)) for key0, key1, a, b in plan.sums.tolist()}
    assert {tile: sorted(used) for tile, used in slots.items()} == {tile: [-1] for tile in slots} | split
    assert sorted(slot for used in split.values() for slot in used) == list(range(plan.slots))
    assert sizes[0] <= max(1, max(_tiles.MIN_WORK, -(-sum(sizes) * 6 // (2 * sms))) // 2)


def test_triton_grids_of_more_than_65535_tiles_have_one_axis(monkeypatch, device):
    tokens, grids = 70_000, {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            grids[self.name] = grid
            return lambda *args, **kwargs: None

    for name in ("_forward_kernel", "_dq_kernel", "_dkv_kernel"):
        monkeypatch.setattr(kernel, name, Recorder(name))
    ones = torch.arange(tokens, dtype=torch.int32)[:, None]
    spans = Spans(torch.cat([ones, ones + 1, ones, ones + 1, 0 * ones, 0 * ones, 0 * ones], 1), tokens)
    q, k = (torch.zeros(tokens, heads, 8, device=device, requires_grad=True) for heads in (2, 1))
    triton(spans)(q, k, k).sum().backward()
    assert grids == {"_forward_kernel": (140_000,), "_dq_kernel": (140_000,), "_dkv_kernel": (70_000,)}


def test_auto_goes_by_the_device(monkeypatch, device):
    for impl in ("sdpa", "triton"):
        monkeypatch.setitem(kernel.IMPLS, impl, lambda *args, impl=impl: impl)
    spans = Spans(chain([10], 1), 10)
    assert attention(Q, KV, KV, spans) == "sdpa"
    assert attention(*(x.to(device) for x in (Q, KV, KV)), spans) == ("triton" if device.type == "cuda" else "sdpa")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("table", "q_heads", "kv_heads", "dim"),
    [
        pytest.param(shared_prefix(1400, [400] * 8), 16, 2, 128, id="prompt and responses"),
        pytest.param(chain([64] * 80, 0), 16, 16, 80, id="windows"),
        pytest.param(chain([5120], 0), 16, 16, 80, id="image"),
    ],
)
def test_triton_in_bf16_at_real_shapes(table, q_heads, kv_heads, dim, device):
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    tokens, group = table[-1][1], q_heads // kv_heads
    spans, tensors = Spans(table, tokens), [x.to(device) for x in qkv(tokens, q_heads, kv_heads, torch.bfloat16, dim)]
    upstream = qkv(tokens, q_heads, 1, torch.bfloat16, dim)[0].to(device)

    def by_head(dtype):  # the (Hq, T, T) scores of a dense softmax do not fit for all heads at once
        parts = []
        for h in range(kv_heads):
            rows, cols = slice(h * group, (h + 1) * group), slice(h, h + 1)
            part = [x[:, heads].to(dtype) for x, heads in zip(tensors, (rows, cols, cols), strict=True)]
            parts.append(run(lambda q, k, v: dense(q, k, v, spans, dim**-0.5), part, upstream[:, rows]))
        return [torch.cat(part, 1) for part in zip(*parts, strict=True)]

    gold, plain = by_head(torch.float64), by_head(torch.bfloat16)
    ours, again = (run(triton(spans), tensors, upstream) for _ in range(2))
    for a, b, g, p in zip(ours, again, gold, plain, strict=True):
        assert torch.equal(a, b)
        assert error([a], [g]) <= 2 * error([p], [g]) + 1e-6


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (torch.zeros(2, 6), r"\(2, 6\).*\(S, 7\)"),
        (torch.zeros(7), r"\(7,\)"),
        ([[0, 4, 0, 4, 3, 2, 1]], "3:2 runs backwards"),
        ([[0, 11, 0, 11, 0, 0, 1]], "0:11 .* leaves the 10"),
        ([[0, 4, -1, 3, 0, 0, 0]], "-1:3"),
        ([[0, 4, 0, 4, 0, 0, 1], [3, 6, 3, 6, 0, 0, 1]], "overlap.* end at 4"),
        ([[0, 4, 0, 5, 0, 0, 1]], "as many own keys as queries"),
        ([[0, 4, 6, 6, 2, 2, 0]], "without any key"),
        ([[0, 4, 0, 4, 0, 0, 2]], "causal is 0 or 1"),
        (torch.tensor([[0, 4, 0, 4, 0, 0, 0.5]]), "float32.*integers"),
        ([[2**32, 2**32 + 4, 0, 4, 0, 0, 1]], "leaves the 10"),
    ],
)
def test_impossible_spans_are_refused(table, words):
    with pytest.raises(ValueError, match=words):
        Spans(table, 10)


Q, KV = torch.zeros(10, 4, 8), torch.zeros(10, 2, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(q=torch.zeros(10, 32)), r"q \(10, 32\)"),
        (dict(q=torch.zeros(10, 3, 8)), "Hkv dividing Hq"),
        (dict(k=torch.zeros(10, 1, 8)), r"k \(10, 1, 8\)"),
        (dict(k=torch.zeros(9, 2, 8), v=torch.zeros(9, 2, 8)), r"k \(9, 2, 8\)"),
        (dict(k=torch.zeros(10, 2, 4), v=torch.zeros(10, 2, 4)), r"\(10, 2, 4\)"),
        (dict(v=KV.bfloat16()), "bfloat16.*one dtype"),
        (dict(spans=Spans(chain([9], 1), 9)), "9 tokens, q has 10"),
        (dict(impl="fast"), "fast.*auto, triton, varlen, flash, sdpa, reference"),
        (dict(scale=0.0), "scale=0.0"),
        (dict(scale=float("nan")), "scale=nan"),
        (dict(q=Q.double(), k=KV.double(), v=KV.double(), impl="triton"), "float64.*float32, bfloat16"),
        (dict(zip("qkv", (x[..., :4] for x in (Q, KV, KV)), strict=True), impl="triton"), "head dim 4.*up to 128"),
        (dict(zip("qkv", (x.repeat(1, 1, 17) for x in (Q, KV, KV)), strict=True), impl="triton"), "head dim 136"),
        (dict(v=torch.zeros(10, 2, 16)[..., ::2], impl="triton"), r"v \(10, 2, 8\) has strides.*contiguous\(\)"),
        (dict(q=Q.to("meta"), impl="triton"), "q, k, v lie on (cpu|cuda:0), meta"),
        (dict(k=torch.zeros(10, 2, 8, 5), v=torch.zeros(10, 2, 8, 5)), r"k \(10, 2, 8, 5\)"),
        (dict(k=torch.zeros(10, 0, 8), v=torch.zeros(10, 0, 8)), r"k \(10, 0, 8\)"),
        (dict(scale=1e-46), "scale=1e-46"),
    ],
)
def test_wrong_use_is_refused(changes, words, device):
    arguments = dict(q=Q, k=KV, v=KV, spans=Spans(chain([10], 1), 10)) | changes
    for name, value in arguments.items():
        if torch.is_tensor(value) and value.device.type == "cpu":
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=words):
        attention(**arguments)


def test_a_plan_made_in_inference_mode_serves_training():
    tokens, table = TABLES["shared prefix"]
    spans, tensors = Spans(table, tokens), qkv(tokens, 4, 2)
    with torch.inference_mode():
        attention(*tensors, spans, impl="sdpa")
    again = run(lambda q, k, v: attention(q, k, v, spans, impl="sdpa"), tensors)
    assert error(again, run(lambda q, k, v: dense(q, k, v, spans, 0.25), tensors)) <= 1e-12


def test_spans_keep_a_copy_of_their_table():
    table = torch.tensor([[0, 4, 0, 4, 0, 0, 1]], dtype=torch.int32)
    spans = Spans(table, 10)
    table.zero_()
    assert spans.table.tolist() == [[0, 4, 0, 4, 0, 0, 1]]


def test_an_empty_span_overlaps_nothing():
    assert len(Spans([[0, 4, 0, 4, 0, 0, 1], [2, 2, 2, 2, 0, 0, 1], [4, 5, 4, 5, 0, 0, 1]], 10).table) == 3


def test_cpu_tensors_have_a_path_of_their_own(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="q is on cpu.*CUDA tensors"):
        attention(Q, KV, KV, Spans(chain([10], 1), 10), impl="triton")
