"""Numbers over steps, made fewer for a plot so that nothing that stands out is lost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MOST_POINTS = 600


@dataclass(frozen=True)
class Series:
    """Values by step, in ascending order; NaN is a value that is not there."""

    name: str
    steps: Floats
    values: Floats

    @property
    def finite(self) -> "Series":
        there = np.isfinite(self.values)
        return Series(self.name, self.steps[there], self.values[there])

    def at(self, step: float) -> float:
        """NaN where there is no such step."""
        place = int(np.searchsorted(self.steps, step))
        return float(self.values[place]) if place < len(self.steps) and self.steps[place] == step else np.nan

    def thinned(self, most: int = MOST_POINTS) -> "Series":
        """At most about `most` points: of each stretch of steps the first, the last, the smallest and the largest, and
        one that is missing, if one is."""
        count = len(self.steps)
        if count <= most:
            return self
        keep = {0, count - 1}
        edges = np.linspace(0, count, max(1, most // 4) + 1).astype(int)
        for start, stop in pairwise(edges):
            part = self.values[start:stop]
            keep |= {int(start), int(stop) - 1}
            there = np.isfinite(part)
            if there.any():
                keep |= {int(start + np.nanargmin(np.where(there, part, np.nan)))}
                keep |= {int(start + np.nanargmax(np.where(there, part, np.nan)))}
            if not there.all():
                keep.add(int(start + np.argmin(there)))
        chosen = np.array(sorted(keep))
        return Series(self.name, self.steps[chosen], self.values[chosen])

    def smoothed(self, half_life: float, name: str) -> "Series":
        """An exponential mean of the values so far: one that is `half_life` values old counts half. What is missing
        stays missing and counts nothing."""
        decay = 0.5 ** (1 / half_life)
        total = weight = 0.0
        means = np.full(len(self.values), np.nan)
        for n, value in enumerate(self.values.tolist()):
            if math.isfinite(value):
                total, weight = decay * total + value, decay * weight + 1
                means[n] = total / weight
        return Series(name, self.steps, means)


def with_gaps(series: Series, usual_step: float) -> Series:
    """A missing value where steps are missing, so that a line breaks there."""
    after = np.flatnonzero(np.diff(series.steps) > 1.5 * usual_step)
    return Series(
        series.name,
        np.insert(series.steps, after + 1, series.steps[after] + usual_step),
        np.insert(series.values, after + 1, np.nan),
    )


def usual_distance(steps: Floats) -> float:
    """Between neighbouring lines: more than one where not every step is logged."""
    return float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= raw * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [number * size for number in range(first, math.floor(high / size + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 where there are few of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors: Sequence[int] = (1, 2, 5) if last - first <= 2 else (1,)
    stride = max(1, (last - first) // 6)
    found = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]
