"""RMSNorm: equal to fp64 torch for every mix of dtypes that autocast makes, with and without the residual add."""

import sys

import pytest
import torch
from compare import assert_within_twice, errors, run
from test_swiglu import guard_memory

from nanolmmr1.kernels import _triton
from nanolmmr1.kernels import rmsnorm as kernel

pytestmark = pytest.mark.usefixtures("poisoned_empty")
rmsnorm, EPS = kernel.rmsnorm, 1e-6

SHAPES = [(1, 20), (5, 36), (9, 20), (4, 32), (3, 1280)]  # the interpreter shares rows between 4 programs in backward
MIXES = {  # dtypes of x, weight and residual: what autocast makes, with fp16 for bf16, which is not interpreted
    "plain": (torch.float32, torch.float32, None),
    "fp32 stream": (torch.float32, torch.float32, torch.float32),
    "half branch, fp32 stream": (torch.float16, torch.float32, torch.float32),  # the language model
    "half stream": (torch.float16, torch.float32, torch.float16),  # the vision tower
    "half x": (torch.float16, torch.float32, None),
    "all half": (torch.float16, torch.float16, torch.float16),
}


def make(shape, mix="plain", seed=0):
    """x, weight and perhaps residual, spread over powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    weight = 1 + torch.randn(shape[1], generator=generator, dtype=torch.float64)
    x, residual = (t * torch.logspace(-1, 1, shape[0], dtype=torch.float64)[:, None] for t in (x, residual))
    tensors = zip((x, weight, residual), MIXES[mix] if isinstance(mix, str) else mix, strict=True)
    return [t.to(dtype) for t, dtype in tensors if dtype]


def call(**options):
    def function(x, weight, residual=None):
        out = rmsnorm(x, weight, EPS, residual=residual, **options)
        return out if isinstance(out, tuple) else (out,)

    return function


def plain(x, weight, residual=None):
    """Independent of the op, row by row."""
    s = x if residual is None else x + residual
    y = torch.stack([weight * row / ((row @ row) / len(row) + EPS).sqrt() for row in s])
    return (y,) if residual is None else (y, s)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp64_reference_equals_plain_torch(shape, residual):
    tensors = make(shape, (torch.float64, torch.float64, torch.float64 if residual else None))
    ours = run(call(), tensors)
    assert max(errors(ours, run(plain, tensors))) <= 1e-12
    assert all(x.dtype == torch.float64 for x in ours)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_errs_at_most_twice_as_much_as_torch(shape, mix, device):
    tensors = make(shape, mix)
    gold = run(plain, [t.double() for t in tensors])
    reference = run(call(impl="reference"), tensors)
    ours = run(call(impl="triton"), tensors, device)
    assert [x.dtype for x in ours] == [x.dtype for x in reference]
    assert_within_twice(ours, reference, gold)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_y_is_rounded_to_the_dtype_asked_for_and_gradients_to_their_inputs(mix, impl, device):
    """As a cast behind the op would, without the pass over memory that it takes."""
    tensors = make((5, 36), mix)
    ours = run(call(impl=impl, dtype=torch.float16), tensors, device)
    cast = run(lambda *x: tuple(y.half() if i == 0 else y for i, y in enumerate(call(impl=impl)(*x))), tensors, device)
    assert ours[0].dtype == torch.float16
    assert [x.dtype for x in ours] == [x.dtype for x in cast] and all(map(torch.equal, ours, cast))


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_written_past_the_end(shape, device, monkeypatch):
    tensors = make(shape, "fp32 stream")
    tails = guard_memory(monkeypatch)
    assert all(x.isfinite().all() for x in run(call(impl="triton"), tensors, device))
    assert len(tails) == 5 and all((tail == 7).all() for tail in tails)


@pytest.mark.gpu
@pytest.mark.parametrize("mix", [m for m in MIXES if "half" in m])
@pytest.mark.parametrize("shape", [(300, 2048), (333, 1280)])
def test_bf16_kernel_errs_at_most_twice_as_much_as_torch(shape, mix, device):
    if device.type != "cuda":
        pytest.skip("bf16 rounds otherwise under the interpreter")
    tensors = make(shape, [torch.bfloat16 if dtype == torch.float16 else dtype for dtype in MIXES[mix]])
    gold = run(plain, [t.double() for t in tensors])
    ours, reference = (run(call(impl=impl), tensors, device) for impl in ("triton", "reference"))
    assert_within_twice(ours, reference, gold)


def test_the_reference_rounds_bf16_as_the_published_model_does():
    x, weight = (t.bfloat16() for t in make((64, 36)))
    exact = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    assert torch.equal(rmsnorm(x, weight, EPS), weight * exact.bfloat16())
    assert not torch.equal(rmsnorm(x, weight, EPS), (weight.float() * exact).bfloat16())
    assert rmsnorm(x, weight.float(), EPS).dtype == torch.float32


@pytest.mark.parametrize("mix", ["all half", "half x"])
def test_the_kernel_rounds_before_the_weight(mix, device):
    x, weight = make((64, 36), (*MIXES[mix][:2], None))
    y = rmsnorm(x.to(device), weight.to(device), EPS, impl="triton").cpu()
    late = weight.float() * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS))
    same, other = ((y == z).float().mean() for z in (rmsnorm(x, weight, EPS), late.to(y.dtype)))
    assert same > 0.99 and other < 0.8


def test_what_is_normed_is_the_rounded_sum(device):
    x, weight, residual = (t.to(device) for t in make((9, 20), "all half"))
    y, s = rmsnorm(x, weight, EPS, residual=residual, impl="triton")
    assert torch.equal(s, x + residual)
    assert torch.equal(y, rmsnorm(s, weight, EPS, impl="triton"))


def test_an_fp32_residual_stream_keeps_its_digits(device):
    x, weight, _ = make((4, 20), "half branch, fp32 stream")
    residual = torch.full((4, 20), 1 / 3)
    _, s = rmsnorm(x.to(device) * 0, weight.to(device), EPS, residual=residual.to(device), impl="triton")
    assert torch.equal(s.cpu(), residual)


@pytest.mark.parametrize("of_sum", [lambda s: (s * s).sum(), lambda s: s.sum()], ids=["dense", "strides of 0"])
def test_gradient_of_the_sum_reaches_both_as_two_tensors(device, of_sum):
    x, weight, residual = (t.to(device).requires_grad_() for t in make((9, 20), "fp32 stream"))
    y, s = rmsnorm(x, weight, EPS, residual=residual, impl="triton")
    (y.sum() + of_sum(s)).backward()  # y's gradient has strides of 0
    gold = [t.detach().cpu().double().requires_grad_() for t in (x, weight, residual)]
    y, s = plain(*gold)
    (y.sum() + of_sum(s)).backward()
    assert max(errors([t.grad.cpu() for t in (x, weight, residual)], [t.grad for t in gold])) <= 1e-6
    assert torch.equal(x.grad, residual.grad) and x.grad.data_ptr() != residual.grad.data_ptr()


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_go_unused(used, device):
    grads = []
    for impl in ("triton", "reference"):
        tensors = [t.to(device).requires_grad_() for t in make((5, 20), "fp32 stream")]
        out = call(impl=impl)(*tensors)[used]
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
        grads.append(torch.autograd.grad(out, tensors, upstream, allow_unused=True, materialize_grads=True))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_frozen_tensors_get_no_gradient_and_change_no_others(frozen, device):
    tensors = [t.to(device) for t in make((9, 20), "fp32 stream")]
    whole = run(call(impl="triton"), tensors, device)[2:]
    tensors = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    out = call(impl="triton")(*tensors)
    generator = torch.Generator().manual_seed(7)
    torch.autograd.backward(out, [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in out])
    for i, (t, gold) in enumerate(zip(tensors, whole, strict=True)):
        assert t.grad is None if i in frozen else torch.equal(t.grad.cpu(), gold)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_rows_of_zeros_and_of_extreme_size(impl, device):
    x, weight, residual = make((5, 20), "fp32 stream")
    scale = torch.tensor([0.0, 1e-12, 1.0, 1e6, 1e15])[:, None]
    tensors = [x * scale, weight, residual * scale]
    ours, gold = run(call(impl=impl), tensors, device), run(plain, [t.double() for t in tensors])
    assert all(t.isfinite().all() for t in ours)
    assert ours[0][0].abs().max() == 0
    for a, b in zip(ours[:2] + ours[2::2], gold[:2] + gold[2::2], strict=True):  # rows differ in size: each apart
        assert ((a - b).abs().amax(1) <= 2e-6 * b.abs().amax(1)).all()
    assert errors(ours[3:4], gold[3:4])[0] <= 2e-6


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("mix", ["plain", "fp32 stream"])
def test_no_tokens_give_nothing_and_a_zero_weight_gradient(impl, mix, device):
    tensors = [t[:0] if t.ndim == 2 else t for t in make((3, 20), mix)]
    ours = run(call(impl=impl), tensors, device)
    shapes = [(0, 20)] * (len(tensors) - 1) + [(0, 20), (20,)] + [(0, 20)] * (len(tensors) - 2)
    assert [tuple(x.shape) for x in ours] == shapes
    assert torch.equal(ours[len(tensors)], torch.zeros(20))


def test_any_number_of_programs_makes_the_same_weight_gradient(device, monkeypatch):
    tensors = make((11, 20), "fp32 stream")
    gold = run(plain, [t.double() for t in tensors])
    for sms in (1, 3, 11, 50):
        monkeypatch.setattr(_triton, "num_sms", lambda _, sms=sms: sms)
        assert max(errors(run(call(impl="triton"), tensors, device), gold)) <= 1e-6


def test_two_runs_agree_to_the_bit(device):
    tensors = make((11, 36), "fp32 stream")
    first, second = (run(call(impl="triton"), tensors, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_backward_leaves_upstream_gradients_and_inputs_as_they_were(device):
    tensors = [t.to(device).requires_grad_() for t in make((5, 20), "fp32 stream")]
    out = call(impl="triton")(*tensors)
    upstream = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device) for x in out]
    before = [t.detach().clone() for t in (*tensors, *upstream)]
    first = torch.autograd.grad(out, tensors, upstream, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip((*tensors, *upstream), before, strict=True))
    second = torch.autograd.grad(out, tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_reference_takes_strided_rows_and_the_kernel_refuses_them(device):
    x, weight = (t.to(device) for t in make((6, 20)))
    whole = rmsnorm(x[::2].clone(), weight, EPS, impl="reference")
    assert torch.equal(rmsnorm(x[::2], weight, EPS, impl="reference"), whole)
    with pytest.raises(ValueError, match=r"x .* has strides \(40, 1\).*contiguous"):
        rmsnorm(x[::2], weight, EPS, impl="triton")
    with pytest.raises(ValueError, match="residual .* has strides"):
        rmsnorm(x, weight, EPS, residual=torch.zeros(20, 6, device=device).T, impl="triton")


def test_auto_goes_by_device_and_fp64_to_the_reference(device):
    for dtype in (torch.float32, torch.float64):
        x, weight = (t.to(device, dtype) for t in make((5, 20)))
        impl = "triton" if device.type == "cuda" and dtype == torch.float32 else "reference"
        assert torch.equal(rmsnorm(x, weight, EPS), rmsnorm(x, weight, EPS, impl=impl))


X, W = torch.ones(5, 20), torch.ones(20)
FAULTS = [  # what to change in a correct call, and words of the complaint
    (dict(x=torch.ones(1, 5, 20)), r"\(1, 5, 20\)"),
    (dict(weight=torch.ones(19)), r"\(19,\)"),
    (dict(weight=torch.ones(1, 20)), r"\(1, 20\)"),
    (dict(residual=torch.ones(4, 20)), r"residual \(4, 20\)"),
    (dict(impl="fast"), "fast.*auto, triton, liger"),
    (dict(x=X.double(), impl="triton"), "float64.*reference"),
    (dict(residual=X.double(), impl="triton"), "float64.*reference"),
    (dict(x=torch.ones(1, 16385), weight=torch.ones(16385), impl="triton"), "16385.*16384"),
    (dict(x=X.half(), impl="liger"), "float16.*rounds"),
    (dict(x=X.bfloat16(), weight=W.bfloat16(), residual=X, impl="liger"), "bfloat16.*rounds"),
]


@pytest.mark.parametrize("changes, words", FAULTS, ids=[words for _, words in FAULTS])
def test_wrong_use_is_refused(changes, words, device):
    arguments = dict(x=X, weight=W, eps=EPS) | changes
    with pytest.raises(ValueError, match=words):
        rmsnorm(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()})


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    for impl in ("triton", "liger"):
        with pytest.raises(ValueError, match="x is on cpu.*CUDA"):
            rmsnorm(X, W, EPS, impl=impl)


def test_a_missing_liger_is_named(monkeypatch, device):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_add_rms_norm", None)
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        rmsnorm(X.to(device), W.to(device), EPS, impl="liger")


def test_why_liger_is_not_the_default(monkeypatch):
    """When this fails, Liger keeps an fp32 residual stream, and could be."""
    liger = pytest.importorskip("liger_kernel.ops.fused_add_rms_norm")

    class NoLaunch:  # dtypes are chosen before the launch, which is all that is looked at
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    monkeypatch.setattr(liger, "_fused_add_rms_norm_forward_kernel", NoLaunch())
    _, s = liger.LigerFusedAddRMSNormFunction.apply(X.bfloat16(), X / 3, W, EPS)
    assert s.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def test_liger_agrees_where_it_may_be_asked(dtype, residual, device):
    if device.type != "cuda":
        pytest.skip("Liger's kernels do not run under the interpreter")
    pytest.importorskip("liger_kernel")
    tensors = make((33, 1280), (dtype, dtype, dtype if residual else None))
    gold = run(plain, [t.double() for t in tensors])
    ours, reference = (run(call(impl=impl), tensors, device) for impl in ("liger", "reference"))
    assert_within_twice(ours, reference, gold)
