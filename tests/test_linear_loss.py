"""The head in training: loss and gradients of any objective equal those through whole logits, in less memory."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from compare import errors

from nanolmmr1.kernels import _head, _rows
from nanolmmr1.kernels import linear_logprob as logprob
from nanolmmr1.kernels import linear_loss as kernel
from nanolmmr1.update.objective import Tokens, policy_loss

pytestmark = pytest.mark.usefixtures("poisoned_empty")
both = pytest.mark.parametrize("impl", ["chunked", "triton"])
linear_loss = kernel.linear_loss
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of Triton kernels


@pytest.fixture
def objective():
    """A smooth one, not linear, of both statistics, with signed coefficients that differ from token to token."""
    a, b, c = torch.randn(3, 100, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def losses(logp, entropy, rows):
        at, bt, ct = (t[rows].to(logp) for t in (a, b, c))
        return at * (0.5 * logp).exp() + bt * entropy + ct * logp.square() / 10

    return losses


def run(inputs, objective, scale=1.0, head=None, **options):
    """loss, dhidden, dweight of `scale * loss`, on the CPU; with `head`, plain autograd through it."""
    if options.get("impl") == "triton":
        inputs = [t.to(DEVICE) for t in inputs]
    x, w, y = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_(), inputs[2]
    if head:
        loss = objective(*head(x, w, y, *options.values()), slice(0, len(y))).sum()
    else:
        loss, _, _ = linear_loss(x, w, y, objective, **options)
    (scale * loss).backward()
    return loss.detach().cpu(), x.grad.cpu(), w.grad.cpu()


def double(inputs):
    return inputs[0].double(), inputs[1].double(), inputs[2]


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


@pytest.mark.parametrize(("temperature", "banned"), [(1.0, ()), (0.7, (99, 98)), (0.7, ())])
@pytest.mark.parametrize("chunk_tokens", [3, 0])
def test_the_row_kernels_equal_plain_autograd(head_inputs, plain_head, objective, chunk_tokens, temperature, banned):
    inputs = head_inputs(dtype=torch.float32)
    options = dict(temperature=temperature, banned=banned)
    gold = run(double(inputs), objective, -2.5, plain_head, **options)
    ours = run(inputs, objective, -2.5, chunk_tokens=chunk_tokens, impl="triton", **options)
    assert max(errors(ours, gold)) <= 1e-5
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


IMPLS = ["chunked", "reference", "triton"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("two_pass", [False, True])
def test_a_master_weight_counts_as_rounded_and_its_gradient_is_not(head_inputs, plain_head, objective, impl, two_pass):
    # The interpreter has no bf16 product; fp16's rounding is eight times finer.
    dtype = torch.float16 if impl == "triton" and DEVICE.type == "cpu" else torch.bfloat16
    x, _, y = head_inputs(20, 16, 103, dtype)
    w = head_inputs(20, 16, 103, torch.float32)[1]
    assert not torch.equal(w, w.to(dtype).float())
    gold = run(double((x, w.to(dtype), y)), objective, -2.5, plain_head, temperature=0.7)
    options = dict(temperature=0.7, chunk_tokens=7, impl=impl, two_pass=two_pass)
    ours = run((x, w, y), objective, -2.5, **options)
    assert [t.dtype for t in ours] == [torch.float32, dtype, torch.float32]
    rounded = run((x, w.to(dtype), y), objective, -2.5, **options)  # as through a cast outside
    assert abs(ours[0] - gold[0]) <= 1e-5 * abs(gold[0])
    if impl == "reference":
        assert errors(ours, gold)[2] <= 1e-5
    else:  # the same numbers, of which only the last rounding is left out
        assert torch.equal(ours[1], rounded[1]) and torch.equal(ours[2].to(dtype), rounded[2])
        assert not torch.equal(ours[2], rounded[2].float())
    largest = gold[2].abs().amax()
    mean = [float((dw.double() - gold[2]).abs().mean() / largest) for dw in (ours[2], rounded[2])]
    assert mean[0] < mean[1]


def test_a_master_weights_gradient_is_the_fp32_sum_of_16_bit_products(head_inputs):
    """dlogits of one token are exact in bf16 here, so that nothing but the last rounding could lose a digit."""
    x = torch.tensor([[1.0, 2**-7], [1.0, 0.0]], dtype=torch.bfloat16)
    w, y = torch.zeros(2, 2), torch.tensor([0, 0])  # p = 1/2
    weights = torch.tensor([1.0, 2**-9])
    _, _, dw = run((x, w, y), lambda logp, entropy, rows: -weights[rows] * logp, chunk_tokens=1)
    assert dw.dtype == torch.float32
    assert dw.tolist() == [[-0.5 - 2**-10, -(2**-8)], [0.5 + 2**-10, 2**-8]]  # in bf16 the first column would be 0.5


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
    ],
)
def test_other_mixes_of_dtypes_are_refused(head_inputs, objective, hidden, weight):
    x, w, y = head_inputs()
    with pytest.raises(ValueError, match=f"{hidden}.*{weight}"):
        linear_loss(x.to(hidden), w.to(weight), y, objective)


def test_log_prob_and_entropy_come_out_without_gradient(head_inputs, plain_head, objective):
    x, w, y = head_inputs()
    for impl in ("chunked", "reference"):
        _, *stats = linear_loss(x.clone().requires_grad_(), w, y, objective, chunk_tokens=4, impl=impl)
        assert not any(t.requires_grad for t in stats)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(stats, plain_head(x, w, y), strict=True))


@both
def test_two_pass_serves_an_objective_that_couples_all_tokens(head_inputs, plain_head, impl):
    inputs, calls = head_inputs(dtype=torch.float32), []
    a = torch.linspace(-1, 2, 13, dtype=torch.float64)

    def objective(logp, entropy, rows):
        calls.append((rows.start, rows.stop))
        return a[rows].to(logp) * logp * logp.mean() + entropy.mean()

    gold = run(double(inputs), objective, head=plain_head)
    calls.clear()
    assert max(errors(run(inputs, objective, chunk_tokens=3, two_pass=True, impl=impl), gold)) <= 1e-5
    assert calls == [(0, 13)]
    calls.clear()
    assert errors(run(inputs, objective, chunk_tokens=3, impl=impl), gold)[0] > 1e-3
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


@both
@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-8])
def test_the_gradient_of_a_nearly_certain_token_is_not_cancelled(plain_head, distance, impl):
    inputs = peaked(1 - distance, torch.float32)
    objective = lambda logp, entropy, rows: -logp  # noqa: E731
    gold = run(double(inputs), objective, head=plain_head)[1]
    assert abs(float(gold[0, 0]) / -distance - 1) <= 1e-2
    assert ((run(inputs, objective, impl=impl)[1] - gold).abs() <= 1e-3 * gold.abs()).all()


@both
@pytest.mark.parametrize("level", [-3e4, 3e4])
def test_logits_far_from_zero_give_the_gradients_of_those_near_it(head_inputs, plain_head, objective, level, impl):
    x, w, y = head_inputs(5, 24, 101, torch.float32)
    x, w = x.round(), w.round()  # so that adding the level rounds nothing
    far = torch.cat([x, torch.full((5, 1), level)], 1), torch.cat([w, torch.ones(101, 1)], 1), y
    gold = run(double((x, w, y)), objective, head=plain_head)
    loss, dx, dw = run(far, objective, impl=impl)
    assert max(errors((loss, dx[:, :-1], dw[:, :-1]), gold)) <= 1e-5


@pytest.mark.parametrize("weighted", [0.0, 1.0])
def test_dlogits_of_a_token_sum_to_zero(objective, weighted):
    x = 2 * torch.randn(6, 37, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = x, torch.eye(37, dtype=torch.float64), torch.arange(6)
    _, dlogits, _ = run(inputs, lambda logp, entropy, rows: objective(logp, weighted * entropy, rows), chunk_tokens=4)
    assert dlogits.sum(1).abs().max() <= 1e-13 < dlogits.abs().max()


@both
def test_autocast_around_the_op_rounds_nothing(head_inputs, objective, impl):
    inputs = head_inputs(dtype=torch.float32)
    plain = run(inputs, objective, impl=impl)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = run(inputs, objective, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@both
def test_without_grad_there_is_the_loss_and_no_gradient_is_made(head_inputs, objective, impl, monkeypatch):
    x, w, y = (t.to(DEVICE) for t in head_inputs(dtype=torch.float32))
    loss, logp, entropy = linear_loss(x.requires_grad_(), w.requires_grad_(), y, objective, impl=impl)
    monkeypatch.setattr(kernel, "accumulate", None)  # only a gradient of the weight would call it
    with torch.no_grad():
        again = linear_loss(x, w, y, objective, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip((loss, logp, entropy), again, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("two_pass", [False, True])
def test_no_token_and_one_token(head_inputs, plain_head, objective, tokens, impl, two_pass):
    inputs = head_inputs(tokens, dtype=torch.float32)
    gold = run(double(inputs), objective, head=plain_head)
    ours = run(inputs, objective, impl=impl, two_pass=two_pass, banned=(99,) if tokens == 0 else ())
    assert [t.shape for t in ours] == [(), (tokens, 24), (101, 24)]
    assert all(torch.allclose(a.double(), b, rtol=0, atol=1e-5) for a, b in zip(ours, gold, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fused", [False, True])
def test_without_a_token_the_loss_still_has_a_graph(head_inputs, impl, fused):
    """A rank whose micro-batch scores nothing takes part in the gradient's sum, by zeros."""
    x, _, y = head_inputs(0, dtype=torch.float16)
    w = head_inputs(0, dtype=torch.float32)[1].to(DEVICE).requires_grad_()
    x, y = x.to(DEVICE).requires_grad_(), y.to(DEVICE)
    none = torch.zeros(0, device=DEVICE)
    form = kernel.FusedObjective(none, none) if fused else None
    loss, logp, entropy = linear_loss(x, w, y, lambda logp, entropy, rows: -logp, fused=form, impl=impl)
    loss.backward()
    assert loss == 0 and logp.shape == entropy.shape == (0,)
    assert x.grad.shape == (0, 24) and x.grad.dtype == torch.float16
    assert w.grad.shape == (101, 24) and w.grad.dtype == torch.float32 and not w.grad.any()


@both
def test_an_objective_may_ignore_the_policy(head_inputs, impl):
    inputs = head_inputs(dtype=torch.float32)
    loss, dx, dw = run(inputs, lambda logp, entropy, rows: torch.ones_like(logp), chunk_tokens=4, impl=impl)
    assert loss == 13 and dx.abs().sum() == 0 and dw.abs().sum() == 0


@both
def test_an_objective_may_be_the_log_prob_itself(head_inputs, plain_head, impl):
    """Its gradient is one number, expanded: a tensor without memory of its own for each token."""
    inputs, objective = head_inputs(dtype=torch.float32), lambda logp, entropy, rows: logp
    gold = run(double(inputs), objective, head=plain_head)
    assert max(errors(run(inputs, objective, chunk_tokens=4, impl=impl), gold)) <= 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_the_same(head_inputs, objective, impl):
    x, w, y = (t.to(DEVICE) for t in head_inputs(dtype=torch.float32))
    _, dx, dw = run((x, w, y), objective)
    only_x, only_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    linear_loss(only_x, w, y, objective, chunk_tokens=4, impl=impl)[0].backward()
    linear_loss(x, only_w, y, objective, chunk_tokens=4, impl=impl)[0].backward()
    assert max(errors((only_x.grad.cpu(), only_w.grad.cpu()), (dx, dw))) <= 1e-5 and x.grad is None and w.grad is None
    assert not linear_loss(x, w, y, objective, impl=impl)[0].requires_grad


def test_gradients_add_up_over_calls(head_inputs, objective):
    x, w, y = head_inputs()
    _, _, dw = run((x, w, y), objective)
    w.requires_grad_()
    for _ in range(2):
        linear_loss(x, w, y, objective)[0].backward()
    assert errors((w.grad,), (2 * dw,)) <= [1e-12]


@both
def test_a_second_backward_is_refused_instead_of_scaled_twice(head_inputs, objective, impl):
    x, w, y = (t.to(DEVICE) for t in head_inputs(dtype=torch.float32))
    loss, _, _ = linear_loss(x.requires_grad_(), w, y, objective, impl=impl)
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


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dlogits_lie_in_their_logits_memory_and_no_column_is_lost(vocab, dtype):
    """16-bit ones in the back half of their row, written while the front columns are still to be read."""
    generator = torch.Generator().manual_seed(vocab)
    z, (g, h) = 3 * torch.randn(5, vocab, generator=generator), torch.randn(2, 5, generator=generator)
    y = torch.randint(vocab, (5,), generator=generator)
    exact = (z.double() / 0.7).requires_grad_()
    logps = exact.log_softmax(-1)
    gold = g * logps.gather(1, y[:, None])[:, 0] - h * (logps.exp() * logps).sum(-1)
    (gold,) = torch.autograd.grad(gold.sum() / 0.7, exact)
    z, y, g, h = (t.to(DEVICE) for t in (z, y, g, h))
    stats = _rows.row_stats(z, y, 0.7, None)
    dz = _rows.row_dlogits(z, stats, y, g, h, 0.7, dtype)
    assert dz.untyped_storage().data_ptr() == z.untyped_storage().data_ptr() and dz.dtype == dtype
    digits = torch.finfo(dtype).eps
    assert ((dz.cpu().double() - gold).abs() <= digits * gold.abs() + 1e-6).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("logits", [None, torch.float16])
def test_16_bit_inputs_lose_what_their_gradients_round_away(head_inputs, plain_head, objective, logits, fused):
    inputs, form, objective_of = head_inputs(20, 16, 203, torch.float16), None, objective
    if fused:
        advantage, weight = torch.linspace(-1, 2, 20), torch.linspace(1, 0.2, 20)
        form = kernel.FusedObjective(advantage.to(DEVICE), weight.to(DEVICE), entropy_coef=0.3)

        def objective_of(logp, entropy, rows):
            ratio = (logp - logp.detach()).exp()
            return weight[rows].to(logp) * (-ratio * advantage[rows].to(logp) - 0.3 * entropy)

    gold = run(double(inputs), objective_of, head=plain_head, temperature=0.7)
    # Fused, only the numbers may be read.
    options = dict(fused=form, impl="triton", temperature=0.7, logits_dtype=logits, chunk_tokens=6)
    ours = run(inputs, None if fused else objective_of, **options)
    assert [t.dtype for t in ours] == [torch.float32, torch.float16, torch.float16]
    assert errors(ours, gold)[0] <= (1e-3 if logits else 1e-6) and max(errors(ours, gold)) <= 2e-3


LOG_RATIO = torch.tensor([0.5, 1.05, 1.6, 0.5, 1.05, 1.6, 4.0, 1.3], dtype=torch.float64).log()  # logp - old
ADVANTAGE = torch.tensor([1.0, 2.0, 0.7, -1.0, -0.5, -2.0, -0.3, 0.0], dtype=torch.float64)
TRUST = torch.tensor([0.5, 3.0, 0.9, 1.1, 4.0, 0.2, 1.9, 2.5], dtype=torch.float64).log()  # old - sampler
REFERENCE = torch.tensor([-1.2, 1e-3, 0.3, 0.7, -0.4, 2.0, -0.05, 0.0], dtype=torch.float64)  # logp - ref
FUSABLE = dict(
    loss_type="ppo", clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_dual=0.0, kl_coef=0.0, kl_estimator="k3",
    kl_ratio=False, entropy_coef=0.0, tis_cap=0.0,
)  # fmt: skip


@pytest.fixture
def fusable(head_inputs, plain_head):
    """Inputs of eight tokens, one on each side of every clip, and a maker of an objective and its fused form."""
    x, w, y = head_inputs(8, 6, 11, torch.float32)
    inputs = x, 0.3 * w, y  # log-probs of a size that fp32 rounds little
    logp = plain_head(*double(inputs), 0.7)[0]
    old = logp - LOG_RATIO
    weight, response = torch.linspace(0.2, 1.5, 8).double(), torch.zeros(8, dtype=torch.int64)
    tokens = Tokens(ADVANTAGE, weight, response, old - TRUST, old, logp - REFERENCE)

    def make(with_old=True, **settings):
        settings = FUSABLE | settings
        told = tokens if with_old else replace(tokens, old_logp=None)
        objective = SimpleNamespace(**settings, kl_place="loss", tis_mode="token_truncate", tis_floor=0.0)

        def losses(logp, entropy, rows):
            cast = {k: v if v is None or k == "response" else v.to(logp) for k, v in vars(told[rows]).items()}
            return policy_loss(logp, entropy, Tokens(**cast), objective)

        vectors = {k: None if v is None else v.float().to(DEVICE) for k, v in vars(told).items() if k != "response"}
        return losses, kernel.FusedObjective(**vectors, **settings)

    return inputs, make


KLS = [(None, False), *product(("k1", "k2", "k3"), (False, True))]


@pytest.mark.parametrize(("kl", "kl_ratio"), KLS)
@pytest.mark.parametrize("dual", [0.0, 3.0])
@pytest.mark.parametrize("loss_type", ["ppo", "cispo"])
def test_the_fused_objective_is_the_objective(fusable, plain_head, loss_type, dual, kl, kl_ratio):
    inputs, make = fusable
    settings = dict(loss_type=loss_type, clip_ratio_dual=dual)
    if kl:
        settings |= dict(kl_coef=0.3, kl_estimator=kl, kl_ratio=kl_ratio)
    for tis_cap, entropy_coef, with_old in product((0.0, 2.0), (0.0, 0.4), (True, False)):
        losses, fused = make(with_old, tis_cap=tis_cap, entropy_coef=entropy_coef, **settings)
        gold = run(double(inputs), losses, -2.5, plain_head, temperature=0.7)
        ours = run(inputs, None, -2.5, fused=fused, temperature=0.7, impl="triton")
        assert max(errors(ours[1:], gold[1:])) <= 1e-5, (tis_cap, entropy_coef, with_old)
        # The loss is a sum of terms around 1 that may cancel: an error of theirs is none of the sum's own size.
        assert abs(float(ours[0]) - float(gold[0])) <= 1e-5 * max(1.0, abs(float(gold[0])))


def test_fused_chunks_banned_ids_and_statistics(fusable, plain_head):
    (x, w, y), make = fusable
    w = torch.cat([w, 1e3 * x[:2]])  # two ids that would take all
    losses, fused = make(kl_coef=0.3, entropy_coef=0.4, tis_cap=2.0)
    options = dict(temperature=0.7, banned=(11, 12))
    gold = run(double((x, w, y)), losses, head=plain_head, **options)
    for chunk_tokens in (1, 3, 0):
        ours = run((x, w, y), None, fused=fused, chunk_tokens=chunk_tokens, impl="triton", **options)
        assert max(errors(ours, gold)) <= 1e-5
        assert ours[2][11:].abs().sum() == 0
    x, w, y = (t.to(DEVICE) for t in (x, w, y))
    _, *stats = linear_loss(x, w, y, None, fused=fused, impl="triton", chunk_tokens=3, **options)
    _, *plain = linear_loss(x, w, y, losses, impl="reference", **options)
    assert max(errors(stats, plain)) <= 1e-5 and not any(t.requires_grad for t in stats)


def test_the_gradient_passes_a_clip_at_its_bound(fusable, plain_head):
    inputs, make = fusable
    losses, fused = make(with_old=False, clip_ratio_low=0.0, clip_ratio_high=0.0)  # the ratio is 1, both bounds too
    gold = run(double(inputs), losses, head=plain_head, temperature=0.7)
    assert gold[1].abs().max() > 0.1
    assert max(errors(run(inputs, None, fused=fused, temperature=0.7, impl="triton"), gold)) <= 1e-5


@triton.jit
def _elementwise(x_ptr, out_ptr, SIZE: tl.constexpr, LOG1P: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), _rows.log1p(x) if LOG1P else _rows.exp_less_line(x))


@pytest.mark.parametrize("name", ["log1p", "exp_less_line"])
def test_series_are_good_to_the_last_digits(name):
    x = torch.cat([torch.logspace(-30, 0, 128), torch.linspace(0.01, 1, 128)])
    if name == "exp_less_line":
        x = torch.cat([x.clamp(min=1e-12)[::2], -x.clamp(min=1e-12)[1::2]])
    out = torch.full_like(x, float("nan")).to(DEVICE)
    _elementwise[(1,)](x.to(DEVICE), out, len(x), name == "log1p")
    exact = x.double()
    if name == "log1p":
        gold = exact.log1p()
    else:  # by its series where even fp64 would cancel
        gold = torch.where(exact.abs() < 1e-4, exact.square() / 2 * (1 + exact / 3), exact.expm1() - exact)
    ulps = 4 if name == "log1p" else 16
    assert ((out.cpu().double() - gold).abs() <= ulps * torch.finfo(torch.float32).eps * gold.abs()).all()


def test_other_impls_take_the_objective_itself(fusable):
    inputs, make = fusable
    losses, _ = make()
    _, other = make(kl_coef=5.0)
    assert torch.equal(run(inputs, losses, fused=other, impl="chunked")[1], run(inputs, losses, impl="chunked")[1])


def test_gspo_takes_two_passes(fusable, plain_head):
    inputs, make = fusable
    losses, _ = make(loss_type="gspo", kl_coef=0.3, entropy_coef=0.4)
    gold = run(double(inputs), losses, head=plain_head, temperature=0.7)
    ours = run(inputs, losses, two_pass=True, chunk_tokens=3, impl="triton", temperature=0.7)
    assert max(errors(ours, gold)) <= 1e-5


def test_a_run_repeats_bit_by_bit(fusable):
    inputs, make = fusable
    losses, fused = make(kl_coef=0.3, entropy_coef=0.4)
    for form in (None, fused):
        first, second = (run(inputs, losses, fused=form, chunk_tokens=3, impl="triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_nan_is_not_hidden(fusable):
    (x, w, y), make = fusable
    for spoil in (dict(old_logp=torch.full((8,), float("nan"), device=DEVICE)), {}):
        _, fused = make(tis_cap=2.0)
        if not spoil:
            w[5, 0] = float("nan")
        loss, _, _ = run((x, w, y), None, fused=replace(fused, **spoil), impl="triton")
        assert loss.isnan()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(loss_type="gspo"), "gspo.*ppo or cispo"),
        (dict(kl_estimator="k4"), "k4"),
        (dict(weight=None), "weight is None"),
        (dict(kl_coef=0.1, ref_logp=None), "ref_logp is None"),
        (dict(tis_cap=2.0, sampler_logp=None), "sampler_logp is None"),
        (dict(advantage=torch.zeros(7, device=DEVICE)), r"advantage is \(7,\)"),
        (dict(old_logp=torch.zeros(8, device=DEVICE).double()), "old_logp.*float64"),
        (dict(weight=torch.zeros(16, device=DEVICE)[::2]), "weight.*contiguous"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_fused_objective_is_refused(fusable, change, words):
    inputs, make = fusable
    with pytest.raises(ValueError, match=words):
        run(inputs, None, fused=replace(make()[1], **change), impl="triton")


def test_options_that_exclude_each_other_are_refused(fusable):
    inputs, make = fusable
    losses, fused = make()
    for options, words in (
        (dict(fused=fused, two_pass=True, impl="triton"), "two_pass"),
        (dict(logits_dtype=torch.float16, impl="triton"), "logits_dtype=torch.float16"),
        (dict(logits_dtype=torch.bfloat16, impl="chunked"), "logits_dtype=torch.bfloat16: it can be torch.float32$"),
    ):
        with pytest.raises(ValueError, match=words):
            run(inputs, losses, **options)


@pytest.fixture(scope="module")
def real_size():
    """(hidden, weight, target) of 1,000 tokens in bf16 on a GPU, an objective, and its fused form."""
    torch.manual_seed(0)
    x = torch.randn(1000, 2048, device=DEVICE, dtype=torch.bfloat16)
    w = (torch.randn(151_936, 2048, device=DEVICE) * 3 / 2048**0.5).bfloat16()
    advantage, weight = torch.randn(1000, device=DEVICE), torch.rand(1000, device=DEVICE) / 1000

    def objective(logp, entropy, rows):
        ratio = (logp - logp.detach()).exp()
        return weight[rows].to(logp) * (-ratio * advantage[rows].to(logp) - 0.01 * entropy)

    fused = kernel.FusedObjective(advantage, weight, entropy_coef=0.01)
    return (x, w, torch.randint(151_936, (1000,), device=DEVICE)), objective, fused


needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_bf16_at_the_real_size(real_size):
    (x, w, y), objective, fused = real_size
    gold = [torch.zeros((), device=DEVICE), torch.empty(x.shape, device=DEVICE), torch.zeros(w.shape, device=DEVICE)]
    plain = [t.clone() for t in gold]
    for rows in (slice(start, start + 125) for start in range(0, 1000, 125)):
        for found, dtype in ((gold, torch.float64), (plain, torch.float32)):
            if dtype == torch.float64:
                z = x[rows].double() @ w.double().T
            else:  # plain torch: fp32 logits of bf16 inputs, gradients through bf16 matmuls
                z = torch.mm(x[rows], w.T, out_dtype=dtype)
            logps = z.requires_grad_().log_softmax(-1)
            logp = logps.gather(1, y[rows, None])[:, 0]
            loss = objective(logp, -(logps.exp() * logps).sum(-1), rows).sum()
            (dz,) = torch.autograd.grad(loss, z)
            found[0] += loss.detach()
            if dtype == torch.float64:
                found[1][rows], dw = dz @ w.double(), dz.T @ x[rows].double()
            else:
                found[1][rows], dw = dz.bfloat16() @ w, torch.mm(dz.bfloat16().T, x[rows], out_dtype=dtype)
            found[2] += dw
            del z, logps, dz, dw
    plain[2] = plain[2].bfloat16()
    for form in (None, fused):
        ours = run((x, w, y), objective, fused=form, impl="triton")
        again = run((x, w, y), objective, fused=form, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        wanted = [t.cpu() for t in gold]
        limits = errors([t.cpu() for t in plain], wanted)
        assert all(a <= 2 * b + 1e-6 for a, b in zip(errors(ours, wanted), limits, strict=True))


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_chunk_makes_the_gradients_that_several_make(head_inputs, objective, impl, dtype):
    """It has no running sum of dW: that is one product, in backward, where the upstream gradient is known."""
    inputs = head_inputs(dtype=dtype)
    found = []
    for chunk_tokens in (0, 5):
        x, w = (t.detach().clone().requires_grad_() for t in inputs[:2])
        loss = kernel.linear_loss(x, w, inputs[2], objective, chunk_tokens=chunk_tokens, impl=impl)[0]
        (loss / 3).backward()
        found.append((x.grad.double(), w.grad.double()))
    limit = 1e-6 if dtype == torch.float32 else 2e-3
    assert all((a - b).norm() <= limit * b.norm() for a, b in zip(*found, strict=True))


def test_the_host_waits_for_no_value_of_another_device():
    """Meta tensors have none: to read one is an error."""
    hidden, weight = torch.empty(5, 4, device="meta"), torch.empty(7, 4, device="meta")
    target = torch.empty(5, dtype=torch.int64, device="meta")
    _head.check_head(hidden, weight, target, 1.0, (2, 3))
    assert _head.banned_ids((2, 3), target.device) is _head.banned_ids((2, 3), target.device)  # copied there once


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_needs_one_chunk_of_logits_beside_the_gradients_and_waits_for_none(real_size):
    (x, w, y), objective, fused = real_size
    banned = tuple(i for i in range(151_643, 151_700) if not (y == i).any())[:5]
    for form in (None, fused):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()

        def head(a=a, b=b, form=form):
            logps = logprob.linear_logprob(a, b, y, banned=banned, impl="triton")
            return logps, kernel.linear_loss(a, b, y, objective, fused=form, banned=banned, impl="triton")[0]

        head()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            made = head()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        gradients = a.numel() * 2 + b.numel() * 4
        assert torch.cuda.max_memory_allocated() - before - gradients <= 1.3e9  # a chunk of logits is 1.245e9
        del made


@pytest.mark.gpu
@needs_gpu
def test_offsets_beyond_32_bits():
    rows, vocab = 14_200, 151_936  # rows * vocab > 2^31
    z = torch.zeros(rows, vocab, device=DEVICE, dtype=torch.float16)
    z[:, 7] = torch.linspace(-3, 3, rows, device=DEVICE)
    y = torch.full((rows,), 7, device=DEVICE)
    gold = -torch.log1p((vocab - 1) * torch.exp(-z[:, 7].double()))
    stats = _rows.row_stats(z, y, 1.0, None)
    assert torch.allclose(stats[0].double(), gold, rtol=1e-5)
    one = torch.ones(rows, device=DEVICE)
    dz = _rows.row_dlogits(z, stats, y, one, torch.zeros_like(one), 1.0, torch.float16)
    assert torch.allclose(dz[:, 7].double(), 1 - gold.exp(), atol=1e-3)


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
