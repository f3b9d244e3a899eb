"""HTML report of a run: held-out accuracy, curves, stage times, sample rollouts, recipe.

`report.html` is a single file that needs no network: style, script, curves (SVG) and images are inside. It is built
from the files in the run folder (`recipe.yaml`, `metrics.jsonl`, `summary.json`, `samples.jsonl`), so a run that was
killed early has a report too. This file collects the data; page.html is its jinja2 template, in the frame of
frame.html, which the page of an evaluation has too.

Problems and responses are untrusted text. The template escapes all of it, and the page's content security policy
allows only its own script, by its hash.

Next: chart.py, its charts.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nanolmmr1.benchmarks.statistics import wilson
from nanolmmr1.errors import UserError
from nanolmmr1.files import write_atomically
from nanolmmr1.report.chart import LEFT, NUM_COLOURS, RIGHT, WIDTH, Band, Point, chart, number
from nanolmmr1.report.diagnose import Diagnosis
from nanolmmr1.report.display import Accuracy, accuracy_rows
from nanolmmr1.report.logs import Record, read_log

CHARTS = (  # title, unit, {metrics key: label}
    ("Reward", "mean over responses",
     {"reward/overall": "overall", "reward/accuracy": "accuracy", "reward/format": "format"}),
    ("Response length", "tokens", {"response_length/mean": "mean"}),
    ("Entropy", "nats per token", {"actor/entropy": "policy"}),
    ("KL to the reference", "nats, averaged like the loss", {"actor/kl_loss": "KL"}),
    ("Gradient norm", "before clipping", {"actor/grad_norm": "norm"}),
    ("Learning rate", "", {"actor/lr": "rate"}),
    ("Throughput", "tokens per second", {"perf/throughput": "tokens/s"}),
)
REASON = "reward/reason/"
EXACT = ("Learning rate", "Held-out accuracy")  # charts without noise to smooth


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def half_width(percent: float, count: int) -> float:
    """Half of the 95 % interval of a percentage of `count` rows, in points."""
    found = wilson(percent * count / 100, count)
    return 50 * (found.high - found.low)


TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)
TEMPLATES.filters |= {"number": number, "sha256": _sha256, "half_width": half_width}
TEMPLATES.globals |= {"LEFT": LEFT, "RIGHT": RIGHT, "WIDTH": WIDTH, "NUM_COLOURS": NUM_COLOURS}


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path. Unreadable files are left out, and the page says so.

    Raises:
        UserError: the folder does not exist.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"no run folder {str(folder)!r}: give the `output` of a recipe that has run")
    faults: list[str] = []  # files that cannot be read, for the reader of the page
    recipe_text, recipe = _read_recipe(folder / "recipe.yaml")
    summary = _read_summary(folder / "summary.json", faults)
    metrics, samples = (_read_log(folder / name, faults) for name in ("metrics.jsonl", "samples.jsonl"))
    bands, accuracy = phase_bands(metrics), summary.get("accuracy") or {}
    reach = len(metrics) // 40  # steps on either side of a running mean
    stages, times = _stage_times(metrics, bands)
    html = TEMPLATES.get_template("page.html").render(
        name=recipe.get("name") or folder.resolve().name, facts=_facts(recipe, summary, metrics), faults=faults,
        warnings=_warnings(recipe, metrics), stages=stages, times=times,
        accuracy=accuracy_rows(accuracy), counts=_counts(summary), bands=bands, reach=reach,
        charts=_charts(metrics, accuracy, bands, reach), samples=_selected(samples), recipe=recipe_text)
    path = folder / "report.html"
    write_atomically(path, html.encode("utf-8", "replace"))
    return path


def try_report(run_folder: str | Path, note: Callable[[str], object]) -> None:
    """Write the report. A failure of any type becomes a note and does not end the run."""
    try:
        write_report(run_folder)
    except Exception as error:  # the files may have been edited, and nothing depends on the report
        note(f"report.html could not be written ({type(error).__name__}: {error}); nothing else depends on it")


def duration(seconds: float) -> str:
    """Seconds for people: "42 s", "12 min 3 s", "5 h 7 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def phase_bands(metrics: list[Record]) -> list[Band]:
    """The phases in global steps; a phase begins where the previous one ends."""
    steps: dict[str, list[int]] = {}
    for record in metrics:
        steps.setdefault(record["phase"], []).append(record["step"])
    return [(phase, min(each) - 1, max(each)) for phase, each in steps.items()]


def _facts(recipe: Mapping[str, Any], summary: Mapping[str, Any], metrics: list[Record]) -> dict[str, Any]:
    """Name -> value, for the head of the page; false if unknown."""
    phases = recipe.get("phases") or {}
    planned = sum(phase.get("steps", 0) for phase in phases.values())
    done = max((record["step"] for record in metrics), default=0)
    return {
        "model": recipe.get("model"),
        "steps": f"{done:,} of {planned:,}" if done < planned else f"{done:,}",
        "phases": " → ".join(phases),
        "wall time": "wall_s" in summary and duration(summary["wall_s"]),
        "peak memory": "peak_rss_mb" in summary and f"{number(summary['peak_rss_mb'])} MB",
    }


def _warnings(recipe: Mapping[str, Any], metrics: list[Record]) -> list[str]:
    """What the display has said, or would have, about steps from which nothing can be learnt."""
    reward, phases = recipe.get("reward") or {}, recipe.get("phases") or {}
    rewarded = {name: reward.get(f"{name}_weight") != 0 for name in ("format", "accuracy")}
    diagnosis = Diagnosis({name: phase["steps"] for name, phase in phases.items() if "steps" in phase}, rewarded)
    told = ((record, diagnosis.see(record)) for record in metrics)
    return [f"Phase {record['phase']}, step {record['step']}: {sentence}." for record, sentence in told if sentence]


def _charts(metrics: list[Record], accuracy: Accuracy, bands: list[Band], reach: int) -> list[Markup]:
    """The figures that have points. Without a KL reference in any phase there is no KL chart."""
    has_kl = any(record.get("actor/kl_loss") or "timing_s/ref" in record for record in metrics)
    figures: list[tuple[str, str, dict[str, list[Point]]]] = []
    reasons = {key: key.removeprefix(REASON) for key in dict.fromkeys(key for record in metrics for key in record)
               if key.startswith(REASON)}
    for title, unit, labels in (*CHARTS, ("Judged by", "fraction of responses", reasons)):
        if has_kl or "actor/kl_loss" not in labels:
            # A record lacks a reason that none of its responses had.
            curves = {label: [(record["step"], value) for record in metrics
                              if (value := record.get(key, 0.0 if key in reasons else None)) is not None]
                      for key, label in labels.items()}
            figures.append((title, unit, {label: points for label, points in curves.items() if points}))
    figures.insert(1, ("Held-out accuracy", "% right", _held_out(accuracy, bands)))
    return [chart(title, unit, each, bands, 0 if title in EXACT else reach) for title, unit, each in figures if each]


def _held_out(accuracy: Accuracy, bands: list[Band]) -> dict[str, list[Point]]:
    """Task -> percent right at the start and where each phase ends."""
    ends = {phase: end for phase, _, end in bands}
    points: dict[str, list[Point]] = {}
    for i, (moment, fractions) in enumerate(accuracy.items()):
        if bands and (not i or moment in ends):
            for task, fraction in fractions.items():
                points.setdefault(task, []).append((ends[moment] if i else bands[0][1], 100 * fraction))
    return points


def _stage_times(metrics: list[Record], bands: list[Band]) -> tuple[list[str], list[tuple[str, list[float], float]]]:
    """(stages, rows): a row is (phase, mean seconds of each stage, mean seconds of a step)."""
    keys = dict.fromkeys(key for record in metrics for key in record if key.startswith("timing_s/"))
    keys.pop("timing_s/step", None)
    rows = []
    for phase, _, _ in bands:
        records = [record for record in metrics if record["phase"] == phase]
        *means, step = [sum(record.get(key) or 0 for record in records) / len(records)
                        for key in [*keys, "timing_s/step"]]
        rows.append((phase, means, max(step, sum(means))))
    return [key.removeprefix("timing_s/") for key in keys], rows


def _selected(samples: list[Record]) -> dict[str, list[Record]]:
    """Phase -> the groups of the first and of the last step that has some."""
    phases: dict[str, list[Record]] = {}
    for sample in samples:
        phases.setdefault(sample["phase"], []).append(sample)
    return {phase: [group for group in groups if group["step"] in (groups[0]["step"], groups[-1]["step"])]
            for phase, groups in phases.items()}


def _counts(summary: Mapping[str, Any]) -> dict[str, int]:
    """Rows of each held-out task; a run of an earlier version has not written them."""
    rows = summary.get("rows")
    return {task: n for task, n in rows.items() if isinstance(n, int) and n > 0} if isinstance(rows, dict) else {}


def _read_recipe(path: Path) -> tuple[str, dict[str, Any]]:
    """(text, mapping); ("", {}) if there is no file. The mapping of a torn file is empty."""
    raw = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        tree = yaml.safe_load(raw)
    except yaml.YAMLError:
        tree = None
    return raw, tree if isinstance(tree, dict) else {}


def _read_summary(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_bytes()) if path.exists() else {}
        if isinstance(summary, dict):
            return summary
        faults.append(f"{path.name}, which holds {type(summary).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        faults.append(f"{path.name}, which is not JSON ({error})")
    return {}


def _read_log(path: Path, faults: list[str]) -> list[Record]:
    try:
        written, unreadable = read_log(path)
    except OSError as error:
        faults.append(f"{path.name}, which cannot be read ({error})")
        return []
    if unreadable:
        faults.append(f"{len(unreadable)} lines of {path.name} that no step has written")
    return [record for _, record in written if isinstance(record.get("phase"), str)]
