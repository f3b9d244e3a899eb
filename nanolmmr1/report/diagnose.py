"""Runs that cannot learn: the likely cause and the key to change, from the records of metrics.jsonl.

Next: page.py, report.html.
"""

from collections.abc import Callable, Mapping
from typing import Any

STEPS = 5  # in a row, before a cause is told

Record = Mapping[str, Any]
# (reward that the cause is about, whether a step shows it, sentence), the most specific first.
CAUSES: tuple[tuple[str, Callable[[Record], bool], str], ...] = (
    ("", lambda r: r.get("response_length/clip_ratio") == 1,
     "every response {when} was cut off at {length} tokens, before its end: raise "
     "phases.{phase}.max_response_tokens, or ask for shorter answers in prompt.system"),
    ("format", lambda r: r.get("reward/format") == 0,
     "no response {when} had the format that is rewarded: describe it in prompt.system, or change reward.format"),
    ("accuracy", lambda r: r.get("reward/frac_all_wrong") == 1,
     "every response {when} was wrong: the rows of phases.{phase}.data are too hard, or gold answers or the reward are "
     "wrong; compare answers with responses in samples.jsonl or report.html"),
    ("accuracy", lambda r: r.get("reward/frac_all_right") == 1,
     "every response {when} was right: the rows of phases.{phase}.data are too easy, give harder ones"),
    ("", lambda r: r.get("reward/frac_zero_std") == 1,
     "all responses to the same prompt earned the same reward in each step {when}, so no group teaches anything: raise "
     "phases.{phase}.temperature or phases.{phase}.group_size, or set phases.{phase}.dynamic_sampling=true"),
    ("", lambda r: r.get("actor/grad_norm") == 0,
     "the gradient {when} was exactly 0 although rewards differ: every token is clipped or masked, see "
     "phases.{phase}.objective and mismatch/* in metrics.jsonl"),
)


class Diagnosis:
    """Watches a run's records in order, and says once per phase when a cause begins to hold. A cause that was gone for
    STEPS steps and returns is told again. Of several causes only the most specific one is told.

    Args:
        steps: of each phase; one of fewer than STEPS steps is judged at its end.
        rewarded: which of "format" and "accuracy" have a weight in the reward.
    """

    def __init__(self, steps: Mapping[str, int], rewarded: Mapping[str, bool]) -> None:
        self.steps, self.rewarded = steps, rewarded
        self.phase = ""
        self.streaks = [0] * len(CAUSES)  # steps in a row that show each cause
        self.told: dict[int, int] = {}  # cause -> steps since the last one that showed it

    def see(self, record: Record) -> str:
        """The sentence that a step calls for, or ""."""
        if record["phase"] != self.phase:
            self.phase, self.streaks, self.told = record["phase"], [0] * len(CAUSES), {}
        for i, (reward, shows, _) in enumerate(CAUSES):
            self.streaks[i] = self.streaks[i] + 1 if shows(record) and self.rewarded.get(reward, True) else 0
        gaps = {i: 0 if self.streaks[i] else gap + 1 for i, gap in self.told.items()}
        self.told = {i: gap for i, gap in gaps.items() if gap < STEPS}
        needed = min(STEPS, self.steps.get(self.phase, STEPS))
        cause = next((i for i, streak in enumerate(self.streaks) if streak >= needed), None)
        if cause is None or cause in self.told:
            return ""
        self.told[cause] = 0
        when = f"of the last {needed} steps" if needed > 1 else "of the only step"
        return CAUSES[cause][2].format(phase=self.phase, when=when, length=record.get("response_length/max"))
