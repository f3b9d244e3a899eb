"""Held-out accuracy by task: greedy answers, scored by the accuracy reward alone.

Next: checkpoint.py, atomic checkpoints.
"""

import functools
from collections.abc import Callable, Sequence

import torch

from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import Row
from nanolmmr1.errors import Preempted
from nanolmmr1.parallel import dist
from nanolmmr1.report.display import Display
from nanolmmr1.reward.judge import Judge
from nanolmmr1.rollout.sampler import Sampler, SamplingParams, never_stop

ROWS = 256  # prepared at a time by a rank: bounds the prompts held in memory

Tasks = dict[str, tuple[Sequence[Row], bool]]  # name -> rows, whether captions are shown


def evaluate(
    tasks: Tasks,
    sampler: Sampler,
    processor: Processor,
    judge: Judge,
    max_tokens: int,
    display: Display,
    should_stop: Callable[[], bool] = never_stop,
) -> dict[str, float]:
    """Fraction of right answers per task; each rank answers its share of the rows.

    Args:
        max_tokens: of an answer; a longer one is truncated and judged as it stands.
        should_stop: asked between prompts and between tokens.

    Raises:
        Preempted: on all ranks, after `should_stop` was True on one.
        UserError: a reward function or the sampler failed.
    """
    params = SamplingParams(
        1, max_tokens, temperature=0.0, stop_ids=processor.stop_ids, banned_ids=processor.banned_ids
    )
    engines, engine = dist.size() // sampler.ranks_per_engine, dist.rank() // sampler.ranks_per_engine
    counts = dist.rank() % sampler.ranks_per_engine == 0  # ranks of one engine answer the same rows
    accuracy = {}
    for name, (rows, captions) in tasks.items():
        mine = rows[dist.my_slice(len(rows), engines, engine)]
        with display.busy(f"evaluating {name}", len(mine)) as advance:
            count = functools.partial(
                _count_right, mine, captions, params, sampler, processor, judge, advance, should_stop
            )
            right = dist.together(count)
        accuracy[name] = float(dist.all_reduce_sum(torch.tensor(float(right * counts)))) / len(rows)
    return accuracy


def _count_right(
    rows: Sequence[Row],
    captions: bool,
    params: SamplingParams,
    sampler: Sampler,
    processor: Processor,
    judge: Judge,
    advance: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> float:
    """Number of rows that this rank answers right."""
    right = 0.0
    for start in range(0, len(rows), ROWS):
        prompts, chunk = [], rows[start : start + ROWS]
        for row in chunk:
            if should_stop():
                raise Preempted
            prompts.append(processor.prepare(row, captions))
        seeds = [(0,)] * len(prompts)
        groups = sampler.generate(prompts, params, seeds, on_progress=advance, should_stop=should_stop)
        texts = [processor.decode(group.responses[0].ids) for group in groups]
        scores = judge.score([(text, row.public()) for text, row in zip(texts, chunk, strict=True)])
        right += sum(score["accuracy"] for score in scores)
    return right
