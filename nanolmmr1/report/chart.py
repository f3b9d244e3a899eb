"""SVG line charts over training steps, with round axis numbers and shaded, named phases.

All charts of a page share one x axis, so that the script of page.html can move one cursor through all of them and show
each curve's value at that step in its legend. Without script the legend shows the last values.

Next: ../run/setup.py, everything before the first step.
"""

import json
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 230  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 54, 460, 26, 202  # of its plot
NUM_COLOURS = 6  # the style sheet has c0 ... c5

Band = tuple[str, int, int]  # a phase: name, step after which it begins, last step
Point = tuple[int, float]  # step, value
Curves = Mapping[str, Sequence[Point]]  # label -> points


def number(value: float | None, digits: int = 3) -> str:
    """A number for people, with a true minus sign: "0.712", "−0.5", "12,346", "1e−6"; a dash for None."""
    if value is None:
        return "–"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        plain = f"{float(mantissa):g}e{int(exponent)}"
    else:
        plain = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return plain.replace("-", "−")


def round_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 x 10^k that divides `span` > 0 into at most `count` parts."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * (1 - 1e-9))


def y_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that enclose the values. 0 is included if it is near, or if the values hardly differ."""
    low, high = min(values), max(values)
    if 0 < low < high / 2 or high - low <= 0.01 * max(abs(low), abs(high)):
        low, high = min(low, 0), max(high, 0)
    if low == high:
        high = 1
    step = round_step(high - low, 4)
    return [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def running_mean(points: Sequence[Point], bands: Sequence[Band], reach: int) -> list[Point]:
    """Mean over the points of the same phase that are at most `reach` places away."""
    smooth = []
    for _, begin, end in bands:
        inside = [(step, value) for step, value in points if begin < step <= end]
        for i, (step, _) in enumerate(inside):
            near = [value for _, value in inside[max(0, i - reach):i + reach + 1]]
            smooth.append((step, sum(near) / len(near)))
    return smooth


def chart(title: str, unit: str, curves: Curves, bands: Sequence[Band], reach: int = 0) -> Markup:
    """One figure: curves over global step, shaded phases, and a legend with the value under the pointer.

    Args:
        curves: at least one, none of them empty.
        bands: at least one.
        reach: above 0 the points are drawn faint, with their `running_mean` over them.
    """
    low, high = bands[0][1], bands[-1][2]
    ticks = y_ticks([value for points in curves.values() for _, value in points])

    def x(step: float) -> float:
        return LEFT + (step - low) / (high - low) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (BOTTOM - TOP)

    def path(points: Sequence[Point], css_class: str) -> str:
        line = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
        return f'<path class="{css_class}" d="M{line}"/>'

    svg = []
    for i, (phase, begin, end) in enumerate(bands):
        room = int((x(end) - x(begin)) / 6.5)  # letters that fit over the band
        label = phase if len(phase) <= room else phase[:max(0, room - 1)] + "…"
        svg.append(f'<rect class="band{i % 2}" x="{x(begin):.1f}" y="{TOP}" width="{x(end) - x(begin):.1f}" '
                   f'height="{BOTTOM - TOP}"><title>{escape(phase)}</title></rect>'
                   f'<text class="phase" x="{(x(begin) + x(end)) / 2:.1f}" y="{TOP - 9}">{escape(label)}</text>')
    svg += [f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
            f'<text class="ytick" x="{LEFT - 7}" y="{y(t) + 4:.1f}">{number(t, 6)}</text>' for t in ticks]
    every = max(1, round(round_step(high - low, 6)))
    svg += [f'<text class="xtick" x="{x(t):.1f}" y="{BOTTOM + 18}">{t:,}</text>'
            for t in range(math.ceil(low / every) * every, high + 1, every)]
    legend = []
    for i, (label, points) in enumerate(curves.items()):
        colour = f"c{i % NUM_COLOURS}"
        smooth = running_mean(points, bands, reach) if reach else points
        drawn = (path(points, "raw") if reach else "") + path(smooth, "curve")
        if len(points) <= 12:
            drawn += "".join(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>' for step, value in points)
        svg.append(f'<g class="{colour}">{drawn}</g>')
        values = json.dumps([[step, number(value)] for step, value in points], separators=(",", ":"))
        legend.append(f'<span class="{colour}"><i></i>{escape(label)} '
                      f'<output data-points="{escape(values)}">{number(points[-1][1])}</output></span>')
    svg.append(f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}"/>')
    return Markup(
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <small>{escape(unit)}</small>'
        f'<small class="at"></small><div class="legend">{"".join(legend)}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps">'
        f'{"".join(svg)}</svg></figure>'
    )
