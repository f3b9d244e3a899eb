"""Held-out accuracy by task: greedy answers, judged by the accuracy reward alone."""

from nanolmmr1.rollout import SamplingParams


def evaluate(tasks, sampler, processor, judge, max_tokens, display):
    """Fraction of right answers per task.

    Args:
        tasks: name -> (rows, captions).
        max_tokens: of an answer; a longer one is judged as far as it goes.

    Returns:
        {task: fraction}
    """
    params = SamplingParams(
        1, max_tokens, temperature=0.0, stop_ids=processor.stop_ids, banned_ids=processor.banned_ids
    )
    accuracy = {}
    for name, (rows, captions) in tasks.items():
        right = 0
        with display.busy(f"evaluating {name}", len(rows)) as advance:
            for start in range(0, len(rows), 256):  # bounds the prompts held in memory
                part = rows[start : start + 256]
                prompts = [processor.prepare(row, captions) for row in part]
                groups = sampler.generate(prompts, params, [(0,)] * len(prompts), advance)
                texts = [processor.decode(group.responses[0].ids) for group in groups]
                verdicts = judge.score([(text, row.public()) for text, row in zip(texts, part, strict=True)])
                right += sum(verdict["accuracy"] for verdict in verdicts)
        accuracy[name] = right / len(rows)
    return accuracy
