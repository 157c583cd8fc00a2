"""One step of trace.json as lanes: what computed, what was copied, what the host's optimizer did, and when."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from megatrain.device.trace import TRACKS
from megatrain.report.charts import figure, legend, table
from megatrain.report.markup import Html, tag
from megatrain.report.metrics import number
from megatrain.report.numbers import percent
from megatrain.report.series import nice_ticks
from megatrain.sizes import format_seconds

# lanes by the tracks of the trace; the second is what it waited for
_LANES = (
    ("compute", "compute", "waits of compute"),
    ("queued", "queued compute", "waits of queued compute"),
    ("to device", "up", "waits of up"),
    ("to host", "down", "waits of down"),
    ("host", "host", "waits of host"),
    ("NVMe", "nvme", None),
)
_FORWARD, _BACKWARD, _COPY_UP, _COPY_DOWN, _UPDATE, _OTHER = 0, 1, 2, 3, 4, 5
_KINDS = ("forward, head and loss", "backward", "weights to device", "gradients to host", "optimizer", "other work")
_WIDTH, _LEFT, _RIGHT, _LANE, _FOOT = 720.0, 70.0, 52.0, 30.0, 28.0
_LEAST_PIXELS = 0.4  # narrower spans of a lane that touch are drawn as one


@dataclass(frozen=True)
class Span:
    """Times in seconds."""

    track: str
    name: str
    start: float
    end: float

    @property
    def backward(self) -> bool:
        return self.name.endswith(" backward")


def read_spans(events: Sequence[dict[str, Any]]) -> list[Span]:
    """Complete events of tracks that have a name, by start."""
    tracks: dict[object, str] = {}
    for event in events:
        arguments = event.get("args")
        if event.get("ph") == "M" and isinstance(arguments, dict) and isinstance(event.get("tid"), int):
            tracks[event["tid"]] = str(arguments.get("name"))
    found = []
    for event in events:
        start, duration, track = number(event.get("ts")), number(event.get("dur")), event.get("tid")
        if event.get("ph") == "X" and start >= 0 and duration >= 0 and isinstance(track, int):
            name = tracks.get(track, "")
            if name in TRACKS and math.isfinite(start + duration):
                found.append(Span(name, str(event.get("name", "")), start * 1e-6, (start + duration) * 1e-6))
    return sorted(found, key=lambda span: span.start)


def one_step(spans: Sequence[Span]) -> tuple[float, float] | None:
    """From the first forward to where the next step's begins, or to the end of the trace: the first step that ends in
    the trace. None where nothing computes."""
    compute = [span for span in spans if span.track == "compute"]
    if not compute:
        return None
    starts = [compute[0].start]
    for before, span in pairwise(compute):
        if before.backward and not span.backward:
            starts.append(span.start)
    end = starts[1] if len(starts) > 1 else max(span.end for span in spans)
    return (starts[0], end) if end > starts[0] else None


def timeline(events: Sequence[dict[str, Any]]) -> Html | None:
    """None where the trace holds no computation."""
    spans = read_spans(events)
    window = one_step(spans)
    if window is None:
        return None
    start, end = window
    inside = [span for span in spans if span.end > start and span.start < end]
    lanes = [lane for lane in _LANES if any(span.track == lane[1] and span.end > span.start for span in inside)]
    height = _LANE * len(lanes) + _FOOT

    def x_of(seconds: float) -> float:
        return _LEFT + (min(max(seconds, start), end) - start) / (end - start) * (_WIDTH - _LEFT - _RIGHT)

    parts, rows, kinds = list(_time_axis(start, end, x_of, height)), [], set()
    for n, (lane, track, waits) in enumerate(lanes):
        y = n * _LANE + 4
        parts.append(tag("text", lane, x=_LEFT - 8, y=y + 16, class_="tick end"))
        for span, pieces in _merged([s for s in inside if s.track == waits], x_of):
            parts.append(_rect(span, pieces, x_of, y + 7, 8.0, "wait", f"waits for {span.name}", start))
        own = [s for s in inside if s.track == track]
        for span, pieces in _merged(own, x_of):
            kind = _kind(span)
            kinds.add(kind)
            parts.append(_rect(span, pieces, x_of, y, 22.0, f"f{kind}", span.name, start))
        busy = sum(min(s.end, end) - max(s.start, start) for s in own)
        waited = sum(min(s.end, end) - max(s.start, start) for s in inside if s.track == waits)
        parts.append(tag("text", percent(busy / (end - start)), x=_WIDTH - _RIGHT + 6, y=y + 16, class_="tick"))
        rows.append(
            [
                lane,
                f"{len(own):,}",
                format_seconds(busy),
                percent(busy / (end - start)),
                format_seconds(waited) if waits else "–",
            ]
        )
    described = f"One step of {format_seconds(end - start)}: " + ", ".join(f"{row[0]} busy {row[3]}" for row in rows)
    drawing = tag(
        "svg",
        tag("title", described),
        *parts,
        viewBox=f"0 0 {_WIDTH:.0f} {height:.0f}",
        role="img",
        aria_label=described,
        class_="chart timeline",
    )
    entries = [(_KINDS[kind], kind) for kind in sorted(kinds)]
    about = "Percentages: the share of the step that a lane was busy. Hatched: waiting. From trace.json (--profile)."
    numbers = table(["lane", "spans", "busy", "of the step", "waited"], rows)
    return figure("One step", format_seconds(end - start), legend(entries), drawing, about, numbers)


def _kind(span: Span) -> int:
    if span.track == "compute":
        return _BACKWARD if span.backward else _FORWARD
    if span.track in ("up", "down"):
        return _COPY_UP if span.track == "up" else _COPY_DOWN
    return _UPDATE if span.name.startswith("update of ") else _OTHER


def _merged(spans: Sequence[Span], x_of: Any) -> Iterator[tuple[Span, int]]:
    """Spans, those too narrow to be seen with their neighbours of the same kind in one: (span, how many)."""
    waiting: list[Span] = []
    for span in spans:
        if waiting:
            narrow = x_of(span.end) - x_of(waiting[0].start) < 4 * _LEAST_PIXELS
            touches = x_of(span.start) - x_of(waiting[-1].end) < _LEAST_PIXELS
            if narrow and touches and _kind(span) == _kind(waiting[0]):
                waiting.append(span)
                continue
            yield _one(waiting)
        waiting = [span]
    if waiting:
        yield _one(waiting)


def _one(spans: Sequence[Span]) -> tuple[Span, int]:
    first = spans[0]
    return Span(first.track, first.name, first.start, max(span.end for span in spans)), len(spans)


def _rect(span: Span, pieces: int, x_of: Any, y: float, height: float, kind: str, name: str, zero: float) -> Html:
    left, right = x_of(span.start), x_of(span.end)
    more = f" and {pieces - 1} more" if pieces > 1 else ""
    took = format_seconds(span.end - span.start)
    title = tag("title", f"{name}{more}: {took}, from {format_seconds(max(0.0, span.start - zero))}")
    return tag("rect", title, x=left, y=y, width=max(_LEAST_PIXELS, right - left), height=height, class_=kind)


def _time_axis(start: float, end: float, x_of: Any, height: float) -> Iterator[Html]:
    foot = height - _FOOT + 4
    for seconds in nice_ticks(0.0, end - start, 6):
        x = x_of(start + seconds)
        yield tag("line", x1=x, x2=x, y1=0, y2=foot, class_="grid")
        shown = "0" if seconds == 0 else format_seconds(seconds)
        yield tag("text", shown, x=x, y=foot + 16, class_="tick middle")
