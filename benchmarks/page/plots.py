"""Plots of the page, as SVG whose bytes depend on the numbers alone."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from page.recorded import Comparison

INK, OURS, OTHERS = "#1f2430", "#2f6fb3", "#b9c3d3"


def missing() -> str | None:
    return None if find_spec("matplotlib") else "matplotlib is not installed (pip install '.[bench]')"


def draw_bars(path: Path, comparison: Comparison, metric: str, label: str) -> None:
    """One bar for each case that was measured, with a line from p20 to p80."""
    figure, axes = _figure()
    cases = [case for case in comparison.measured if metric in case.rows]
    for number, case in enumerate(cases):
        row = case.rows[metric]
        value = float(row["value"])
        axes.barh(number, value, color=OURS if number == 0 else OTHERS, height=0.6)
        if row["p20"]:
            axes.plot([float(row["p20"]), float(row["p80"])], [number, number], color=INK, linewidth=1.2)
    axes.set_yticks(range(len(cases)), [case.name for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    _write(figure, axes, path, comparison)


def draw_lines(path: Path, comparison: Comparison, metrics: Sequence[tuple[str, str]]) -> None:
    """Ratios to the first case by case, one line for each (metric, label)."""
    figure, axes = _figure()
    cases = comparison.measured
    for (metric, label), color in zip(metrics, (OURS, "#c05621"), strict=False):
        values = [case.median(metric) for case in cases]
        axes.plot(range(len(cases)), values, marker="o", color=color, label=label)
    axes.axhspan(0.9, 1.1, color="#e8edf4", zorder=0, label="within 10%")
    axes.set_xticks(range(len(cases)), [case.name for case in cases])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _write(figure, axes, path, comparison)


def _figure() -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "megatrain", "svg.fonttype": "none", "font.size": 10})
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7.0, 3.2))


def _write(figure: Any, axes: Any, path: Path, comparison: Comparison) -> None:
    axes.set_title(f"{comparison.setting}; {comparison.device}", fontsize=10, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    import matplotlib.pyplot as plt

    plt.close(figure)
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")
