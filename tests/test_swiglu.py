"""SwiGLU: equal to fp64 torch, with gate and up left as they were, and no number out of range."""

import sys

import pytest
import torch
from compare import assert_within_twice, errors

from nanolmmr1.kernels import _triton
from nanolmmr1.kernels import swiglu as kernel

pytestmark = pytest.mark.usefixtures("poisoned_empty")
swiglu = kernel.swiglu

SHAPES = [(1, 1), (4, 8), (3, 36), (7, 20), (2, 3, 11)]  # a program has 32 elements in the interpreter


def make(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return [(3 * gate).to(dtype), up.to(dtype)]


def plain(gate, up):
    return gate / (1 + (-gate).exp()) * up


def run(function, tensors, device="cpu"):
    """Output and gradients, under a fixed upstream gradient of both signs."""
    tensors = [t.to(device).requires_grad_() for t in tensors]
    out = function(*tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grads = torch.autograd.grad(out, tensors, upstream.to(device, out.dtype))
    return [x.detach().cpu() for x in (out, *grads)]


def call(impl):
    return lambda gate, up: swiglu(gate, up, impl=impl)


def guard_memory(monkeypatch):
    """From here on uninitialised floats are NaN and lie before 64 sevens; returns the list that collects the sevens."""
    tails = []

    def guarded(make):
        def empty(*args, **kwargs):
            out = make(*args, **kwargs)
            whole = torch.full((out.numel() + 64,), 7.0, dtype=out.dtype, device=out.device)
            tails.append(whole[out.numel() :])
            return whole[: out.numel()].fill_(float("nan")).view(out.shape)

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, guarded(getattr(torch, name)))
    return tails


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_written_past_the_end(shape, device, monkeypatch):
    tensors = make(shape, torch.float32)
    tails = guard_memory(monkeypatch)
    assert all(x.isfinite().all() for x in run(call("triton"), tensors, device))
    assert len(tails) == 3 and all((tail == 7).all() for tail in tails)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp64_reference_equals_plain_torch(shape):
    tensors = make(shape)
    ours = run(swiglu, tensors)
    assert max(errors(ours, run(plain, tensors))) <= 1e-12
    assert all(x.dtype == torch.float64 for x in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_errs_at_most_twice_as_much_as_torch(shape, dtype, device):
    tensors = make(shape, dtype)
    gold = run(plain, [t.double() for t in tensors])
    ours, reference = run(call("triton"), tensors, device), run(call("reference"), tensors)
    assert [(x.dtype, x.shape) for x in ours] == [(x.dtype, x.shape) for x in reference]
    assert_within_twice(ours, reference, gold)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "liger"])
def test_bf16_kernel_errs_at_most_twice_as_much_as_torch(impl, device):
    if device.type != "cuda":
        pytest.skip("bf16 rounds otherwise under the interpreter, which does not run Liger's kernels")
    if impl == "liger":
        pytest.importorskip("liger_kernel")
    tensors = make((333, 3420), torch.bfloat16)
    gold = run(plain, [t.double() for t in tensors])
    reference = run(call("reference"), tensors, device)
    ours = run(call(impl), [t.clone() for t in tensors], device)
    assert_within_twice(ours, reference, gold)


def test_silu_is_rounded_before_the_product(device):
    gate, up = make((30, 36), torch.float16)
    out = swiglu(gate.to(device), up.to(device), impl="triton").cpu()
    late = (torch.nn.functional.silu(gate.float()) * up.float()).half()
    same, other = ((out == z).float().mean() for z in (swiglu(gate, up), late))
    assert same > 0.99 and other < 0.9


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter's exp, which then is inf, as on a GPU
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_large_gates_saturate(impl, device):
    gate = torch.tensor([-1e30, -1e4, -104.0, -89.0, -20.0, 0.0, 20.0, 89.0, 104.0, 1e4, 1e30])
    up = torch.linspace(-2, 2, 11)
    out, dgate, dup = run(call(impl), [gate, up], device)
    upstream = torch.randn(11, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    s = torch.sigmoid(gate.double())
    gold = (gate.double() * s * up, upstream * up * s * (1 + gate.double() * (1 - s)), upstream * gate.double() * s)
    for a, b in zip((out, dgate, dup), gold, strict=True):
        assert ((a - b).abs() <= 1e-5 * b.abs() + 1e-7).all()


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("shape", [(0, 20), (0,)])
def test_no_tokens_give_nothing(impl, shape, device):
    assert all(x.shape == shape for x in run(call(impl), make(shape, torch.float32), device))


def test_upstream_gradients_may_have_any_strides(device):
    grads = []
    for impl in ("triton", "reference"):
        tensors = [t.to(device).requires_grad_() for t in make((5, 20), torch.float32)]
        out = call(impl)(*tensors)
        grads.append(torch.autograd.grad(out.sum(), tensors, retain_graph=True))  # strides of 0
        transposed = torch.randn(20, 5, generator=torch.Generator().manual_seed(3)).to(device).T
        grads[-1] += torch.autograd.grad(out, tensors, transposed)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_backward_leaves_gate_up_and_upstream_as_they_were(device):
    tensors = [t.to(device).requires_grad_() for t in make((5, 20), torch.float32)]
    out = swiglu(*tensors, impl="triton")
    upstream = torch.randn(5, 20, generator=torch.Generator().manual_seed(1)).to(device)
    before = [t.detach().clone() for t in (*tensors, upstream)]
    first = torch.autograd.grad(out, tensors, upstream, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip((*tensors, upstream), before, strict=True))
    second = torch.autograd.grad(out, tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_runs_agree_to_the_bit(device):
    first, second = (run(call("triton"), make((7, 20), torch.float32), device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_auto_goes_by_device_and_fp64_to_the_reference(device):
    for dtype in (torch.float32, torch.float64):
        gate, up = (t.to(device) for t in make((5, 20), dtype))
        impl = "triton" if device.type == "cuda" and dtype == torch.float32 else "reference"
        assert torch.equal(swiglu(gate, up), swiglu(gate, up, impl=impl))


def test_the_reference_takes_strided_tensors_and_the_kernel_refuses_them(device):
    gate, up = (t.to(device) for t in make((5, 40), torch.float32))
    assert torch.allclose(swiglu(gate[:, ::2], up[:, ::2], impl="reference"), swiglu(gate, up)[:, ::2])
    with pytest.raises(ValueError, match=r"up .* has strides \(40, 1\).*contiguous"):
        swiglu(gate[:, :20].contiguous(), up[:, :20], impl="triton")


X = torch.ones(5, 20)
FAULTS = [  # what to change in a correct call, and words of the complaint
    (dict(up=torch.ones(5, 19)), r"\(5, 20\).*\(5, 19\)"),
    (dict(up=torch.ones(20)), r"\(20,\)"),
    (dict(up=X.half()), "float32.*float16"),
    (dict(impl="fast"), "fast.*auto, triton, liger"),
    (dict(gate=X.double(), up=X.double(), impl="triton"), "float64.*reference"),
    (dict(gate=X.double(), up=X.double(), impl="liger"), "float64.*reference"),
]


@pytest.mark.parametrize("changes, words", FAULTS, ids=[words for _, words in FAULTS])
def test_wrong_use_is_refused(changes, words, device):
    arguments = dict(gate=X, up=X) | changes
    with pytest.raises(ValueError, match=words):
        swiglu(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()})


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    for impl in ("triton", "liger"):
        with pytest.raises(ValueError, match="gate is on cpu.*CUDA"):
            swiglu(X, X, impl=impl)


def test_a_missing_liger_is_named(monkeypatch, device):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.swiglu", None)
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        swiglu(X.to(device), X.to(device), impl="liger")


def test_why_liger_is_not_the_default(monkeypatch):
    """When this fails, Liger's backward no longer writes over gate and up, and it could be."""
    liger = pytest.importorskip("liger_kernel.ops.swiglu")

    class NoLaunch:  # where results go is chosen before the launch, which is all that is looked at
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    for name in ("_swiglu_forward_kernel", "_swiglu_backward_kernel"):
        monkeypatch.setattr(liger, name, NoLaunch())
    tensors = [t.requires_grad_() for t in make((5, 20), torch.float32)]
    grads = torch.autograd.grad(liger.LigerSiLUMulFunction.apply(*tensors), tensors, torch.ones(5, 20))
    assert all(g.data_ptr() == t.data_ptr() for g, t in zip(grads, tensors, strict=True))
