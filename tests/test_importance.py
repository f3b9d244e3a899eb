"""Importance weights against another engine's sampler: each mode against its definition, token by token in Python, and
the same step whatever the route that computes them: known beforehand, in the head's chunks, or after a second pass.
"""

import itertools
import math

import pytest
import torch
from small import small_model, small_trainer
from test_objective import close, losses_and_grads, make_tokens, random_pack, recipe, vec

from nanolmmr1.schema import ALGORITHMS
from nanolmmr1.update import objective as ob
from nanolmmr1.update import policy
from nanolmmr1.update.pack import pack_groups

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
RESPONSES = (5, 6, 13, 21, 24)  # where the responses of the packs begin, but for the first
RANGES = [(0.0, 1.3), (0.8, 1.3)]  # tis_floor, tis_cap: both ends are passed by tokens and by responses of the packs


def defined_weights(old, sampler, response, mode, floor, cap):
    """The definition in plain numbers: one weight a token."""
    old, sampler, response = old.tolist(), sampler.tolist(), response.tolist()
    weights = []
    for t, own in enumerate(response):
        members = [t] if mode.startswith("token") else [s for s, other in enumerate(response) if other == own]
        ratio = math.exp(sum(old[s] - sampler[s] for s in members))
        if mode.endswith("mask"):
            weights.append(ratio if floor <= ratio <= cap else 0.0)
        else:
            weights.append(min(max(ratio, floor), cap))
    return torch.tensor(weights, dtype=torch.float64)


def mild_pack(old):
    """Tokens whose weights, and whose responses' weights, lie on both sides of RANGES; with or without old_logp."""
    logp, entropy, tokens = random_pack((5, 1, 7, 8, 3, 6))
    tokens.sampler_logp = (tokens.old_logp if old else logp) + 0.6 * (tokens.sampler_logp - logp)
    tokens.old_logp = tokens.old_logp if old else None
    return logp, entropy, tokens


every_mode = pytest.mark.parametrize("mode", MODES)
every_range = pytest.mark.parametrize("floor, cap", RANGES)


@every_mode
@every_range
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("old", [True, False])
def test_losses_and_gradients_are_those_of_weighted_advantages(mode, floor, cap, algorithm, old):
    logp, entropy, tokens = mild_pack(old)
    keys = dict(kl_coef=0.1, entropy_coef=0.01, kl_estimator="k2", clip_ratio_dual=1.6)
    weights = defined_weights(tokens.old_logp if old else logp, tokens.sampler_logp, tokens.response, mode, floor, cap)
    assert ((weights == 0).any() if "mask" in mode else (weights == cap).any()) and len(weights.unique()) > 2
    assert not floor or (weights == (0 if "mask" in mode else floor)).any()
    objective = recipe(algorithm, tis_mode=mode, tis_floor=floor, tis_cap=cap, **keys)
    got = losses_and_grads(logp, entropy, tokens, objective)
    tokens.advantage = weights * tokens.advantage
    for one, other in zip(got, losses_and_grads(logp, entropy, tokens, recipe(algorithm, **keys)), strict=True):
        close(one, other)


@every_mode
def test_on_policy_the_gradient_is_the_weighted_advantage(mode):
    logp, entropy, tokens = mild_pack(old=False)
    weights = defined_weights(logp, tokens.sampler_logp, tokens.response, mode, 0.8, 1.3)
    grad = losses_and_grads(logp, entropy, tokens, recipe(tis_mode=mode, tis_floor=0.8, tis_cap=1.3))[1]
    close(grad, -tokens.weight * weights * tokens.advantage)


@every_mode
@pytest.mark.parametrize("algorithm", ["grpo", "cispo"])
def test_gradients_match_finite_differences(mode, algorithm):
    logp, entropy, tokens = mild_pack(old=True)
    if algorithm == "cispo":
        tokens.old_logp, tokens.sampler_logp = logp - 1, tokens.sampler_logp + logp - 1 - tokens.old_logp
    objective = recipe(algorithm, kl_coef=0.3, entropy_coef=0.2, tis_mode=mode, tis_floor=0.8, tis_cap=1.3)

    def total(logp, entropy):
        return ob.policy_loss(logp, entropy, tokens, objective).sum()
    assert torch.autograd.gradcheck(total, (logp.requires_grad_(), entropy.requires_grad_()))


@pytest.mark.parametrize("mode, floor, want", [
    ("token_truncate", 0.0, (0.5, 1.6, 2.0, 1.5, 0.4)), ("token_truncate", 0.6, (0.6, 1.6, 2.0, 1.5, 0.6)),
    ("token_mask", 0.0, (0.5, 1.6, 0.0, 1.5, 0.4)), ("token_mask", 0.6, (0.0, 1.6, 0.0, 1.5, 0.0)),
    # The products are 0.8, 9 and 0.6.
    ("sequence_truncate", 0.0, (0.8, 0.8, 2.0, 0.6, 0.6)), ("sequence_truncate", 0.7, (0.8, 0.8, 2.0, 0.7, 0.7)),
    ("sequence_mask", 0.0, (0.8, 0.8, 0.0, 0.6, 0.6)), ("sequence_mask", 0.7, (0.8, 0.8, 0.0, 0.0, 0.0))])
def test_weights_by_hand(mode, floor, want):
    objective, old = recipe(tis_mode=mode, tis_floor=floor, tis_cap=2.0), vec(-1, -1, -1, -1, -1)
    sampler, response = old - vec(0.5, 1.6, 9.0, 1.5, 0.4).log(), torch.tensor([0, 0, 1, 2, 2])
    close(ob.importance_weights(ob.importance_ratio(old, sampler, response, objective), objective), vec(*want))
    # Both ends belong to the range.
    assert torch.equal(ob.importance_weights(vec(floor, 2.0), objective), vec(floor, 2.0))
    assert ob.importance_weights(vec(math.nan), objective).isnan()  # a broken step must be seen to be broken


@every_mode
def test_a_sampler_far_away_gives_the_cap_or_nothing_and_never_infinity(mode):
    logp = torch.full((3,), -0.5)
    tokens = make_tokens(torch.ones(3), response=[0, 0, 0], sampler=torch.tensor([-1e4, -300.0, -200.0]))
    loss, grad, _ = losses_and_grads(logp, logp, tokens, recipe(tis_mode=mode, tis_cap=2.0))
    assert grad.tolist() == loss.tolist() == ([-2.0] * 3 if "truncate" in mode else [0.0] * 3)


def test_response_weights_are_unbiased_by_enumeration_and_token_weights_are_not():
    """Two tokens drawn one after the other, of a policy that differs from its sampler at each."""
    first, second = vec(0.4, -0.3).requires_grad_(), torch.tensor([[0.2, -0.5], [1.0, 0.3]]).double().requires_grad_()
    sampler = vec(-0.2, 0.5).log_softmax(0), torch.tensor([[0.6, 0.1], [-0.4, 0.2]]).double().log_softmax(1)
    reward, pairs = torch.tensor([[1.0, -0.7], [0.3, 2.0]]).double(), list(itertools.product(range(2), repeat=2))

    def logp(model, a, b):
        return torch.stack([model[0][a], model[1][a, b]])

    model = first.log_softmax(0), second.log_softmax(1)
    value = sum(reward[a, b] * logp(model, a, b).sum().exp() for a, b in pairs)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(value, (first, second), retain_graph=True)])
    for mode in ("token_truncate", "sequence_truncate"):
        loss = 0
        for a, b in pairs:
            drawn = logp(sampler, a, b)
            tokens = make_tokens(reward[a, b].expand(2), sampler=drawn)
            losses = ob.policy_loss(logp(model, a, b), torch.zeros(2), tokens, recipe(tis_mode=mode, tis_cap=1e9))
            loss = loss + drawn.sum().exp() * losses.sum()
        got = -torch.cat([g.flatten() for g in torch.autograd.grad(loss, (first, second), retain_graph=True)])
        assert torch.allclose(got, want) == (mode == "sequence_truncate")


@every_mode
def test_chunks_add_up_but_for_weights_of_whole_responses_that_are_not_known_yet(mode):
    objective = recipe(tis_mode=mode, tis_floor=0.8, tis_cap=1.3, kl_coef=0.1)
    for old in (True, False):
        logp, entropy, tokens = mild_pack(old)
        whole = losses_and_grads(logp, entropy, tokens, objective)
        folded = ob.fold_importance(tokens, objective)
        assert ob.needs_whole_sequences(objective) == mode.startswith("sequence")
        assert ob.needs_whole_sequences(folded[1]) == (mode.startswith("sequence") and not old)
        for (told, rule), cuts in itertools.product(((tokens, objective), folded), (RESPONSES, range(1, 30))):
            slices = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, 30), strict=True)]
            parts = [losses_and_grads(logp[s], entropy[s], told[s], rule) for s in slices]
            joined = [torch.cat(vectors) for vectors in zip(*parts, strict=True)]
            same = all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(joined, whole, strict=True))
            assert same == (cuts is RESPONSES or not ob.needs_whole_sequences(rule))


@every_mode
def test_masked_tokens_keep_their_kl_and_entropy_and_are_not_counted_as_clipped(mode):
    logp, entropy, tokens = mild_pack(old=True)
    objective = recipe(tis_mode=mode, tis_floor=0.8, tis_cap=1.3, kl_coef=0.1, entropy_coef=0.5, clip_ratio_high=0.01)
    weights = defined_weights(tokens.old_logp, tokens.sampler_logp, tokens.response, mode, 0.8, 1.3)
    _, grad, by_entropy = losses_and_grads(logp, entropy, tokens, objective)
    close(by_entropy, -0.5 * tokens.weight)
    kl = tokens.weight * 0.1 * -torch.expm1(tokens.ref_logp - logp)  # of k3
    silent = torch.isclose(grad, kl, rtol=1e-9, atol=1e-15)
    stats = ob.policy_stats(logp, entropy, tokens, objective)
    clipped = stats["clipfrac_higher"] + stats["clipfrac_lower"]
    assert clipped > 0 and silent.sum() == clipped + (weights == 0).sum()
    assert (weights == 0).any() == ("mask" in mode)


def test_the_row_kernel_is_given_a_loss_that_it_knows_or_none():
    for mode, floor, old in itertools.product(MODES, (0.0, 0.8), (True, False)):
        _, _, tokens = mild_pack(old)
        tokens, objective = ob.fold_importance(tokens, recipe(tis_mode=mode, tis_floor=floor, tis_cap=1.3))
        fused = policy.fused_objective(tokens, objective)
        assert (fused is not None) == (old or (mode, floor) == ("token_truncate", 0.0))
        assert fused is None or fused.tis_cap == (0.0 if old else 1.3)


def mismatched_trainer(folder, objective, **changes):
    """A trainer whose sampler reports log-probs that are off by up to 0.3."""
    trainer = small_trainer(folder, objective=objective, optim={"eps": 1.0, "max_grad_norm": 1e9},
                            rollout={"max_mismatch": 0.0}, **changes)  # weights are for samplers that stray
    generate = trainer.sampler.generate

    def blurred(*args, **callbacks):
        groups = generate(*args, **callbacks)
        for response in (r for group in groups for r in group.responses):
            response.logp = response.logp + 0.3 * torch.sin(response.ids.float() * 7)
        return groups

    trainer.sampler.generate = blurred
    return trainer


def moved(trainer):
    """The step's record, and how every weight was changed by it."""
    before = [p.detach().clone() for p in trainer.policy.model.parameters()]
    record = trainer.step()
    return record, torch.cat([(p.detach() - b).flatten() for p, b in zip(trainer.policy.model.parameters(), before,
                                                                         strict=True)])


def options(mode, updates, floor=0.8, **pack):
    return dict(objective=dict(tis_mode=mode, tis_floor=floor, tis_cap=1.3),
                phase={"lr": 1.0, "updates_per_rollout": updates, "prompts_per_step": 2}, pack=pack)


@every_mode
def test_a_step_weighs_and_reports_as_defined(tmp_path, mode):
    trainer = mismatched_trainer(tmp_path, **options(mode, 1, tokens_per_micro_batch=45))
    record, groups = trainer.step(), trainer.sampler.groups
    assert record["pack/micro_batches"] > 1
    trainer.policy.model.load_state_dict(small_model().state_dict())
    (pack,), _ = pack_groups(groups, 1 << 20)
    ours = trainer.policy.logprobs(pack, 1.0)[0].double()
    sampler = torch.cat([r.logp for group in groups for r in group.responses]).double()
    lengths = torch.tensor([len(r.ids) for group in groups for r in group.responses])
    response = torch.repeat_interleave(lengths)
    weights = defined_weights(ours, sampler, response, mode, 0.8, 1.3)
    advantage = torch.cat([ob.group_advantages(torch.tensor(group.rewards), "grpo") for group in groups])
    share = 1 / (len(lengths) * lengths.double())[response]
    gap, raw = ours - sampler, defined_weights(ours, sampler, response, mode.replace("mask", "truncate"), 0, 1e9)
    want = {
        "actor/pg_loss": -(share * weights * advantage[response]).sum(),
        "mismatch/kl": (gap.exp() - 1 - gap).mean(),
        "mismatch/logp_abs": gap.abs().mean(),
        "mismatch/logp_abs_max": gap.abs().max(),
        "mismatch/tis_mean": weights.mean(),
        "mismatch/tis_frac_high": (raw > 1.3).double().mean(),
        "mismatch/tis_frac_low": (raw < 0.8).double().mean(),
        "mismatch/tis_eff_sample_size": weights.sum() ** 2 / (len(weights) * weights.square().sum()),
    }
    assert {name: record[name] for name in want} == pytest.approx({k: float(v) for k, v in want.items()}, rel=1e-4)
    assert record["mismatch/tis_frac_high"] > 0 < record["mismatch/tis_frac_low"]
    assert 0 < record["mismatch/tis_eff_sample_size"] < 1


@pytest.mark.parametrize("mode, floor", [*((mode, 0.8) for mode in MODES), ("token_truncate", 0.0)])
@pytest.mark.parametrize("updates", [1, 2])
def test_neither_packs_nor_chunks_nor_kernels_change_a_step(tmp_path, mode, floor, updates):
    gold, change = moved(mismatched_trainer(tmp_path / "gold", **options(mode, updates, floor)))
    assert change.abs().max() > 1e-3
    for pack in (dict(tokens_per_micro_batch=45), dict(tokens_per_micro_batch=12, head_chunk_tokens=3),
                 dict(head="triton", head_chunk_tokens=40)):
        record, other = moved(mismatched_trainer(tmp_path / "-".join(pack), **options(mode, updates, floor, **pack)))
        assert (other - change).norm() < 1e-4 * change.norm(), pack
        assert record["pack/micro_batches"] > gold["pack/micro_batches"] or pack.get("tokens_per_micro_batch") != 12
        for key in (key for key in gold if key.startswith(("mismatch", "actor"))):
            assert record[key] == pytest.approx(gold[key], rel=1e-3, abs=1e-6), (key, pack)


@every_mode
@pytest.mark.parametrize("updates", [1, 2])
def test_only_unknown_weights_of_whole_responses_cost_a_second_pass(tmp_path, monkeypatch, mode, updates):
    calls, head = [], policy.linear_loss

    def watched(*args, **kwargs):
        calls.append((kwargs["two_pass"], kwargs["fused"] is not None))
        return head(*args, **kwargs)

    monkeypatch.setattr(policy, "linear_loss", watched)
    mismatched_trainer(tmp_path, **options(mode, updates)).step()
    assert calls == [(updates == 1 and mode.startswith("sequence"), updates == 2)] * updates
