"""Numbers of the answered items, as results.json holds them and as the terminal shows them.

Shares are fractions of 1, rounded to 6 decimals, so that the file is the same on every machine.

Next: page.py, the page.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from nanolmmr1.benchmarks import published, statistics
from nanolmmr1.benchmarks.item import Item, Response
from nanolmmr1.benchmarks.table import Benchmark
from nanolmmr1.data.readers import shown

Record = dict[str, Any]  # JSON-able
WIDTH = 100  # of tables that go to no terminal


def summarise(items: Iterable[Item], entries: Mapping[str, Benchmark], official: bool, k: int) -> Record:
    """The results of models on benchmarks.

    Args:
        items: of all; a model's items of a benchmark in the order of its rows.
        entries: by the names of the items' benchmarks.
        official: a benchmark's own lenient rule counts where it decides.
        k: of pass@k, if there are several responses.

    Returns:
        `models`; `benchmarks`, name -> what its tables need, with published scores; `scores`, one per benchmark and
        model; `differences`, one per benchmark and later model, to the first one.
    """
    groups: dict[str, dict[str, list[Item]]] = {}
    models: dict[str, None] = {}
    for item in items:
        models[item.model] = None
        groups.setdefault(item.benchmark, {}).setdefault(item.model, []).append(by_official(item) if official else item)
    scores, differences = list[Record](), list[Record]()
    for name, by_model in groups.items():
        base = next(iter(models))
        for model, mine in by_model.items():
            scores.append({"benchmark": name, "model": model} | _score(mine, entries[name], k))
            found = statistics.difference(by_model.get(base, []), mine, entries[name].macro) if model != base else None
            if found:
                differences.append({"benchmark": name, "model": model, "base": base, **_estimate(found.estimate),
                                    "lost": found.lost, "gained": found.gained, "p": _rounded(found.p)})  # fmt: skip
    return {
        "official": official, "k": k, "models": list(models),
        "benchmarks": {name: _benchmark(entries[name]) for name in groups}, "scores": scores,
        "differences": differences,
    }  # fmt: skip


def by_official(item: Item) -> Item:
    """The item with its responses right by the official rule, where that decides."""
    return item._replace(responses=[
        each if each.lenient is None else each._replace(right=each.lenient, reason="official rule", undecided=False)
        for each in item.responses])  # fmt: skip


def _benchmark(entry: Benchmark) -> Record:
    parts = [each for each in published.scores() if each.benchmark.startswith(f"{entry.name}: ")]
    return {
        "title": entry.title, "rows": entry.rows, "licence": entry.licence, "macro": entry.macro,
        "private": entry.private, "published": [each._asdict() for each in published.published(entry.name)],
        "published_parts": [each._asdict() for each in parts],
    }  # fmt: skip


def _score(items: Sequence[Item], entry: Benchmark, k: int) -> Record:
    """All numbers of one model on one benchmark."""
    several = any(len(item.responses) > 1 for item in items)
    clean = [item for item in items if not item.contaminated]
    return {
        **_estimate(statistics.score(items, entry.macro)),
        "plain": _estimate(statistics.score(items)) if entry.macro else None,  # the headline is a mean of means
        "contaminated": len(items) - len(clean),
        "clean": _estimate(statistics.score(clean, entry.macro)) if items[0].contaminated is not None else None,
        "pass_at_k": _mean(statistics.pass_at_k(item, k) for item in items) if several else None,
        "majority": _mean(map(statistics.majority, items)) if several else None,
        "faults": dict(Counter(item.fault for item in items if item.fault).most_common()),
        **_of_responses([response for item in items for response in item.responses]),
        "more": {name: round(value, 6) for name, value in entry.more(items).items()},
        "subjects": {column: _by_value(items, column) for column in entry.subjects},
    }  # fmt: skip


def _of_responses(responses: Sequence[Response]) -> Record:
    """Counts of responses, and means over them."""
    return {
        "responses": len(responses),
        "undecided": sum(response.undecided for response in responses),
        "without_official": sum(response.lenient is None for response in responses),
        **{key: _mean(getattr(response, key) for response in responses) for key in ("tokens", "cut", "format")},
    }  # fmt: skip


def _by_value(items: Sequence[Item], column: str) -> dict[str, Record]:
    """The scores of the items with each of a subject's values, in the values' order."""
    parts: dict[str, list[Item]] = {}
    for item in items:
        parts.setdefault(item.subjects.get(column, ""), []).append(item)
    return {value: _estimate(statistics.score(part)) for value, part in sorted(parts.items())}


def _estimate(estimate: statistics.Estimate | None) -> Record:
    """As JSON; without rows, the numbers are null."""
    value, low, high, count = estimate or (None, None, None, 0)
    return {"score": _rounded(value), "low": _rounded(low), "high": _rounded(high), "rows": count}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return _rounded(sum(found) / len(found)) if found else None


def show(results: Record, subjects: bool) -> None:
    """Print the results: scores, what else is known of them, published numbers, differences, and tables by subject.

    Long cells are folded, so that nothing is lost on a narrow terminal.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False, highlight=False)
    for table in _tables(results, subjects):
        if table.row_count:
            console.print(table)
            console.print()


def points(value: float | None, sign: str = "") -> str:
    """A share in percent with one decimal and a true minus sign; a dash for None. `sign`: "+" to write it always."""
    return "–" if value is None else f"{100 * value:{sign}.1f}".replace("-", "−")


def interval(found: Record, sign: str = "") -> str:
    """An estimate's interval, as "[22.1, 25.1]"."""
    return f"[{points(found['low'], sign)}, {points(found['high'], sign)}]"


def chance(p: float | None) -> str:
    """The p of McNemar's exact test; a dash where rows are not independent."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def further(score: Record, entry: Record, k: int) -> Iterator[tuple[str, str]]:
    """(name, value) of a score's other numbers."""
    if score["plain"]:
        yield f"mean over {entry['macro']}; plain mean", f"{points(score['plain']['score'])} {interval(score['plain'])}"
    if score["pass_at_k"] is not None:
        yield f"pass@{k}", points(score["pass_at_k"])
        yield "majority", points(score["majority"])
    yield from ((name, points(value)) for name, value in score["more"].items())
    yield "in the asked format", points(score["format"])
    yield from ((f"not asked: {why}", f"{count:,}") for why, count in score["faults"].items())


def rules(results: Record) -> str:
    """Which rules the scores are by."""
    return "official rules where they decide" if results["official"] else "rules of the accuracy reward"


def _table(title: str, *columns: str, right: int = 0) -> Table:
    """A table whose columns from number `right` on hold numbers."""
    return Table(*(Column(name, justify="right" if right and i >= right else "left", overflow="fold")
                   for i, name in enumerate(columns)), title=title, title_justify="left", title_style="bold",
                 box=SIMPLE_HEAD, show_edge=False, show_header=any(columns))  # fmt: skip


def _tables(results: Record, subjects: bool) -> Iterator[Table]:
    official = results["official"]
    scores = _table(f"right, % ({rules(results)}) with 95 % intervals", "", "score", "rows", "without\nleaked",
                    "un-\ndecided", *["by our\nrule"] * official, "cut\noff", "tokens", right=1)  # fmt: skip
    more, others = _table("further", "", ""), _table("published by others", "", "")
    for name, entry in results["benchmarks"].items():
        title = shown(entry["title"])
        scores.add_row(title, style="bold")
        mine = [score for score in results["scores"] if score["benchmark"] == name]
        for score in mine:
            scores.add_row(f" {shown(score['model'])}", *_cells(score, entry, official), end_section=score is mine[-1])
            text = "; ".join(f"{key} {value}" for key, value in further(score, entry, results["k"]))
            more.add_row(f"{title}, {shown(score['model'])}", text)
        for of, by_source in _published(entry, subjects).items():
            others.add_row(title + of.removeprefix(name), style="bold")
            for source, values in by_source.items():
                others.add_row(f" {source}", ", ".join(values))
    yield from (scores, more, others, _differences(results))
    for name in results["benchmarks"] if subjects else ():
        yield from _subjects(results, name)


def _published(entry: Record, parts: bool) -> dict[str, dict[str, list[str]]]:
    """Benchmark or part of it -> source -> models with their scores."""
    found: dict[str, dict[str, list[str]]] = {}
    for each in [*entry["published"], *(entry["published_parts"] if parts else ())]:
        values = found.setdefault(each["benchmark"], {}).setdefault(each["source"], [])
        values.append(f"{each['model']} {each['value']}")
    return found


def _cells(score: Record, entry: Record, official: bool) -> Iterator[str]:
    yield f"{points(score['score'])} {interval(score)}"
    yield f"{score['rows']:,}" + (f"/{entry['rows']:,}" if entry["rows"] not in (0, score["rows"]) else "")
    yield f"{points(score['clean']['score'])} (−{score['contaminated']:,})" if score["clean"] else "–"
    yield f"{score['undecided']:,}"
    if official:
        yield f"{score['without_official']:,}"
    yield points(score["cut"])
    yield "–" if score["tokens"] is None else f"{score['tokens']:,.0f}"


def _differences(results: Record) -> Table:
    base = shown(results["models"][0]) if results["models"] else ""
    table = _table(f"better than {base}, points", "", "difference", "right →\nwrong", "wrong →\nright", "p", "rows",
                   right=1)
    for each in results["differences"]:
        title = shown(results["benchmarks"][each["benchmark"]]["title"])
        table.add_row(f"{title}, {shown(each['model'])}", f"{points(each['score'], '+')} {interval(each, '+')}",
                      f"{each['lost']:,}", f"{each['gained']:,}", chance(each["p"]), f"{each['rows']:,}")
    return table


def _subjects(results: Record, name: str) -> Iterator[Table]:
    """A table per subject of a benchmark: a row per value, a column per model."""
    title, models, tables = shown(results["benchmarks"][name]["title"]), *by_subject(results, name)
    for column, rows in tables.items():
        table = _table(f"{title} by {shown(column)}", "", "rows", *map(shown, models), right=1)
        for value, count, found in rows:
            cells = (f"{points(each['score'])} {interval(each)}" if each else "–" for each in found)
            table.add_row(shown(value) or "–", f"{count:,}", *cells)
        yield table


SubjectRow = tuple[str, int, list[Record | None]]  # value, its rows, an estimate per model


def by_subject(results: Record, name: str) -> tuple[list[str], dict[str, list[SubjectRow]]]:
    """A benchmark's models, and per subject a row for each of its values."""
    mine = [score for score in results["scores"] if score["benchmark"] == name]
    tables = {}
    for column in mine[0]["subjects"]:
        found = [score["subjects"][column] for score in mine]
        values = sorted({value for each in found for value in each})
        tables[column] = [(value, max(each[value]["rows"] for each in found if value in each),
                           [each.get(value) for each in found]) for value in values]  # fmt: skip
    return [score["model"] for score in mine], tables
