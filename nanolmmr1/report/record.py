"""What a step tells: one flat record, under the key names of EasyR1 and verl, and how far the sampler strayed.

`mismatch/kl`            mean of k3, an estimate of KL(sampler || policy), nats a token
`mismatch/logp_abs`      mean of |log-prob of the policy - log-prob as the sampler reported it|, nats
`mismatch/logp_abs_max`  the largest of these
`mismatch/image/...`, `mismatch/text/...`  the same over responses to prompts with images, and without

The policy is the one before the step's first update, which is the one that the sampler should have been. With
importance weights (`objective.tis_cap`) there are also, over tokens:

`mismatch/tis_mean`                 mean weight, after truncation or masking
`mismatch/tis_frac_high`, `_low`    share whose ratio was above tis_cap, or below tis_floor: truncated or masked
`mismatch/tis_eff_sample_size`      (sum w)^2 / (n sum w^2) of these weights: 1 where all are equal

Next: metrics.py, where records are kept and shown.
"""

import torch

from nanolmmr1.report.usage import peak_rss_mb, rss_mb
from nanolmmr1.update.objective import importance_ratio, importance_weights, kl_penalty


def step_record(progress, objective, rollout, sampled, learnt, sampler_stats, seconds):
    """The step's record. Rewards and lengths are of everything sampled, the rest of what was learnt from.

    Args:
        rollout: Batch of the groups learnt from; sampled: all groups.
        learnt: what Trainer.update_policy gave, and the numbers of updates, micro-batches and split groups.
        sampler_stats: the sampler's own numbers; seconds: stage times, as StageTimer gives them.
    """
    tokens = max(1, learnt["tokens"])
    judgements = [j for group in sampled for j in group.judgements]
    spread = [len(set(group.rewards)) > 1 for group in sampled]
    lengths = torch.tensor([len(r.ids) for group in sampled for r in group.responses], dtype=torch.float)
    cut = [r.finish == "length" for group in sampled for r in group.responses]
    prompts = [group.prompt_tokens for group in sampled]
    parts = {key for judgement in judgements for key in judgement} - {"timeout"}
    handled = sum(prompts) + float(lengths.sum())
    return {
        "phase": progress.phase,
        "step": progress.step,
        "phase_step": progress.phase_step,
        **{f"reward/{key}": _mean([j[key] for j in judgements if key in j]) for key in sorted(parts)},
        "reward/timeouts": sum(j["timeout"] for j in judgements),
        "reward/frac_zero_std": 1 - _mean(spread),
        "actor/pg_loss": learnt["pg_loss"] / learnt["updates"],
        "actor/kl_loss": learnt.get("kl_loss", 0.0) / learnt["updates"],
        "actor/entropy": learnt["entropy"] / tokens,
        "actor/ppo_kl": learnt["ppo_kl"] / tokens,
        **{f"actor/pg_{key}": learnt[key] / tokens for key in ("clipfrac_higher", "clipfrac_lower", "clipfrac_dual")},
        "actor/grad_norm": learnt["norm"],
        "actor/lr": learnt["lr"],
        "actor/skipped_steps": progress.skipped_steps,
        **mismatch(rollout, objective),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": int(lengths.max()),
        "response_length/min": int(lengths.min()),
        "response_length/clip_ratio": _mean(cut),
        "prompt_length/mean": _mean(prompts),
        "prompt_length/max": max(prompts),
        "dynamic/sampled_groups": len(sampled),
        "dynamic/trained_groups": len(rollout.groups),
        "pack/micro_batches": learnt["micro_batches"],
        "pack/split_groups": learnt["split_groups"],
        **{f"rollout/{key}": value for key, value in sampler_stats.items()},
        **seconds,
        "perf/time_per_step": seconds["timing_s/step"],
        "perf/total_num_tokens": int(handled),
        "perf/throughput": handled / seconds["timing_s/step"],
        "perf/peak_rss_mb": peak_rss_mb(),
        "perf/rss_mb": rss_mb(),
    }


def mismatch(rollout, objective):
    """The sampler's log-probs against the policy's, over all scored tokens; a kind of prompt not there is left out."""
    policy, sampler = rollout.first_logp, rollout.sampler_logp  # (M,)
    k3, gap = kl_penalty(sampler, policy, "k3"), (policy - sampler).abs()
    images = torch.tensor([group.num_patches > 0 for group in rollout.groups])  # (groups,)
    image = images[rollout.group][rollout.response]  # (M,)
    record = {}
    for kind, chosen in (("", torch.ones_like(image)), ("image/", image), ("text/", ~image)):
        if chosen.any():
            record[f"mismatch/{kind}kl"] = float(k3[chosen].mean())
            record[f"mismatch/{kind}logp_abs"] = float(gap[chosen].mean())
            record[f"mismatch/{kind}logp_abs_max"] = float(gap[chosen].max())
    if objective.tis_cap:
        ratio = importance_ratio(policy, sampler, rollout.response, objective)  # (M,)
        weights = importance_weights(ratio, objective).double()
        total, squares = float(weights.sum()), float(weights.square().sum())
        record["mismatch/tis_mean"] = float(weights.mean())
        record["mismatch/tis_frac_high"] = float((ratio > objective.tis_cap).float().mean())
        record["mismatch/tis_frac_low"] = float((ratio < objective.tis_floor).float().mean())
        # Where all are masked, there is no sample.
        record["mismatch/tis_eff_sample_size"] = total**2 / (len(weights) * squares) if squares else 0.0
    return record


def _mean(values):
    return sum(values) / len(values)
