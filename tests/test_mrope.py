"""Rotary embeddings: a column pair is a complex number times e^(i angle), whatever the strides; backward undoes it."""

from functools import partial

import pytest
import torch
from compare import largest, run
from test_swiglu import guard_memory

from nanolmmr1.kernels import _triton
from nanolmmr1.kernels import mrope as kernel

pytestmark = pytest.mark.usefixtures("poisoned_empty")
mrope, rope2d = kernel.mrope, kernel.rope2d

SECTION, DIM = (2, 3, 3), 16
CASES = {  # op, (tokens, query heads, key heads, D), largest position; blocks are of 4 tokens in the interpreter
    "3-D": ("mrope", (9, 4, 2, DIM), 50),
    "one token": ("mrope", (1, 3, 1, DIM), 50),
    "a full block": ("mrope", (4, 1, 1, DIM), 50),
    "2-D": ("rope2d", (6, 2, 2, 20), 30),  # D / 2 = 10 columns, in a tile of 16
    "vision tower": ("rope2d", (5, 2, 2, 80), 70),
}


def make(op, shape, top, dtype=torch.float64, seed=0):
    """q, k, and the op bound to its positions."""
    tokens, q_heads, k_heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(tokens, heads, dim, generator=generator, dtype=torch.float64) for heads in (q_heads, k_heads))
    at = torch.randint(0, top + 1, (3 if op == "mrope" else 2, tokens), generator=generator)
    return q.to(dtype), k.to(dtype), at


def call(op, at, **options):
    """The op as a function of q and k."""
    if op == "mrope":
        return lambda q, k: mrope(q, k, at.to(q.device), theta=1e6, section=SECTION, **options)
    return lambda q, k: rope2d(q, k, at.T.contiguous().to(q.device), **options)


def complex_turn(op, at):
    """Independent of the op: fp64, one column after another."""

    def turn(x):
        half = x.shape[2] // 2
        z = torch.complex(x[..., :half].double(), x[..., half:].double())  # (T, heads, D / 2)
        columns = []
        for j in range(half):
            if op == "mrope":
                axis = 0 if j < SECTION[0] else 1 if j < SECTION[0] + SECTION[1] else 2
                angle = at[axis].double() * 1e6 ** (-j / half)
            else:
                quarter = half // 2
                angle = at[j // quarter].double() * 10000.0 ** (-(j % quarter) / quarter)
            columns.append(z[..., j] * torch.polar(torch.ones_like(angle), angle)[:, None])
        z = torch.stack(columns, -1)
        return torch.cat([z.real, z.imag], -1)

    return lambda q, k: (turn(q), turn(k))


def error(ours, gold):
    return max(largest(ours, gold))


@pytest.mark.parametrize("name", CASES)
def test_fp64_reference_equals_complex_products(name):
    op, *case = CASES[name]
    q, k, at = make(op, *case)
    ours = run(call(op, at), [q, k])
    assert all(x.dtype == torch.float64 for x in ours)
    assert error(ours, run(complex_turn(op, at), [q, k])) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_kernel_errs_at_most_twice_as_much_as_torch(name, device):
    op, *case = CASES[name]
    q, k, at = make(op, *case, torch.float32)
    gold = run(complex_turn(op, at), [q.double(), k.double()])
    plain = error(run(call(op, at, impl="reference"), [q, k]), gold)
    ours = run(call(op, at, impl="triton"), [q, k], device)
    assert error(ours, gold) <= 2 * plain + 1e-6
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in ours)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_written_past_the_end(name, device, monkeypatch):
    op, *case = CASES[name]
    q, k, at = make(op, *case, torch.float32)
    tails = guard_memory(monkeypatch)
    assert all(x.isfinite().all() for x in run(call(op, at, impl="triton"), [q, k], device))
    assert len(tails) == 4 and all((tail == 7).all() for tail in tails)


@pytest.mark.gpu
@pytest.mark.parametrize("op, shape, top", [("mrope", (100, 16, 2, DIM), 3000), ("rope2d", (333, 16, 16, 80), 200)])
def test_bf16_kernel_rounds_as_torch_does(op, shape, top, device):
    if device.type != "cuda":
        pytest.skip("bf16 rounds otherwise under the interpreter")
    q, k, at = make(op, shape, top, torch.bfloat16)
    plain = run(call(op, at, impl="reference"), [q, k], device)
    ours = run(call(op, at, impl="triton"), [q, k], device)
    for a, b in zip(ours, plain, strict=True):
        assert (a == b).float().mean() > 0.99 and error([a], [b]) <= 2**-5  # one bit of a number below 8


@pytest.mark.parametrize("top", [50, 100_000, 2**24 - 1])
def test_angles_are_reduced_to_the_last_bit(top, device):
    # theta = 1: every frequency is 1 and the angle is the position, which fp32 holds exactly.
    at = torch.randint(-top, top + 1, (3, 60), generator=torch.Generator().manual_seed(top))
    at[:, 0], at[:, 1] = top, 0
    x = torch.cat([torch.ones(60, 1, 4), torch.zeros(60, 1, 4)], -1).to(device)  # turns into (cos, sin)
    out, _ = mrope(x, x, at.to(device), theta=1.0, section=(1, 1, 2), impl="triton")
    angle = at[torch.tensor([0, 1, 2, 2])].T.double()  # (T, D / 2)
    gold = torch.cat([angle.cos(), angle.sin()], -1)
    assert float((out[:, 0].cpu().double() - gold).abs().max()) <= 2**-23


def test_far_positions_turn_as_the_references_fp32_angles_do(device):
    # The product's rounding is up to 0.004 there, so fp64 is no measure: both must round it alike.
    q, k, at = make("mrope", (9, 2, 1, DIM), 100_000, torch.float32)
    ours, plain = (run(call("mrope", at, impl=impl), [q, k], device) for impl in ("triton", "reference"))
    assert error(ours, plain) <= 2e-6
    gold = run(complex_turn("mrope", at), [q.double(), k.double()])
    assert error(plain, gold) > 1e-4  # or the above would have been easy


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_turns_its_own_columns_and_no_others(axis, impl, device):
    q, k, at = make("mrope", (6, 2, 1, DIM), 9, torch.float32)
    moved = at.clone()
    moved[axis] += 1
    mine = torch.repeat_interleave(torch.tensor(SECTION)).repeat(2) == axis  # (D,)
    for x, y in zip(*(run(call("mrope", a, impl=impl), [q, k], device)[:2] for a in (at, moved)), strict=True):
        assert torch.equal((x != y).all(0).all(0), mine) and torch.equal((x != y).any(0).any(0), mine)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_turn_the_first_half_of_the_columns(axis, impl, device):
    q, k, at = make("rope2d", (5, 1, 1, 20), 9, torch.float32)
    moved = at.clone()
    moved[axis] += 1
    mine = (torch.arange(20) % 10 < 5) == (axis == 0)  # (D,)
    x, y = (run(call("rope2d", a, impl=impl), [q, k], device)[0] for a in (at, moved))
    assert torch.equal((x != y).all(0).all(0), mine) and torch.equal((x != y).any(0).any(0), mine)


@pytest.mark.parametrize("section", [(8, 0, 0), (0, 8, 0), (0, 0, 8), (0, 5, 3), (3, 0, 5), (3, 5, 0)])
def test_an_axis_may_have_no_columns(section, device):
    q, k, at = (x.to(device) for x in make("mrope", (5, 2, 1, DIM), 20, torch.float32))
    ours, plain = (mrope(q, k, at, theta=1e4, section=section, impl=impl) for impl in ("triton", "reference"))
    assert error(ours, plain) <= 1e-6


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_slices_of_a_fused_projection_turn_as_copies_do_and_stay_as_they_were(impl, device):
    heads, dim, tokens = 3, 20, 6
    fused = torch.randn(tokens, 3, heads, dim, generator=torch.Generator().manual_seed(1)).to(device)
    before, at = fused.clone(), torch.randint(0, 40, (2, tokens), generator=torch.Generator().manual_seed(2))
    q, k, _ = fused.unbind(1)  # rows lie 3 * heads * D apart
    assert not q.is_contiguous()
    ours = call("rope2d", at, impl=impl)(q, k)
    copies = call("rope2d", at, impl=impl)(q.contiguous(), k.contiguous())
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(ours, copies, strict=True))
    assert torch.equal(fused, before)
    heads_apart = call("rope2d", at, impl=impl)(q.transpose(0, 1).contiguous().transpose(0, 1), k)
    assert torch.equal(heads_apart[0], copies[0])


def test_positions_may_be_int32_and_strided(device):
    q, k, at = (x.to(device) for x in make("mrope", (7, 2, 1, DIM), 90, torch.float32))
    turn = partial(mrope, q, k, theta=1e6, section=SECTION, impl="triton")
    for same in (at.int(), at.T.contiguous().T, torch.stack([at, at + 5], -1)[..., 0]):
        assert all(torch.equal(a, b) for a, b in zip(turn(same), turn(at), strict=True))


def test_upstream_gradients_may_have_any_strides(device):
    q, k, at = make("mrope", (6, 3, 2, DIM), 30, torch.float32)
    gold = {}
    for impl in ("reference", "triton"):
        x, y = (t.to(device).requires_grad_() for t in (q, k))
        a, b = call("mrope", at, impl=impl)(x, y)
        transposed = torch.randn(DIM, 3, 6, generator=torch.Generator().manual_seed(3)).to(device).permute(2, 1, 0)
        gold[impl] = torch.autograd.grad((a * transposed).sum() + b.sum(), [x, y])  # b's gradient has strides of 0
        gold[impl] += torch.autograd.grad(call("mrope", at, impl=impl)(x, y)[0].sum(), [x])  # k' unused
    assert error(gold["triton"], gold["reference"]) <= 1e-6


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_tokens_are_none_back(impl, device):
    for op, dim in (("mrope", DIM), ("rope2d", 20)):
        q, k, at = make(op, (0, 2, 1, dim), 5, torch.float32)
        ours = run(call(op, at, impl=impl), [q, k], device)
        assert [tuple(x.shape) for x in ours] == [(0, 2, dim), (0, 1, dim)] * 2


def test_two_runs_agree_to_the_bit(device):
    q, k, at = make("rope2d", (7, 2, 2, 20), 30, torch.float32)
    first, second = (run(call("rope2d", at, impl="triton"), [q, k], device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_auto_goes_by_device_and_fp64_to_the_reference(device):
    for dtype in (torch.float32, torch.float64):
        q, k, at = (x.to(device) for x in make("mrope", (5, 2, 1, DIM), 30))
        q, k = q.to(dtype), k.to(dtype)
        impl = "triton" if device.type == "cuda" and dtype == torch.float32 else "reference"
        auto = mrope(q, k, at, theta=1e6, section=SECTION)
        assert all(torch.equal(a, b) for a, b in zip(auto, call("mrope", at, impl=impl)(q, k), strict=True))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_frequencies_first_made_in_inference_mode_serve_training(impl, device):
    q, k, at = (x.to(device) for x in make("mrope", (3, 1, 1, DIM), 30, torch.float32))
    turn = partial(mrope, k=k, positions=at, theta=123.0, section=SECTION, impl=impl)
    with torch.inference_mode():
        turn(q)
    turn(q.requires_grad_())[0].sum().backward()
    assert q.grad.isfinite().all()


def test_no_second_derivative_is_made_up(device):
    q, k, at = (x.to(device) for x in make("mrope", (3, 1, 1, DIM), 30, torch.float32))
    (grad,) = torch.autograd.grad(call("mrope", at, impl="triton")(q.requires_grad_(), k)[0].square().sum(), q,
                                  create_graph=True)  # fmt: skip
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


X, Y, AT = torch.zeros(5, 2, 16), torch.zeros(5, 1, 16), torch.zeros(3, 5, dtype=torch.int64)
FAULTS = [  # what to change in a correct call, and words of the complaint
    (dict(q=torch.zeros(5, 16)), r"\(5, 16\)"),
    (dict(k=torch.zeros(4, 1, 16)), r"\(4, 1, 16\)"),
    (dict(k=torch.zeros(5, 1, 12)), r"\(5, 1, 12\)"),
    (dict(k=Y.half()), "float16"),
    (dict(q=torch.zeros(5, 2, 15), k=torch.zeros(5, 1, 15)), "D=15"),
    (dict(section=(2, 3, 4)), r"\(2, 3, 4\).*D=16"),
    (dict(section=(-1, 5, 4)), r"\(-1, 5, 4\)"),
    (dict(section=(4, 4)), r"\(4, 4\): want three"),
    (dict(section=(8,), positions=AT[:1]), r"\(8,\): want three"),
    (dict(positions=AT[:, :4]), "4 tokens.*want 5"),
    (dict(positions=AT[:2]), "on 2 axes.*on 3"),
    (dict(positions=AT.float()), "float32.*int64"),
    (dict(impl="fast"), "fast.*auto, triton"),
    (dict(q=X.double(), k=Y.double(), impl="triton"), "float64.*reference"),
    (dict(q=torch.zeros(16, 2, 5).permute(2, 1, 0), impl="triton"), r"q .* has strides.*contiguous"),
]


@pytest.mark.parametrize("changes, words", FAULTS, ids=[words for _, words in FAULTS])
def test_wrong_use_is_refused(changes, words, device):
    right = dict(q=X, k=Y, positions=AT, theta=1e4, section=SECTION)
    with pytest.raises(ValueError, match=words):
        mrope(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in (right | changes).items()})


def test_wrong_use_of_the_2d_one_is_refused():
    x, places = torch.zeros(5, 2, 20), torch.zeros(5, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"D=18.*multiple of 4"):
        rope2d(x[..., :18], x[..., :18], places)
    with pytest.raises(ValueError, match="on 5 axes.*on 2"):
        rope2d(x, x, places.T)
    with pytest.raises(ValueError, match=r"\(10,\)"):
        rope2d(x, x, places.flatten())


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="q is on cpu.*CUDA"):
        mrope(X, Y, AT, theta=1e4, section=SECTION, impl="triton")
