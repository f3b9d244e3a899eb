"""The objective: advantages, KL estimators and the GRPO family of losses, on flat per-token vectors.

This file is the definition of the loss; the fused kernel (kernels/_rows.py) is tested against it. A pack's scored
response tokens form one axis of length N, and the loss of an update is `sum_t weight_t * l_t`. Averaging is entirely in
`weight`, whose denominator is computed once over the whole update: the gradient does not depend on how tokens are cut
into micro-batches or ranks. `objective` is always a resolved `schema.Objective`.

Next: pack.py, groups on one token axis.
"""

import copy
from dataclasses import dataclass, replace

import torch

from nanolmmr1.schema import Objective

EPS = 1e-6  # added to standard deviations


@dataclass
class Tokens:
    """Inputs of the loss per scored token of a pack, apart from the policy's log-probs and entropies.

    Tokens of a response are contiguous, and responses are in order. Log-probs are those of the sampled tokens, in nats,
    at the sampling temperature. Slicing a `Tokens` gives a `Tokens`.
    """

    advantage: torch.Tensor  # (N,) fp32
    weight: torch.Tensor  # (N,) fp32, from `token_weights`
    response: torch.Tensor  # (N,) int64, index of the response in the pack, 0..R-1
    sampler_logp: torch.Tensor  # (N,) fp32, reported by the sampler
    old_logp: torch.Tensor | None = None  # (N,) fp32, before the batch's first update; None: this is the first update
    ref_logp: torch.Tensor | None = None  # (N,) fp32, of the reference; None: there is none

    def __getitem__(self, part: slice) -> "Tokens":
        return replace(self, **{name: v[part] for name, v in vars(self).items() if v is not None})


def group_advantages(rewards: torch.Tensor, estimator: str, group: torch.Tensor | None = None) -> torch.Tensor:
    """Advantage of each response over its group; exactly 0 if all rewards of the group are equal.

    grpo                   (r - mean) / (std + 1e-6), std unbiased    (DeepSeekMath, arXiv 2402.03300)
    dr_grpo                r - mean                                   (Dr. GRPO, arXiv 2503.20783)
    rloo                   r - mean of the others                     (RLOO, arXiv 2402.14740)
    reinforce_pp_baseline  r - mean, to be whitened over all tokens   (REINFORCE++, arXiv 2501.03262)

    Args:
        rewards: (R,) float. group: (R,) int64, group index of each response; None: all are one group.

    Returns:
        (R,)
    """
    if group is None:
        group = torch.zeros_like(rewards, dtype=torch.int64)
    count = torch.bincount(group)  # (groups,)
    assert (count[group] > 1).all(), "an advantage compares at least two responses"
    # Advantages are invariant to a shift. Relative to the group's best reward, equal rewards are exactly 0; relative to
    # their mean, a rounding error would remain, which division by std + 1e-6 amplifies into a signal.
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


def overlong_penalty(lengths: torch.Tensor, max_length: int, buffer: int, penalty: float) -> torch.Tensor:
    """DAPO's soft overlong punishment, added to rewards (arXiv 2503.14476, eq. 13).

    0 up to `max_length - buffer` tokens, then linear down to `-penalty` at `max_length`; buffer 0: off.

    Args:
        lengths: (R,) int64, in tokens.

    Returns:
        (R,) fp32
    """
    excess = (lengths - (max_length - buffer)).float()
    return -penalty * (excess / buffer).clamp(0, 1) if buffer else torch.zeros_like(excess)


def token_advantages(
    rewards: torch.Tensor, group: torch.Tensor, response: torch.Tensor, kl: torch.Tensor | None, objective: Objective
) -> torch.Tensor:
    """Advantage of every scored token, including KL if it is part of the reward.

    The group estimators subtract a response's whole KL from its reward, `r_i - beta * sum_t kl_t`, compare responses,
    and give all tokens of a response the same advantage. REINFORCE++ with baseline subtracts the KL from a token on,
    `r_i - mean - beta * sum_{s>=t} kl_s`, then whitens over all tokens passed: pass the whole batch.

    Args:
        rewards: (R,) float, penalties included. group: (R,) int64. response: (N,) int64, as in `Tokens`.
        kl: (N,), k1 = old_logp - ref_logp; None unless KL is part of the reward.

    Returns:
        (N,) of rewards' dtype
    """
    cost = torch.zeros_like(response, dtype=torch.float64)  # (N,)
    if objective.kl_coef and objective.kl_place == "reward":
        assert kl is not None, "KL in the reward needs the reference's log-probs"
        cost = objective.kl_coef * kl.double()  # double: running sums over a million tokens are subtracted below
    total = _sum_by(response, cost, len(rewards))  # (R,)
    if objective.adv_estimator != "reinforce_pp_baseline":
        return group_advantages(rewards - total, objective.adv_estimator, group)[response].to(rewards.dtype)
    # Cumulative cost at the end of the token's response minus cumulative cost before the token.
    to_go = total.cumsum(0)[response] - (cost.cumsum(0) - cost)  # (N,)
    advantage = group_advantages(rewards, objective.adv_estimator, group)[response] - to_go
    return ((advantage - advantage.mean()) / (advantage.std(correction=0) + EPS)).to(rewards.dtype)


def token_weights(lengths: torch.Tensor, mode: str, max_length: int) -> torch.Tensor:
    """Weight of every token of a response in the loss.

    token     1 / sum_i len_i       all tokens weigh the same                  (DAPO, arXiv 2503.14476)
    sequence  1 / (R * len_i)       all responses weigh the same               (GRPO, arXiv 2402.03300)
    constant  1 / (R * max_length)  all tokens weigh the same in every step    (Dr. GRPO, arXiv 2503.20783)

    Args:
        lengths: (R,) int64, of ALL responses of the update, over micro-batches and ranks; empty ones count in R.

    Returns:
        (R,) fp32
    """
    denominator = {
        "token": lengths.sum().expand_as(lengths),
        "sequence": len(lengths) * lengths,
        "constant": torch.full_like(lengths, len(lengths) * max_length),
    }[mode]
    # An empty response has no tokens, but an infinite weight times 0 would be NaN.
    return 1 / denominator.clamp(min=1).float()


def kl_penalty(logp: torch.Tensor, ref_logp: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimates (N,) of KL(policy || reference) at tokens that the policy sampled.

    With x = logp - ref_logp: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x (Schulman, joschu.net/blog/kl-approx.html).
    The means of k1 and k3 equal the KL. As a loss, only k2 has the KL's gradient on average (arXiv 2510.01555): k1's
    is 0, and k3's is that of KL(reference || policy). Multiplied by the importance ratio, k1 and k3 are correct too.
    """
    x = logp - ref_logp  # (N,)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x.square() / 2
    assert estimator == "k3", estimator
    return torch.expm1(-x) + x


def importance_ratio(
    old_logp: torch.Tensor, sampler_logp: torch.Tensor, response: torch.Tensor, objective: Objective
) -> torch.Tensor:
    """Probability under the policy divided by probability under the sampler, (N,), per token or per response.

    The ratio of a response is the product of its tokens' ratios: unbiased, but its variance grows with the length. The
    ratio of a token ignores the tokens before it (Liu, Li et al., 2025, richardli.xyz/rl-collapse).
    """
    log_ratio = old_logp - sampler_logp  # (N,)
    if objective.tis_mode.startswith("sequence"):
        log_ratio = _sum_by(response, log_ratio, len(torch.bincount(response)))[response]
    return log_ratio.exp()


def importance_weights(ratio: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Truncated importance sampling (tis): a factor (N,) of each token's surrogate, from its `importance_ratio`.

    truncate  clip(ratio, tis_floor, tis_cap)               (Yao et al., 2025, fengyao.notion.site/off-policy-rl)
    mask      ratio inside [tis_floor, tis_cap], else 0     (IcePop, arXiv 2510.18855)

    A masked token still counts in averages, and keeps its KL and entropy terms.
    """
    low, high = objective.tis_floor, objective.tis_cap
    assert high is not None, "the recipe is resolved"
    if objective.tis_mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0, ratio)  # NaN stays NaN


def fold_importance(tokens: Tokens, objective: Objective) -> tuple[Tokens, Objective]:
    """Multiply importance weights into the advantages if they are known; the loss stays the same.

    With `old_logp` the weights are non-negative constants, and the surrogate is linear in the advantage while its sign
    is fixed. After folding, code that slices `tokens` or computes the loss can ignore them. Without `old_logp` they
    depend on the current policy, and nothing is folded. tokens: whole responses.
    """
    if tokens.old_logp is None or not objective.tis_cap:
        return tokens, objective
    advantage = _importance(tokens.old_logp, tokens, objective) * tokens.advantage  # (N,)
    objective = copy.copy(objective)
    objective.tis_cap = 0.0
    return replace(tokens, advantage=advantage), objective


def needs_whole_sequences(objective: Objective) -> bool:
    """Whether a token's loss depends on its whole response, so that `Tokens` may be cut between responses only."""
    return objective.loss_type == "gspo" or bool(objective.tis_cap) and objective.tis_mode.startswith("sequence")


def policy_loss(
    logp: torch.Tensor, entropy: torch.Tensor, tokens: Tokens, objective: Objective
) -> torch.Tensor:
    """Weighted per-token losses (N,), whose sum is the loss; differentiable in logp and entropy.

    weight_t * (-importance_t * surrogate_t + kl_coef * kl_t - entropy_coef * entropy_t)

    Args:
        logp: (N,) fp32, of the sampled tokens under the policy, in nats.
        entropy: (N,) fp32, of the policy's distribution at each token, in nats.
    """
    loss = _policy_term(logp, tokens, objective) - objective.entropy_coef * entropy
    if objective.kl_coef and objective.kl_place == "loss":
        loss = loss + objective.kl_coef * _kl_term(logp, tokens, objective)
    return tokens.weight * loss


@torch.no_grad()
def policy_stats(
    logp: torch.Tensor, entropy: torch.Tensor, tokens: Tokens, objective: Objective
) -> dict[str, torch.Tensor]:
    """Name -> 0-d sum over tokens: sums of micro-batches and ranks can be added.

    `pg_loss` and `kl_loss` are weighted, so their sum over an update is a mean; divide the others by `tokens`.
    `kl_loss` excludes kl_coef, and is absent without a reference. `clipfrac_*` count tokens whose gradient was removed
    by clipping, or, for cispo, whose importance weight was changed by it.
    """
    tokens, objective = fold_importance(tokens, objective)  # a token removed by a mask does not count as clipped
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


def _policy_term(logp: torch.Tensor, tokens: Tokens, objective: Objective) -> torch.Tensor:
    """Negative surrogate (N,): clip(ratio) * A, or for cispo sg[clip(ratio) * A] * logp."""
    surrogate = _clip(_ratio(logp, tokens, objective), tokens.advantage, objective) * tokens.advantage
    if objective.loss_type == "cispo":
        # Clipping bounds a token's weight but keeps its gradient (MiniMax-M1, arXiv 2506.13585).
        surrogate = surrogate.detach() * logp
    if objective.tis_cap:
        # The sampler's numerics differ from the trainer's: its tokens are slightly off-policy from the start.
        surrogate = surrogate * _importance(logp, tokens, objective)
    return -surrogate


def _kl_term(logp: torch.Tensor, tokens: Tokens, objective: Objective) -> torch.Tensor:
    """KL estimate (N,); with kl_ratio, times the importance ratio (DeepSeek-V3.2, arXiv 2512.02556)."""
    assert tokens.ref_logp is not None, "KL in the loss needs the reference's log-probs"
    kl = kl_penalty(logp, tokens.ref_logp, objective.kl_estimator)
    # The token's ratio, for gspo too: with the response's ratio the gradient of a token's KL would be wrong.
    return kl * (logp - _old(logp, tokens)).exp() if objective.kl_ratio else kl


def _old(logp: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Log-probs (N,) in the ratio's denominator, without gradient."""
    return logp.detach() if tokens.old_logp is None else tokens.old_logp


def _importance(logp: torch.Tensor, tokens: Tokens, objective: Objective) -> torch.Tensor:
    """Importance weights (N,) of the old policy against the sampler, without gradient."""
    ratio = importance_ratio(_old(logp, tokens), tokens.sampler_logp, tokens.response, objective)
    return importance_weights(ratio, objective)


def _ratio(logp: torch.Tensor, tokens: Tokens, objective: Objective) -> torch.Tensor:
    """Importance ratio policy / old policy, (N,), per token, or for gspo per response."""
    log_ratio = logp - _old(logp, tokens)
    if objective.loss_type == "gspo":
        # sg[s] * exp(logp - sg[logp]) with log s = mean log-ratio of the response: the value is the response's ratio,
        # the gradient is per token (GSPO-token, arXiv 2507.18071, section 4.3).
        length = torch.bincount(tokens.response)
        mean = _sum_by(tokens.response, log_ratio.detach(), len(length)) / length
        log_ratio = mean[tokens.response] + (logp - logp.detach())
    return log_ratio.exp()


def _clip(ratio: torch.Tensor, advantage: torch.Tensor, objective: Objective) -> torch.Tensor:
    """The clipped ratio (N,); it is constant, and has no gradient, where the bound is active.

    PPO's min(r A, clip(r, 1 - low, 1 + high) A) equals A times r, bounded above if A > 0 and below if A < 0 (arXiv
    1707.06347). Dual clip's max(.., c A) also bounds r above by c if A < 0 (arXiv 1912.09729). CISPO bounds r on both
    sides.
    """
    low, high = 1 - objective.clip_ratio_low, 1 + objective.clip_ratio_high
    if objective.loss_type == "cispo":
        return ratio.clamp(low, high)
    return torch.where(advantage > 0, ratio.clamp(max=high), ratio.clamp(low, objective.clip_ratio_dual or None))


def _sum_by(index: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    """Sums (size,) of values by index."""
    return values.new_zeros(size).index_add(0, index, values)
