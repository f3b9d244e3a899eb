"""A model's answers to benchmarks: asked for where they are not known, judged, and made items.

Next: summary.py, numbers.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nanolmmr1.benchmarks
import nanolmmr1.reward
from nanolmmr1.benchmarks.choose import Chosen, as_published, kept, spread, unique
from nanolmmr1.benchmarks.item import Item, Response
from nanolmmr1.benchmarks.table import Benchmark, subject
from nanolmmr1.data.group import Group
from nanolmmr1.data.images import image_size
from nanolmmr1.data.schemas import recognize
from nanolmmr1.data.store import Row, Rows, picture_hash
from nanolmmr1.errors import UserError
from nanolmmr1.prepare import sampling
from nanolmmr1.reward.judge import Judge
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.schema import Recipe

Said = tuple[str, int, bool]  # a response: text, tokens, whether it was cut off


class TestSet(NamedTuple):
    """The rows of a benchmark that models are asked about."""

    entry: Benchmark
    sources: list[str]
    rows: Rows
    ids: list[str]  # of the rows, each another one
    every: Rows  # also those beyond a limit
    every_id: list[str]  # the ids of those
    dropped: dict[str, int]  # rows of the source that are bad, by reason


def read_test(chosen: Chosen, cfg: Recipe, limit: int, note: Callable[[str], None]) -> TestSet:
    """Read a benchmark's rows; on all ranks together.

    Raises:
        UserError: its source cannot be read, has other columns, or lacks pictures.
    """
    entry, sources = chosen
    every, dropped = sampling.read_rows(sources, cfg, note, entry.schema)
    if lost := {why: count for why, count in dropped.items() if why.startswith("picture")}:
        raise UserError(f"{entry.name}: {lost}: a benchmark is not scored without its pictures; put them beside its "
                        "rows, or name their folder with data.image_dir")
    if not len(every := kept(every, entry)):
        raise UserError(f"{entry.name}: none of the rows of {', '.join(sources)} is of this benchmark")
    if entry.rows and len(every) != entry.rows:
        note(f"{entry.title}: {len(every):,} rows, and {entry.rows:,} are published")
    entry, places = _as_found(entry, every, note), spread(len(every), limit)
    ids = unique(row.id for row in every)
    return TestSet(entry, sources, every.subset(places), [ids[place] for place in places], every, ids, dropped)


def _as_found(entry: Benchmark, rows: Rows, note: Callable[[str], None]) -> Benchmark:
    """The entry with the columns that the rows have, and private if they are GPQA's, wherever they are from.

    Raises:
        UserError: no row has the column over whose values the score is a mean.
    """
    columns = [column for column in (*entry.subjects, entry.macro, entry.problem) if column]
    present = {column for column in columns if any(subject(row, column) for row in rows)}
    if entry.macro and entry.macro not in present:
        raise UserError(f"{entry.name}: no row has a column {entry.macro!r}, over whose values its score is a mean: "
                        "give the benchmark's own file")
    if entry.problem and entry.problem not in present:
        note(f"{entry.title}: no row has a column {entry.problem!r}, so intervals treat all rows as independent")
    subjects = tuple(column for column in dict.fromkeys((*entry.subjects, entry.macro)) if column in present)
    return entry._replace(subjects=subjects, private=entry.private or recognize(rows[0].extra).name == "gpqa")


@functools.cache
def judged_by() -> str:
    """A hash of the rules: responses are judged again when a file of theirs has changed."""
    found = hashlib.sha256()
    for room in (nanolmmr1.reward, nanolmmr1.benchmarks):
        for path in sorted(Path(*room.__path__).glob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


class Answers:
    """What one model answers.

    Args:
        label: of the model, in tables. official: ask with each benchmark's own prompt.
        leaked: benchmark -> ids of rows that a training set holds.
    """

    def __init__(self, label: str, session: sampling.Session, judge: Judge, params: SamplingParams, official: bool,
                 leaked: dict[str, list[str]]) -> None:
        self.label, self.session, self.judge, self.params = label, session, judge, params
        self.official, self.leaked = official, leaked
        self.keys: dict[str, list[str]] = {}  # benchmark -> key of each row; on rank 0
        self.reduced: dict[str, int] = {}  # benchmark -> rows with a picture above the pixel limit; on rank 0

    def ask(self, test: TestSet, common: str) -> int:
        """Have the rows answered that are not known; the number of them. `common`: what all results depend on."""
        def judged(items: sampling.Items, groups: list[Group | str]) -> list[Any]:
            return self.judged(test, items, groups)

        question = sampling.Question(lambda items: [self.as_asked(test, place) for _, place in items], self.params,
                                     False, judged)
        return self.session.ask(f"{self.label} on {test.entry.title}", lambda: self.find(test, common), question)

    def as_asked(self, test: TestSet, place: int) -> Row:
        row = test.rows[place]
        return as_published(row, test.entry) if self.official else row

    def find(self, test: TestSet, common: str) -> dict[str, int]:
        """Key -> place of a row with it, on rank 0. Known responses that other rules have judged are judged again."""
        keys, most, reduced = list[str](), self.session.cfg.prompt.max_pixels, 0
        entry = test.entry
        with self.session.display.busy(f"reading {test.entry.title}", len(test.rows)) as advance:
            for place, row in enumerate(test.rows):
                asked = self.as_asked(test, place)
                try:
                    pictures = [picture_hash(item) for item in row.images]
                except OSError as error:
                    raise UserError(f"{test.entry.name}: a picture of row {row.id} is gone: {error}") from error
                reduced += any(width * height > most for width, height in map(image_size, row.images))
                keys.append(sampling.digest([common, asked.problem, row.answer, row.options, row.gold_rule, pictures,
                                             entry.name, entry.private, row.extra if entry.lenient else ""]))
                advance()
        self.keys[test.entry.name], self.reduced[test.entry.name] = keys, reduced
        if reduced:
            self.session.display.note(f"{test.entry.title}: {reduced:,} of {len(test.rows):,} rows have a picture that "
                                      f"is reduced to prompt.max_pixels={most:,}")
        places = {key: place for place, key in enumerate(keys)}
        self.judge_again(test, places)
        known = self.session.known
        self.session.kept({key: known[key] for key in places if key in known})
        return places

    def judge_again(self, test: TestSet, places: dict[str, int]) -> None:
        """Judge known responses by the present rules. Those without a text are forgotten."""
        known = self.session.known
        stale = [key for key in places if isinstance(known.get(key), dict) and known[key]["by"] != judged_by()]
        if stale and not test.entry.private:
            said = [[(each["text"], each["tokens"], each["cut"]) for each in known[key]["responses"]] for key in stale]
            results = self.results(test, [places[key] for key in stale], said)
            found = {key: result | {"engine": known[key]["engine"]} for key, result in zip(stale, results, strict=True)}
            self.session.cache.append(found)
            known |= found
        elif stale:
            for key in stale:
                del known[key]

    def judged(self, test: TestSet, items: sampling.Items, groups: list[Group | str]) -> list[Any]:
        """Per item its judged responses, or the reason why the row cannot be asked."""
        decode = self.session.processor.decode
        asked = [(place, [(decode(r.ids), len(r.ids), r.finish == "length") for r in group.responses])
                 for (_, place), group in zip(items, groups, strict=True) if not isinstance(group, str)]
        found = iter(self.results(test, [place for place, _ in asked], [said for _, said in asked]))
        return [group if isinstance(group, str) else next(found) for group in groups]

    def results(self, test: TestSet, places: Sequence[int], said: Sequence[Sequence[Said]]) -> list[Any]:
        """Judge the responses to rows."""
        rows = [test.rows[place] for place in places]
        pairs = [(text, row.public()) for row, each in zip(rows, said, strict=True) for text, *_ in each]
        verdicts = iter(self.judge.verdicts(pairs))
        lenient = test.entry.lenient or (lambda text, row: None)

        def response(text: str, tokens: int, cut: bool, row: Row) -> dict[str, Any]:
            verdict = next(verdicts)
            shown, answer = text, verdict.answer
            if test.entry.private:  # a letter tells nothing, and answers that are alike vote together
                shown, answer = "", answer if len(answer) < 2 else sampling.digest(answer)[:8]
            return Response(shown, answer, verdict.right, verdict.reason, verdict.undecided, lenient(text, row),
                            verdict.format, tokens, cut)._asdict()

        engine = self.session.cfg.rollout.engine
        return [{"by": judged_by(), "engine": engine, "responses": [response(*each, row) for each in texts]}
                for row, texts in zip(rows, said, strict=True)]

    def engines(self, test: TestSet) -> set[str]:
        """The engines that the responses are of; on rank 0."""
        known = [self.session.known[key] for key in self.keys[test.entry.name]]
        return {result["engine"] for result in known if isinstance(result, dict)}

    def items(self, test: TestSet, found: dict[str, Any]) -> Iterator[Item]:
        """The rows whose keys are in `found`, in their order; on rank 0."""
        entry, leaked = test.entry, self.leaked.get(test.entry.name)
        for place, (key, name) in enumerate(zip(self.keys[entry.name], test.ids, strict=True)):
            if (result := found.get(key)) is not None:
                row, is_fault = test.rows[place], isinstance(result, str)  # read from disk, with its pictures
                yield Item(
                    self.label, entry.name, name, subject(row, entry.problem) or name,
                    {column: subject(row, column) for column in entry.subjects}, "" if entry.private else row.answer,
                    [] if is_fault else [Response(**each) for each in result["responses"]],
                    result if is_fault else "", None if leaked is None else name in leaked)
