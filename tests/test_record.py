"""What a step tells of its sampler and its rewards: by hand on a few tokens, and in real steps."""

import math
from dataclasses import replace

import pytest
import torch
from small import SmallProcessor, small_trainer

from nanolmmr1.data.group import Group, Response
from nanolmmr1.data.prompt import Prompt
from nanolmmr1.data.rows import Row
from nanolmmr1.report.logs import read_lines
from nanolmmr1.report.page import write_report
from nanolmmr1.report.record import mismatch
from nanolmmr1.rollout.batch import Batch
from nanolmmr1.schema import Objective

PATCHES, GRID = torch.linspace(-1, 1, 4 * 1176).view(4, 1176), torch.tensor([[1, 2, 2]])  # one image, one token


def with_image(prompt):
    return replace(prompt, patches=PATCHES, grid=GRID, image_slots=torch.tensor([1]))


def prompt(image):
    none = Prompt(Row("p", ""), torch.tensor([5, 6]), torch.arange(2).expand(3, -1), torch.zeros(0, 1176),
                  torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), "p")
    return with_image(none) if image else none


def rollout_of(*groups):
    """Groups as (has an image, [[log-ratio policy - sampler of each token] of each response])."""
    made, policy = [], []
    for image, responses in groups:
        made.append(Group(prompt(image), [Response(torch.arange(len(r)), torch.full((len(r),), -2.0), "stop")
                                          for r in responses], judgements=[{"overall": 0.0}] * len(responses)))
        policy += [-2.0 + gap for r in responses for gap in r]
    rollout = Batch(made)
    rollout.first_logp = torch.tensor(policy)
    return rollout


def k3(*gaps):
    return sum(math.exp(gap) - 1 - gap for gap in gaps) / len(gaps)


def test_the_mismatch_by_hand_split_into_prompts_with_and_without_images():
    rollout = rollout_of((False, [[0.1], [-0.2, 0.0]]), (True, [[0.5, -1.0, 0.0], [0.25]]), (False, [[0.3]] * 2))
    got = mismatch(rollout, Objective(tis_cap=0.0))
    text, image = (0.1, -0.2, 0.0, 0.3, 0.3), (0.5, -1.0, 0.0, 0.25)
    want = {}
    for kind, gaps in (("", text + image), ("image/", image), ("text/", text)):
        want[f"mismatch/{kind}kl"] = k3(*gaps)
        want[f"mismatch/{kind}logp_abs"] = sum(map(abs, gaps)) / len(gaps)
        want[f"mismatch/{kind}logp_abs_max"] = max(map(abs, gaps))
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("image, kind, other", [(True, "image", "text"), (False, "text", "image")])
def test_a_kind_of_prompt_that_the_step_lacks_is_left_out(image, kind, other):
    got = mismatch(rollout_of((image, [[0.1], [0.2]])), Objective(tis_cap=0.0))
    assert not [key for key in got if other in key]
    assert got["mismatch/kl"] == got[f"mismatch/{kind}/kl"] > 0


@pytest.mark.parametrize("mode, weights, high, low", [
    ("token_truncate", (1.5, 0.5, 2.0, 1.0), 1 / 4, 1 / 4),
    ("token_mask", (1.5, 0.0, 0.0, 1.0), 1 / 4, 1 / 4),
    ("sequence_truncate", (0.6, 0.6, 2.0, 2.0), 2 / 4, 0),
    ("sequence_mask", (0.6, 0.6, 0.0, 0.0), 2 / 4, 0)])
def test_importance_weights_are_told_by_mean_shares_and_effective_sample_size(mode, weights, high, low):
    rollout = rollout_of((False, [[math.log(1.5), math.log(0.4)], [math.log(3.0), 0.0]]))
    got = mismatch(rollout, Objective(tis_cap=2.0, tis_floor=0.5, tis_mode=mode))
    assert {key.removeprefix("mismatch/tis_"): got[key] for key in got if "tis" in key} == pytest.approx({
        "mean": sum(weights) / 4, "frac_high": high, "frac_low": low,
        "eff_sample_size": sum(weights) ** 2 / (4 * sum(w * w for w in weights))}, rel=1e-5)


def test_where_all_is_masked_there_is_no_sample():
    got = mismatch(rollout_of((True, [[3.0], [4.0]])), Objective(tis_cap=2.0, tis_mode="token_mask"))
    assert got["mismatch/tis_eff_sample_size"] == got["mismatch/tis_mean"] == 0.0
    assert got["mismatch/tis_frac_high"] == 1.0


class Pictures(SmallProcessor):
    """Odd rows show an image."""

    def prepare(self, row, captions):
        given = super().prepare(row, captions)
        return with_image(given) if int(row.problem) % 2 else given


@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_compares_with_the_policy_before_its_first_update(tmp_path, updates):
    trainer = small_trainer(tmp_path, phase={"lr": 0.02, "prompts_per_step": 8, "updates_per_rollout": updates},
                            rollout={"max_mismatch": 0.0},
                            pack={"tokens_per_micro_batch": 60})
    trainer.processor, generate = Pictures(), trainer.sampler.generate

    def worse_with_pictures(*args, **callbacks):
        groups = generate(*args, **callbacks)
        for group in groups:
            for response in group.responses:
                response.logp = response.logp - (0.25 if len(group.prompt.grid) else 0.125)
        return groups

    trainer.sampler.generate = worse_with_pictures
    record = trainer.step()
    kinds = {len(group.prompt.grid) for group in trainer.sampler.groups}
    assert kinds == {0, 1} and record["pack/micro_batches"] > updates
    for kind, gap in (("image", 0.25), ("text", 0.125)):
        assert record[f"mismatch/{kind}/logp_abs"] == pytest.approx(gap, abs=1e-5)
        assert record[f"mismatch/{kind}/logp_abs_max"] == pytest.approx(gap, abs=1e-4)
        assert record[f"mismatch/{kind}/kl"] == pytest.approx(k3(gap), rel=1e-3)
    assert record["mismatch/logp_abs_max"] == record["mismatch/image/logp_abs_max"]
    assert 0.125 < record["mismatch/logp_abs"] < 0.25


def judged(trainer, *groups):
    """A step whose groups have these judgements, each with `timeout` and its accuracy as reward."""
    given = iter([judgement for group in groups for judgement in group])

    def score(pairs):
        each = [next(given) for _ in pairs]
        return [{"timeout": 0, "overall": judgement.get("accuracy", 0.0)} | judgement for judgement in each]

    trainer.judge.score = score
    return trainer.step()


RIGHT, WRONG = {"accuracy": 1.0}, {"accuracy": 0.0}


@pytest.mark.parametrize(("groups", "right", "wrong", "equal"), [
    (([RIGHT] * 4, [WRONG] * 4, [RIGHT, WRONG] * 2, [WRONG] * 4), 1 / 4, 2 / 4, 3 / 4),
    (([RIGHT] * 4, [RIGHT] * 3 + [WRONG], [WRONG] * 3 + [RIGHT], [RIGHT] * 4), 2 / 4, 0, 2 / 4),
    # The rewards of groups that are all right or all wrong may differ still, as by their format.
    (([RIGHT | {"overall": k} for k in range(4)], [WRONG | {"overall": k} for k in range(4)], [RIGHT] * 4,
      [{"accuracy": 0.5}] * 4), 2 / 4, 1 / 4, 2 / 4),
    ((*[[{"overall": 1.0, "length": 1.0}] * 4] * 4,), None, None, 1),  # rewards of the user's alone
])
def test_groups_that_are_all_right_or_all_wrong_are_counted(tmp_path, groups, right, wrong, equal):
    record = judged(small_trainer(tmp_path), *groups)
    assert (record.get("reward/frac_all_right"), record.get("reward/frac_all_wrong")) == (right, wrong)
    assert record["reward/frac_zero_std"] == equal


def test_a_reason_is_a_fraction_of_all_responses_and_a_reward_the_mean_of_those_that_have_it(tmp_path):
    first = [RIGHT | {"reason/parsed": 1.0, "style": 0.5}] * 3 + [WRONG | {"reason/letter": 1.0}]
    record = judged(small_trainer(tmp_path), first, *[[WRONG | {"reason/unread": 1.0}] * 4] * 2, [RIGHT] * 4)
    assert {key: value for key, value in record.items() if "/reason/" in key} == {
        "reward/reason/letter": 1 / 16, "reward/reason/parsed": 3 / 16, "reward/reason/unread": 8 / 16}
    assert (record["reward/style"], record["reward/accuracy"]) == (0.5, 7 / 16)


def test_a_run_whose_responses_are_all_cut_off_says_so_once_and_in_its_report(tmp_path):
    notes = []
    trainer = small_trainer(tmp_path, lambda ids, row: 0.0, notes=notes, phase={"steps": 6, "max_response_tokens": 3})
    trainer.processor.stop_ids = ()
    for _ in range(6):
        assert trainer.step()["response_length/clip_ratio"] == 1
    sentence = ("every response of the last 5 steps was cut off at 3 tokens, before its end: raise "
                "phases.train.max_response_tokens, or ask for shorter answers in prompt.system")
    assert [note for note in notes if not note.startswith("train ")] == [f"step 5: {sentence}"]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 6
    assert write_report(tmp_path).read_text().count(f"Phase train, step 5: {sentence}.") == 1


def test_a_run_that_learns_says_nothing(tmp_path):
    notes = []
    trainer = small_trainer(tmp_path, notes=notes, phase={"steps": 6})
    records = [trainer.step() for _ in range(6)]
    assert all(record["actor/grad_norm"] > 0 and record["reward/frac_zero_std"] < 1 for record in records)
    assert len(notes) == 6 and all(note.startswith("train ") for note in notes)
