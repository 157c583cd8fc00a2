"""What a step of the engine did: busy seconds from its trace, and layers that were not computed again."""

import json
import tempfile
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from torch import Tensor

from megatrain.engine.engine import Engine
from megatrain.engine.weight_stream import WeightStream


def traced_seconds(engine: Engine, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Busy seconds of one step by track of its trace. Marks cost a little, so that step is not one of the timed."""
    engine.start_trace()
    engine.train_step(batches)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        engine.write_trace(path)
        return busy_seconds(json.loads(path.read_text())["traceEvents"])


def busy_seconds(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds by track; spans of a track that overlap count once, and computation not while it waits."""
    names: dict[int, str] = {}
    spans: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "M":
            names[event["tid"]] = event["args"]["name"]
        else:
            spans.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    by_name = {name: spans.get(tid, []) for tid, name in names.items()}
    busy = {name: _covered_seconds(found) for name, found in by_name.items()}
    waits = by_name.get("waits of compute", [])
    busy["compute"] = _covered_seconds(by_name["compute"] + waits) - _covered_seconds(waits)
    return busy


def _covered_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Of (start, end) in microseconds."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end)) / 1e6
        end = max(end, stop)
    return total


def kept_layers(engine: Engine) -> int:
    """Layers that keep their graph instead of being computed again."""
    held: Set[int] = engine.executor.kept_units
    if isinstance(engine.weights, WeightStream):  # of those, the ones whose weights stay in their slot
        schedule = engine.weights.schedule_of("step")
        held = held & (schedule.held if schedule is not None else frozenset())
    return sum(".layers." in unit.name for unit in engine.partition.units if unit.index in held)
