"""How far reading has come: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any, Self, TextIO

_SECONDS_BETWEEN_LINES = 10.0


class RowProgress:
    """Counts rows, or what else `unit` says, out of `total` where that is known. Nothing is said of what is done within
    ten seconds."""

    def __init__(self, words: str, total: int | None, stream: TextIO | None = None, *, unit: str = "rows") -> None:
        self.words, self.total, self.unit = words, total, unit
        self._stream = stream or sys.stderr
        self._rows = 0
        self._last = time.monotonic()
        self._bar: Any = _bar(self._stream) if self._stream.isatty() else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.words, total=self.total)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, rows: int) -> None:
        """So many rows more."""
        self._rows += rows
        if self._bar is not None:
            self._bar.update(self._task, completed=self._rows)
        elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            of = f" of {self.total:,}" if self.total else ""
            print(f"{self.words}: {self._rows:,}{of} {self.unit}", file=self._stream, flush=True)


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=stream),
        transient=True,
    )
