"""Where the bytes were meant to be, and what the peak came to."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatrain.planner.placement import RESERVED
from megatrain.report.charts import figure, table
from megatrain.report.folder import Run
from megatrain.report.markup import Html, tag
from megatrain.report.metrics import number
from megatrain.report.numbers import percent
from megatrain.sizes import format_bytes

_TIERS = {"device": "Device memory", "host": "Host memory", "nvme": "NVMe"}
_COLORS = 8
_WIDTH, _LEFT, _RIGHT, _BAR = 720.0, 70.0, 90.0, 26.0


def planned_bytes(run: Run, tier: str) -> dict[str, float]:
    """By category, the largest first; of what a step uses."""
    tiers = (run.plan or {}).get("bytes")
    held = tiers.get(tier) if isinstance(tiers, Mapping) else None
    found = {str(name): number(n) for name, n in held.items()} if isinstance(held, Mapping) else {}
    used = {name: n for name, n in found.items() if n > 0 and name not in RESERVED}
    return dict(sorted(used.items(), key=lambda item: -item[1]))


def measured_peak(run: Run, tier: str) -> float | None:
    """The largest of all steps; None where nothing was measured."""
    if not run.metrics.lines or tier == "nvme":
        return None
    peaks = run.metrics.series(f"{tier}_peak_bytes").finite.values
    return float(np.max(peaks)) if len(peaks) and np.max(peaks) > 0 else None


def memory_figures(run: Run) -> list[Html]:
    """One for each tier that the plan puts something into."""
    return [_tier(run, tier, held) for tier in _TIERS if (held := planned_bytes(run, tier))]


def _tier(run: Run, tier: str, held: dict[str, float]) -> Html:
    planned, measured = sum(held.values()), measured_peak(run, tier)
    largest = max(planned, measured or 0.0)
    usable = _WIDTH - _LEFT - _RIGHT
    parts, x = [tag("text", "planned", x=_LEFT - 8, y=21.0, class_="tick end")], _LEFT
    for n, (name, count) in enumerate(held.items()):
        width = usable * count / largest
        title = tag("title", f"{name}: {format_bytes(count)} ({percent(count / planned)})")
        parts.append(tag("rect", title, x=x, y=4.0, width=max(0.0, width - 0.5), height=_BAR, class_=f"f{n % _COLORS}"))
        x += width
    parts.append(tag("text", format_bytes(planned), x=x + 6, y=21.0, class_="tick"))
    if measured is not None:
        width = usable * measured / largest
        parts.append(tag("text", "peak", x=_LEFT - 8, y=57.0, class_="tick end"))
        parts.append(
            tag(
                "rect",
                tag("title", f"measured peak: {format_bytes(measured)}"),
                x=_LEFT,
                y=40.0,
                width=width,
                height=_BAR,
                class_="measured",
            )
        )
        parts.append(tag("text", format_bytes(measured), x=_LEFT + width + 6, y=57.0, class_="tick"))
    described = f"{_TIERS[tier]}: planned {format_bytes(planned)}" + _against(planned, measured)
    height = 72 if measured is not None else 36
    drawing = tag(
        "svg",
        tag("title", described),
        *parts,
        viewBox=f"0 0 {_WIDTH:.0f} {height}",
        role="img",
        aria_label=described,
        class_="chart",
    )
    shown = [
        tag("li", tag("span", class_=f"swatch b{n % _COLORS}"), f"{name} {format_bytes(count)}")
        for n, (name, count) in enumerate(held.items())
        if count >= 0.005 * planned
    ]
    rows = [[name, format_bytes(count), percent(count / planned)] for name, count in held.items()]
    rows.append(["in all", format_bytes(planned), ""])
    return figure(
        _TIERS[tier],
        described.partition(": ")[2],
        tag("ul", *shown, class_="legend"),
        drawing,
        _room(run, tier),
        table(["category", "planned", "share"], rows),
    )


def _against(planned: float, measured: float | None) -> str:
    if measured is None:
        return "; the peak was not measured"
    return f", measured peak {format_bytes(measured)} ({measured / planned - 1:+.0%})"


def _room(run: Run, tier: str) -> str:
    """What could be had, by the plan."""
    available: Any = (run.plan or {}).get("available")
    room = number(available.get(tier)) if isinstance(available, Mapping) else 0.0
    return f"{format_bytes(room)} could be had." if 0 < room < 1 << 60 else ""
