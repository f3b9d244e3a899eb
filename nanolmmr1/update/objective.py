"""What is optimised: advantages, KL estimators and the GRPO family, on plain per-token vectors.

This is the only definition of the loss; every kernel and backend must agree with it. A pack's scored response tokens
lie on one flat axis of N, and the loss of an optimiser step is `sum_t weight_t * l_t`. All averaging is in `weight`,
whose denominator is counted once over the whole step, so any cut into micro-batches or ranks adds up to the same
gradient. `objective` is always a resolved `schema.Objective`.

Next: policy.py, which differentiates this.
"""

from dataclasses import dataclass, replace

import torch

EPS = 1e-6  # added to standard deviations


@dataclass
class Tokens:
    """What the loss knows about the scored tokens of one pack, besides the policy's log-probs and entropies.

    Tokens of a response are contiguous, and responses lie in order. Log-probs are of the sampled token, in nats, at
    the sampling temperature. A slice of a `Tokens` is a `Tokens`.
    """

    advantage: torch.Tensor  # (N,) fp32
    weight: torch.Tensor  # (N,) fp32, averaging mode and global denominator folded in
    response: torch.Tensor  # (N,) int64, which response of the pack, 0..R-1
    sampler_logp: torch.Tensor  # (N,) fp32, as the sampler reported them
    old_logp: torch.Tensor | None = None  # (N,) fp32, before the rollout's first update; None: this is that update
    ref_logp: torch.Tensor | None = None  # (N,) fp32, the reference; None: none is kept

    def __getitem__(self, part):
        return Tokens(*(None if vector is None else vector[part] for vector in vars(self).values()))


def group_advantages(rewards, estimator, group=None):
    """How much better each response did than its group; exactly 0 where the group's rewards are all equal.

    grpo                   (r - mean) / (std + 1e-6), std unbiased    (DeepSeekMath, arXiv 2402.03300)
    dr_grpo                r - mean                                   (Dr. GRPO, arXiv 2503.20783)
    rloo                   r - mean of the others                     (RLOO, arXiv 2402.14740)
    reinforce_pp_baseline  r - mean, to be whitened over all tokens   (REINFORCE++, arXiv 2501.03262)

    rewards (R,) float; group (R,) int64, the group of each response, None: all are one group. Returns (R,).
    """
    if group is None:
        group = torch.zeros_like(rewards, dtype=torch.int64)
    count = torch.bincount(group)  # (groups,)
    assert (count[group] > 1).all(), "an advantage compares at least two responses"
    # A shift changes no advantage. Measured from the group's best, equal rewards are 0, where their mean would leave
    # a rounding error that division by std + 1e-6 blows up into a signal.
    best = rewards.new_zeros(len(count)).scatter_reduce(0, group, rewards, "amax", include_self=False)
    rewards = rewards - best[group]
    centred = rewards - (_sum_by(group, rewards, len(count)) / count)[group]  # (R,)
    if estimator == "grpo":
        variance = _sum_by(group, centred.square(), len(count)) / (count - 1)
        return centred / (variance.sqrt()[group] + EPS)
    if estimator == "rloo":
        return centred * (count / (count - 1))[group]
    assert estimator in ("dr_grpo", "reinforce_pp_baseline"), estimator
    return centred


def overlong_penalty(lengths, max_length, buffer, penalty):
    """DAPO's soft overlong punishment, to be added to the rewards (arXiv 2503.14476, eq. 13).

    0 up to `max_length - buffer` tokens, then linear down to `-penalty` at `max_length`; buffer 0: none.
    lengths (R,) int64, in tokens. Returns (R,) fp32.
    """
    excess = (lengths - (max_length - buffer)).float()
    return -penalty * (excess / buffer).clamp(0, 1) if buffer else torch.zeros_like(excess)


def token_advantages(rewards, group, response, kl, objective):
    """The advantage of every scored token, KL in the reward included.

    The group estimators charge a response for all its KL, `r_i - beta * sum_t kl_t`, before responses are compared,
    and give its tokens one advantage. REINFORCE++ with baseline charges a token for the KL from there on,
    `r_i - mean - beta * sum_{s>=t} kl_s`, then whitens over all tokens given, so give it the whole rollout batch.

    rewards (R,) float, after penalties; group (R,) int64; response (N,) int64, as in `Tokens`; kl (N,)
    k1 = old_logp - ref_logp, or None, read only when the KL is in the reward. Returns (N,) of rewards' dtype.
    """
    cost = torch.zeros_like(response, dtype=torch.float64)  # (N,)
    if objective.kl_coef and objective.kl_place == "reward":
        assert kl is not None, "KL in the reward needs the reference's log-probs"
        cost = objective.kl_coef * kl.double()  # running sums over a million tokens are subtracted below
    total = _sum_by(response, cost, len(rewards))  # (R,)
    if objective.adv_estimator != "reinforce_pp_baseline":
        return group_advantages(rewards - total, objective.adv_estimator, group)[response].to(rewards.dtype)
    # What is spent by the end of the token's response, less what was spent before the token.
    to_go = total.cumsum(0)[response] - (cost.cumsum(0) - cost)  # (N,)
    advantage = group_advantages(rewards, objective.adv_estimator, group)[response] - to_go
    return ((advantage - advantage.mean()) / (advantage.std(correction=0) + EPS)).to(rewards.dtype)


def token_weights(lengths, mode, max_length):
    """The weight that every token of a response carries in the loss.

    token     1 / sum_i len_i       every token counts the same                (DAPO, arXiv 2503.14476)
    sequence  1 / (R * len_i)       every response counts the same             (GRPO, arXiv 2402.03300)
    constant  1 / (R * max_length)  every token counts the same in all steps   (Dr. GRPO, arXiv 2503.20783)

    lengths (R,) int64: of ALL responses of the optimiser step, over micro-batches and ranks; empty ones count in R.
    Returns (R,) fp32.
    """
    denominator = {
        "token": lengths.sum().expand_as(lengths),
        "sequence": len(lengths) * lengths,
        "constant": torch.full_like(lengths, len(lengths) * max_length),
    }[mode]
    # An empty response has no token to weigh, but an infinite weight would make NaN of the first 0 it meets.
    return 1 / denominator.clamp(min=1).float()


def kl_penalty(logp, ref_logp, estimator):
    """Estimates of KL(policy || reference), (N,), at tokens that the policy sampled.

    With x = logp - ref_logp: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x (Schulman, joschu.net/blog/kl-approx.html).
    The mean of k1 and k3 is the KL. As a loss, only the mean gradient of k2 is the KL's (arXiv 2510.01555): that of k1
    is 0, that of k3 belongs to KL(reference || policy). Under the importance ratio k1 and k3 become right.
    """
    x = logp - ref_logp  # (N,)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x.square() / 2
    assert estimator == "k3", estimator
    return torch.expm1(-x) + x


def importance_ratio(old_logp, sampler_logp, response, objective):
    """Probability under the policy over probability under the sampler, (N,): the token's, or its response's.

    A response's is the product of its tokens', the exact weight of an expectation over responses, whose variance grows
    with their length; a token's ignores what came before it (Liu, Li et al., 2025, richardli.xyz/rl-collapse).
    """
    log_ratio = old_logp - sampler_logp  # (N,)
    if objective.tis_mode.startswith("sequence"):
        log_ratio = _sum_by(response, log_ratio, len(torch.bincount(response)))[response]
    return log_ratio.exp()


def importance_weights(ratio, objective):
    """What a token's surrogate is multiplied by, (N,), given its `importance_ratio`.

    truncate  clip(ratio, tis_floor, tis_cap)               (Yao et al., 2025, fengyao.notion.site/off-policy-rl)
    mask      ratio inside [tis_floor, tis_cap], else 0     (IcePop, arXiv 2510.18855)

    A masked token still counts in the averages, and keeps its KL and entropy.
    """
    low, high = objective.tis_floor, objective.tis_cap
    if objective.tis_mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0, ratio)  # NaN stays NaN


def fold_importance(tokens, objective):
    """The same loss as (tokens, objective) with the importance weights in the advantage, where that can be done.

    With `old_logp` they are constants, and not negative; the surrogate is linear in an advantage of given sign. So
    nothing that cuts `tokens` afterwards, or evaluates the loss elsewhere, need know of them. Without `old_logp` they
    are the current policy's and stay. tokens: whole responses.
    """
    if tokens.old_logp is None or not objective.tis_cap:
        return tokens, objective
    advantage = _importance(tokens.old_logp, tokens, objective) * tokens.advantage  # (N,)
    return replace(tokens, advantage=advantage), replace(objective, tis_cap=0.0)


def needs_whole_sequences(objective):
    """Whether a token's loss reads its whole response, so that `Tokens` may be cut between responses only."""
    return objective.loss_type == "gspo" or bool(objective.tis_cap) and objective.tis_mode.startswith("sequence")


def policy_loss(logp, entropy, tokens, objective):
    """Weighted per-token losses, (N,), whose sum is the loss; differentiable in logp and entropy.

    weight_t * (-importance_t * surrogate_t + kl_coef * kl_t - entropy_coef * entropy_t)

    logp (N,) fp32: of the sampled tokens under the policy; entropy (N,) fp32: of its distribution there. Nats.
    """
    loss = _policy_term(logp, tokens, objective) - objective.entropy_coef * entropy
    if objective.kl_coef and objective.kl_place == "loss":
        assert tokens.ref_logp is not None, "KL in the loss needs the reference's log-probs"
        loss = loss + objective.kl_coef * _kl_term(logp, tokens, objective)
    return tokens.weight * loss


@torch.no_grad()
def policy_stats(logp, entropy, tokens, objective):
    """Name -> 0-d sum over tokens, so that chunks, micro-batches and ranks add up.

    `pg_loss` and `kl_loss` are weighted, so their sum over a step is a mean; divide the others by `tokens`. `kl_loss`
    leaves kl_coef out, and is absent without a reference. `clipfrac_*` count tokens whose gradient the clip removed,
    or, for cispo, whose importance weight it changed.
    """
    tokens, objective = fold_importance(tokens, objective)  # what a mask removed, the clip did not
    ratio, advantage = _ratio(logp, tokens, objective), tokens.advantage
    clipped = _clip(ratio, advantage, objective)
    lower, upper = (clipped > ratio) & (advantage != 0), (clipped < ratio) & (advantage != 0)
    dual = upper & (advantage < 0) & (objective.loss_type != "cispo")
    stats = {
        "tokens": torch.ones_like(logp),
        "pg_loss": tokens.weight * _policy_term(logp, tokens, objective),
        "entropy": entropy,
        "ppo_kl": _old(logp, tokens) - logp,
        "clipfrac_higher": upper & ~dual,
        "clipfrac_lower": lower,
        "clipfrac_dual": dual,
    }
    if tokens.ref_logp is not None:
        stats["kl_loss"] = tokens.weight * _kl_term(logp, tokens, objective)
    return {name: values.sum(dtype=logp.dtype) for name, values in stats.items()}


def _policy_term(logp, tokens, objective):
    """Minus the surrogate, (N,): clip(ratio) * A, or for cispo sg[clip(ratio) * A] * logp."""
    surrogate = _clip(_ratio(logp, tokens, objective), tokens.advantage, objective) * tokens.advantage
    if objective.loss_type == "cispo":
        # A clipped token is held in weight but keeps its gradient (MiniMax-M1, arXiv 2506.13585).
        surrogate = surrogate.detach() * logp
    if objective.tis_cap:
        # Another engine's tokens are off-policy even when fresh.
        surrogate = surrogate * _importance(logp, tokens, objective)
    return -surrogate


def _kl_term(logp, tokens, objective):
    """KL estimate, (N,), with kl_ratio times the importance ratio (DeepSeek-V3.2, arXiv 2512.02556)."""
    kl = kl_penalty(logp, tokens.ref_logp, objective.kl_estimator)
    # The token's own ratio even for gspo: under the response's, the gradient of a token's KL is wrong.
    return kl * (logp - _old(logp, tokens)).exp() if objective.kl_ratio else kl


def _old(logp, tokens):
    """Log-probs, (N,), of the policy that the ratio is taken against, without gradient."""
    return logp.detach() if tokens.old_logp is None else tokens.old_logp


def _importance(logp, tokens, objective):
    """Importance weights, (N,), of the policy that the ratio is taken against over the sampler; without gradient."""
    ratio = importance_ratio(_old(logp, tokens), tokens.sampler_logp, tokens.response, objective)
    return importance_weights(ratio, objective)


def _ratio(logp, tokens, objective):
    """Importance ratio policy / old, (N,): the token's, or for gspo its response's."""
    log_ratio = logp - _old(logp, tokens)
    if objective.loss_type == "gspo":
        # sg[s] * exp(logp - sg[logp]), log s = mean log-ratio of the response: the value is the response's, the
        # gradient the token's own (GSPO-token, arXiv 2507.18071, section 4.3).
        length = torch.bincount(tokens.response)
        mean = _sum_by(tokens.response, log_ratio.detach(), len(length)) / length
        log_ratio = mean[tokens.response] + (logp - logp.detach())
    return log_ratio.exp()


def _clip(ratio, advantage, objective):
    """The ratio, (N,), held constant, and thus without gradient, once it has gone far enough.

    PPO's min(r A, clip(r, 1 - low, 1 + high) A) is A times r bounded above where A > 0, and below where A < 0 (arXiv
    1707.06347); there dual clip's max(.., c A) bounds it by c above (arXiv 1912.09729). CISPO bounds every r both ways.
    """
    low, high = 1 - objective.clip_ratio_low, 1 + objective.clip_ratio_high
    if objective.loss_type == "cispo":
        return ratio.clamp(low, high)
    return torch.where(advantage > 0, ratio.clamp(max=high), ratio.clamp(low, objective.clip_ratio_dual or None))


def _sum_by(index, values, size):
    """Sum of the values that share an index, (size,)."""
    return values.new_zeros(size).index_add(0, index, values)
