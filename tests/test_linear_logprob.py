"""The head's log-probs and entropies: equal to fp64 torch, however the tokens are cut and wherever the logits lie."""

import pytest
import torch

from nanolmmr1.kernels import _head
from nanolmmr1.kernels import linear_logprob as kernel

pytestmark = pytest.mark.usefixtures("poisoned_empty")
linear_logprob = kernel.linear_logprob


def error(ours, gold):
    return float(max((a.double() - b).abs().max() for a, b in zip(ours, gold, strict=True)))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 13, 0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("banned", [(), (100, 0, 98)])
def test_fp64_equals_plain_torch(head_inputs, plain_head, impl, chunk_tokens, temperature, banned):
    x, w, y = head_inputs()
    y = y.clamp(min=1)
    ours = linear_logprob(x, w, y, temperature=temperature, banned=banned, chunk_tokens=chunk_tokens, impl=impl)
    assert [t.dtype for t in ours] == [torch.float64] * 2
    assert error(ours, plain_head(x, w, y, temperature, banned)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [7, 0])
def test_lower_precision_errs_at_most_twice_as_much_as_torch(head_inputs, plain_head, dtype, chunk_tokens):
    x, w, y = head_inputs(70, 64, 1003, dtype)
    gold = plain_head(x.double(), w.double(), y, 0.7)
    ours = linear_logprob(x, w, y, temperature=0.7, chunk_tokens=chunk_tokens)
    assert [t.dtype for t in ours] == [torch.float32] * 2
    assert error(ours, gold) <= 2 * error(plain_head(x, w, y, 0.7), gold) + 1e-6


def test_bf16_logits_are_never_rounded_to_bf16(head_inputs, plain_head):
    x, w, y = head_inputs(70, 64, 1003, torch.bfloat16)
    gold = plain_head(x.double(), w.double(), y)
    assert error(linear_logprob(x, w, y), gold) <= 1e-5 < 1e-3 < error(plain_head(x, w, y), gold)


@pytest.mark.parametrize("level", [-3e4, 3e4])
def test_logits_far_from_zero_lose_nothing(level):
    z = torch.tensor([[0.0, -1.0, 2.0], [0.5, 0.0, -4.0]])
    x, y = torch.cat([z, torch.full((2, 1), level)], 1), torch.tensor([2, 1])  # (N, V + 1)
    w = torch.cat([torch.eye(3), torch.ones(3, 1)], 1)  # logits = z + level
    gold = (x @ w.T).double().log_softmax(-1)
    logp, entropy = linear_logprob(x, w, y)
    assert error((logp,), (gold.gather(1, y[:, None])[:, 0],)) <= 1e-6
    assert error((entropy,), (-(gold.exp() * gold).sum(-1),)) <= 1e-6


def test_a_certain_token_keeps_the_digits_of_its_log_prob():
    gap = torch.tensor([5.0, 14.0, 30.0, 80.0])  # z_0 = gap, the other logits 0
    logp, entropy = linear_logprob(gap[:, None], torch.eye(3)[:, :1], torch.zeros(4, dtype=torch.int64))
    gold = -torch.log1p(2 * torch.exp(-gap.double()))
    assert ((logp - gold).abs() <= 1e-6 * gold.abs()).all()
    assert (logp[:3] < 0).all() and (entropy >= 0).all() and not logp.isnan().any()


def test_a_banned_id_leaves_the_distribution_even_as_the_largest_logit(head_inputs, plain_head):
    x, w, y = head_inputs(dtype=torch.float32)
    w[99] = 1e4 * x[0]
    gold = plain_head(x.double(), w.double(), y, banned=(99,))
    assert error(linear_logprob(x, w, y, banned=(99,)), gold) <= 1e-5


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(head_inputs, plain_head, tokens):
    x, w, y = head_inputs(tokens)
    ours = linear_logprob(x, w, y)
    assert [t.shape for t in ours] == [(tokens,)] * 2
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ours, plain_head(x, w, y), strict=True))


def test_nothing_is_kept_for_a_gradient(head_inputs):
    x, w, y = head_inputs()
    for impl in ("chunked", "reference"):
        outputs = linear_logprob(x.requires_grad_(), w.requires_grad_(), y, impl=impl)
        assert not any(t.requires_grad for t in outputs)


def test_inputs_are_left_as_they_were(head_inputs):
    inputs = head_inputs()
    before = [t.clone() for t in inputs]
    linear_logprob(*inputs, temperature=0.7, banned=(99,))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(("elements", "sizes"), [(101 * 40, [30, 30, 30]), (101 * 89, [45, 45]), (0, [15] * 6)])
def test_automatic_chunks_fit_their_buffer_and_are_even(head_inputs, monkeypatch, elements, sizes):
    monkeypatch.setitem(_head.CHUNK_ELEMENTS, "cpu", elements)
    x, w, _ = head_inputs(90)
    parts = _head.chunks(x, w, 0)
    assert [part.stop - part.start for part in parts] == sizes
    assert torch.equal(torch.cat([torch.arange(90)[part] for part in parts]), torch.arange(90))


def test_wrong_use_is_refused(head_fault):
    arguments, words = head_fault
    with pytest.raises(ValueError, match=words):
        linear_logprob(**arguments)


def test_a_sharded_weight_is_refused(sharded_weight):
    with pytest.raises(ValueError, match="full_tensor"):
        linear_logprob(torch.zeros(5, 4), sharded_weight, torch.arange(5))
