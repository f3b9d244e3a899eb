"""The fused head: loss and gradients of any objective equal those through whole logits, at a quarter of the memory."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanolmmr1.kernels import linear_loss as kernel

pytestmark = pytest.mark.usefixtures("poisoned_empty")
linear_loss = kernel.linear_loss


@pytest.fixture
def objective():
    """A smooth one, not linear, of both statistics, with signed coefficients that differ from token to token."""
    a, b, c = torch.randn(3, 100, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def losses(logp, entropy, rows):
        return a[rows] * (0.5 * logp).exp() + b[rows] * entropy + c[rows] * logp.square() / 10

    return losses


def run(inputs, objective, scale=1.0, head=None, **options):
    """loss, dhidden, dweight of `scale * loss`; with `head`, plain autograd through it."""
    x, w, y = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_(), inputs[2]
    if head:
        loss = objective(*head(x, w, y, *options.values()), slice(0, len(y))).sum()
    else:
        loss, _, _ = linear_loss(x, w, y, objective, **options)
    (scale * loss).backward()
    return loss.detach(), x.grad, w.grad


def double(inputs):
    return inputs[0].double(), inputs[1].double(), inputs[2]


def errors(ours, gold):
    """Of loss, dhidden, dweight, in units of the largest gold value."""
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(ours, gold, strict=True)]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 13, 0])
@pytest.mark.parametrize(("temperature", "banned"), [(1.0, ()), (0.7, (99, 98)), (0.7, ())])
def test_fp64_equals_plain_autograd(head_inputs, plain_head, objective, impl, chunk_tokens, temperature, banned):
    inputs = head_inputs()
    options = dict(temperature=temperature, banned=banned)
    gold = run(inputs, objective, -2.5, plain_head, **options)
    ours = run(inputs, objective, -2.5, chunk_tokens=chunk_tokens, impl=impl, **options)
    assert max(errors(ours, gold)) <= 1e-12
    assert all(a.dtype == b.dtype == torch.float64 for a, b in zip(ours, gold, strict=True))
    assert ours[2][list(banned)].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [7, 0])
def test_lower_precision_errs_at_most_twice_as_much_as_torch(head_inputs, plain_head, objective, dtype, chunk_tokens):
    inputs = head_inputs(70, 64, 1003, dtype)
    gold = run(double(inputs), objective, head=plain_head, temperature=0.7)
    ours = run(inputs, objective, chunk_tokens=chunk_tokens, temperature=0.7)
    plain = run(inputs, objective, head=plain_head, temperature=0.7)
    assert [t.dtype for t in ours] == [torch.float32, dtype, dtype]
    assert all(a <= 2 * b + 1e-6 for a, b in zip(errors(ours, gold), errors(plain, gold), strict=True))


def test_the_weight_gradient_does_not_lose_digits_over_many_bf16_chunks(head_inputs, plain_head):
    x, w, y = head_inputs(600, 4, 11, torch.bfloat16)
    inputs = x.abs(), w, torch.full_like(y, 3)  # all add to row 3, each less than the sum's last digit in bf16
    objective = lambda logp, entropy, rows: -logp  # noqa: E731
    gold = run(double(inputs), objective, head=plain_head)
    assert errors(run(inputs, objective, chunk_tokens=1), gold)[2] <= 1e-2  # a bf16 number is good to 4e-3


def test_log_prob_and_entropy_come_out_without_gradient(head_inputs, plain_head, objective):
    x, w, y = head_inputs()
    for impl in ("chunked", "reference"):
        _, *stats = linear_loss(x.clone().requires_grad_(), w, y, objective, chunk_tokens=4, impl=impl)
        assert not any(t.requires_grad for t in stats)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(stats, plain_head(x, w, y), strict=True))


def test_two_pass_serves_an_objective_that_couples_all_tokens(head_inputs, plain_head):
    inputs, calls = head_inputs(), []
    a = torch.linspace(-1, 2, 13, dtype=torch.float64)

    def objective(logp, entropy, rows):
        calls.append((rows.start, rows.stop))
        return a[rows] * logp * logp.mean() + entropy.mean()

    gold = run(inputs, objective, head=plain_head)
    calls.clear()
    assert max(errors(run(inputs, objective, chunk_tokens=3, two_pass=True), gold)) <= 1e-12
    assert calls == [(0, 13)]
    calls.clear()
    assert errors(run(inputs, objective, chunk_tokens=3), gold)[0] > 1e-3
    assert calls == [(0, 3), (3, 6), (6, 9), (9, 12), (12, 13)]


@pytest.mark.parametrize("two_pass", [False, True])
def test_gradients_equal_finite_differences(head_inputs, objective, two_pass):
    x, w, y = head_inputs(4, 3, 7)
    _, *grads = run((x, w, y), objective, temperature=0.7, chunk_tokens=3, two_pass=two_pass)
    for tensor, grad in zip((x, w), grads, strict=True):
        for index in range(tensor.numel()):
            losses = []
            for step in (1e-5, -1e-5):
                tensor.view(-1)[index] += step
                losses.append(linear_loss(x, w, y, objective, temperature=0.7)[0])
                tensor.view(-1)[index] -= step
            assert abs((losses[0] - losses[1]) / 2e-5 - grad.view(-1)[index]) <= 1e-8


def peaked(probability, dtype, others=10):
    """One token whose target has this probability; the weight is the identity, so dhidden is dlogits."""
    gap = math.log(others * probability / (1 - probability))
    x = torch.zeros(1, others + 1, dtype=dtype)
    x[0, 0] = gap
    return x, torch.eye(others + 1, dtype=dtype), torch.tensor([0])


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-8])
def test_the_gradient_of_a_nearly_certain_token_is_not_cancelled(plain_head, distance):
    inputs = peaked(1 - distance, torch.float32)
    objective = lambda logp, entropy, rows: -logp  # noqa: E731
    gold = run(double(inputs), objective, head=plain_head)[1]
    assert abs(float(gold[0, 0]) / -distance - 1) <= 1e-2
    assert ((run(inputs, objective)[1] - gold).abs() <= 1e-3 * gold.abs()).all()


@pytest.mark.parametrize("level", [-3e4, 3e4])
def test_logits_far_from_zero_give_the_gradients_of_those_near_it(head_inputs, plain_head, objective, level):
    x, w, y = head_inputs(5, 24, 101, torch.float32)
    x, w = x.round(), w.round()  # so that adding the level rounds nothing
    far = torch.cat([x, torch.full((5, 1), level)], 1), torch.cat([w, torch.ones(101, 1)], 1), y
    gold = run(double((x, w, y)), objective, head=plain_head)
    loss, dx, dw = run(far, objective)
    assert max(errors((loss, dx[:, :-1], dw[:, :-1]), gold)) <= 1e-5


@pytest.mark.parametrize("weighted", [0.0, 1.0])
def test_dlogits_of_a_token_sum_to_zero(objective, weighted):
    x = 2 * torch.randn(6, 37, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = x, torch.eye(37, dtype=torch.float64), torch.arange(6)
    _, dlogits, _ = run(inputs, lambda logp, entropy, rows: objective(logp, weighted * entropy, rows), chunk_tokens=4)
    assert dlogits.sum(1).abs().max() <= 1e-13 < dlogits.abs().max()


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(head_inputs, plain_head, objective, tokens):
    inputs = head_inputs(tokens)
    gold, ours = run(inputs, objective, head=plain_head), run(inputs, objective)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ours, gold, strict=True))


def test_an_objective_may_ignore_the_policy(head_inputs):
    loss, dx, dw = run(head_inputs(), lambda logp, entropy, rows: torch.ones_like(logp), chunk_tokens=4)
    assert loss == 13 and dx.abs().sum() == 0 and dw.abs().sum() == 0


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_the_same(head_inputs, objective, impl):
    x, w, y = head_inputs()
    _, dx, dw = run((x, w, y), objective)
    only_x, only_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    linear_loss(only_x, w, y, objective, chunk_tokens=4, impl=impl)[0].backward()
    linear_loss(x, only_w, y, objective, chunk_tokens=4, impl=impl)[0].backward()
    assert errors((only_x.grad, only_w.grad), (dx, dw)) <= [1e-12, 1e-12] and x.grad is None and w.grad is None
    assert not linear_loss(x, w, y, objective, impl=impl)[0].requires_grad


def test_gradients_add_up_over_calls(head_inputs, objective):
    x, w, y = head_inputs()
    _, _, dw = run((x, w, y), objective)
    w.requires_grad_()
    for _ in range(2):
        linear_loss(x, w, y, objective)[0].backward()
    assert errors((w.grad,), (2 * dw,)) <= [1e-12]


def test_a_second_backward_is_refused_instead_of_scaled_twice(head_inputs, objective):
    x, w, y = head_inputs()
    loss, _, _ = linear_loss(x.requires_grad_(), w, y, objective)
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


def test_wrong_use_is_refused(head_fault, objective):
    arguments, words = head_fault
    with pytest.raises(ValueError, match=words):
        linear_loss(**arguments, objective=objective)


def test_a_sharded_weight_is_refused(sharded_weight, objective):
    with pytest.raises(ValueError, match="full_tensor"):
        linear_loss(torch.zeros(5, 4), sharded_weight, torch.arange(5), objective)


MEASURE = """
import json, resource, sys, time, torch
from nanolmmr1.kernels.linear_loss import linear_loss

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

N, H, V = 512, 2048, 151_936
torch.manual_seed(0)
torch.set_num_threads(1)
x, w, y = torch.randn(N, H, requires_grad=True), torch.randn(V, H), torch.randint(0, V, (N,))
w.mul_(0.05).requires_grad_()
x.grad, w.grad = torch.ones_like(x), torch.ones_like(w)
base, cpu, wall = peak_mb(), [], []
for _ in range(2):
    x.grad = w.grad = None
    clocks = time.process_time(), time.perf_counter()
    linear_loss(x, w, y, lambda logp, entropy, rows: -logp - 0.01 * entropy, impl=sys.argv[1])[0].backward()
    cpu.append(time.process_time() - clocks[0])
    wall.append(time.perf_counter() - clocks[1])
print(json.dumps({"extra_mb": peak_mb() - base, "cpu_s": min(cpu), "wall_s": min(wall), "norm": float(w.grad.norm())}))
"""


@pytest.mark.acceptance
def test_at_the_real_vocabulary_a_quarter_of_eager_memory_and_no_more_time(capsys):
    def measure(impl):
        root = Path(__file__).resolve().parents[1]
        return json.loads(subprocess.check_output([sys.executable, "-c", MEASURE, impl], cwd=root, text=True))

    eager, ours = measure("reference"), measure("chunked")
    with capsys.disabled():
        print(f"\nN=512 H=2048 V=151936 fp32: eager {eager}, ours {ours}")
    assert math.isclose(ours["norm"], eager["norm"], rel_tol=1e-4)
    assert ours["extra_mb"] <= eager["extra_mb"] / 4
    assert ours["cpu_s"] <= 1.1 * eager["cpu_s"]  # of one thread, so that a busy machine changes nothing
