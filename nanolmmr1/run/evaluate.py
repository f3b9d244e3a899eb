"""Held-out accuracy by task: greedy answers, judged by the accuracy reward alone."""

import torch

from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.parallel import dist
from nanolmmr1.rollout import SamplingParams

ROWS = 256  # a rank prepares at a time: bounds the prompts held in memory


def evaluate(tasks, sampler, processor, judge, max_tokens, display, check=lambda done: None):
    """Fraction of right answers per task, each rank answering its share.

    Args:
        tasks: name -> (rows, captions).
        max_tokens: of an answer; a longer one is judged as far as it goes.
        check: called between prompts and between tokens; may raise Preempted, which all ranks then do.

    Returns:
        {task: fraction}
    """
    params = SamplingParams(
        1, max_tokens, temperature=0.0, stop_ids=processor.stop_ids, banned_ids=processor.banned_ids
    )
    accuracy = {}
    parts, part = dist.size() // sampler.ranks, dist.rank() // sampler.ranks
    for name, (rows, captions) in tasks.items():
        right, error = torch.zeros(2), ""  # right answers, and ranks that are to stop
        own = rows[dist.my_slice(len(rows), parts, part)]
        with display.busy(f"evaluating {name}", len(own)) as advance:

            def told(done, advance=advance):
                check(done)
                advance(done)

            try:
                for start in range(0, len(own), ROWS):
                    some, prompts = own[start : start + ROWS], []
                    for row in some:
                        check(0)
                        prompts.append(processor.prepare(row, captions))
                    groups = sampler.generate(prompts, params, [(0,)] * len(prompts), told)
                    texts = [processor.decode(group.responses[0].ids) for group in groups]
                    verdicts = judge.score([(text, row.public()) for text, row in zip(texts, some, strict=True)])
                    right[0] += sum(verdict["accuracy"] for verdict in verdicts)
            except Preempted:
                right[1] = 1
            except UserError as caught:
                if dist.size() == 1:
                    raise
                error = str(caught)
            if dist.rank() % sampler.ranks:
                right[0] = 0  # another rank of the same engine has counted these
            right, stopping = dist.all_reduce_sum(right).tolist()
        if stopping:
            raise Preempted
        dist.share_error(error)
        accuracy[name] = right / len(rows)
    return accuracy
