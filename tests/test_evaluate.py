"""Held-out accuracy: greedy answers to every row, each task's share of right ones."""

import pytest
from small import BANNED, STOP, Bell, SmallJudge, SmallProcessor, small_policy

from nanolmmr1.data.rows import Row
from nanolmmr1.errors import Preempted
from nanolmmr1.report.display import Display
from nanolmmr1.rollout.local import LocalSampler
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.run.evaluate import evaluate

ROWS = [Row(str(n), "") for n in range(12)]


def accuracy(tasks, rule, max_tokens=6):
    sampler = LocalSampler(small_policy())
    return evaluate(tasks, sampler, SmallProcessor(), SmallJudge(rule), max_tokens, Display({}, quiet=True))


def test_accuracy_is_the_share_of_greedy_answers_that_are_right():
    sampler = LocalSampler(small_policy())
    params = SamplingParams(1, 6, temperature=0.0, stop_ids=(STOP,), banned_ids=BANNED)
    groups = sampler.generate([SmallProcessor().prepare(row, False) for row in ROWS], params, [(n,) for n in range(12)])
    answers = {int(g.prompt.row.problem): g.responses[0].ids.tolist() for g in groups}

    def right(ids, row):  # half of the rows are out of luck
        return ids == answers[row] and row % 2

    assert accuracy({"all": (ROWS, False), "odd": (ROWS[1::2], True)}, right) == {"all": 0.5, "odd": 1.0}


def test_rows_are_all_asked_however_many_there_are():
    asked = []
    accuracy({"many": (ROWS * 30, False)}, lambda ids, row: asked.append(row) or 0.0, max_tokens=1)
    assert asked == 30 * list(range(12))


def test_answers_are_no_longer_than_asked():
    lengths = []
    accuracy({"all": (ROWS, False)}, lambda ids, row: lengths.append(len(ids)) or 0.0, max_tokens=3)
    assert max(lengths) == 3


def test_a_run_that_is_told_to_stop_prepares_no_further_prompt():
    class Processor(SmallProcessor):
        prepared = 0

        def prepare(self, row, captions):
            self.prepared += 1
            return super().prepare(row, captions)

    processor, watch = Processor(), Bell()

    def should_stop():
        watch.stopping = processor.prepared == 5
        return watch.should_stop()

    sampler, judge = LocalSampler(small_policy()), SmallJudge(lambda *_: 1.0)
    with pytest.raises(Preempted):
        evaluate({"all": (ROWS, False)}, sampler, processor, judge, 3, Display({}, quiet=True), should_stop)
    assert processor.prepared == 5
