"""The step: six stages over a real sampler, packer, policy and objective, in a world small enough to check by hand."""

import json

import pytest
import torch
from small import Bell, samples, share_of_even, small_model, small_trainer

from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.report.logs import read_lines
from nanolmmr1.run.trainer import Progress, mismatch_limit
from nanolmmr1.schema import Phase, Rollout
from nanolmmr1.update.objective import group_advantages
from nanolmmr1.update.pack import pack_groups

DOCUMENTED = """reward/overall reward/accuracy reward/format reward/timeouts reward/frac_zero_std
    reward/frac_all_right reward/frac_all_wrong actor/pg_loss
    actor/kl_loss actor/entropy actor/ppo_kl actor/pg_clipfrac_higher actor/pg_clipfrac_lower
    actor/pg_clipfrac_dual actor/grad_norm actor/lr actor/skipped_steps mismatch/kl mismatch/logp_abs
    mismatch/logp_abs_max mismatch/text/kl mismatch/text/logp_abs mismatch/text/logp_abs_max
    response_length/mean response_length/max response_length/min response_length/clip_ratio
    prompt_length/mean prompt_length/max dynamic/sampled_groups dynamic/trained_groups pack/micro_batches
    pack/split_groups timing_s/data timing_s/gen timing_s/reward timing_s/exchange timing_s/pack
    timing_s/adv timing_s/update_actor timing_s/update_weights timing_s/step timing_s/save_checkpoint
    perf/time_per_step perf/total_num_tokens perf/throughput perf/peak_rss_mb perf/rss_mb""".split()


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.policy.model.parameters()]).clone()


def logp_now(trainer, groups):
    """Sum of each response's log-probs under the policy as it is."""
    (pack,), _ = pack_groups(groups, 1 << 20)
    logp, responses = trainer.policy.logprobs(pack, 1.0)[0], [r for group in groups for r in group.responses]
    return torch.stack([part.sum() for part in logp.split([len(r.ids) for r in responses])])


def test_a_step_tells_what_it_did_under_the_documented_names(tmp_path):
    trainer = small_trainer(tmp_path)
    record = trainer.step()
    assert set(record) == {"phase", "step", "phase_step", *DOCUMENTED}
    assert read_lines(tmp_path / "metrics.jsonl") == [json.loads(json.dumps(record))]
    groups = trainer.sampler.groups
    lengths = [len(r.ids) for group in groups for r in group.responses]
    rewards = [reward for group in groups for reward in group.rewards]
    assert record["response_length/mean"] == pytest.approx(sum(lengths) / 16)
    assert (record["response_length/min"], record["response_length/max"]) == (min(lengths), max(lengths))
    assert record["response_length/clip_ratio"] == sum(r.finish == "length" for g in groups for r in g.responses) / 16
    assert record["reward/overall"] == pytest.approx(sum(rewards) / 16)
    assert record["perf/total_num_tokens"] == sum(lengths) + sum(len(g.prompt.ids) for g in groups)
    assert record["mismatch/logp_abs"] < 1e-5 and record["actor/entropy"] > 1
    assert trainer.progress == Progress("train", phase_step=1, step=1, cursor=4)


def test_samples_show_first_and_last_step_with_rewards_and_advantages(tmp_path):
    trainer = small_trainer(tmp_path, phase={"steps": 3})
    for _ in range(3):
        trainer.step()
    shown = samples(tmp_path)
    assert [s["step"] for s in shown] == [1, 2, 3]
    for sample in shown:
        rewards = torch.tensor([r["reward"] for r in sample["responses"]])
        advantages = torch.tensor([r["advantage"] for r in sample["responses"]])
        assert torch.allclose(advantages, group_advantages(rewards, "grpo"), atol=1e-5)
        assert all(share_of_even(list(map(int, r["text"].split())), 0) == r["reward"] for r in sample["responses"])


def test_good_responses_become_likelier_and_bad_ones_less(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.step()
    groups = trainer.sampler.groups
    before = torch.stack([r.logp.sum() for group in groups for r in group.responses])
    advantage = torch.cat([group_advantages(torch.tensor(group.rewards), "grpo") for group in groups])
    change = logp_now(trainer, groups) - before
    assert advantage.abs().max() > 1
    assert change[advantage > 0.5].mean() > 0 > change[advantage < -0.5].mean()
    assert (advantage * change).sum() > 0


def test_the_reward_rises(tmp_path):
    trainer = small_trainer(tmp_path, phase={"lr": 5e-3, "prompts_per_step": 8})
    rewards = [trainer.step()["reward/overall"] for _ in range(25)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


@pytest.mark.parametrize("objective", [{}, {"algorithm": "gspo"}, {"algorithm": "dapo", "entropy_coef": 0.01}])
def test_neither_update_nor_record_depends_on_how_tokens_are_packed(tmp_path, objective):
    outcomes = []
    for budget in (1 << 14, 45, 12):
        # A large eps makes AdamW's update proportional to the gradient, where it would else be its sign.
        notes = []
        trainer = small_trainer(tmp_path / str(budget), objective=objective, optim={"eps": 1.0, "max_grad_norm": 1e9},
                                pack={"tokens_per_micro_batch": budget}, phase={"lr": 1.0}, notes=notes)
        start = weights_of(trainer)
        record = trainer.step()
        trainer.step()
        outcomes.append((record, weights_of(trainer) - start))
        told = [note for note in notes if "groups exceed pack.tokens_per_micro_batch=12" in note]
        assert len(told) == (budget == 12)  # once a phase
    (whole, moved), *others = outcomes
    assert whole["pack/micro_batches"] == 1 and moved.abs().max() > 1e-3
    for (record, other), split in zip(others, (False, True), strict=True):
        assert record["pack/micro_batches"] > 1 and (record["pack/split_groups"] > 0) == split
        assert (other - moved).norm() < 1e-4 * moved.norm()
        for key in DOCUMENTED:
            if not key.startswith(("timing_s", "perf", "pack")):
                assert record[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("objective", [
    {"algorithm": "dapo", "entropy_coef": 0.01, "kl_coef": 0.1, "clip_ratio_dual": 3.0, "tis_cap": 2.0},
    {"algorithm": "cispo", "kl_coef": 0.1, "kl_estimator": "k2", "kl_ratio": True},
    {"algorithm": "gspo"},
], ids=lambda objective: objective["algorithm"])
def test_steps_through_the_triton_kernels_equal_those_through_torch(tmp_path, objective):
    outcomes = []
    for route in ({}, {"attention": "triton", "head": "triton"}):
        trainer = small_trainer(tmp_path / str(len(route)), reference=small_model(seed=1), objective=objective,
                                phase={"lr": 1.0, "updates_per_rollout": 2, "prompts_per_step": 2}, pack=route,
                                optim={"eps": 1.0, "max_grad_norm": 1e9})  # the update is the gradient, not its sign
        start = weights_of(trainer)
        records = [trainer.step() for _ in range(2)]
        outcomes.append((records, weights_of(trainer) - start))
    (gold, moved), (records, ours) = outcomes
    assert (ours - moved).norm() < 1e-3 * moved.norm()
    for record, want in zip(records, gold, strict=True):
        for key in ("actor/pg_loss", "actor/grad_norm", "actor/entropy", "actor/ppo_kl", "reward/overall"):
            assert record[key] == pytest.approx(want[key], rel=1e-3, abs=1e-5), key


def test_later_updates_on_a_rollout_are_off_policy_and_compare_with_the_first(tmp_path):
    once = small_trainer(tmp_path / "1", phase={"lr": 0.02}).step()
    twice = small_trainer(tmp_path / "2", phase={"lr": 0.02, "updates_per_rollout": 2}).step()
    assert once["actor/ppo_kl"] == 0.0 and once["actor/pg_clipfrac_higher"] == once["actor/pg_clipfrac_lower"] == 0.0
    assert abs(twice["actor/ppo_kl"]) > 1e-4
    assert twice["actor/pg_clipfrac_higher"] + twice["actor/pg_clipfrac_lower"] > 0
    # Old log-probs are of the policy that sampled, not of the one that is halfway through its updates.
    assert twice["mismatch/logp_abs"] < 1e-5
    assert "timing_s/old" in twice and "timing_s/old" not in once


def test_every_update_weighs_its_own_tokens(tmp_path):
    """Where the loss is minus the entropy, an update's is the mean over its own tokens, not over the rollout's."""
    trainer = small_trainer(tmp_path, lambda ids, row: 1.0, phase={"lr": 0.0, "updates_per_rollout": 2},
                            objective={"entropy_coef": 1.0, "loss_avg_mode": "token"})
    losses, apply = [], trainer.policy.optimizer_step

    def listening(lr, loss):
        losses.append(loss)
        return apply(lr, loss)

    trainer.policy.optimizer_step = listening
    trainer.step()
    for groups, loss in zip((trainer.sampler.groups[:2], trainer.sampler.groups[2:]), losses, strict=True):
        (pack,), _ = pack_groups(groups, 1 << 20)
        assert loss == pytest.approx(-float(trainer.policy.logprobs(pack, 1.0)[1].mean()), rel=1e-4)


def test_kl_in_the_loss_pulls_towards_the_reference(tmp_path):
    equal = {"rule": lambda ids, row: 1.0, "phase": {"lr": 1e-2}}
    reference = small_model(seed=1).requires_grad_(False)
    trainer = small_trainer(tmp_path, reference=reference, objective={"kl_coef": 1.0, "kl_estimator": "k2"}, **equal)
    losses = [trainer.step()["actor/kl_loss"] for _ in range(25)]
    assert losses[0] > 1 and losses[-1] < losses[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), small_model(seed=1).parameters(), strict=True))


def test_kl_to_the_policy_itself_is_nothing(tmp_path):
    record = small_trainer(tmp_path, reference=small_model(), objective={"kl_coef": 1.0}).step()
    assert abs(record["actor/kl_loss"]) < 1e-9 and "timing_s/ref" in record


def test_kl_in_the_reward_lowers_the_advantage_of_what_the_reference_would_not_say(tmp_path):
    reference = small_model(seed=1)
    trainer = small_trainer(tmp_path, lambda ids, row: 1.0, reference,
                            objective={"kl_coef": 1.0, "kl_place": "reward", "kl_estimator": "k1"})
    record = trainer.step()
    group = trainer.sampler.groups[0]
    (pack,), _ = pack_groups([group], 1 << 20)
    k1 = torch.cat([r.logp for r in group.responses]) - trainer.policy.logprobs(pack, 1.0, reference)[0]
    cost = torch.stack([part.sum() for part in k1.split([len(r.ids) for r in group.responses])])
    advantages = torch.tensor([r["advantage"] for r in samples(tmp_path)[0]["responses"]])
    assert torch.allclose(advantages, group_advantages(-cost, "grpo"), atol=1e-3)
    assert record["actor/grad_norm"] > 0  # although all rewards are equal


def test_without_a_signal_a_step_changes_nothing(tmp_path):
    trainer = small_trainer(tmp_path, lambda ids, row: 1.0)
    start = weights_of(trainer)
    record = trainer.step()
    assert record["actor/grad_norm"] == 0.0 and record["reward/frac_zero_std"] == 1.0
    assert torch.equal(weights_of(trainer), start)


def test_dynamic_sampling_replaces_groups_that_teach_nothing(tmp_path):
    def rule(ids, row):  # even rows are always right
        return 1.0 if row % 2 == 0 else share_of_even(ids, row)

    trainer = small_trainer(tmp_path, rule, phase={"dynamic_sampling": True, "max_refills": 9})
    order = trainer.order.take(0, 60)
    record = trainer.step()
    needed = [i for i, row in enumerate(order) if row % 2][3] + 1  # until four odd rows have been met
    assert record["dynamic/trained_groups"] == 4
    assert needed <= record["dynamic/sampled_groups"] == trainer.progress.cursor < needed + 4
    assert record["reward/frac_zero_std"] == pytest.approx(1 - 4 / record["dynamic/sampled_groups"])
    assert int(samples(tmp_path)[0]["problem"]) % 2 == 1
    # The next step goes on with rows that this one has not seen.
    trainer.step()
    assert {int(g.prompt.row.problem) for g in trainer.sampler.groups} <= set(order[record["dynamic/sampled_groups"]:])


def test_dynamic_sampling_makes_do_with_the_groups_it_finds(tmp_path):
    def rule(ids, row):
        return share_of_even(ids, row) if row == 5 else 0.0

    trainer = small_trainer(tmp_path, rule, phase={"dynamic_sampling": True, "max_refills": 2})
    record = trainer.step()  # 4 + 4 + 4 rows: one whole epoch, so row 5 once
    assert record["dynamic/sampled_groups"] in (11, 12) and record["dynamic/trained_groups"] == 1
    assert record["actor/grad_norm"] > 0


def test_dynamic_sampling_that_starves_says_so_and_goes_on(tmp_path):
    notes = []
    trainer = small_trainer(tmp_path, lambda ids, row: 0.0, notes=notes,
                            phase={"dynamic_sampling": True, "max_refills": 2})
    start = weights_of(trainer)
    record = trainer.step()
    assert record["dynamic/sampled_groups"] == 12 and record["dynamic/trained_groups"] == 4
    assert notes and "all 12 groups have equal rewards" in notes[0]
    assert torch.equal(weights_of(trainer), start)


def test_the_overlong_penalty_makes_long_responses_worse(tmp_path):
    trainer = small_trainer(tmp_path, lambda ids, row: 1.0, phase={"group_size": 16, "max_response_tokens": 24},
                            objective={"overlong_buffer": 20, "overlong_penalty": 2.0})
    trainer.step()
    shown = samples(tmp_path)[0]["responses"]
    lengths = torch.tensor([len(r["text"].split()) for r in shown])
    penalty = -2.0 * ((lengths - 4) / 20).clamp(0, 1)
    assert len(penalty.unique()) > 3
    expected = group_advantages(penalty, "grpo")
    assert torch.allclose(torch.tensor([r["advantage"] for r in shown]), expected, atol=1e-5)
    assert {r["reward"] for r in shown} == {1.0}  # what is logged is what the judge gave


def test_non_finite_steps_are_skipped_counted_and_after_a_few_the_end(tmp_path):
    trainer = small_trainer(tmp_path, optim={"max_bad_steps": 2})
    bias = trainer.policy.model.model.layers[0].self_attn.q_proj.bias
    trainer.step()
    good = weights_of(trainer)
    with torch.no_grad():
        bias[0] = float("nan")
    record = trainer.step()
    assert record["actor/skipped_steps"] == trainer.progress.bad_steps == 1
    with torch.no_grad():
        bias[0] = 0.0
    moved = (weights_of(trainer) - good).count_nonzero()
    assert moved <= 1  # the bias itself
    trainer.step()
    assert (trainer.progress.bad_steps, trainer.progress.skipped_steps) == (0, 1)
    with torch.no_grad():
        bias[0] = float("nan")
    trainer.step()
    with pytest.raises(UserError, match="2 steps in a row had a non-finite"):
        trainer.step()
    assert trainer.progress.step == len(read_lines(tmp_path / "metrics.jsonl")) == 5


def test_a_step_of_several_updates_is_bad_only_if_all_of_them_are(tmp_path):
    trainer = small_trainer(tmp_path, phase={"updates_per_rollout": 4}, optim={"max_bad_steps": 2})
    learn, calls = trainer.policy.backward, []

    def now_and_then(*args):
        calls.append(1)
        stats = learn(*args)
        return stats | {"loss": stats["loss"] * float("nan")} if len(calls) in bad else stats

    trainer.policy.backward = now_and_then
    bad = {2, 3, 4, *range(5, 9)}
    record = trainer.step()
    assert (record["actor/skipped_steps"], trainer.progress.bad_steps) == (1, 0)  # the first update was made
    assert not trainer.last_update_finite  # and may be what made the others bad
    trainer.step()
    assert (trainer.progress.skipped_steps, trainer.progress.bad_steps) == (2, 1)
    trainer.step()
    assert (trainer.progress.skipped_steps, trainer.progress.bad_steps, trainer.last_update_finite) == (2, 0, True)


def test_a_step_is_given_up_before_its_first_update_and_not_after_it(tmp_path):
    watch = Bell()
    budget = {"tokens_per_micro_batch": 30}
    trainer = small_trainer(tmp_path, watch=watch, pack=budget, phase={"updates_per_rollout": 2})
    score, apply = trainer.policy.logprobs, trainer.policy.optimizer_step

    def told_while(work, calls):
        def told(*args):
            calls.append(1)
            watch.stopping = True
            return work(*args)

        return told

    trainer.policy.logprobs = told_while(score, scored := [])
    with pytest.raises(Preempted):
        trainer.step()
    assert len(scored) == 1 and trainer.progress.step == 0
    watch.stopping, trainer.policy.logprobs = False, score
    trainer.policy.optimizer_step = told_while(apply, applied := [])
    record = trainer.step()
    assert len(applied) == 2 and record["pack/micro_batches"] > 3 and trainer.progress.step == 1


def test_no_memory_for_a_hand_over_ends_the_run_after_the_step_that_was_taken(tmp_path):
    trainer = small_trainer(tmp_path)

    def full(weights):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee the documentation")

    trainer.sampler.update = full
    with pytest.raises(UserError, match="^CUDA out of memory. Tried to allocate 9 GiB.$"):
        trainer.step()
    assert trainer.progress.step == 1 and trainer.last_update_finite
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("limit, ends", [(None, True), (0.6, False), (0.4, True), (0.0, False)])
def test_a_sampler_that_samples_from_other_weights_ends_the_run(tmp_path, limit, ends):
    """Its log-probs are off by 0.5 nats, on prompts with images alone."""
    trainer = small_trainer(tmp_path, images=True)
    trainer.cfg.rollout.max_mismatch, generate = limit, trainer.sampler.generate

    def shifted(prompts, *args, **callbacks):
        groups = generate(prompts, *args, **callbacks)
        for group in groups:
            for response in group.responses if group.num_patches else ():
                response.logp = response.logp - 0.5
        return groups

    trainer.sampler.generate = shifted
    if not ends:
        assert trainer.step()["mismatch/image/logp_abs"] == pytest.approx(0.5, rel=1e-3)
        return
    with pytest.raises(UserError, match=f"image prompts differ .* by 0.5 nats .*max_mismatch={limit or 0.01:g}"):
        trainer.step()
    assert trainer.progress.step == 1 and trainer.last_update_finite  # taken and told of: a checkpoint follows
    assert read_lines(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("engine, dtype, changes, limit", [
    ("local", torch.float32, {}, 0.01), ("vllm", torch.bfloat16, {}, 0.1), ("server", torch.bfloat16, {}, 0.25),
    ("vllm", torch.float32, {"top_p": 0.9}, 0.0), ("vllm", torch.float32, {"top_k": 5}, 0.0),
    ("server fixed", torch.float32, {}, 0.0), ("server fixed", torch.float32, {"lr": 0.0}, 0.01),
])  # fmt: skip
def test_how_far_a_sampler_may_be_from_the_policy(engine, dtype, changes, limit):
    kind, _, fixed = engine.partition(" ")
    rollout = Rollout(engine=kind, server_weights=fixed or "nccl")
    assert mismatch_limit(rollout, Phase(**changes), dtype) == limit
    rollout.max_mismatch = 3.0
    assert mismatch_limit(rollout, Phase(**changes), dtype) == 3.0


def test_a_row_that_comes_again_gets_other_responses(tmp_path):
    trainer = small_trainer(tmp_path, phase={"lr": 0.0, "prompts_per_step": 1})
    trainer.start_phase("train", trainer.rows[:1])
    said = set()
    for _ in range(3):
        trainer.step()
        said.add(tuple(tuple(r.ids.tolist()) for r in trainer.sampler.groups[0].responses))
    assert len(said) == 3


def test_phases_draw_different_rows_and_responses(tmp_path):
    trainer = small_trainer(tmp_path, phase={"prompts_per_step": 12})
    trainer.cfg.phases["other"] = trainer.phase
    trainer.display.phases["other"] = 50
    trainer.step()
    first = {int(g.prompt.row.problem): [r.ids.tolist() for r in g.responses] for g in trainer.sampler.groups}
    rows = trainer.rows
    trainer.policy.model.load_state_dict(small_model().state_dict())
    trainer.start_phase("other", rows)
    trainer.step()
    second = {int(g.prompt.row.problem): [r.ids.tolist() for r in g.responses] for g in trainer.sampler.groups}
    assert list(first) != list(second) and set(first) == set(second)
    assert all(first[row] != second[row] for row in first)
    assert (trainer.progress.phase_step, trainer.progress.step, trainer.progress.cursor) == (1, 2, 12)


@pytest.mark.parametrize("progress, done", [
    (Progress(), []),
    (Progress("a", 1), []),
    (Progress("a", 2), []),  # not yet evaluated
    (Progress("a", 2, finished="a"), ["a"]),
    (Progress("b", 0, finished="a"), ["a"]),
    (Progress("b", 3, finished="b"), ["a", "b"]),
])
def test_progress_knows_which_phases_are_behind_it(progress, done):
    class Steps:
        steps = 2

    phases = {"a": Steps, "b": Steps, "c": Steps}
    assert [name for name in phases if progress.phase_done(name, phases)] == done
    assert [name for name in phases if progress.inside(name)] == ([progress.phase] if progress.phase_step else [])


def test_a_step_whose_weights_the_sampler_did_not_take_is_a_whole_step(tmp_path):
    """Else a checkpoint would hold one step's number and the next one's weights."""
    whole, broken = small_trainer(tmp_path / "whole"), small_trainer(tmp_path / "broken")

    def lost(weights):
        raise UserError("a server is lost")

    broken.sampler.update = lost
    whole.step()
    with pytest.raises(UserError, match="a server is lost"):
        broken.step()
    assert broken.progress == whole.progress and broken.progress.step == 1
    assert torch.equal(weights_of(broken), weights_of(whole))
    assert len(read_lines(tmp_path / "broken" / "metrics.jsonl")) == 1


def test_a_tower_that_learns_alone_learns_nothing_from_text(tmp_path):
    trainer = small_trainer(tmp_path, phase={"freeze": ["language"]})
    before = weights_of(trainer)
    assert trainer.step()["actor/grad_norm"] == 0
    assert torch.equal(weights_of(trainer), before)


def test_a_run_that_is_told_to_stop_prepares_no_further_prompt(tmp_path, monkeypatch):
    watch = Bell()
    trainer = small_trainer(tmp_path, watch=watch)
    prepare, prepared = trainer.processor.prepare, []

    def counted(row, captions):
        prepared.append(row)
        watch.stopping = len(prepared) == 2
        return prepare(row, captions)

    monkeypatch.setattr(trainer.processor, "prepare", counted)
    with pytest.raises(Preempted):
        trainer.step()
    assert len(prepared) == 2 and trainer.progress.step == 0
