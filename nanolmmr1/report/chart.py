"""Curves over training steps as SVG figures, for report.py: axes with round numbers, phases shaded and named.

One x axis serves all charts of a page, so the script at the end can move one cursor through all
of them and put each curve's value at that step into its legend. Without script the last values
stand there.
"""

import html
import json
import math

WIDTH, HEIGHT = 480, 230  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 54, 460, 26, 202  # its plot
NUM_COLOURS = 6  # the style sheet has c0 ... c5

SCRIPT = """
"use strict";
const frame = document.querySelector("main").dataset;
const [lo, hi, left, right, width] = ["lo", "hi", "left", "right", "width"].map(key => Number(frame[key]));
const charts = [...document.querySelectorAll("figure.chart")].map(figure => ({
  cursor: figure.querySelector(".cursor"), at: figure.querySelector(".at"),
  outputs: [...figure.querySelectorAll("output")].map(output =>
    ({output, last: output.textContent, points: JSON.parse(output.dataset.points)})),
}));
const nearest = (points, step) =>
  points.reduce((best, point) => Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best)[1];
function show(step) {
  for (const {cursor, at, outputs} of charts) {
    cursor.style.display = step === null ? "none" : "inline";
    cursor.setAttribute("transform", `translate(${left + ((step ?? lo) - lo) / (hi - lo) * (right - left)} 0)`);
    at.textContent = step === null ? "" : `step ${step}`;
    for (const {output, last, points} of outputs) output.textContent = step === null ? last : nearest(points, step);
  }
}
for (const svg of document.querySelectorAll("figure.chart svg")) {
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * width;
    show(Math.round(Math.min(hi, Math.max(lo, lo + (x - left) / (right - left) * (hi - lo)))));
  });
  svg.addEventListener("pointerleave", () => show(null));
}
"""


def text(value):
    """Any value as HTML text that cannot become markup, inside an element or a quoted attribute."""
    return html.escape(str(value))


def number(value, digits=3):
    """A number for people, with a true minus sign: "0.712", "−0.5", "12,346", "1e−6"; a dash for None."""
    if value is None:
        return "–"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        plain = f"{float(mantissa):g}e{int(exponent)}"
    else:
        plain = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    return plain.replace("-", "−")


def round_step(span, count):
    """The smallest of 1, 2, 5 x 10^k that cuts `span` > 0 into at most `count` parts."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(m * power for m in (1, 2, 5, 10) if m * power * count >= span * (1 - 1e-9))


def y_ticks(values):
    """Round numbers that enclose the values. 0 is one of them where it is near, or where the values hardly differ."""
    low, high = min(values), max(values)
    if 0 < low < high / 2 or high - low <= 0.01 * max(abs(low), abs(high)):
        low, high = min(low, 0), max(high, 0)
    if low == high:
        high = 1
    step = round_step(high - low, 4)
    return [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def running_mean(points, bands, reach):
    """Mean over the points of a phase that are at most `reach` places away: [(step, value)] -> [(step, value)]."""
    smooth = []
    for _, begin, end in bands:
        own = [(step, value) for step, value in points if begin < step <= end]
        for i, (step, _) in enumerate(own):
            near = [value for _, value in own[max(0, i - reach):i + reach + 1]]
            smooth.append((step, sum(near) / len(near)))
    return smooth


def chart(title, unit, curves, bands, reach=0):
    """One figure: curves over global step, phases named and shaded, a legend that shows the value under the pointer.

    Args:
        curves: {label: [(step, value)]}.
        bands: [(phase, step it begins after, its last step)], at least one.
        reach: above 0 the steps are drawn faint, with their `running_mean` over them.
    """
    low, high = bands[0][1], bands[-1][2]
    ticks = y_ticks([value for points in curves.values() for _, value in points])

    def x(step):
        return LEFT + (step - low) / (high - low) * (RIGHT - LEFT)

    def y(value):
        return BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (BOTTOM - TOP)

    def path(points, kind):
        line = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
        return f'<path class="{kind}" d="M{line}"/>'

    svg = []
    for i, (phase, begin, end) in enumerate(bands):
        room = int((x(end) - x(begin)) / 6.5)  # letters of the phase's name that fit over its band
        label = phase if len(phase) <= room else phase[:max(0, room - 1)] + "…"
        svg.append(f'<rect class="band{i % 2}" x="{x(begin):.1f}" y="{TOP}" width="{x(end) - x(begin):.1f}" '
                   f'height="{BOTTOM - TOP}"><title>{text(phase)}</title></rect>'
                   f'<text class="phase" x="{(x(begin) + x(end)) / 2:.1f}" y="{TOP - 9}">{text(label)}</text>')
    svg += [f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
            f'<text class="ytick" x="{LEFT - 7}" y="{y(t) + 4:.1f}">{number(t, 6)}</text>' for t in ticks]
    every = max(1, round(round_step(high - low, 6)))
    svg += [f'<text class="xtick" x="{x(t):.1f}" y="{BOTTOM + 18}">{t:,}</text>'
            for t in range(math.ceil(low / every) * every, high + 1, every)]
    legend = []
    for i, (label, points) in enumerate(curves.items()):
        smooth = running_mean(points, bands, reach) if reach else points
        drawn = (path(points, "raw") if reach else "") + path(smooth, "curve")
        if len(points) <= 12:
            drawn += "".join(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>' for step, value in points)
        svg.append(f'<g class="c{i % NUM_COLOURS}">{drawn}</g>')
        values = json.dumps([[step, number(value)] for step, value in points], separators=(",", ":"))
        legend.append(f'<span class="c{i % NUM_COLOURS}"><i></i>{text(label)} '
                      f'<output data-points="{text(values)}">{number(points[-1][1])}</output></span>')
    svg.append(f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}"/>')
    return (f'<figure class="chart"><figcaption><b>{text(title)}</b> <small>{text(unit)}</small>'
            f'<small class="at"></small><div class="legend">{"".join(legend)}</div></figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)} over steps">'
            f'{"".join(svg)}</svg></figure>')
