"""The metrics record of a step, under the key names of EasyR1 and verl, with the sampler/trainer mismatch.

`mismatch/kl`            mean of k3, an estimate of KL(sampler || policy), nats per token
`mismatch/logp_abs`      mean |policy log-prob - sampler log-prob|, nats
`mismatch/logp_abs_max`  largest |policy log-prob - sampler log-prob|, nats
`mismatch/image/...`, `mismatch/text/...`  the same over responses to prompts with images, and without

The policy is the one before the step's first update, which the sampler should equal. With importance weights
(`objective.tis_cap`) there are also, over tokens:

`mismatch/tis_mean`                 mean weight, after truncation or masking
`mismatch/tis_frac_high`, `_low`    fraction with a ratio above tis_cap, or below tis_floor: truncated or masked
`mismatch/tis_eff_sample_size`      (sum w)^2 / (n sum w^2) of the weights w: 1 if all are equal

Groups that teach nothing, as fractions of the sampled groups, and what the judge went by:

`reward/frac_zero_std`                       all rewards of the group are equal
`reward/frac_all_right`, `_all_wrong`        all its responses have an accuracy of 1, or of 0
`reward/reason/NAME`                         fraction of responses whose accuracy NAME judged (rules.REASONS, function)

Next: usage.py, stage times and memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from nanolmmr1.data.group import Group
from nanolmmr1.report.usage import peak_rss_mb, rss_mb
from nanolmmr1.rollout.batch import Batch
from nanolmmr1.schema import Objective
from nanolmmr1.update.objective import importance_ratio, importance_weights, kl_penalty


class Progress(Protocol):
    """The part of run.trainer.Progress that a record holds."""

    phase: str
    phase_step: int
    step: int  # over all phases
    skipped_steps: int  # steps with a non-finite update, in all


def step_record(
    progress: Progress,
    objective: Objective,
    batch: Batch,
    sampled: Sequence[Group],
    update: Mapping[str, float],
    sampler_stats: Mapping[str, float],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Build the record of a step. Rewards and lengths cover all sampled groups, the rest only the trained ones.

    Args:
        batch: the groups that the step trained on.
        sampled: all groups.
        update: sums and means from Trainer.update_policy, and the numbers of updates, micro-batches and split groups.
        sampler_stats: Sampler.stats.
        seconds: stage times from StageTimer.seconds.
    """
    num_trained_tokens = max(1, update["tokens"])
    lengths = torch.tensor([len(r.ids) for group in sampled for r in group.responses], dtype=torch.float)
    prompt_lengths = [group.prompt_tokens for group in sampled]
    num_tokens = sum(prompt_lengths) + float(lengths.sum())
    return {
        "phase": progress.phase,
        "step": progress.step,
        "phase_step": progress.phase_step,
        **{f"reward/{key}": value for key, value in rewards(sampled).items()},
        "actor/pg_loss": update["pg_loss"] / update["updates"],
        "actor/kl_loss": update.get("kl_loss", 0.0) / update["updates"],
        "actor/entropy": update["entropy"] / num_trained_tokens,
        "actor/ppo_kl": update["ppo_kl"] / num_trained_tokens,
        **{f"actor/pg_clipfrac_{side}": update[f"clipfrac_{side}"] / num_trained_tokens
           for side in ("higher", "lower", "dual")},
        "actor/grad_norm": update["norm"],
        "actor/lr": update["lr"],
        "actor/skipped_steps": progress.skipped_steps,
        **mismatch(batch, objective),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": int(lengths.max()),
        "response_length/min": int(lengths.min()),
        "response_length/clip_ratio": _mean([r.finish == "length" for group in sampled for r in group.responses]),
        "prompt_length/mean": _mean(prompt_lengths),
        "prompt_length/max": max(prompt_lengths),
        "dynamic/sampled_groups": len(sampled),
        "dynamic/trained_groups": len(batch.groups),
        "pack/micro_batches": update["micro_batches"],
        "pack/split_groups": update["split_groups"],
        **{f"rollout/{key}": value for key, value in sampler_stats.items()},
        **seconds,
        "perf/time_per_step": seconds["timing_s/step"],
        "perf/total_num_tokens": int(num_tokens),
        "perf/throughput": num_tokens / seconds["timing_s/step"],
        "perf/peak_rss_mb": peak_rss_mb(),
        "perf/rss_mb": rss_mb(),
    }


def rewards(groups: Sequence[Group]) -> dict[str, float]:
    """Mean of each reward over the responses that have it, fraction of each reason, and fractions of groups whose
    responses are all alike. Without an accuracy reward there is no frac_all_right or frac_all_wrong."""
    judgements = [judgement for group in groups for judgement in group.judgements]
    columns = {key: [j[key] for j in judgements if key in j] for key in sorted(set().union(*judgements) - {"timeout"})}
    record = {key: sum(values) / (len(judgements) if key.startswith("reason/") else len(values))
              for key, values in columns.items()}
    record["timeouts"] = sum(j["timeout"] for j in judgements)
    record["frac_zero_std"] = 1 - _mean([len(set(group.rewards)) > 1 for group in groups])
    if "accuracy" in columns:
        accuracies = [[j["accuracy"] for j in group.judgements] for group in groups]
        record["frac_all_right"] = _mean([min(each) >= 1 for each in accuracies])
        record["frac_all_wrong"] = _mean([max(each) <= 0 for each in accuracies])
    return record


def mismatch(batch: Batch, objective: Objective) -> dict[str, float]:
    """Compare the log-probs of sampler and policy over all scored tokens; a modality without tokens is left out."""
    policy, sampler = batch.first_logp, batch.sampler_logp  # (M,)
    k3, gap = kl_penalty(sampler, policy, "k3"), (policy - sampler).abs()
    has_images = torch.tensor([group.num_patches > 0 for group in batch.groups])  # (groups,)
    image = has_images[batch.group][batch.response]  # (M,)
    record = {}
    for modality, tokens in (("", torch.ones_like(image)), ("image/", image), ("text/", ~image)):
        if tokens.any():
            record[f"mismatch/{modality}kl"] = float(k3[tokens].mean())
            record[f"mismatch/{modality}logp_abs"] = float(gap[tokens].mean())
            record[f"mismatch/{modality}logp_abs_max"] = float(gap[tokens].max())
    if objective.tis_cap:
        ratio = importance_ratio(policy, sampler, batch.response, objective)  # (M,)
        weights = importance_weights(ratio, objective).double()
        total, squares = float(weights.sum()), float(weights.square().sum())
        record["mismatch/tis_mean"] = float(weights.mean())
        record["mismatch/tis_frac_high"] = float((ratio > objective.tis_cap).float().mean())
        record["mismatch/tis_frac_low"] = float((ratio < objective.tis_floor).float().mean())
        # 0 if every token is masked.
        record["mismatch/tis_eff_sample_size"] = total**2 / (len(weights) * squares) if squares else 0.0
    return record


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
