"""Stochastic rounding is unbiased and repeatable, and AdamW on top of it goes where fp32's goes."""

import math

import pytest
import ranks_optim
import torch
from ranks import results

from nanolmmr1.update import optim
from nanolmmr1.update.optim import StochasticAdamW, round_stochastically


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def neighbours(x):
    """The bf16 numbers around fp32 ones, as fp32: towards 0, and the next away from it."""
    bits = x.view(torch.int32) & -65536
    return bits.view(torch.float32), (bits + 65536).view(torch.float32)


@pytest.mark.parametrize("value", [1.0 + 2**-10, -1.0 - 2**-9, 3.14159, 1e-30, -7e20, 1e-40, 255.99])
def test_the_mean_of_many_roundings_is_the_value(value):
    count = 100_000
    x = torch.full((count,), value)
    rounded = round_stochastically(x, generator())
    assert rounded.dtype == torch.bfloat16
    low, high = (float(t[0]) for t in neighbours(x))
    assert set(rounded.double().tolist()) == {low, high}
    up = (float(x[0]) - low) / (high - low)  # the probability that makes the mean exact
    share = float((rounded.double() == high).double().mean())
    assert abs(share - up) <= 5 * math.sqrt(up * (1 - up) / count)  # five standard deviations


def test_what_bf16_holds_stays_as_it_is():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all 65,536
    rounded = round_stochastically(every.float(), generator())
    assert torch.equal(rounded.isnan(), every.isnan()) and int(every.isnan().sum()) == 254
    assert torch.equal(rounded[~every.isnan()].view(torch.int16), every[~every.isnan()].view(torch.int16))


def test_nan_of_any_bits_and_infinities_stay():
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF]).to(torch.int32).repeat_interleave(1000)
    assert round_stochastically(bits.view(torch.float32), generator()).isnan().all()
    infinite = torch.tensor([math.inf, -math.inf]).repeat_interleave(1000)
    assert torch.equal(round_stochastically(infinite, generator()).float(), infinite)


def test_a_carry_may_change_the_exponent():
    x = torch.full((1000,), 2.0 - 2**-8)
    assert set(round_stochastically(x, generator()).tolist()) == {2.0} | {2.0 - 2**-7}


def parameters(*sizes, seed=0):
    made = [torch.randn(size, generator=generator(seed + i)).bfloat16() for i, size in enumerate(sizes)]
    return [torch.nn.Parameter(p) for p in made]


def train(params, optimizer, steps, first=0):
    """Steps with gradients that follow from their number."""
    for step in range(first, first + steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator(1000 * step + i)).bfloat16()
        optimizer.step()


def test_a_step_lands_next_to_fp32s():
    ours, options = parameters((7, 30), (30,)), dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    exact = [torch.nn.Parameter(p.detach().float()) for p in ours]
    optimizer, other = StochasticAdamW(ours, **options), torch.optim.AdamW(exact, **options)
    for step in range(3):  # each from where ours stands, since roundings add up
        train(ours, optimizer, 1, step)
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.float()
        other.step()
        for p, q in zip(ours, exact, strict=True):
            pairs = [(p, q), *((optimizer.state[p][key], other.state[q][key]) for key in ("exp_avg", "exp_avg_sq"))]
            for rounded, gold in pairs:
                below, above = neighbours(gold.detach() * (1 - 1e-6)), neighbours(gold.detach() * (1 + 1e-6))
                edges = torch.stack([*below, *above])  # the last digits of fp32 may differ
                assert (rounded.float() >= edges.amin(0)).all() and (rounded.float() <= edges.amax(0)).all()
                gold.data.copy_(rounded)
    assert float(optimizer.state[ours[0]]["step"]) == 3


def test_small_steps_add_up_where_rounding_to_the_nearest_never_moves():
    count, steps, lr = 4096, 2000, 1e-6
    start = torch.ones(count)
    ours, exact = (torch.nn.Parameter(start.to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    nearest = start.bfloat16()
    options = dict(lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer, other = StochasticAdamW([ours], **options), torch.optim.AdamW([exact], **options)
    for _ in range(steps):
        before = exact.detach().clone()
        ours.grad, exact.grad = torch.ones_like(ours), torch.ones_like(exact)
        optimizer.step()
        other.step()
        nearest += (exact.detach() - before).bfloat16()
    moved, wanted = (float(p.detach().double().mean() - 1) for p in (ours, exact))
    assert abs(wanted + steps * lr) <= 0.02 * steps * lr  # 1e-6 is 16.8 of fp32's own steps here, so 17 are taken
    # Below 1 a step of bf16 is 2^-8. A weight takes one with probability lr / 2^-8 an update: the variance of its way
    # is at most steps * lr * 2^-8, that of the mean of all a `count`-th of it.
    deviation = math.sqrt(steps * lr * 2**-8 / count)
    assert abs(moved - wanted) <= 5 * deviation < 0.2 * abs(wanted)
    assert (nearest == 1).all()


def test_bits_repeat_and_differ_between_steps_seeds_and_parameters():
    def moves(seed=0):
        """Three updates of two parameters, each from 1 by the same small step."""
        found = []
        pair = [torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = StochasticAdamW(pair, lr=2**-9, betas=(0.0, 0.0), weight_decay=0.0, seed=seed)
        for _ in range(3):
            for p in pair:
                p.data.fill_(1)
                p.grad = torch.ones_like(p)
            optimizer.step()
            found += [p.detach().clone() for p in pair]
        return found

    first, again, other = moves(), moves(), moves(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    drawn = [*first, *other]
    assert all(len(set(t.tolist())) == 2 for t in drawn)
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit():
    whole = parameters((5, 40), (40,))
    optimizer = StochasticAdamW([{"params": whole[:1], "weight_decay": 0.1}, {"params": whole[1:]}], lr=0.01, seed=3)
    train(whole, optimizer, 3)
    saved, state = [p.detach().clone() for p in whole], optimizer.state_dict()
    state = {**state, "state": {i: {k: t.clone() for k, t in s.items()} for i, s in state["state"].items()}}
    train(whole, optimizer, 3, first=3)

    resumed = [torch.nn.Parameter(p) for p in saved]
    other = StochasticAdamW([{"params": resumed[:1]}, {"params": resumed[1:]}], seed=3)
    other.load_state_dict(state)
    train(resumed, other, 3, first=3)
    for p, q in zip(whole, resumed, strict=True):
        assert torch.equal(p, q)
        assert {k: t.dtype for k, t in other.state[q].items()} == {k: t.dtype for k, t in optimizer.state[p].items()}
        assert all(torch.equal(optimizer.state[p][k], other.state[q][k]) for k in other.state[q])


def test_state_looks_like_adamws():
    ours, theirs = parameters((3, 4)), parameters((3, 4))
    optimizers = StochasticAdamW(ours), torch.optim.AdamW(theirs)
    for params, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(params, optimizer, 1)
    states = [list(optimizer.state.values()) for optimizer in optimizers]
    mine, its = ({key: (t.shape, t.dtype) for key, t in state.items()} for (state,) in states)
    assert mine == its
    assert StochasticAdamW(ours).defaults.items() <= torch.optim.AdamW(theirs).defaults.items()


def test_a_tensor_larger_than_a_slice_is_stepped_whole_and_in_little_memory(monkeypatch):
    monkeypatch.setattr(optim, "SLICE", 7)
    largest, make = [], optim.round_stochastically
    monkeypatch.setattr(optim, "round_stochastically", lambda x, g: largest.append(x.numel()) or make(x, g))
    (p,) = parameters((5, 6))
    before = p.detach().clone()
    train([p], StochasticAdamW([p], lr=0.5, weight_decay=0.0), 1)
    assert (p != before).all() and max(largest) == 7 and sum(largest) == 3 * 30


def test_parameters_without_a_gradient_and_without_elements():
    kept, empty = parameters(4, 0)
    before = kept.detach().clone()
    empty.grad = torch.zeros_like(empty)
    optimizer = StochasticAdamW([kept, empty], lr=1.0)
    assert optimizer.step(lambda: 5) == 5
    assert torch.equal(kept, before) and kept not in optimizer.state


def test_parameters_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\) is torch.float32.*bfloat16"):
        StochasticAdamW([torch.nn.Parameter(torch.zeros(3, 4))])


def test_shards_follow_the_same_rule_with_bits_of_their_own_and_replicas_stay_equal():
    ranks = results(2, ranks_optim.__file__)
    assert ranks == [{claim: True for claim in claims} for claims in ranks]
