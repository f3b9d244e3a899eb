"""HTML page of an evaluation: scores with their intervals beside published ones, tables by subject, answers to read.

`report.html` is a single file that needs no network, as the page of a run is. This file collects the data; page.html is
its jinja2 template.

Problems, golds and responses are untrusted text. The template escapes all of it, control characters and changes of the
direction of text are written out, and the page's content security policy allows only its own script, by its hash.

Next: ../doctor.py, a check of this machine.
"""

import base64
import functools
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import FileSystemLoader
from markupsafe import Markup

from nanolmmr1.benchmarks.item import Item, Response
from nanolmmr1.benchmarks.statistics import share_right
from nanolmmr1.data.images import open_image
from nanolmmr1.data.readers import BadRow
from nanolmmr1.data.store import ImageItem, Row
from nanolmmr1.evaluate.summary import Record, by_official, by_subject, chance, further, interval, points, rules
from nanolmmr1.files import write_atomically
from nanolmmr1.report import page as run_page
from nanolmmr1.report.chart import NUM_COLOURS, number, y_ticks
from nanolmmr1.terminal import printable

OUTCOMES = ("right", "wrong", "changed", "undecided", "contaminated")
MOST_ITEMS = 40  # of a benchmark with one outcome
MOST_TEXT = 8_000  # characters of a text; of a longer one, the start and the end are shown
LONG = 500  # characters from which on a response is collapsed
MOST_PICTURES, MOST_RESPONSES = 8, 4  # of an item
SIDE = 400  # pixels of a picture's longest side
WIDTH, MARGIN = 240, 16  # of a plot, in pixels
TALL, LOW = 34, 24  # heights of plots of models and of published numbers: those of their rows in the table
HERE = Path(__file__).parent
# Its own page.html first; frame and style sheet are the run report's.
TEMPLATES = run_page.TEMPLATES.overlay(loader=FileSystemLoader([HERE, Path(run_page.__file__).parent]))


def write_page(path: Path, results: Record, items: Iterable[Item], row_of: Callable[[Item], Row | None]) -> None:
    """Write the page.

    Args:
        results: of `summarise`, perhaps with `settings`: how the models were asked.
        items: those of the results, in their order.
        row_of: the row of an item; None if it must not be published. Then nothing of it stands in the page.
    """
    results = _cleaned(results)
    found = (by_official(item) if results["official"] else item for item in items)
    names = list(results["benchmarks"])
    html = TEMPLATES.get_template("page.html").render(
        results=results, facts=dict(_facts(results)),
        settings=json.dumps(results["settings"], indent=1, ensure_ascii=False) if "settings" in results else "",
        tables=[_scores(results, name) for name in names], differences=_differences(results),
        subjects={name: by_subject(results, name) for name in names},
        sources={name: list(_source(results, name)) for name in names},
        browser=list(browser(found, results, row_of)), outcomes=OUTCOMES,
        points=points, interval=interval, further=further, chance=chance)  # fmt: skip
    write_atomically(path, html.encode("utf-8", "replace"))


def _cleaned(value: Any) -> Any:
    """A JSON-able value whose texts can be shown."""
    if isinstance(value, dict):
        return {printable(str(key)): _cleaned(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(each) for each in value]
    return printable(value) if isinstance(value, str) else value


def _facts(results: Record) -> Iterator[tuple[str, str]]:
    """Name and value, for the head of the page."""
    yield "right by", rules(results)
    settings: Mapping[str, Any] = results.get("settings", {})
    if samples := settings.get("samples"):
        yield "prompt", ", ".join(dict.fromkeys(each["prompt"] for each in settings["models"].values()))
        drawn = ", ".join(f"{key} {settings[key]:g}" for key in ("temperature", "top_p", "top_k"))
        yield "responses per row", "1, greedy" if samples == 1 else f"{samples}, {drawn}"
        yield "longest response", f"{settings['max_response_tokens']:,} tokens"
        yield "pictures", f"at most {settings['max_pixels']:,} pixels"
        yield "engine", settings["engine"]
        yield "seed", f"{settings['seed']}"
        if settings["limit"]:
            yield "rows", f"at most {settings['limit']:,} per benchmark"


def _source(results: Record, name: str) -> Iterator[str]:
    """Where the rows of a benchmark are from, and what became of them."""
    yield f"licence {results['benchmarks'][name]['licence']}"
    if how := results.get("settings", {}).get("benchmarks", {}).get(name):
        yield f"rows of {', '.join(how['sources'])}"
        yield f"{how['reduced_pictures']:,} with a picture above the pixel limit"
        yield from (f"{count:,} dropped: {why}" for why, count in how["dropped"].items())


class Axis:
    """The common horizontal axis of some plots, in percent.

    Args:
        values: that it must hold, as shares.
    """

    def __init__(self, values: Iterable[float]) -> None:
        self.ticks = y_ticks([100 * value for value in values] or [0, 100])

    def x(self, percent: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return MARGIN + (percent - low) / (high - low) * (WIDTH - 2 * MARGIN)

    def labels(self) -> Markup:
        """The numbers over the plots."""
        return self._svg("", LOW, "".join(
            f'<text class="xtick" x="{self.x(tick):.1f}" y="18">{number(tick, 6)}</text>' for tick in self.ticks))

    def interval(self, found: Record, colour: str) -> Markup:
        """The plot of an estimate: a dot on a bar from low to high."""
        if found["score"] is None:
            return self._svg("", TALL, self._grid(TALL))
        low, at, high = (self.x(100 * found[key]) for key in ("low", "score", "high"))
        return self._svg(f"95 % interval {interval(found)}", TALL, (
            f'{self._grid(TALL)}<g class="{colour}"><line class="span" x1="{low:.1f}" x2="{high:.1f}" y1="17" y2="17"/>'
            f'<circle cx="{at:.1f}" cy="17" r="4.5"/></g>'))  # fmt: skip

    def published(self, percent: float) -> Markup:
        """The plot of a published number: a hollow diamond, since its interval is not known."""
        x = self.x(percent)
        diamond = f"M{x - 5:.1f} 12L{x:.1f} 7L{x + 5:.1f} 12L{x:.1f} 17Z"
        return self._svg("", LOW, f'{self._grid(LOW)}<path class="diamond" d="{diamond}"/>')

    def _grid(self, height: int) -> str:
        return "".join(f'<line class="grid{" zero" * (tick == 0)}" x1="{self.x(tick):.1f}" x2="{self.x(tick):.1f}" '
                       f'y1="0" y2="{height}"/>' for tick in self.ticks)  # fmt: skip

    def _svg(self, label: str, height: int, body: str) -> Markup:
        named = f'role="img" aria-label="{label}"' if label else 'aria-hidden="true"'
        return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" {named}>{body}</svg>')


def _scores(results: Record, name: str) -> Record:
    """What the table of scores has of a benchmark."""
    entry = results["benchmarks"][name]
    mine = [score for score in results["scores"] if score["benchmark"] == name]
    edges = [score[key] for score in mine for key in ("low", "high") if score[key] is not None]
    axis = Axis([*edges, *(each["value"] / 100 for each in entry["published"])])
    others = [{"plot": axis.published(each["value"]), "of": each} for each in entry["published"]]
    return {"entry": entry, "labels": axis.labels(), "rows": _plotted(results, mine, axis), "published": others}


def _differences(results: Record) -> Record:
    """What the table of differences has."""
    found = results["differences"]
    axis = Axis([0.0, *(each[key] for each in found for key in ("low", "high"))])
    return {"labels": axis.labels(), "rows": _plotted(results, found, axis)}


def _plotted(results: Record, found: Sequence[Record], axis: Axis) -> list[Record]:
    """Estimates of models with their plots, each model in its colour."""
    colours = {model: f"c{place % NUM_COLOURS}" for place, model in enumerate(results["models"])}
    return [{"of": each, "colour": colours[each["model"]], "plot": axis.interval(each, colours[each["model"]])}
            for each in found]  # fmt: skip


class Picture(NamedTuple):
    """A picture as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


@functools.lru_cache(256)  # versions of a problem share their pictures
def picture(item: ImageItem) -> Picture | None:
    """A picture for the page; None if it cannot be read."""
    try:
        image = open_image(item)
    except BadRow:
        return None
    image.thumbnail((SIDE, SIDE))
    image.save(file := io.BytesIO(), "WEBP", quality=75)
    return Picture(f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}", *image.size)


def shortened(text: str) -> str:
    """A text as it is shown: see MOST_TEXT."""
    if len(text) > MOST_TEXT:
        half, left_out = MOST_TEXT // 2, len(text) - MOST_TEXT
        text = f"{text[:half]}\n[… {left_out:,} characters are not shown …]\n{text[-half:]}"
    return printable(text)


def browser(items: Iterable[Item], results: Record, row_of: Callable[[Item], Row | None]) -> Iterator[Record]:
    """Per benchmark the rows that the page shows, evenly spaced over those of each outcome.

    `entries`: the rows, [] if they must not be published. `counts`: "OUTCOME MODEL VALUE" -> rows, of all rows, by the
    numbers of model and subject value; "any" stands for all of them. `values`: the (subject, value) pairs.
    """
    by_row: dict[str, dict[str, list[Item]]] = {name: {} for name in results["benchmarks"]}
    for item in items:
        by_row[printable(item.benchmark)].setdefault(item.id, []).append(item)
    for name, rows in by_row.items():
        values, pairs = _values(rows)
        tokens = {key: _tokens(row, results["models"]) for key, row in rows.items()}
        counts = Counter(f"{token} {value}" for key in rows for token, value in product(tokens[key], values[key]))
        kept = {outcome: _spread([key for key in rows if f"{outcome} any" in tokens[key]]) for outcome in OUTCOMES}
        entries = []
        for key, row in rows.items():
            outcomes = {"any"} | {outcome for outcome, keys in kept.items() if key in keys}
            if len(outcomes) > 1 and (found := row_of(row[0])):
                shown = sorted(token for token in tokens[key] if token.split()[0] in outcomes)
                entries.append(_entry(row, found) | {"tokens": shown, "values": values[key]})
        yield {"name": name, "title": results["benchmarks"][name]["title"], "entries": entries, "counts": counts,
               "values": _cleaned(pairs)}


def _values(rows: Mapping[str, Sequence[Item]]) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Per row "any" and the numbers of its subjects' values, and (subject, value) by these numbers."""
    own = {key: row[0].subjects.items() for key, row in rows.items()}
    pairs = sorted({pair for each in own.values() for pair in each})
    number_of = {pair: f"{n}" for n, pair in enumerate(pairs)}
    return {key: ["any", *(number_of[pair] for pair in each)] for key, each in own.items()}, pairs


def _tokens(row: Sequence[Item], models: Sequence[str]) -> set[str]:
    """The outcomes of a row, each as "OUTCOME MODEL" with the model's number and with "any"."""
    tokens = set()
    right = [is_right(item) for item in row]
    for item, good in zip(row, right, strict=True):
        outcomes = {"any", "right" if good else "wrong"}
        outcomes |= {"changed"} if good != right[0] else set()
        outcomes |= {"undecided"} if any(response.undecided for response in item.responses) else set()
        outcomes |= {"contaminated"} if item.contaminated else set()
        place = models.index(printable(item.model))
        tokens |= {f"{outcome} {model}" for outcome, model in product(outcomes, (place, "any"))}
    return tokens


def is_right(item: Item) -> bool:
    """Whether at least half of the responses are."""
    return share_right(item) >= 0.5


def _spread(keys: Sequence[str]) -> set[str]:
    """At most MOST_ITEMS of them, evenly spaced."""
    count = min(len(keys), MOST_ITEMS)
    return {keys[i * len(keys) // count] for i in range(count)}


def _entry(row: Sequence[Item], found: Row) -> Record:
    """What the page shows of a row."""
    answers = [{"model": printable(item.model), "right": is_right(item), "fault": printable(item.fault),
                "responses": [_answer(each) for each in item.responses[:MOST_RESPONSES]],
                "count": len(item.responses)} for item in row]  # fmt: skip
    subjects = [value for value in row[0].subjects.values() if value]
    return {"id": printable(row[0].id), "subjects": _cleaned(subjects), "contaminated": row[0].contaminated,
            "problem": shortened(found.problem), "gold": shortened(row[0].gold), "answers": answers,
            "pictures": [picture(item) for item in found.images[:MOST_PICTURES]], "picture_count": len(found.images)}


def _answer(response: Response) -> Record:
    """What the page shows of a response; `end`: the last words of a long one."""
    text = shortened(response.text.strip())
    return response._asdict() | {"text": text, "answer": shortened(response.answer),
                                 "end": text[-160:] if len(text) > LONG else ""}  # fmt: skip
