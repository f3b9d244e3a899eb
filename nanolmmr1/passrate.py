"""How hard rows are for a model: a column with the share of its sampled responses that are right.

    python -m nanolmmr1.passrate MODEL ROWS OUT [--samples 8] [--without-images] [--column NAME]
                                 [--recipe NAME_OR_FILE] [dotted.key=value ...]
    torchrun -m nanolmmr1.passrate ...      one process per GPU

Prompts, kernels, engine and the sampling settings of the last phase are those of the recipe; `defaults.KEY=VALUE` sets
one, as in defaults.temperature=0.7. A response is right if its accuracy reward is 1. OUT, a .jsonl or .parquet, is ROWS
with the column `pass_rate`, which is null for a row that cannot be asked. With --without-images, pictures and their
markers are left out, and the column is `pass_rate_without_images`: a row that is solved without its picture needs none.

Results are kept in OUT.cache, by the contents of rows, settings and model. The same command goes on after a kill; later
ones with this OUT and column ask only what is new. Rows with the same contents are asked once.

Exit status: 0; 2 something is wrong (the message says what); 143 or 130 stopped by SIGTERM or Ctrl-C.

Next: caption.py, pictures in words.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanolmmr1.data.columns import COLUMNS
from nanolmmr1.data.group import Group
from nanolmmr1.data.images import MARKER
from nanolmmr1.data.schemas import OURS
from nanolmmr1.data.store import Row, picture_hash
from nanolmmr1.errors import UserError
from nanolmmr1.parallel import dist
from nanolmmr1.prepare import sampling
from nanolmmr1.prepare.output import Record, to_record, write_rows
from nanolmmr1.reward.judge import Judge
from nanolmmr1.rollout.sampler import SamplingParams

BINS = {"0": 0.0, "(0, 0.25]": 0.25, "(0.25, 0.5]": 0.5, "(0.5, 0.75]": 0.75, "(0.75, 1)": 1 - 1e-9, "1": 1.0}


def main(args: list[str]) -> None:
    """Run the command; see the docstring of this file."""
    parser = sampling.parser("passrate", __doc__ or "")
    parser.add_argument("--samples", type=int, default=8, help="responses per row (8)")
    parser.add_argument("--without-images", action="store_true", help="ask without pictures")
    parser.add_argument("--column", help="its name, instead of pass_rate or pass_rate_without_images")
    options = parser.parse_intermixed_args(args)
    column = options.column or "pass_rate" + "_without_images" * options.without_images
    if column in {OURS, *COLUMNS} or column.startswith("video"):
        raise UserError(f"--column={column} is a column of the rows: choose another name")
    if not 0 < options.samples <= 1 << 16:
        raise UserError(f"--samples={options.samples}: 1 to {1 << 16} are possible")
    cfg = sampling.read_recipe(options)
    # Only the accuracy counts, and a user's function may cost money.
    reward = cfg.reward.model_copy(update={"functions": {}})
    with sampling.opened(cfg, options.rows, options.out, column) as session, Judge(reward) as judge:
        judge.workers.between = session.watch.check
        PassRate(session, judge, options.samples, options.without_images).write(options.out, column)


class PassRate:
    """The pass rates of a session's rows.

    Args:
        samples: responses per row. without_images: ask without pictures.
    """

    def __init__(self, session: sampling.Session, judge: Judge, samples: int, without_images: bool) -> None:
        self.session, self.judge, self.without_images = session, judge, without_images
        phase, processor = session.phase, session.processor
        self.params = SamplingParams(
            samples, phase.max_response_tokens, phase.temperature, phase.top_p, phase.top_k, processor.stop_ids,
            processor.banned_ids,
        )  # fmt: skip
        self.keys: list[str] = []  # per row; "" if a picture cannot be read; on rank 0

    def write(self, out: Path, column: str) -> None:
        """Ask for all rows that are not known, write OUT and print the table."""
        session = self.session
        question = sampling.Question(self.questions, self.params, session.phase.captions, self.right)
        asked = session.ask("sampling", self.find, question)

        def finish() -> None:
            write_rows(out, self.records(out, column))
            sampling.print_table(f"{column}, {self.params.num_responses} samples a row", self.summary(asked))

        dist.on_main(finish)

    def find(self) -> dict[str, int]:
        """Key -> index of a row with it."""
        session, params, reward = self.session, self.params, self.session.cfg.reward
        settings = session.settings() | dataclasses.asdict(params)
        settings |= dict(option_value=reward.option_value, verify_s=reward.verify_s)
        common = sampling.digest(settings)
        with session.display.busy("reading rows", len(session.rows)) as advance:
            for row in session.rows:
                self.keys.append(self.key(self.as_asked(row), common))
                advance()
        return {key: i for i, key in enumerate(self.keys) if key}

    def key(self, row: Row, common: str) -> str:
        """The key of a row as it is asked. A row of text has one key, with or without images."""
        try:
            pictures = [picture_hash(item) for item in row.images]
        except OSError:
            return ""
        caption = row.caption * self.session.phase.captions
        return sampling.digest([common, row.problem, row.answer, row.options, pictures, caption])

    def as_asked(self, row: Row) -> Row:
        if not (self.without_images and row.images):
            return row
        return dataclasses.replace(row, problem=row.problem.replace(MARKER, "").strip(), images=[])

    def questions(self, items: sampling.Items) -> list[Row]:
        return [self.as_asked(self.session.rows[index]) for _, index in items]

    def right(self, items: sampling.Items, groups: list[Group | str]) -> list[Any]:
        """Per item the number of right responses, or the reason why the row cannot be asked."""
        rows = self.questions(items)
        texts = [[] if isinstance(group, str) else [self.session.processor.decode(r.ids) for r in group.responses]
                 for group in groups]
        scores = iter(self.judge.score([(text, row.public()) for row, of in zip(rows, texts, strict=True)
                                        for text in of]))  # fmt: skip
        right = [sum(next(scores)["accuracy"] == 1 for _ in of) for of in texts]
        return [group if isinstance(group, str) else count for group, count in zip(groups, right, strict=True)]

    def rate(self, key: str) -> float | None:
        """The pass rate of a row; None if it could not be asked."""
        result = self.session.known.get(key)
        return result / self.params.num_responses if isinstance(result, int) else None

    def records(self, out: Path, column: str) -> Iterator[Record]:
        for key, row in zip(self.keys, self.session.rows, strict=True):
            yield to_record(row, out) | {column: self.rate(key)}

    def summary(self, asked: int) -> Iterator[tuple[str, str]]:
        """Lines of the table: counts of rows, then the histogram."""
        known = self.session.known
        failed = Counter(result for result in (known.get(key, "picture unreadable") for key in self.keys)
                         if isinstance(result, str))  # fmt: skip
        yield "rows", f"{len(self.keys):,}"
        yield "asked now", f"{asked:,}"
        yield "known before, or like another row", f"{sum(key in known for key in self.keys) - asked:,}"
        yield from ((f"not asked: {why}", f"{count:,}") for why, count in failed.most_common())
        yield from ((f"dropped: {why}", f"{count:,}") for why, count in self.session.dropped.items())
        rates = [rate for rate in map(self.rate, self.keys) if rate is not None]
        if rates:
            yield "mean pass rate", f"{sum(rates) / len(rates):.3f}"
        bins = Counter(next(name for name, top in BINS.items() if rate <= top) for rate in rates)
        yield from ((f"pass rate {name}", f"{bins[name]:,}") for name in BINS)


if __name__ == "__main__":
    sampling.run(main)
