"""The loss against numbers worked out by hand, and each algorithm against the property it exists for.

"By enumeration" means that an expectation over samples is computed exactly, from every outcome and its probability.
"""

import itertools

import pytest
import torch

from nanolmmr1.config import resolve
from nanolmmr1.schema import ALGORITHMS, Objective, Phase, Recipe
from nanolmmr1.update import objective as ob


def recipe(algorithm="grpo", **keys):
    objective = Objective(algorithm=algorithm, **keys)
    resolve(Recipe(model="m", phases={"p": Phase(data="d", objective=objective)}))
    return objective


def vec(*values):
    return torch.tensor(values, dtype=torch.float64)


def make_tokens(advantage, weight=None, response=None, sampler=None, old=None, ref=None):
    response = torch.zeros(len(advantage), dtype=torch.int64) if response is None else torch.tensor(response)
    weight = torch.ones_like(advantage) if weight is None else weight
    sampler = torch.full_like(advantage, -1) if sampler is None else sampler
    return ob.Tokens(advantage, weight, response, sampler, old, ref)


def random_pack(lengths=(5, 1, 63, 8)):
    """A pack with non-trivial ratios, in order: logp, entropy, tokens."""
    response = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    noise = torch.randn(6, len(response), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logp, entropy, advantage = -noise[0].exp(), noise[1].exp(), noise[2][response]
    weight = ob.token_weights(torch.tensor(lengths), "sequence", 64).double()[response]
    old, sampler, ref = logp + 0.2 * noise[3], logp + 0.4 * noise[4], logp + 0.5 * noise[5]
    return logp, entropy, ob.Tokens(advantage, weight, response, sampler, old, ref)


def losses_and_grads(logp, entropy, tokens, objective):
    """Per-token losses, and the gradients of their sum, each (N,)."""
    logp, entropy = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
    losses = ob.policy_loss(logp, entropy, tokens, objective)
    return losses.detach(), *torch.autograd.grad(losses.sum(), (logp, entropy))


def at_ratio(ratio, advantage, objective, response=None):
    """Losses and d loss / d logp of tokens of weight 1 at given importance ratios."""
    logp = torch.full_like(ratio, -1.0)
    tokens = make_tokens(advantage, response=response, old=logp - ratio.log())
    return losses_and_grads(logp, torch.zeros_like(logp), tokens, objective)[:2]


def close(got, want, **kw):
    torch.testing.assert_close(got, want, **{"rtol": 1e-9, "atol": 1e-12} | kw)


def test_a_slice_of_tokens_slices_every_vector_and_keeps_none():
    part = ob.Tokens(vec(1, 2, 3), vec(4, 5, 6), torch.tensor([0, 1, 1]), vec(7, 8, 9), None, vec(-1, -2, -3))[1:]
    assert (part.advantage.tolist(), part.weight.tolist(), part.response.tolist()) == ([2, 3], [5, 6], [1, 1])
    assert (part.sampler_logp.tolist(), part.old_logp, part.ref_logp.tolist()) == ([8, 9], None, [-2, -3])


@pytest.mark.parametrize("estimator, want", [
    ("grpo", (1.1547005, -0.5773503, -0.5773503)), ("dr_grpo", (2, -1, -1)), ("rloo", (3, -1.5, -1.5)),
    ("reinforce_pp_baseline", (2, -1, -1))])
def test_group_advantages_by_hand(estimator, want):
    close(ob.group_advantages(vec(4, 1, 1), estimator), vec(*want), rtol=0, atol=2e-6)
    # The same group, with another one's responses between.
    got = ob.group_advantages(vec(4, 70, 1, 90, 1), estimator, torch.tensor([1, 0, 1, 0, 1]))
    close(got[[0, 2, 4]], vec(*want), rtol=0, atol=2e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
def test_equal_rewards_give_exactly_zero(estimator):
    # In fp32 the mean of seven times 0.1 is not 0.1.
    rewards, group = torch.tensor([0.1] * 7 + [-0.1] * 7 + [1, 0]), torch.tensor([0] * 7 + [1] * 7 + [2, 2])
    advantages = ob.group_advantages(rewards, estimator, group)
    assert (advantages[:14] == 0).all() and (advantages[14:] != 0).all()
    assert (ob.token_advantages(rewards[:14], group[:14], torch.arange(14), None, recipe(estimator)) == 0).all()


def test_grpo_ignores_the_scale_of_rewards_and_dr_grpo_keeps_it():
    rewards = vec(0, 0.5, 1.5, 1.0)
    close(ob.group_advantages(7 * rewards + 3, "grpo"), ob.group_advantages(rewards, "grpo"), rtol=1e-5)
    close(ob.group_advantages(7 * rewards + 3, "dr_grpo"), 7 * ob.group_advantages(rewards, "dr_grpo"))


def test_rloo_is_unbiased_by_enumeration_and_the_plain_mean_is_not():
    theta, reward, size = vec(0.3, -0.2, 0.9).requires_grad_(), vec(1.0, 0.2, -0.5), 3
    logp = theta.log_softmax(0)
    (want,) = torch.autograd.grad((logp.exp() * reward).sum(), theta, retain_graph=True)
    for estimator, factor in (("rloo", 1), ("dr_grpo", (size - 1) / size)):
        mean = 0
        for draw in map(list, itertools.product(range(3), repeat=size)):
            advantages = ob.group_advantages(reward[draw], estimator)
            mean = mean + logp[draw].sum().exp().detach() * (advantages * logp[draw]).mean()
        close(torch.autograd.grad(mean, theta, retain_graph=True)[0], factor * want)


def test_the_overlong_penalty_is_flat_then_linear_then_flat():
    lengths = torch.tensor([0, 60, 80, 85, 90, 100, 120])
    got = ob.overlong_penalty(lengths, max_length=100, buffer=20, penalty=0.5)
    close(got, torch.tensor([0, 0, 0, -0.125, -0.25, -0.5, -0.5]))
    assert (ob.overlong_penalty(lengths, 100, 0, 0.5) == 0).all()


@pytest.mark.parametrize("mode, want", [
    ("token", (1 / 8, 1 / 8, 1 / 8, 1 / 8)), ("sequence", (1 / 8, 1 / 4, 1 / 20, 1 / 4)),
    ("constant", (1 / 40, 1 / 40, 1 / 40, 1 / 40))])
def test_token_weights_by_hand_with_an_empty_response(mode, want):
    got = ob.token_weights(torch.tensor([2, 1, 5, 0]), mode, max_length=10)
    close(got[:3], torch.tensor(want[:3]))
    assert got[3].isfinite() and got.dtype == torch.float32
    assert ob.token_weights(torch.zeros(3, dtype=torch.int64), mode, 10).isfinite().all()


def test_averaging_modes_disagree_about_long_responses():
    lengths = torch.tensor([1, 3])
    for mode, want in dict(token=[0.25, 0.75], sequence=[0.5, 0.5], constant=[1 / 16, 3 / 16]).items():
        assert (lengths * ob.token_weights(lengths, mode, 8)).tolist() == want
    # No length bias: what a token weighs does not depend on how long its own or any other response is.
    assert ob.token_weights(torch.tensor([8, 2]), "constant", 8).unique().tolist() == [1 / 16]


KL, KL_RESPONSE, KL_GROUP = vec(1, 2, 3, 4), torch.tensor([0, 0, 1, 3]), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize("algorithm, keys, want", [
    # Rewards less KL are (5 - 1.5, 1 - 1.5) and, the third response being empty, (2, 2 - 2).
    ("rloo", dict(kl_place="reward"), (4, 4, -4, -2)),
    ("dr_grpo", dict(kl_place="reward"), (2, 2, -2, -1)),
    ("dr_grpo", dict(kl_place="loss"), (2, 2, -2, 0)),
    # r - mean = 2, -2, 0, 0; KL to go 1.5, 1, 1.5, 2; so 0.5, 1, -3.5, -2 with mean -1, variance 13.5 / 4.
    ("reinforce_pp_baseline", dict(kl_place="reward"), (0.8164966, 1.0886621, -1.3608276, -0.5443311)),
    # Without KL 2, 2, -2, 0 with mean 0.5, variance 11 / 4.
    ("reinforce_pp_baseline", dict(kl_place="loss"), (0.9045340, 0.9045340, -1.5075567, -0.3015113))])
def test_token_advantages_by_hand(algorithm, keys, want):
    objective = recipe(algorithm, kl_coef=0.5, kl_estimator="k1", **keys)
    got = ob.token_advantages(vec(5, 1, 2, 2), KL_GROUP, KL_RESPONSE, KL, objective)
    close(got, vec(*want), rtol=0, atol=2e-6)


def test_reinforce_pp_advantages_are_whitened_over_all_tokens_even_far_into_a_pack():
    objective = recipe("reinforce_pp_baseline", kl_coef=1.0, kl_place="reward", kl_estimator="k1")
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]).repeat(400), torch.arange(2000) // 4
    response, kl = torch.arange(200_000) // 100, torch.full((200_000,), 0.01)
    got = ob.token_advantages(rewards, group, response, kl, objective)
    assert got.dtype == torch.float32 and abs(got.mean()) < 1e-4 and abs(got.std() - 1) < 1e-4
    # Every response pays the same KL to go, 1.00 down to 0.01, wherever it lies.
    steps = got.view(-1, 100).diff(dim=1)
    assert (steps > 0).all() and steps.max() / steps.min() < 1.001


def test_a_kl_without_a_reference_and_a_response_without_a_group_are_refused():
    in_loss, in_reward = (recipe(kl_coef=0.5, kl_place=place, kl_estimator="k1") for place in ("loss", "reward"))
    with pytest.raises(AssertionError, match="reference"):
        ob.policy_loss(vec(-1), vec(0), make_tokens(vec(1)), in_loss)
    with pytest.raises(AssertionError, match="reference"):
        ob.token_advantages(vec(1, 0, 1, 1), KL_GROUP, KL_RESPONSE, None, in_reward)
    with pytest.raises(AssertionError, match="at least two"):
        ob.group_advantages(vec(1, 0, 1), "grpo", torch.tensor([0, 0, 1]))


def test_kl_penalty_by_hand_and_k3_is_never_negative():
    logp, ref = vec(-1, -3), vec(-2, -1)
    for estimator, want in dict(k1=(1, -2), k2=(0.5, 2), k3=(0.3678794412, 4.3890560989)).items():
        close(ob.kl_penalty(logp, ref, estimator), vec(*want), rtol=1e-9)
    near = torch.linspace(-1e-3, 1e-3, 4001)
    assert (ob.kl_penalty(near, torch.zeros_like(near), "k3") >= 0).all()


THETA, REF = vec(0.5, -1.0, 0.2, 1.1), vec(-0.3, 0.8, 0.1, -0.9).log_softmax(0)


def kl_gradient(of):
    """d/dtheta of `of(logp)`, where logp are the log-probs of a policy over four outcomes."""
    theta = THETA.clone().requires_grad_()
    return torch.autograd.grad(of(theta.log_softmax(0)), theta)[0]


def true_kl(logp):
    return (logp.exp() * (logp - REF)).sum()


def test_the_mean_and_the_mean_gradient_of_each_kl_estimator_by_enumeration():
    def mean(logp, estimator):
        return (logp.exp().detach() * ob.kl_penalty(logp, REF, estimator)).sum()
    k1, k2, k3 = (kl_gradient(lambda logp, e=e: mean(logp, e)) for e in ("k1", "k2", "k3"))
    close(k1, torch.zeros(4, dtype=torch.float64))
    close(k2, kl_gradient(true_kl))
    close(k3, kl_gradient(lambda logp: (REF.exp() * (REF - logp)).sum()))
    for estimator in ("k1", "k3"):
        close(mean(THETA.log_softmax(0), estimator), true_kl(THETA.log_softmax(0)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_ratio_makes_the_kl_gradient_unbiased_off_policy_by_enumeration(algorithm, estimator):
    old = vec(0.9, 0.1, -0.7, 0.2).log_softmax(0)
    tokens = make_tokens(torch.zeros(4, dtype=torch.float64), weight=old.exp(), old=old, ref=REF)
    for kl_ratio in (True, False):
        objective = recipe(algorithm, kl_coef=2.0, kl_estimator=estimator, kl_ratio=kl_ratio)
        got = kl_gradient(lambda logp, o=objective: ob.policy_loss(logp, torch.zeros_like(logp), tokens, o).sum())
        assert torch.allclose(got, 2 * kl_gradient(true_kl)) == kl_ratio


def test_the_clipped_surrogate_by_hand_and_as_the_papers_write_it():
    objective = recipe("grpo", clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_dual=3.0)
    ratio, advantage = vec(0.5, 1.2, 2.0, 0.5, 1.2, 2.0, 4.0), vec(2, 2, 2, -2, -2, -2, -2)
    loss, grad = at_ratio(ratio, advantage, objective)
    close(loss, vec(-1.0, -2.4, -2.6, 1.6, 2.4, 4.0, 6.0))
    close(grad, vec(-1.0, -2.4, 0, 0, 2.4, 4.0, 0))
    ratio, advantage = (v.reshape(-1) for v in torch.meshgrid(
        torch.linspace(0.05, 5, 34).double(), vec(-1.3, 0, 0.7), indexing="ij"))
    ppo = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)
    dual = torch.where(advantage < 0, torch.maximum(ppo, 3.0 * advantage), ppo)
    for clip_ratio_dual, paper in ((0.0, ppo), (3.0, dual)):
        objective.clip_ratio_dual = clip_ratio_dual
        close(at_ratio(ratio, advantage, objective)[0], -paper)


def test_dapo_clips_higher_so_that_a_rising_token_keeps_its_gradient():
    assert at_ratio(vec(1.25), vec(1), recipe("dapo"))[1].item() == pytest.approx(-1.25)
    assert at_ratio(vec(1.25), vec(1), recipe("grpo"))[1].item() == 0


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    bounded, free = (at_ratio(vec(1e4), vec(-1.0), recipe(clip_ratio_dual=c))[0].item() for c in (3.0, 0.0))
    assert (bounded, free) == (pytest.approx(3.0), pytest.approx(1e4))


def test_gspo_clips_whole_responses_and_treats_their_tokens_alike():
    objective, response = recipe("gspo", clip_ratio_low=0.1, clip_ratio_high=0.1), [0, 0, 0, 1, 1, 2]
    # Geometric means: 1.05 within the range, 1.2 above it, 0.8 below it but with nothing to gain there.
    ratio = vec(4.0, 0.25, 1.157625, 1.6, 0.9, 0.8)
    loss, grad = at_ratio(ratio, vec(2, 2, 2, 1, 1, 1), objective, response)
    close(loss, vec(-2.1, -2.1, -2.1, -1.1, -1.1, -0.8))
    close(grad, vec(-2.1, -2.1, -2.1, 0, 0, -0.8))
    assert ob.needs_whole_sequences(objective) and not ob.needs_whole_sequences(recipe("grpo"))


def test_cispo_clips_the_weight_of_a_token_and_never_its_gradient():
    ratio, advantage = vec(0.01, 1.1, 9.0, 0.01, 9.0), vec(1, 1, 1, -2, -2)
    loss, grad = at_ratio(ratio, advantage, recipe("cispo"))
    close(grad, vec(-0.01, -1.1, -1.28, 0.02, 2.56))
    close(loss, -grad)  # A log-prob of -1.
    close(at_ratio(ratio, advantage, recipe("cispo", clip_ratio_low=0.4))[1], vec(-0.6, -1.1, -1.28, 1.2, 2.56))


@pytest.mark.parametrize("old", [None, vec(-1, -1, -1)])
def test_truncated_importance_sampling_caps_the_weight_of_the_policy_term_only(old):
    sampler, logp = vec(-1, -1, -1) - vec(0.5, 1.5, 9.0).log(), vec(-1, -1, -1)
    tokens = make_tokens(vec(1, 1, -1), sampler=sampler, old=old, ref=vec(-2, -2, -2))
    objective = recipe("grpo", tis_cap=2.0, kl_coef=0.1, kl_estimator="k1")
    loss, grad, _ = losses_and_grads(logp, torch.zeros(3).double(), tokens, objective)
    close(grad, vec(-0.5, -1.5, 2.0) + 0.1)
    close(loss, vec(-0.5, -1.5, 2.0) + 0.1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_policy_the_gradient_is_exactly_minus_weight_times_advantage(algorithm):
    logp, entropy, tokens = random_pack()
    tokens.old_logp = None
    # A KL in the reward is in the advantage already.
    objective = recipe(algorithm, kl_coef=0.1, kl_place="reward", kl_estimator="k1")
    _, grad, _ = losses_and_grads(logp, entropy, tokens, objective)
    assert torch.equal(grad, -tokens.weight * tokens.advantage)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_step_raises_what_was_good_and_lowers_what_was_bad(algorithm):
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    before, tokens = logits.log_softmax(-1)[:, 2], make_tokens(vec(1, -1, 0.5, 0), response=[0, 1, 2, 3])
    ob.policy_loss(before, torch.zeros(4).double(), tokens, recipe(algorithm)).sum().backward()
    torch.optim.SGD([logits], lr=0.1).step()
    assert (logits.log_softmax(-1)[:, 2] - before).sign().tolist() == [1, -1, 1, 0]


def test_the_entropy_bonus_raises_entropy():
    logits, tokens = vec(2.0, 0.0, -1.0).requires_grad_(), make_tokens(vec(0), weight=vec(0.5))
    before = torch.distributions.Categorical(logits=logits).entropy()[None]
    loss = ob.policy_loss(logits.log_softmax(0)[:1], before, tokens, recipe(entropy_coef=0.1))
    close(loss, -0.05 * before)
    loss.sum().backward()
    torch.optim.SGD([logits], lr=1.0).step()
    assert torch.distributions.Categorical(logits=logits).entropy() > before


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_add_up_and_so_do_chunks_unless_a_loss_needs_whole_sequences(algorithm):
    logp, entropy, tokens = random_pack()
    objective = recipe(algorithm, kl_coef=0.1, kl_ratio=True, entropy_coef=0.01, tis_cap=2.0)

    def cut_at(*cuts):
        slices = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, len(logp)), strict=True)]
        parts = [(logp[s], entropy[s], tokens[s], objective) for s in slices]
        stats = [ob.policy_stats(*part) for part in parts]
        vectors = zip(*(losses_and_grads(*part) for part in parts), strict=True)
        return torch.cat([torch.cat(v) for v in vectors] + [sum(s[name] for s in stats)[None] for name in stats[0]])
    close(cut_at(5, 6, 69), cut_at())  # between responses
    assert torch.allclose(cut_at(10, 11, 40), cut_at(), rtol=1e-12) != ob.needs_whole_sequences(objective)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("estimator, kl_ratio", list(itertools.product(("k1", "k2", "k3"), (False, True))))
def test_gradients_match_finite_differences(algorithm, estimator, kl_ratio):
    logp, entropy, tokens = random_pack(lengths=(3, 1, 4))
    if algorithm == "cispo":
        tokens.old_logp = logp - 1  # beyond the clip: inside, finite differences see the stopped gradient
    if algorithm == "gspo":
        tokens.sampler_logp = tokens.old_logp - 0.3  # gspo spreads a response's gradient evenly, so must its weights
    objective = recipe(algorithm, kl_coef=0.3, kl_estimator=estimator, kl_ratio=kl_ratio, entropy_coef=0.2,
                       tis_cap=1.5, clip_ratio_dual=1.6)

    def total(logp, entropy):
        return ob.policy_loss(logp, entropy, tokens, objective).sum()
    assert torch.autograd.gradcheck(total, (logp.requires_grad_(), entropy.requires_grad_()))


def test_stats_by_hand():
    logp, ratio = vec(-1, -1, -1, -1, -1, -1), vec(1.5, 0.5, 4.0, 4.0, 0.5, 1.0)
    tokens = make_tokens(vec(1, -1, -1, 0, 0, 1), weight=torch.full((6,), 0.5).double(), old=logp - ratio.log(),
                         ref=logp - vec(0, 0, 0, 0, 2, 4))
    stats = ob.policy_stats(logp, vec(1, 2, 3, 4, 5, 6), tokens, recipe("grpo", clip_ratio_dual=3.0, kl_estimator="k2"))
    # The product of the ratios is 6.
    want = dict(tokens=6, pg_loss=0.5 * (-1.2 + 0.8 + 3 - 1), entropy=21, ppo_kl=-1.7917594692, clipfrac_higher=1,
                clipfrac_lower=1, clipfrac_dual=1, kl_loss=0.5 * (2 + 8))
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(want)
    tokens.ref_logp = None
    assert "kl_loss" not in ob.policy_stats(logp, logp, tokens, recipe("grpo"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stats_add_up_to_the_loss_and_count_the_tokens_that_clipping_silenced(algorithm):
    logp, entropy, tokens = random_pack()
    objective = recipe(algorithm, kl_coef=0.1, entropy_coef=0.01, tis_cap=2.0, clip_ratio_dual=1.2)
    stats = ob.policy_stats(logp.requires_grad_(), entropy, tokens, objective)
    assert not any(v.requires_grad or v.dim() for v in stats.values())
    loss = losses_and_grads(logp, entropy, tokens, objective)[0].sum()
    close(stats["pg_loss"] + 0.1 * stats["kl_loss"] - 0.01 * (tokens.weight * entropy).sum(), loss)
    objective.kl_coef = 0.0
    _, grad, _ = losses_and_grads(logp, entropy, tokens, objective)
    clipped = {side: stats[f"clipfrac_{side}"].item() for side in ("higher", "lower", "dual")}
    if algorithm == "cispo":
        assert (grad != 0).all() and clipped["higher"] > 0 and clipped["lower"] == clipped["dual"] == 0
    else:
        assert sum(clipped.values()) == (grad == 0).sum() > 0
