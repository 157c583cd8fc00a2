"""What the user sees of a run: a progress bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from megatrain.sizes import format_bytes, format_seconds

_SECONDS_BETWEEN_LINES = 10.0
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
    """The words that follow a step number: smoothed loss and speed, memory, time left."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._loss, self._seconds, self._tokens = _Average(), _Average(), _Average()

    def of(self, line: dict[str, Any]) -> str:
        seconds = self._seconds.add(line["seconds"])
        tokens = self._tokens.add(line["target_tokens"])
        loss = line["loss"]
        shown_loss = f"loss {self._loss.add(loss):.3f}" if loss is not None and loss - loss == 0 else f"loss {loss}"
        speed = f"{tokens / seconds:,.0f} target tokens/s" if seconds > 0 else ""
        left = format_seconds(seconds * (self.total_steps - line["step"]))
        return f"{shown_loss}  {speed}  host {format_bytes(line['host_peak_bytes'])}  {left} left"


class LineProgress:
    """For logs and pipes: the first and the last step, and between them a line every ten seconds."""

    def __init__(self, total_steps: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._summary = _Summary(total_steps)
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
        due = self._last_time is None or now - self._last_time >= _SECONDS_BETWEEN_LINES
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
    """The progress display that fits `stream` (standard error by default)."""
    stream = stream or sys.stderr
    return BarProgress(total_steps, stream) if stream.isatty() else LineProgress(total_steps, stream)
