"""One HTML page about a run: accuracy, curves, sample rollouts, recipe.

`report.html` is a single file that asks the network for nothing: style, script, curves (SVG) and
pictures are inside. It is made from whatever the run folder holds (`recipe.yaml`, `metrics.jsonl`,
`summary.json`, `samples.jsonl`), so a run that was killed early has a report too.

Problems and responses are untrusted text. All of it passes through `text`, and the page's content
security policy lets no script run but our own, which is named by its hash.

Next: report_chart.py, how a curve is drawn.
"""

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path

import yaml

from nanolmmr1.errors import UserError
from nanolmmr1.files import write_atomically
from nanolmmr1.report.chart import LEFT, NUM_COLOURS, RIGHT, SCRIPT, WIDTH, chart, number, text
from nanolmmr1.report.display import accuracy_rows
from nanolmmr1.report.logs import read_lines

CHARTS = (  # title, unit, ((metrics key, label), ...)
    ("Reward", "mean over responses", (("reward/overall", "overall"), ("reward/accuracy", "accuracy"),
                                       ("reward/format", "format"))),
    ("Response length", "tokens", (("response_length/mean", "mean"),)),
    ("Entropy", "nats per token", (("actor/entropy", "policy"),)),
    ("KL to the reference", "nats per token", (("actor/kl_loss", "KL"),)),
    ("Gradient norm", "before clipping", (("actor/grad_norm", "norm"),)),
    ("Learning rate", "", (("actor/lr", "rate"),)),
    ("Throughput", "tokens per second", (("perf/throughput", "tokens/s"),)),
)
EXACT = ("Learning rate", "Held-out accuracy")  # no noise to smooth away


def write_report(run_folder):
    """Write `report.html` into a run folder from what is there, and return its path.

    Raises:
        UserError: no such folder. What of it cannot be read is left out, and the page says so.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"no run folder {str(folder)!r}: give the `output` of a recipe that has run")
    recipe_text, recipe = _read_recipe(folder / "recipe.yaml")
    wrong = []  # what of the folder cannot be read
    summary = _read_summary(folder / "summary.json", wrong)
    metrics, samples = (_read_log(folder / name, wrong) for name in ("metrics.jsonl", "samples.jsonl"))
    name, bands = recipe.get("name") or folder.resolve().name, phase_bands(metrics)
    accuracy = summary.get("accuracy") or {}
    sections = [
        _header(name, recipe, summary, metrics),
        "".join(f'<p class="note">Left out: {text(each)}.</p>' for each in wrong),
        _section("Held-out accuracy", _accuracy(accuracy)),
        _section("Curves", _curves(metrics, accuracy, bands)),
        _section("Time per step", _stage_times(metrics, bands)),
        _section("Sample rollouts", _samples(samples)),
        _section("Recipe", recipe_text and f"<details><summary>Every value of this run</summary>"
                                           f"<pre>{text(recipe_text)}</pre></details>"),
    ]
    path = folder / "report.html"
    write_atomically(path, _page(name, bands, "\n".join(filter(None, sections))).encode("utf-8", "replace"))
    return path


def try_report(run_folder, note):
    """Write the report; a failure, of whatever kind, is told and ends no run."""
    try:
        write_report(run_folder)
    except Exception as error:  # it is made from files that anybody may have changed, and nothing depends on it
        note(f"report.html could not be written ({type(error).__name__}: {error}); nothing else depends on it")


def duration(seconds):
    """Seconds for people: "42 s", "12 min 3 s", "5 h 7 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def phase_bands(metrics):
    """[(phase, where it begins, where it ends)] in global steps; a phase begins where the one before it ends."""
    steps = {}
    for record in metrics:
        steps.setdefault(record["phase"], []).append(record["step"])
    return [(phase, min(own) - 1, max(own)) for phase, own in steps.items()]


def _page(name, bands, body):
    style = resources.files("nanolmmr1.report").joinpath("style.css").read_text(encoding="utf-8")
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    low, high = (bands[0][1], bands[-1][2]) if bands else (0, 1)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{script_hash}'">
<title>{text(name)} · nanoLMM-R1</title>
<style>
{style}</style>
</head>
<body>
<main data-lo="{low}" data-hi="{high}" data-left="{LEFT}" data-right="{RIGHT}" data-width="{WIDTH}">
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _section(title, content):
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _header(name, recipe, summary, metrics):
    phases = recipe.get("phases") or {}
    planned = sum(phase.get("steps", 0) for phase in phases.values())
    done = max((record["step"] for record in metrics), default=0)
    facts = {
        "model": recipe.get("model"),
        "steps": f"{done:,} of {planned:,}" if done < planned else f"{done:,}",
        "phases": " → ".join(phases),
        "wall time": "wall_s" in summary and duration(summary["wall_s"]),
        "peak memory": "peak_rss_mb" in summary and f"{number(summary['peak_rss_mb'])} MB",
    }
    shown = "".join(f"<div><dt>{key}</dt><dd>{text(value)}</dd></div>" for key, value in facts.items() if value)
    return f'<header><p class="eyebrow">nanoLMM-R1 run</p><h1>{text(name)}</h1><dl>{shown}</dl></header>'


def _accuracy(accuracy):
    tasks, rows, change = accuracy_rows(accuracy)
    if not tasks:
        return ""
    head = "".join(f"<th>{text(task)}</th>" for task in tasks)
    body = "".join(f"<tr><th>{text('after ' + moment if i else moment)}</th>{''.join(map(_percent, percents))}</tr>"
                   for i, (moment, percents) in enumerate(rows))
    if change:
        signed = ("–" if points is None else f"{points:+.1f}".replace("-", "−") for points in change)
        cells = "".join(f"<td>{points}</td>" for points in signed)
        body += f'<tr class="change"><th>change, points</th>{cells}</tr>'
    return (f'<div class="scroll"><table class="accuracy"><thead><tr><th>% right</th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def _percent(percent):
    if percent is None:
        return "<td>–</td>"
    return f'<td>{percent:.1f}<span class="bar"><span style="width:{percent:.1f}%"></span></span></td>'


def _curves(metrics, accuracy, bands):
    if not bands:
        return ""
    figures = []
    for title, unit, keys in CHARTS:
        curves = {label: [(record["step"], record[key]) for record in metrics if record.get(key) is not None]
                  for key, label in keys}
        figures.append((title, unit, curves))
    ends = {phase: end for phase, _, end in bands}
    held_out = {task: [] for task in accuracy_rows(accuracy)[0]}
    for i, (moment, right) in enumerate(accuracy.items()):
        for task, fraction in right.items():
            if not i or moment in ends:
                held_out[task].append((ends[moment] if i else bands[0][1], 100 * fraction))
    figures.insert(1, ("Held-out accuracy", "% right", held_out))
    kept = [(title, unit, {label: points for label, points in curves.items() if points})
            for title, unit, curves in figures]
    reach = len(metrics) // 40
    note = "Over training steps. Beside the names: the last values, or those of the step that you point at."
    if reach:
        note += f" Faint: each step; bold: the mean of the {2 * reach + 1} steps around it."
    drawn = "".join(chart(title, unit, curves, bands, reach if title not in EXACT else 0)
                    for title, unit, curves in kept if curves)
    return f'<p class="note">{note}</p><div class="charts">{drawn}</div>'


def _stage_times(metrics, bands):
    """Mean seconds of each stage by phase: a bar of shares, and the numbers."""
    whole = "timing_s/step"
    stages = list(dict.fromkeys(key for record in metrics for key in record if key.startswith("timing_s/")))
    stages = [stage for stage in stages if stage != whole]
    if not stages:
        return ""
    head, rows = "", ""
    for i, stage in enumerate(stages):
        head += f'<th><span class="c{i % NUM_COLOURS}"><i></i></span>{text(stage.removeprefix("timing_s/"))}</th>'
    for phase, _, _ in bands:
        own = [record for record in metrics if record["phase"] == phase]
        *means, step = [sum(record.get(stage) or 0 for record in own) / len(own) for stage in [*stages, whole]]
        total = max(step, sum(means))
        bar = "".join(f'<span class="c{i % NUM_COLOURS}" style="width:{100 * mean / (total or 1):.2f}%"></span>'
                      for i, mean in enumerate(means))
        cells = "".join(f"<td>{number(mean)}</td>" for mean in means)
        rows += (f'<tr><th>{text(phase)}</th><td class="share"><span class="stages">{bar}</span></td>{cells}'
                 f"<td><b>{number(total)}</b></td></tr>")
    return (f'<div class="scroll"><table class="times"><thead><tr><th>seconds</th><th></th>{head}<th>step</th></tr>'
            f"</thead><tbody>{rows}</tbody></table></div>")


def _samples(samples):
    """The groups kept at the first and the last such step of each phase."""
    shown = ""
    for phase in dict.fromkeys(sample["phase"] for sample in samples):
        own = [sample for sample in samples if sample["phase"] == phase]
        steps = sorted({own[0]["step"], own[-1]["step"]})
        groups = "".join(_group(sample) for sample in own if sample["step"] in steps)
        shown += f"<h3>{text(phase)}</h3>{groups}"
    return shown


def _group(sample):
    images = "".join(f'<img alt="picture {i}" src="data:image/png;base64,{text(image)}">'
                     for i, image in enumerate(sample["images"], 1))
    pictures = images and f'<div class="pictures">{images}</div>'
    caption = sample.get("caption", "") and f'<p class="caption"><small>caption</small>{text(sample["caption"])}</p>'
    largest = max((abs(response["advantage"]) for response in sample["responses"]), default=0) or 1
    responses = "".join(_response(response, largest) for response in sample["responses"])
    return (f'<article><header><small>step {text(sample["step"])}</small>'
            f'<span>answer <b>{text(sample["answer"])}</b></span></header>'
            f'<div class="prompt">{pictures}<div>{caption}<p class="problem">{text(sample["problem"])}</p></div></div>'
            f"<ol>{responses}</ol></article>")


def _response(response, largest):
    advantage = response["advantage"]
    kind = "up" if advantage > 0 else "down" if advantage < 0 else "flat"
    parts = "".join(f"<span>{text(part)} {number(value)}</span>" for part, value in response["parts"].items())
    signed = f"{advantage:+.2f}".replace("-", "−")
    return (f'<li class="{kind}" style="--strength:{abs(advantage) / largest:.2f}"><p><b title="advantage">{signed}</b>'
            f'<span>reward {number(response["reward"])}</span>{parts}</p><pre>{text(response["text"])}</pre></li>')


def _read_recipe(path):
    """(the file's text, its mapping); ("", {}) where there is none. A torn file is shown, not read."""
    raw = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        tree = yaml.safe_load(raw)
    except yaml.YAMLError:
        tree = None
    return raw, tree if isinstance(tree, dict) else {}


def _read_summary(path, wrong):
    try:
        summary = json.loads(path.read_bytes()) if path.exists() else {}
        if isinstance(summary, dict):
            return summary
        wrong.append(f"{path.name}, which holds {type(summary).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        wrong.append(f"{path.name}, which is not JSON ({error})")
    return {}


def _read_log(path, wrong):
    unreadable = []
    try:
        records = [record for record in read_lines(path, unreadable) if isinstance(record.get("phase"), str)]
    except OSError as error:
        wrong.append(f"{path.name}, which cannot be read ({error})")
        return []
    if unreadable:
        wrong.append(f"{len(unreadable)} lines of {path.name} that no step has written")
    return records
