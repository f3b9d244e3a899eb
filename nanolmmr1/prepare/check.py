"""Whether a row can be trained on, and why not.

A row is kept if its pictures open, its prompt fits, a response with its gold answer earns the reward, it is inside the
bands of `data_filter`, no earlier row asks the same, and no benchmark holds it.

Next: decontaminate.py, rows of benchmarks.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from nanolmmr1.data.images import open_checked
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.readers import BadRow, shown
from nanolmmr1.data.rows import measured, out_of_band
from nanolmmr1.data.store import Row
from nanolmmr1.errors import UserError
from nanolmmr1.prepare.decontaminate import Contamination, Fingerprint, fingerprint
from nanolmmr1.reward.extract import gold_answer
from nanolmmr1.reward.judge import Judge
from nanolmmr1.schema import Phase

MOST = 200  # characters of an answer by which duplicates are told apart
Dropped = tuple[str, str, str]  # id, reason, what is wrong


class Looked(NamedTuple):
    """What one row's pictures say."""

    fault: tuple[str, str] | None  # reason, what is wrong
    key: str  # "" with a fault; hash of what is asked: the problem's words, its options, the pixels of its pictures
    prints: list[Fingerprint]


class Checks:
    """The checks of all rows, in their order.

    Args:
        phase: its data_filter, its captions, and with a processor its max_prompt_tokens count.
        processor: None: prompts are not measured. benchmarks: None: rows are not compared with any.
    """

    def __init__(self, phase: Phase, judge: Judge, processor: Processor | None, benchmarks: Contamination | None,
                 pool: ThreadPoolExecutor) -> None:
        self.phase, self.judge, self.processor, self.benchmarks, self.pool = phase, judge, processor, benchmarks, pool
        self.asked: dict[str, str] = {}  # key -> start of the gold answer, of the rows kept so far

    def check(
        self, rows: Sequence[Row]
    ) -> tuple[list[bool], list[Dropped], list[dict[str, Any]], dict[str, str]]:  # fmt: skip
        """Check the next rows.

        Returns:
            per row whether it is kept; the dropped ones; every row that a benchmark may hold, dropped or not; and what
            `asked` has got.
        """
        dropped: list[Dropped] = []
        asked: dict[str, str] = {}
        looked = list(self.pool.map(self._look, rows))
        # One after the other: a tokenizer that tokenizes special tokens as text is switched, for all threads.
        faults = [each.fault or self._unfit(row) for row, each in zip(rows, looked, strict=True)]
        self._judge(rows, faults)
        hits: list[dict[str, Any]] = []
        for place, (row, each) in enumerate(zip(rows, looked, strict=True)):
            leak = self._leaks(row, each.prints, hits) if each.key else None
            faults[place] = faults[place] or self._repeats(row, each.key) or leak
            if fault := faults[place]:
                dropped.append((row.id, *fault))
            else:
                self.asked[each.key] = asked[each.key] = gold_answer(row.answer)[:MOST]
        return [fault is None for fault in faults], dropped, hits, asked

    def _look(self, row: Row) -> Looked:
        content, prints = hashlib.sha256(), []
        words = f"{' '.join(row.problem.split())}\0{row.options}"
        content.update(words.encode())
        try:
            for item in row.images:
                image = open_checked(item)
                content.update(repr(image.size).encode() + image.tobytes())
                if self.benchmarks:
                    prints.append(fingerprint(image))
        except BadRow as error:
            return Looked((error.kind, str(error)), "", [])
        return Looked(None, content.hexdigest()[:32], prints)

    def _unfit(self, row: Row) -> tuple[str, str] | None:
        if reason := out_of_band(row, self.phase.data_filter):
            return reason, reason
        if not self.processor:
            return None
        most = self.phase.max_prompt_tokens
        try:
            tokens, _ = measured(row, self.processor, self.phase.captions, most)
        except UserError as error:
            return "no prompt", str(error)
        return ("prompt too long", f"more than {most:,} tokens") if tokens > most else None

    def _judge(self, rows: Sequence[Row], faults: list[tuple[str, str] | None]) -> None:
        """Whether the reward gives a gold answer to itself."""
        whole = [place for place, fault in enumerate(faults) if not fault]
        problems = self.judge.gold_problems([rows[place].public() for place in whole])
        said = [(f"\\boxed{{{gold_answer(rows[place].answer)}}}", rows[place].public()) for place in whole]
        for place, problem, score in zip(whole, problems, self.judge.score(said), strict=True):
            if problem or not score["accuracy"]:
                reason = problem or "gold is not equal to itself"
                faults[place] = reason, f"{reason}: {shown(rows[place].answer, 80)}"

    def _repeats(self, row: Row, key: str) -> tuple[str, str] | None:
        if (earlier := self.asked.get(key)) is None:
            return None
        if earlier == (gold := gold_answer(row.answer)[:MOST]):
            return "duplicate", "an earlier row has the same problem and pictures"
        return "duplicate with another answer", f"{shown(gold, 40)}, and an earlier row has {shown(earlier, 40)}"

    def _leaks(self, row: Row, prints: list[Fingerprint], hits: list[dict[str, Any]]) -> tuple[str, str] | None:
        if not self.benchmarks or not (found := self.benchmarks.find(row, prints)):
            return None
        hits += ({**hit._asdict(), "id": row.id, "benchmark_id": hit.id, "dropped": hit.contaminated} for hit in found)
        return ("in a benchmark", f"{found[0].benchmark} {found[0].id}") if found[0].contaminated else None
