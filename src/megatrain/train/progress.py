"""What the user sees of a run: a progress bar on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from megatrain.sizes import format_bytes, format_seconds

_SECONDS_BETWEEN_LINES, _MOST_SECONDS_BETWEEN = 10.0, 300.0
_SHARE_BETWEEN = 0.01  # of the time that has gone by: a run of days is no log of a hundred thousand lines
_SMOOTHING = 0.95  # of step times and losses: about the last 20 steps count


class Progress(Protocol):
    """Shows a run's steps; entered before the first and left after the last."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: Any) -> None: ...
    def update(self, line: dict[str, Any]) -> None:
        """Show a finished step, by its metrics line."""

    def say(self, text: str) -> None:
        """Print lines that stay."""


class _Average:
    """A running mean that starts at its first value."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> float:
        self.value = value if self.value is None else _SMOOTHING * self.value + (1 - _SMOOTHING) * value
        return self.value


class _Summary:
    """The words that follow a step number: smoothed loss and speed, memory, time gone by and left.

    What comes between steps (evaluations, waits for checkpoints) counts in the time that is left as it has so far.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps = total_steps
        self._loss, self._seconds, self._tokens = _Average(), _Average(), _Average()
        self._clock, self._began, self._in_steps = clock, clock(), 0.0

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return self._clock() - self._began

    def of(self, line: dict[str, Any]) -> str:
        seconds = self._seconds.add(line["seconds"])
        tokens = self._tokens.add(line["target_tokens"])
        loss = line["loss"]
        shown_loss = f"loss {self._loss.add(loss):.3f}" if loss is not None and loss - loss == 0 else f"loss {loss}"
        speed = f"{tokens / seconds:,.0f} target tokens/s" if seconds > 0 else ""
        self._in_steps += line["seconds"]
        between = max(1.0, self.seconds / self._in_steps) if self._in_steps > 0 else 1.0
        left = format_seconds(seconds * between * (self.total_steps - line["step"]))
        memory = f"host {format_bytes(line['host_peak_bytes'])}"
        return f"{shown_loss}  {speed}  {memory}  {format_seconds(self.seconds)}, {left} left"


class LineProgress:
    """For logs and pipes: the first and the last step, and between them a line every ten seconds, in long runs less
    often. Whole lines alone, and nothing that moves a cursor."""

    def __init__(self, total_steps: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._summary = _Summary(total_steps, clock)
        self._stream, self._clock = stream, clock
        self._last_time: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def update(self, line: dict[str, Any]) -> None:
        """Print the step's line if it is due."""
        text = self._summary.of(line)
        now = self._clock()
        between = min(_MOST_SECONDS_BETWEEN, max(_SECONDS_BETWEEN_LINES, _SHARE_BETWEEN * self._summary.seconds))
        due = self._last_time is None or now - self._last_time >= between
        if due or line["step"] == self._total_steps:
            self._last_time = now
            print(f"step {line['step']}/{self._total_steps}  {text}", file=self._stream, flush=True)

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class BarProgress:
    """For terminals: one bar that is redrawn."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._summary = _Summary(total_steps)
        self._bar = RichProgress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}"),
            console=Console(file=stream),
        )
        self._task = self._bar.add_task("training", total=total_steps, summary="first step")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._bar.stop()

    def update(self, line: dict[str, Any]) -> None:
        """Redraw the bar."""
        self._bar.update(self._task, completed=line["step"], summary=self._summary.of(line))

    def say(self, text: str) -> None:
        """Above the bar."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_progress(total_steps: int, stream: TextIO | None = None) -> Progress:
    """The progress display that fits `stream` (standard error by default): a bar where a person looks at a terminal
    that can redraw it, else lines. NO_COLOR is heeded by the library that draws the bar."""
    stream = stream or sys.stderr
    redraws = os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown") or os.name == "nt"
    watched = os.environ.get("CI", "") in ("", "0", "false")  # build machines may give out terminals, too
    return (
        BarProgress(total_steps, stream)
        if stream.isatty() and redraws and watched
        else LineProgress(total_steps, stream)
    )
