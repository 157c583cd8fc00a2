"""Charts as SVG: lines over steps, and stacked bars. Colours come from the page's style (classes c0, c1, ...).

What a chart shows is also in a table beneath it, and for the mouse in `data-chart`, which the page's script reads.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatrain.report.markup import Html, join, tag
from megatrain.report.numbers import short, tick
from megatrain.report.series import Series, log_ticks, nice_ticks, usual_distance, with_gaps

WIDTH, HEIGHT = 720.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 12.0, 34.0
_TABLE_ROWS = 12
_LOG_FROM_RATIO = 50  # between the largest value and the smallest


@dataclass(frozen=True)
class Line:
    """`color`: a number of the palette. `style`: line, faint (beneath others) or marked (few points, each shown)."""

    series: Series
    color: int = 0
    style: str = "line"


@dataclass(frozen=True)
class Mark:
    """A vertical line: something that happened after a step."""

    step: int
    text: str


class _Scale:
    """Values to pixels, upwards."""

    def __init__(self, low: float, high: float, *, logarithmic: bool) -> None:
        self.logarithmic = logarithmic
        if high <= low:
            pad = abs(low) * 0.1 or 1.0
            low, high = (low / 2, low * 2) if logarithmic else (low - pad, high + pad)
        elif not logarithmic:
            pad = 0.05 * (high - low)
            low, high = (0.0 if 0 <= low < pad * 4 else low - pad), high + pad
        self.low, self.high = low, high

    @property
    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.logarithmic else nice_ticks(self.low, self.high)

    def of(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.logarithmic else (self.low, self.high)
        at = math.log(value) if self.logarithmic else value
        return HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - BOTTOM - TOP)


class _Steps:
    """Steps to pixels, to the right."""

    def __init__(self, first: float, last: float) -> None:
        self.first, self.last = (first, last) if last > first else (first - 1, first + 1)

    @property
    def ticks(self) -> list[float]:
        return sorted({round(value) for value in nice_ticks(self.first, self.last, 7)})

    def of(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)


def line_chart(
    name: str,
    unit: str,
    lines: Sequence[Line],
    *,
    about: str = "",
    marks: Sequence[Mark] = (),
    shown: Callable[[float], str] = short,
    may_be_log: bool = False,
    from_zero: bool = False,
) -> Html:
    """A figure with the lines over steps. Lines without any value are left out; of no values at all it says so."""
    lines = [line for line in lines if len(line.series.finite.steps)]
    if not lines:
        return tag("figure", tag("figcaption", tag("h3", name), tag("p", "No values.", class_="muted")))
    everything = np.concatenate([line.series.finite.values for line in lines])
    low, high = float(everything.min()), float(everything.max())
    low = min(0.0, low) if from_zero else low
    scale = _Scale(low, high, logarithmic=may_be_log and low > 0 and high / low > _LOG_FROM_RATIO)
    steps = _Steps(
        min(float(line.series.steps[0]) for line in lines), max(float(line.series.steps[-1]) for line in lines)
    )
    parts = [_grid(scale.ticks, scale.of, tick), _step_axis(steps), _marks(marks, steps)]
    parts += [_missing(line, steps) for line in lines[:1]]
    parts += [_draw(line, steps, scale) for line in lines]
    first, last = (lines[-1].series.finite.values[at] for at in (0, -1))
    described = f"{name} over steps: {lines[-1].series.name} from {shown(float(first))} to {shown(float(last))} {unit}"
    hover = [
        {
            "name": line.series.name,
            "color": line.color,
            "points": [
                [int(step), round(steps.of(step), 1), round(scale.of(value), 1), shown(value)]
                for step, value in _pairs(line.series.finite.thinned())
            ],
        }
        for line in lines
    ]
    svg = _svg(described, parts, hover)
    suffix = ", logarithmic" if scale.logarithmic else ""
    return figure(name, f"{unit}{suffix}", _lines_legend(lines), svg, about, _values_table(lines, shown))


def figure(name: str, unit: str, legend: Html, drawing: Html, about: str, table: Html) -> Html:
    """A drawing with its name above and, folded up, its numbers below."""
    heading = tag("h3", name, " ", tag("span", unit, class_="unit")) if unit else tag("h3", name)
    more = tag("details", tag("summary", "Numbers"), table) if table else Html("")
    note = tag("p", about, class_="muted") if about else Html("")
    return tag("figure", tag("figcaption", heading, legend), drawing, note, more)


def stacked_bars(
    name: str,
    unit: str,
    edges: Sequence[tuple[int, int]],
    layers: Sequence[tuple[str, Sequence[float]]],
    *,
    about: str = "",
    shown: Callable[[float], str] = short,
) -> Html:
    """One bar for each stretch of steps (first, last), with a value of each layer, the lowest first."""
    totals = [sum(values[n] for _, values in layers) for n in range(len(edges))]
    scale = _Scale(0.0, max(totals, default=0.0) or 1.0, logarithmic=False)
    steps = _Steps(edges[0][0] - 0.5, edges[-1][1] + 0.5)
    parts = [_grid(scale.ticks, scale.of, tick), _step_axis(steps)]
    for n, (first, last) in enumerate(edges):
        left, right = steps.of(first - 0.5), steps.of(last + 0.5)
        gap, base = min(1.0, (right - left) * 0.1), 0.0
        for color, (layer, values) in enumerate(layers):
            top, bottom = scale.of(base + values[n]), scale.of(base)
            if bottom - top > 0.05:
                where = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
                title = tag("title", f"{where}: {layer} {shown(values[n])} of {shown(totals[n])} {unit}")
                parts.append(
                    tag(
                        "rect",
                        title,
                        x=left + gap / 2,
                        y=top,
                        width=right - left - gap,
                        height=bottom - top,
                        class_=f"f{color}",
                    )
                )
            base += values[n]
    sums = [sum(values) for _, values in layers]
    whole = sum(sums) or 1.0
    means = [(f"{layer}", color) for color, (layer, _) in enumerate(layers)]
    described = f"{name}: " + ", ".join(
        f"{layer} {100 * part / whole:.1f} %" for (layer, _), part in zip(layers, sums, strict=True)
    )
    head = ["steps", *(layer for layer, _ in layers), "in all"]
    rows = [
        [f"{first:,}–{last:,}", *(shown(values[n]) for _, values in layers), shown(totals[n])]
        for n, (first, last) in enumerate(edges)
    ]
    return figure(name, unit, legend(means), _svg(described, parts), about, table(head, _some(rows)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> Html:
    """The first column names the row; the others are numbers, on the right."""
    head_row = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell, class_=_kind_of(cell)) for cell in row[1:]))
        for row in rows
    ]
    name = tag("caption", caption) if caption else Html("")
    return tag("div", tag("table", name, tag("thead", head_row), tag("tbody", *body)), class_="scroll")


def _kind_of(cell: str) -> str | None:
    return "hash" if len(cell) == 64 else None


def _values_table(lines: Sequence[Line], shown: Callable[[float], str]) -> Html:
    """Some steps with the values there, and the extremes of each line."""
    every = np.unique(np.concatenate([line.series.steps for line in lines]))
    # of a line with few points (an evaluation) the last are shown, too
    few = [line.series.finite.steps[-_TABLE_ROWS:] for line in lines if line.style == "marked"]
    chosen = np.unique(np.concatenate([np.array(_some(every.tolist())), *few])).tolist()
    rows = [[f"{step:,.0f}", *(shown(line.series.at(step)) for line in lines)] for step in chosen]
    for what, at in (("smallest", np.argmin), ("largest", np.argmax)):
        cells = []
        for line in lines:
            there = line.series.finite
            where = int(at(there.values))
            cells.append(f"{shown(float(there.values[where]))} (step {int(there.steps[where]):,})")
        rows.append([what, *cells])
    return table(["step", *(line.series.name for line in lines)], rows)


def _some(rows: Sequence[Any]) -> list[Any]:
    """Evenly chosen, with the first and the last."""
    if len(rows) <= _TABLE_ROWS:
        return list(rows)
    return [rows[round(n * (len(rows) - 1) / (_TABLE_ROWS - 1))] for n in range(_TABLE_ROWS)]


def _pairs(series: Series) -> list[tuple[float, float]]:
    return list(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def _svg(described: str, parts: Sequence[Html], hover: object = None) -> Html:
    data = None if hover is None else json.dumps(hover, separators=(",", ":"))
    return tag(
        "svg",
        tag("title", described),
        *parts,
        viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
        role="img",
        aria_label=described,
        data_chart=data,
        class_="chart",
    )


def _grid(ticks: Sequence[float], of: Callable[[float], float], shown: Callable[[float], str]) -> Html:
    parts = []
    for value in ticks:
        y = of(value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", shown(value), x=LEFT - 8, y=y + 4, class_="tick end"))
    return join(*parts)


def _step_axis(steps: _Steps) -> Html:
    y = HEIGHT - BOTTOM
    parts = [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="axis")]
    for step in steps.ticks:
        x = steps.of(step)
        if LEFT - 1 <= x <= WIDTH - RIGHT + 1:
            parts.append(tag("line", x1=x, x2=x, y1=y, y2=y + 4, class_="axis"))
            parts.append(tag("text", tick(step), x=x, y=y + 17, class_="tick middle"))
    parts.append(tag("text", "step", x=WIDTH - RIGHT, y=HEIGHT - 3, class_="tick end"))
    return join(*parts)


def _marks(marks: Sequence[Mark], steps: _Steps) -> Html:
    parts = []
    for mark in marks:
        x = steps.of(mark.step)
        if LEFT <= x <= WIDTH - RIGHT:
            parts.append(tag("line", tag("title", mark.text), x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="mark"))
    return join(*parts)


def _missing(line: Line, steps: _Steps) -> Html:
    """A tick at the foot for each step whose value is missing, infinite or no number."""
    series = line.series.thinned()
    parts = [
        tag(
            "path",
            tag("title", f"step {step:,.0f}: no finite value"),
            class_="missing",
            d=f"M{steps.of(step) - 4:.1f} {HEIGHT - BOTTOM}h8l-4-7z",
        )
        for step, value in _pairs(series)
        if not math.isfinite(value)
    ]
    return join(*parts[:200])


def _draw(line: Line, steps: _Steps, scale: _Scale) -> Html:
    """A path that breaks where values or steps are missing; a value on its own is a dot."""
    usual = usual_distance(line.series.steps)
    series = line.series if line.style == "marked" else with_gaps(line.series, usual)
    runs: list[list[tuple[float, float]]] = [[]]
    for step, value in _pairs(series.thinned()):
        if math.isfinite(value):
            runs[-1].append((steps.of(step), scale.of(value)))
        elif line.style != "marked" and runs[-1]:
            runs.append([])
    path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run) for run in runs if len(run) > 1)
    dots = [run[0] for run in runs if len(run) == 1]
    if line.style == "marked":
        dots = [point for run in runs for point in run]
        dots = dots if len(dots) <= 200 else []
    parts = [tag("path", d=path, class_=f"line s{line.color} {line.style}")] if path else []
    parts += [tag("circle", cx=x, cy=y, r=3.0, class_=f"f{line.color}") for x, y in dots]
    return join(*parts)


def _lines_legend(lines: Sequence[Line]) -> Html:
    """Nothing where the chart's name says it."""
    items = [tag("li", tag("span", class_=f"swatch b{line.color} {line.style}"), line.series.name) for line in lines]
    return tag("ul", *items, class_="legend") if len(items) > 1 else Html("")


def legend(entries: Sequence[tuple[str, int]]) -> Html:
    """Names with their colours."""
    items = [tag("li", tag("span", class_=f"swatch b{color}"), name) for name, color in entries]
    return tag("ul", *items, class_="legend") if items else Html("")
