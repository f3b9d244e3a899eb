"""Plots of benchmark rows: a roofline for each op, and time over size for each family of cases.

Needs matplotlib (extra `bench`). It reads the rows of the JSON file, so a saved run can be drawn later:
python -m bench.plot FILE DIR
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")  # no display

import matplotlib.pyplot as plt

UNRELATED = ("shared prefix", "causal pack")  # families whose packs differ by more than size: points without a line


def draw(report, folder):
    """Write `<op>_roofline.svg` and `<op>_<family>_time.svg`; returns the paths."""
    rows = [row for row in report["rows"] if row["verdict"] == "right"]
    written = []
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        if any(row["flops"] for row in mine):
            written.append(roofline(op, mine, report["machine"], folder))
        for family in dict.fromkeys(row["family"] for row in mine):
            lines = by_provider(row for row in mine if row["family"] == family)
            if any(len(line) > 1 for line in lines.values()):
                written.append(time_over_size(op, family, lines, folder))
    print(f"{len(written)} pictures in {folder}")
    return written


def by_provider(rows):
    """provider -> its rows, by size."""
    lines = {}
    for row in sorted(rows, key=lambda row: row["size"]):
        lines.setdefault(row["provider"], []).append(row)
    return lines


def roofline(op, rows, machine, folder):
    """Algorithmic FLOP/s over algorithmic FLOPs per byte, below the peak rates of the GPU."""
    figure, axes = canvas(f"{op} on {machine['device']}", "FLOP per byte", "TFLOP/s")
    for line in by_provider(rows).values():
        spots = [(row["flops"] / row["bytes"], row["tflop_per_s"]) for row in line if row["flops"]]
        axes.plot(*zip(*spots, strict=True), "o", label=label(line[0]), alpha=0.7)
    if machine["peaks"]:
        rate, bandwidth = machine["peaks"]
        knee, (low, high) = rate / bandwidth, axes.get_xlim()
        xs = [min(low, knee / 4), knee, max(high, knee * 4)]
        axes.plot(xs, [min(rate, x * bandwidth) / 1e12 for x in xs], color="black", label="the chip")
    return save(figure, axes, folder / f"{op}_roofline.svg")


def time_over_size(op, family, lines, folder):
    figure, axes = canvas(f"{op}: {family}", "tokens", "median ms, bars p20 to p80")
    joined = not family.startswith(UNRELATED)
    for line in lines.values():
        sizes = [row["size"] for row in line]
        (curve,) = axes.plot(sizes, [row["median_ms"] for row in line], "o-" if joined else "o", label=label(line[0]))
        low, high = ([row[key] for row in line] for key in ("p20_ms", "p80_ms"))
        axes.vlines(sizes, low, high, color=curve.get_color(), alpha=0.5)
    floors = {row["size"]: row["floor_ms"] for line in lines.values() for row in line if row["floor_ms"]}
    if floors:
        axes.plot(*zip(*sorted(floors.items()), strict=True), "--" if joined else "_", color="black", label="floor")
    name = "".join(c if c.isalnum() else "_" for c in family)
    return save(figure, axes, folder / f"{op}_{name}_time.svg")


def label(row):
    return f"{row['provider']} (ours)" if row["ours"] else row["provider"]


def canvas(title, x, y):
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(True, which="both", alpha=0.2)
    return figure, axes


def save(figure, axes, path):
    axes.legend(fontsize="small")
    figure.savefig(path)
    plt.close(figure)
    return path


if __name__ == "__main__":
    file, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    draw(json.loads(file.read_text()), folder)
