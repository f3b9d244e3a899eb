"""Packed attention: equal to one dense softmax under a mask, for any spans, in any order and however batched."""

import pytest
import torch

from nanolmmr1.kernels import _sdpa
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
    attending = seen.any(1)
    k, v = (x[:, torch.arange(heads) // (heads // x.shape[1])] for x in (k, v))  # (T, Hq, D)
    scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)) * scale  # (Hq, T, T)
    p = scores[:, attending].masked_fill(~seen[attending], float("-inf")).softmax(-1)
    return torch.zeros_like(q).index_put((attending.nonzero()[:, 0],), (p @ v.transpose(0, 1)).transpose(0, 1))


def qkv(tokens, q_heads, kv_heads, dtype=torch.float64, dim=16):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, dim) for heads in (q_heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [(2 * q).to(dtype), k.to(dtype), v.to(dtype)]


def run(function, tensors):
    """Output and gradients of q, k, v under a fixed upstream gradient of both signs."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad((out * upstream.to(out.dtype)).sum(), tensors)
    return [out.detach(), *grads]


def error(ours, gold):
    """Of the worst tensor, in units of the largest value of all: a gradient may be exactly zero."""
    scale = max(float(b.abs().max()) for b in gold)
    return max(float((a.double() - b).abs().max()) / scale for a, b in zip(ours, gold, strict=True))


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


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_rows_in_no_span_are_zero_and_get_no_gradient(impl):
    tokens, table = TABLES["holes"]
    spans = Spans(table, tokens)
    out, dq, dk, dv = run(lambda q, k, v: attention(q, k, v, spans, impl=impl), qkv(tokens, 4, 2))
    idle = [0, 1, 2, 8, 9, 10, 15, 16, 17, 18, 19]
    assert all(x[idle].abs().sum() == 0 for x in (out, dq, dk, dv))
    busy = [row for row in range(tokens) if row not in idle]
    assert all((x[busy].abs().sum((1, 2)) > 0).all() for x in (out, dv))


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_no_span_at_all_gives_zeros(impl):
    q, k, v = qkv(5, 4, 2)
    assert torch.equal(attention(q, k, v, Spans(torch.zeros(0, 7), 5), impl=impl), torch.zeros_like(q))


@pytest.mark.parametrize("elements", [1, 300, 5000])
def test_spans_split_into_many_batches_give_the_same(monkeypatch, elements):
    tokens, table = TABLES["pack of groups"]
    table, tensors = torch.tensor(table), qkv(tokens, 4, 2)
    gold = run(lambda q, k, v: dense(q, k, v, Spans(table, tokens), 0.25), tensors)
    monkeypatch.setattr(_sdpa, "MASK_ELEMENTS", elements)
    spans = Spans(table, tokens)
    assert error(run(lambda q, k, v: attention(q, k, v, spans), tensors), gold) <= 1e-12
    sizes = [batch.shape for batch in spans.plan(_sdpa.padded_batches)]
    assert sum(count for count, _, _ in sizes) == 8  # of 9 spans one is empty
    assert all(count == 1 or count * queries * keys <= elements for count, queries, keys in sizes)
    assert len(sizes) == 8 if elements == 1 else 1 < len(sizes) < 8


def test_like_spans_share_a_batch_and_unlike_ones_do_not_pad_each_other():
    spans = Spans(chain([8] * 20 + [400], 1), 8 * 20 + 400)
    assert [batch.shape for batch in spans.plan(_sdpa.padded_batches)] == [(20, 8, 8), (1, 400, 400)]


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
        (dict(impl="flash"), "flash.*reference, sdpa"),
    ],
)
def test_wrong_use_is_refused(changes, words):
    arguments = dict(q=Q, k=KV, v=KV, spans=Spans(chain([10], 1), 10)) | changes
    with pytest.raises(ValueError, match=words):
        attention(**arguments)
