"""A run's metrics.jsonl as columns. A line that cannot be read is counted, not fatal: what is there is shown."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.report.series import Floats, Series

_MOST_LINE_BYTES = 1 << 20
_UNSETTLED_LINES = 3  # the first steps record the order of units and warm caches


@dataclass
class Metrics:
    """Steps in ascending order. Of a step that is there twice (a run that went back) the last line counts."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Lines with `eval`."""
    unreadable_lines: int = 0
    torn: bool = False
    """The last line has no end, as a killed run leaves it."""
    _columns: dict[str, Floats] = field(default_factory=dict)  # each made once: there may be 100,000 lines

    @property
    def last_step(self) -> int:
        return int(self.lines[-1]["step"]) if self.lines else 0

    def up_to(self, step: int) -> "Metrics":
        return Metrics(
            [line for line in self.lines if line["step"] <= step],
            [line for line in self.evaluations if line["step"] <= step],
        )

    def series(self, key: str, name: str = "") -> Series:
        for one in {"step", key} - self._columns.keys():
            self._columns[one] = np.array([number(line.get(one)) for line in self.lines], dtype=np.float64)
        return Series(name or key, self._columns["step"], self._columns[key])

    def settled(self, key: str) -> Floats:
        """Values of the lines after the first ones, which are slower; of these where there are no others."""
        values = self.series(key).values
        return values[_UNSETTLED_LINES:] if len(values) > _UNSETTLED_LINES else values

    def usual(self, key: str) -> float:
        """The median of those; NaN where there is none."""
        there = self.settled(key)
        there = there[np.isfinite(there)]
        return float(np.median(there)) if there.size else math.nan

    def total(self, key: str) -> float:
        """The sum over lines that have it."""
        return float(np.nansum(self.series(key).values))

    def evaluated(self, key: str = "loss") -> list[Series]:
        """The loss, or what else was found, of each evaluation set that has it, by step."""
        found: dict[str, dict[float, float]] = {}
        for line in self.evaluations:
            for name, fields in evaluation_sets(line["eval"]):
                if key in fields:
                    found.setdefault(name, {})[line["step"]] = number(fields[key])
        return [
            Series(name, np.array(sorted(by_step), dtype=np.float64), np.array([by_step[s] for s in sorted(by_step)]))
            for name, by_step in found.items()
        ]


def number(value: object) -> float:
    """NaN for what is no number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    return math.nan


def evaluation_sets(content: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, fields) of each set: one without a name, or several by theirs."""
    if not isinstance(content, dict):
        return
    if "loss" in content:
        yield "eval", content
    for name, fields in content.items():
        if isinstance(fields, dict):
            yield f"eval {name}", fields


def read_metrics(path: Path) -> Metrics:
    """Raises OSError where the file is there and cannot be read; none is as one without lines."""
    found = Metrics()
    by_step: dict[int, dict[str, Any]] = {}
    evaluated: dict[int, dict[str, Any]] = {}
    if not path.exists():
        return found
    with open(path, "rb") as stream:
        for raw in iter(lambda: stream.readline(_MOST_LINE_BYTES), b""):
            if not raw.endswith(b"\n"):
                found.torn = True
            line = _parse(raw)
            if line is None:
                found.unreadable_lines += bool(raw.strip()) and raw.endswith(b"\n")
                continue
            if isinstance(line.get("eval"), dict):
                evaluated[line["step"]] = line
            if "loss" in line:
                by_step[line["step"]] = line
    found.lines = [by_step[step] for step in sorted(by_step)]
    found.evaluations = [evaluated[step] for step in sorted(evaluated)]
    return found


def _parse(raw: bytes) -> dict[str, Any] | None:
    """None for what is no line of metrics."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):  # a part of a line, or no JSON
        return None
    if isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 1 << 53:
        return line
    return None
