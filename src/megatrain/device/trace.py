"""What ran when, for Perfetto (ui.perfetto.dev) or chrome://tracing.

Format: "Trace Event Format" of the Chromium project, complete events ("ph": "X"), times in microseconds.
"""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mark = Any  # a point in time: seconds of time.perf_counter, or something of the device that it can place among them

# each is filled by one thread or one stream: spans of a track do not overlap, as viewers ask
TRACKS = (
    "compute",
    "waits of compute",
    "queued compute",
    "waits of queued compute",
    "waits of fetches",
    "up",
    "waits of up",
    "down",
    "waits of down",
    "host",
    "waits of host",
    "nvme",
)


class Trace:
    """Spans by track. Safe to add to from every thread."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, str, Mark, Mark]] = []
        self._lock = threading.Lock()

    def add(self, track: str, name: str, start: Mark, end: Mark) -> None:
        assert track in TRACKS, track
        with self._lock:
            self._spans.append((track, name, start, end))

    def write(self, path: Path, seconds: Callable[[Mark], float]) -> None:
        """Write trace.json; `seconds` places a mark on one clock. The file appears whole or not at all."""
        with self._lock:
            spans = [(track, name, seconds(start), seconds(end)) for track, name, start, end in self._spans]
        begin = min((start for _, _, start, _ in spans), default=0.0)
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": track}}
            for number, track in enumerate(TRACKS)
        ]
        for track, name, start, end in sorted(spans, key=lambda span: span[2]):
            times = {"ts": round((start - begin) * 1e6, 1), "dur": round(max(0.0, end - start) * 1e6, 1)}
            events.append({"ph": "X", "pid": 1, "tid": TRACKS.index(track), "name": name, **times})
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        os.replace(unfinished, path)
