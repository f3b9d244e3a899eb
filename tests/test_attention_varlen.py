"""Attention cut into flash calls: the cut covers each pair once, and merging is exact, forward and backward."""

import sys
import types

import pytest
import torch
from test_attention import HEADS, TABLES, chain, qkv, run, shared_prefix

from nanolmmr1.kernels import _varlen
from nanolmmr1.kernels import attention as kernel

attention_ref, Spans = kernel.attention_ref, kernel.Spans
pytestmark = pytest.mark.usefixtures("poisoned_empty")

MORE = {  # what a pack never holds, but a table may
    "overlapping keys": (24, [[0, 4, 0, 12, 0, 0, 0], [4, 9, 2, 8, 0, 0, 0], [9, 11, 3, 20, 0, 0, 0]]),
    "one key range": (20, [[12, 15, 0, 9, 0, 0, 0], [15, 20, 0, 9, 0, 0, 0], [3, 5, 9, 11, 0, 0, 0]]),
    "nested prefixes": (30, [[10, 14, 10, 14, 0, 9, 1], [14, 20, 14, 20, 0, 5, 1], [20, 29, 20, 29, 3, 9, 1]]),
    "causal on shared keys": (12, [[0, 4, 0, 4, 0, 0, 1], [4, 8, 2, 6, 0, 0, 1], [8, 11, 0, 3, 3, 6, 1]]),
    "single queries": (9, [[2, 3, 2, 3, 0, 2, 1], [3, 4, 3, 4, 0, 2, 1], [5, 6, 5, 6, 0, 0, 1]]),
    "keys in reverse": (12, [[0, 4, 8, 12, 0, 0, 0], [4, 8, 4, 8, 0, 0, 0], [8, 12, 0, 4, 4, 6, 0]]),
    "prefix and any own keys": (16, [[8, 12, 4, 11, 0, 3, 0], [12, 16, 12, 16, 0, 3, 1], [0, 8, 0, 8, 0, 0, 1]]),
}
ALL_TABLES = TABLES | MORE


def per_sequence(cu_q, cu_k, max_q, max_k):
    """(query rows, key rows) of each sequence, as a kernel would read them."""
    assert max_q > 1  # decoding kernels begin there
    (q, k) = (x.tolist() for x in (cu_q, cu_k))
    for q0, q1, k0, k1 in zip(q, q[1:], k, k[1:], strict=False):
        assert 0 < q1 - q0 <= max_q and 0 < k1 - k0 <= max_k
        yield slice(q0, q1), slice(k0, k1)


def heads_first(group, *tensors):
    """(n, H, D) each -> (1, H * group, n, D)."""
    return [x.repeat_interleave(group, 1).transpose(0, 1).unsqueeze(0) for x in tensors]


def cpu_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k)
    out, lse, group = torch.empty_like(q), [], q.shape[1] // k.shape[1]
    for rows, keys in per_sequence(cu_q, cu_k, max_q, max_k):
        tensors = *heads_first(1, q[rows]), *heads_first(group, k[keys], v[keys])
        o, part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.0, causal, scale=scale)
        out[rows] = o[0].transpose(0, 1)
        lse.append(part[0])
    return out, torch.cat(lse, 1)


def cpu_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    assert lse.is_contiguous() and lse.shape == (q.shape[1], len(q))
    assert all(x.stride(-1) == 1 for x in (dout, q, k, v, out))  # as flash kernels want
    grads, group = [torch.empty_like(x) for x in (q, k, v)], q.shape[1] // k.shape[1]
    for rows, keys in per_sequence(cu_q, cu_k, max_q, max_k):
        do, query, o = heads_first(1, dout[rows], q[rows], out[rows])
        key, value = heads_first(group, k[keys], v[keys])
        stats = lse[:, rows].T.contiguous().T.unsqueeze(0)  # laid out as the forward returns it
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, query, key, value, o, stats, 0.0, causal, scale=scale
        )
        for total, at, part in zip(grads, (rows, keys, keys), parts, strict=True):
            total[at] = part[0].transpose(0, 1).unflatten(1, (total.shape[1], -1)).sum(2)  # over heads that share keys
    return grads


CPU = _varlen.Engine(cpu_forward, cpu_backward)  # torch's flash attention for CPUs; it takes fp64


def ours(spans, scale=0.25, engine=CPU):
    return lambda q, k, v: _varlen.attend(q, k, v, spans, scale, engine)


def gold(spans, scale=0.25):
    return lambda q, k, v: attention_ref(q, k, v, spans, scale)


def error(results, wanted):
    """Of the worst tensor, in units of the largest value of all; NaN anywhere is NaN."""
    worst = torch.stack([(a.double() - b).abs().max() for a, b in zip(results, wanted, strict=True)]).max()
    return float(worst / max(b.abs().max() for b in wanted))


def positions(rows, tokens):
    return torch.arange(tokens)[rows].tolist()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ALL_TABLES)
def test_output_and_gradients_equal_the_definition(name, heads):
    tokens, table = ALL_TABLES[name]
    spans, tensors = Spans(table, tokens), qkv(tokens, *HEADS[heads])
    assert error(run(ours(spans), tensors), run(gold(spans), tensors)) <= 1e-12


@pytest.mark.parametrize("name", ALL_TABLES)
def test_calls_cover_each_pair_once_and_no_row_twice(name):
    tokens, table = ALL_TABLES[name]
    spans = Spans(table, tokens)
    times = torch.zeros(tokens, tokens, dtype=torch.int64)
    for call in _varlen.calls(spans, torch.device("cpu")):
        q_rows, k_rows = positions(call.q_rows, tokens), positions(call.k_rows, tokens)
        assert len(set(q_rows)) == len(q_rows) and len(set(k_rows)) == len(k_rows)
        for rows, keys in per_sequence(*call[2:6]):
            for i, row in enumerate(q_rows[rows]):
                times[row, k_rows[keys][: i + 1] if call.causal else k_rows[keys]] += 1
    wanted = torch.zeros_like(times)
    for q0, q1, k0, k1, p0, p1, causal in table:
        for i in range(q1 - q0):
            wanted[q0 + i, p0:p1] += 1
            wanted[q0 + i, k0 : k0 + i + 1 if causal else k1] += 1
    assert torch.equal(times, wanted)


def test_a_pack_of_one_group_is_two_calls_without_a_gather():
    spans = Spans(shared_prefix(40, [9, 0, 1, 13]), 63)
    causal, prefix = _varlen.calls(spans, torch.device("cpu"))
    assert causal.q_rows is causal.k_rows is _varlen.ALL
    assert causal.cu_q.tolist() == causal.cu_k.tolist() == [0, 40, 49, 50, 63]
    assert (causal.causal, causal.max_q, causal.max_k) == (True, 40, 40)
    assert (prefix.q_rows, prefix.k_rows) == (slice(40, 63), slice(0, 40))
    assert (prefix.cu_q.tolist(), prefix.cu_k.tolist()) == ([0, 23], [0, 40])
    assert (prefix.causal, prefix.max_q, prefix.max_k) == (False, 23, 40)


def test_several_groups_vision_windows_and_keys_in_any_order_need_no_more_calls():
    tokens, table = TABLES["pack of groups"]
    causal, prefix = _varlen.calls(Spans(table, tokens), torch.device("cpu"))
    assert causal.q_rows is _varlen.ALL and prefix.cu_q.tolist() == [0, 15, 38] and prefix.cu_k.tolist() == [0, 30, 31]
    tokens, table = TABLES["windows"]
    (windows,) = _varlen.calls(Spans(table, tokens), torch.device("cpu"))
    assert windows.q_rows is windows.k_rows is _varlen.ALL and windows.cu_q.tolist()[-2:] == [128, 210]
    tokens, table = MORE["one key range"]
    (call,) = _varlen.calls(Spans(table, tokens), torch.device("cpu"))
    assert (call.cu_q.tolist(), call.cu_k.tolist(), call.k_rows) == ([0, 8, 10], [0, 9, 11], slice(0, 11))


@pytest.mark.parametrize("shift", [-900, 900])
def test_a_part_that_weighs_nothing_leaves_no_nan(shift):
    """e^-900 is 0 in fp64: all weight lies on the prefix, or none."""
    tokens, table = TABLES["shared prefix"]
    spans, (q, k, v) = Spans(table, tokens), qkv(tokens, 4, 2)
    q[:, :, 0], k[:40, :, 0], k[40:, :, 0] = 1, 0, shift / 0.25
    results = run(ours(spans), (q, k, v))
    assert error(results, run(gold(spans), (q, k, v))) <= 1e-12
    only_prefix = run(gold(Spans([[40, 63, 40, 40, 0, 40, 0]], tokens)), (q, k, v))[0][40:]
    assert torch.allclose(results[0][40:], only_prefix, atol=1e-12) == (shift < 0)


@pytest.mark.parametrize("name", ["pack of groups", "nested prefixes", "overlapping keys"])
def test_bf16_errs_at_most_twice_as_much_as_the_definition_in_bf16(name):
    tokens, table = ALL_TABLES[name]
    spans, tensors = Spans(table, tokens), qkv(tokens, 16, 2, torch.bfloat16)
    exact = run(gold(spans), [t.double() for t in tensors])
    results, plain = run(ours(spans), tensors), run(gold(spans), tensors)
    for a, b, c in zip(results, plain, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-6


def test_bf16_parts_are_merged_in_fp32():
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(7, 3, 16, generator=generator).bfloat16() for _ in range(2))
    old_lse, new_lse = (3 * torch.randn(3, 7, generator=generator) for _ in range(2))
    out, lse = old.clone(), old_lse.clone()
    _varlen._merge_(out, lse, _varlen.ALL, new, new_lse)
    weights = torch.stack([old_lse, new_lse]).double().softmax(0).transpose(1, 2).unsqueeze(3)  # (2, 7, 3, 1)
    exact = weights[0] * old.double() + weights[1] * new.double()
    assert ((out - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    assert torch.allclose(lse.double(), torch.logaddexp(old_lse.double(), new_lse.double()), rtol=1e-6, atol=1e-6)


def test_many_terms_of_one_key_are_summed_in_fp32():
    """Forty spans see some of four keys: a bf16 running sum of their terms would lose a digit."""
    spans, terms = Spans([[4 + i, 5 + i, i % 3, 4 - i % 2, 0, 0, 0] for i in range(40)], 44), []

    def backward(*args):
        terms.append(cpu_backward(*args)[1:])
        return torch.empty_like(args[0]), *terms[-1]

    results = run(ours(spans, engine=_varlen.Engine(cpu_forward, backward)), qkv(44, 4, 2, torch.bfloat16))
    calls = _varlen.calls(spans, torch.device("cpu"))
    assert len(calls) == len(terms) > 2
    for i, total in enumerate(results[2:]):
        exact = torch.zeros(total.shape, dtype=torch.float64)
        for call, term in zip(calls, terms, strict=True):
            exact[call.k_rows] += term[i]
        assert ((total - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("name", ["pack of groups", "nested prefixes"])
def test_two_runs_and_any_order_of_spans_give_the_same_bits(name):
    tokens, table = ALL_TABLES[name]
    tensors = qkv(tokens, 4, 2, torch.float32)
    first = run(ours(Spans(table, tokens)), tensors)
    for spans in (Spans(table, tokens), Spans(table[::-1], tokens)):
        assert all(torch.equal(a, b) for a, b in zip(run(ours(spans), tensors), first, strict=True))


def test_rows_in_no_span_are_zero_and_get_no_gradient():
    tokens, table = TABLES["holes"]
    idle = [0, 1, 2, 8, 9, 10, 15, 16, 17, 18, 19]
    assert all(x[idle].abs().sum() == 0 for x in run(ours(Spans(table, tokens)), qkv(tokens, 4, 2)))


def test_no_span_at_all_gives_zeros():
    assert torch.equal(ours(Spans(torch.zeros(0, 7), 5))(*qkv(5, 4, 2)), torch.zeros(5, 4, 16, dtype=torch.float64))


def test_an_upstream_gradient_may_be_a_broadcast_one():
    tokens, table = TABLES["shared prefix"]
    spans, tensors = Spans(table, tokens), [t.requires_grad_() for t in qkv(tokens, 4, 2)]
    results, wanted = (torch.autograd.grad(f(spans)(*tensors).sum(), tensors) for f in (ours, gold))
    assert error(results, wanted) <= 1e-12


def test_a_second_derivative_is_refused():
    tokens, table = TABLES["causal"]
    q, k, v = (t.requires_grad_() for t in qkv(tokens, 4, 2))
    (grad,) = torch.autograd.grad((ours(Spans(table, tokens))(q, k, v) ** 2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_torch_takes_our_arguments():
    """On the meta device: the operators' own schemas and shape rules, without a GPU."""
    tokens, table = TABLES["shared prefix"]
    q, k, v = (torch.zeros(tokens, h, 128, dtype=torch.bfloat16, device="meta", requires_grad=True) for h in (16, 2, 2))
    out = ours(Spans(table, tokens), engine=_varlen.TORCH)(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    for grad, x in zip(torch.autograd.grad(out, (q, k, v), torch.empty_like(out)), (q, k, v), strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


@pytest.fixture
def flash_attn(monkeypatch):
    """A package that looks like flash-attn, with the signatures of 2.7 and 2.8, over the CPU kernels."""

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0
        cu = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *cpu_forward(q, k, v, *cu, causal, softmax_scale), torch.empty(0), torch.empty(2)

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        cu = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        grads = cpu_backward(dout, q, k, v, out, softmax_lse, *cu, causal, softmax_scale)
        for at, grad in zip((dq, dk, dv), grads, strict=True):
            at.copy_(grad)
        return torch.empty(0)

    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward, interface._flash_attn_varlen_backward = forward, backward
    package.__version__ = "2.7.4.post1"
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    _varlen._flash_package.cache_clear()
    yield package
    _varlen._flash_package.cache_clear()


def test_the_flash_attn_package_is_called_as_it_wants(flash_attn):
    tokens, table = TABLES["pack of groups"]
    spans, tensors = Spans(table, tokens), qkv(tokens, 4, 2)
    assert error(run(ours(spans, engine=_varlen.FLASH), tensors), run(gold(spans), tensors)) <= 1e-12


def test_an_old_or_a_missing_flash_attn_package_is_refused(flash_attn, monkeypatch):
    flash_attn.__version__ = "2.6.3"
    arguments = *qkv(10, 4, 2), Spans(chain([10], 1), 10), 1.0
    with pytest.raises(ValueError, match=r"2\.6\.3.*2\.7 or later"):
        _varlen.attention_flash(*arguments)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match='pip install flash-attn.*impl="varlen"'):
        _varlen.attention_flash(*arguments)


@pytest.mark.parametrize("impl", ["varlen", "flash"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.float(), "q is torch.float32: .*float16 and bfloat16"),
        (lambda x: x[..., :12], "head dim 12: .* multiples of 8"),
        (lambda x: x[..., :1].expand(-1, -1, 264), "head dim 264: .* up to 256"),
        (lambda x: x.transpose(0, 2).contiguous().transpose(0, 2), r"strides \(1, .*contiguous"),
        (lambda x: x, "q is on cpu: .*CUDA"),
    ],
)
def test_what_a_flash_kernel_cannot_take_is_refused(flash_attn, impl, change, words):
    tensors = [change(t.bfloat16()) for t in qkv(10, 4, 2)]
    with pytest.raises(ValueError, match=words):
        getattr(_varlen, f"attention_{impl}")(*tensors, Spans(chain([10], 1), 10), 1.0)


SIZES = {  # heads of a 3B model: (q heads, kv heads, head dim), T, table
    "language": ((16, 2, 128), 4600, shared_prefix(1400, [400] * 8)),
    "vision": ((16, 16, 80), 1024, chain([64] * 15 + [32, 32], 0)),
    "vision whole": ((16, 16, 80), 1024, chain([1024], 0)),
}


def on_gpu(name, impl):
    """Spans, tensors and the public function, where this machine has what `impl` needs."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if impl == "flash":
        pytest.importorskip("flash_attn")
    (q_heads, kv_heads, dim), tokens, table = SIZES[name]
    tensors = qkv(tokens, q_heads, kv_heads, torch.bfloat16, dim)
    return Spans(table, tokens), [t.cuda() for t in tensors], getattr(_varlen, f"attention_{impl}")


def run_on(function, spans, tensors):
    """As `run`, with the upstream gradient on the tensors' device."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors, spans, tensors[0].shape[2] ** -0.5)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device, torch.bfloat16)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["varlen", "flash"])
@pytest.mark.parametrize("name", SIZES)
def test_on_a_gpu_bf16_errs_at_most_twice_as_much_as_the_definition(name, impl):
    spans, tensors, function = on_gpu(name, impl)
    exact = run_on(attention_ref, spans, [t.double() for t in tensors])
    plain, results = run_on(attention_ref, spans, tensors), run_on(function, spans, tensors)
    for a, b, c in zip(results, plain, exact, strict=True):
        assert a.isfinite().all() and (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["varlen", "flash"])
def test_on_a_gpu_deterministic_algorithms_give_the_same_bits(impl):
    spans, tensors, function = on_gpu("language", impl)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run_on(function, spans, tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
