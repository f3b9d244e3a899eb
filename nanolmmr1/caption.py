"""Captions of pictures: a column with a model's description of each row's pictures, as Infi-MMR's second phase shows.

    python -m nanolmmr1.caption MODEL ROWS OUT [--leak keep|redo|drop] [--recipe NAME_OR_FILE] [dotted.key=value ...]
    torchrun -m nanolmmr1.caption ...      one process per GPU

The recipe's section `caption` has the instructions; its engine, kernels and pixel limits count, its system prompt and
templates do not. OUT, a .jsonl or .parquet, is ROWS with the column `caption`. A row with several pictures has their
captions as "Image 1: ...". Rows without pictures stay as they are. A picture is described once, however many rows show
it, and captions are kept in OUT.cache, by contents of the picture, instruction, settings and model.

A caption that states the gold answer teaches nothing: it is a leak, see `leaks`. --leak keep only counts them (the
default); drop leaves such a row without caption, and a phase with captions then leaves it out; redo first samples up to
three further captions at temperature 1.

Exit status: 0; 2 something is wrong (the message says what); 143 or 130 stopped by SIGTERM or Ctrl-C.

Next: benchmarks/table.py, benchmarks.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanolmmr1.data.group import Group
from nanolmmr1.data.images import MARKER
from nanolmmr1.data.store import Row, picture_hash
from nanolmmr1.errors import UserError
from nanolmmr1.parallel import dist
from nanolmmr1.prepare import sampling
from nanolmmr1.prepare.decontaminate import OPTION_CHARS
from nanolmmr1.prepare.output import Record, to_record, write_rows
from nanolmmr1.reward.choice import gold_letters, listed_options, option_values
from nanolmmr1.reward.extract import final_answer, gold_answer
from nanolmmr1.reward.normal import normalise
from nanolmmr1.reward.rules import decide
from nanolmmr1.reward.values import Value, equal_values, read_value
from nanolmmr1.rollout.sampler import SamplingParams

ATTEMPTS = 4  # captions of a picture, with --leak redo
NUMBERS = dict(zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True))
SENTENCE = re.compile(r"(?<=[.!?。])\s+|\n+")
LIST_MARK = re.compile(r"^[ \t]*(?:[-*][ \t]+)?[0-9]{1,2}[.)][ \t]", re.M)
# A number as a whole token: no part of a name (A1, x_2), of a power (x^2), of a decimal or of a time (7:30).
NUMBER = re.compile(r"(?<![\w.^{:/\\])(?:(?<![\w)}\]])-\s?)?"
                    r"(?:\\frac\{\d+\}\{\d+\}|\d+ \d+/\d+|\d+/\d+|\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)"
                    r"(?:\s?%|(?=(?:[cdkm]?m|k?g|ml|in|ft)\b)|(?![\w/]|\.\d|:\d|\^\{?-?\w|,\d{3}(?!\d)))", re.A)
SAYS = re.compile(r"\\boxed|\b(?:answers?|(?:correct|right|best)\s+(?:options?|choices?))\b.{0,20}?"
                  r"(?:\bis\b|\bare\b|\bbe\b|[:=])|####|答案", re.I | re.S)  # fmt: skip
# An angle may be right, so that is no statement about an option.
CORRECT = re.compile(r"(?<![A-Za-z])[(\[]?([A-J])[)\]]?\s+(?:is|would be|must be)\s+(?:the\s+)?(?:only\s+)?"
                     r"(?:correct|answer|right\s+(?:answer|option|choice|one))\b")  # fmt: skip
COMMON = {"yes", "no", "true", "false"}  # such answers are words of any description
OPTIONS = re.compile(r"(?:^|[\s,;])[(\[]?A\s*[)\].:]")  # where a problem begins to list them


def main(args: list[str]) -> None:
    """Run the command; see the docstring of this file."""
    parser = sampling.parser("caption", __doc__ or "")
    parser.add_argument("--leak", choices=["keep", "redo", "drop"], default="keep",
                        help="captions that state the gold answer (keep)")  # fmt: skip
    options = parser.parse_intermixed_args(args)
    cfg = sampling.read_recipe(options)
    for template in (cfg.caption.template, *cfg.caption.by_kind.values()):
        if MARKER in template or not template.strip():
            raise UserError(f"caption.template={template!r:.200}: it must not be empty, and {MARKER} is put before it")
    if cfg.caption.by_kind and not cfg.caption.kind_column:
        raise UserError("caption.by_kind needs caption.kind_column, the name of the column with a row's kind")
    cfg.prompt = cfg.prompt.model_copy(update={"system": "", "template": "{problem}"})
    # A vLLM engine has room for the longest of phases and evaluation.
    cfg.evaluate.max_response_tokens = max(cfg.evaluate.max_response_tokens or 0, cfg.caption.max_tokens)
    with sampling.opened(cfg, options.rows, options.out, "caption") as session:
        Captions(session, options.leak).write(options.out)


class Captions:
    """The captions of a session's rows.

    Args:
        leak: "keep", "redo" or "drop".
    """

    def __init__(self, session: sampling.Session, leak: str) -> None:
        self.session, self.leak, self.section = session, leak, session.cfg.caption
        self.attempts = ATTEMPTS if leak == "redo" else 1
        self.common = ""  # digest of what all captions depend on; on rank 0, as is all below
        self.hashes: list[list[str]] = []  # per row, of its pictures; "" if it cannot be read
        self.first: set[str] = set()  # keys of the pictures' first captions
        self.counts = Counter[str]()  # of rows and their pictures, for the table

    def write(self, out: Path) -> None:
        """Ask for all captions that are not known, write OUT and print the table."""
        asked = [self.session.ask("captioning" + f", attempt {attempt + 1}" * bool(attempt),
                                  functools.partial(self.find, attempt), self.question(attempt))
                 for attempt in range(self.attempts)]  # fmt: skip

        def finish() -> None:
            write_rows(out, self.records(out))
            sampling.print_table("captions", self.summary(asked[0]))

        dist.on_main(finish)

    def find(self, attempt: int) -> dict[str, tuple[int, int, int]]:
        """Key -> row, picture and attempt, of the captions that this attempt needs."""
        session, needed = self.session, dict[str, tuple[int, int, int]]()
        if not attempt:
            limits = self.section.max_tokens, self.section.first_temperature
            self.common = sampling.digest([session.settings(), *limits])
        with session.display.busy("reading rows", len(session.rows)) as advance:
            for index, row in enumerate(session.rows):
                if not attempt:
                    self.hashes.append([_hash(item) for item in row.images])
                for picture, digest in enumerate(self.hashes[index]):
                    key = self.key(row, digest, attempt)
                    if digest and (not attempt or self.choose(row, digest)[1] == "dropped"):
                        needed[key] = index, picture, attempt
                advance()
        self.first = self.first or set(needed)
        return needed

    def template(self, row: Row) -> str:
        kind = row.public().get(self.section.kind_column)
        return self.section.by_kind.get(str(kind), self.section.template)

    def key(self, row: Row, digest: str, attempt: int) -> str:
        return sampling.digest([self.common, self.template(row), digest, attempt])

    def texts(self, row: Row, digest: str) -> list[str]:
        """The known captions of a picture, first attempt first."""
        results = [self.session.known.get(self.key(row, digest, attempt)) for attempt in range(self.attempts)]
        return [result["text"] for result in results if isinstance(result, dict)]

    def question(self, attempt: int) -> sampling.Question:
        processor = self.session.processor
        params = SamplingParams(
            1, self.section.max_tokens, 1.0 if attempt else self.section.first_temperature,
            stop_ids=processor.stop_ids, banned_ids=processor.banned_ids,
        )  # fmt: skip
        return sampling.Question(self.pictures, params, False, self.captions)

    def pictures(self, items: sampling.Items) -> list[Row]:
        """A row of one picture and its instruction per item."""
        rows = [(self.session.rows[index], picture) for _, (index, picture, _) in items]
        return [Row(f"{MARKER}\n{self.template(row)}", "", [row.images[picture]], id=row.id) for row, picture in rows]

    def captions(self, items: sampling.Items, groups: list[Group | str]) -> list[Any]:
        """Per item {"text", "tokens", "finish"}, or the reason why the picture cannot be shown."""
        return [group if isinstance(group, str) else {
            "text": self.session.processor.decode(group.responses[0].ids).strip(),
            "tokens": len(group.responses[0].ids), "finish": group.responses[0].finish} for group in groups]

    def caption(self, row: Row, hashes: list[str]) -> str:
        """The caption of a row, "" if one of its pictures has none."""
        chosen = [self.choose(row, digest) for digest in hashes]
        texts = [text for text, _ in chosen]
        self.counts.update(what for _, what in chosen if what)
        self.counts["rows with a caption"] += all(texts)
        if len(texts) < 2:
            return texts[0]
        return "\n".join(f"Image {i}: {text}" for i, text in enumerate(texts, 1)) if all(texts) else ""

    def choose(self, row: Row, digest: str) -> tuple[str, str]:
        """The known caption of a row's picture that `leak` allows, or "", and what became of the first one if it leaks:
        "kept", "redone" or "dropped"."""
        texts = self.texts(row, digest)
        if not texts or not leaks(texts[0], row):
            return texts[0] if texts else "", ""
        if self.leak == "keep":
            return texts[0], "kept"
        clean = next((text for text in texts[1:] if text and not leaks(text, row)), "")
        return clean, "redone" if clean else "dropped"

    def records(self, out: Path) -> Iterator[Record]:
        for row, hashes in zip(self.session.rows, self.hashes, strict=True):
            row = dataclasses.replace(row, caption=self.caption(row, hashes)) if hashes else row
            yield to_record(row, out)

    def summary(self, asked: int) -> Iterator[tuple[str, str]]:
        """Lines of the table: pictures, then what rows got."""
        results = [self.session.known[key] for key in self.first]
        made = [result for result in results if isinstance(result, dict)]
        unreadable = sum(not digest for hashes in self.hashes for digest in hashes)
        failed = Counter(result for result in results if isinstance(result, str))
        failed += Counter({"picture unreadable": unreadable})
        yield "rows", f"{len(self.hashes):,}"
        yield "rows with pictures", f"{sum(map(bool, self.hashes)):,}"
        yield "different pictures", f"{len(results):,}"
        yield "known before", f"{len(results) - asked:,}"
        yield "captions", f"{len(made):,}"
        yield "empty captions", f"{sum(not result['text'] for result in made):,}"
        yield "cut off at caption.max_tokens", f"{sum(result['finish'] == 'length' for result in made):,}"
        yield "mean tokens", f"{sum(result['tokens'] for result in made) / max(len(made), 1):.1f}"
        yield from ((f"not shown: {why}", f"{count:,}") for why, count in failed.most_common())
        yield "leaks found", f"{sum(self.counts[what] for what in ('kept', 'redone', 'dropped')):,}"
        yield from ((f"leaks {what}", f"{self.counts[what]:,}") for what in ("redone", "dropped"))
        yield "rows with a caption", f"{self.counts['rows with a caption']:,}"
        yield from ((f"dropped: {why}", f"{count:,}") for why, count in self.session.dropped.items())


def _hash(item: str | bytes) -> str:
    try:
        return picture_hash(item)
    except OSError:
        return ""


def leaks(caption: str, row: Row) -> bool:
    """Whether a caption states the gold answer of a row.

    It does if it says so ("the answer is 12", "C is correct"). It does, too, if the gold value stands in it as a whole
    token, and neither in the problem's text before its options nor beside another option: a number with any unit, an
    expression, a word. The value of an option letter is the option's text.
    """
    gold, options = gold_answer(row.answer), row.options or listed_options(row.problem[-OPTION_CHARS:])
    letters = gold_letters(gold)
    if _says(caption, gold, options, letters[0] if letters else ""):
        return True
    marks, values = list(OPTIONS.finditer(row.problem)) if options else [], option_values(options)
    problem = normalise(row.problem[: marks[-1].start()] if marks else row.problem)
    text, value = normalise(LIST_MARK.sub(" ", caption)), gold
    if letters:
        value = letters[1] or values.get(letters[0], "")
        others = [option for letter, option in values.items() if letter != letters[0]]
    else:
        others = [option for option in values.values() if not ((same := decide(option, gold)) and same.score)]
    if value.casefold() in COMMON or any(_states(text, other) for other in others):
        return False
    return _states(text, value) and not _states(problem, value)


def _says(caption: str, gold: str, options: list[str], letters: str) -> bool:
    """Whether a sentence of a caption gives the gold answer as the answer."""
    for sentence in SENTENCE.split(caption):
        if letters and letters in CORRECT.findall(sentence):
            return True
        verdict = decide(final_answer(sentence), gold, options) if SAYS.search(sentence) else None
        if verdict and verdict.score:
            return True
    return False


def _states(text: str, value: str) -> bool:
    """Whether a value stands in a text as a whole token; both are normalised."""
    if not value:
        return False
    if number := read_value(value):
        return any(equal_values(each, number) for each in _numbers(text))
    if len(value) == 1 or len(value) > 200:  # a letter is a label of any picture
        return False
    loose = r"\s*".join(map(re.escape, "".join(value.casefold().split())))
    return bool(re.search(rf"(?<![\w\\.^{{]){loose}(?![\w^]|\.\d)", text.casefold()))


def _numbers(text: str) -> Iterator[Value]:
    """The numbers of a normalised text, without units but for percent; from two to twelve in words as well."""
    for match in NUMBER.finditer(text):
        if value := read_value(match[0]):
            yield value
    for word in re.findall("[a-z]+", text.casefold()):
        if word in NUMBERS and (value := read_value(str(NUMBERS[word]))):
            yield value


if __name__ == "__main__":
    sampling.run(main)
