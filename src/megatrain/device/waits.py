"""How long computation stood still for copies, by the name of the wait."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatrain.device.trace import Mark, Trace


class Waits:
    """Waits of computation since the last `take`. `counting`: whether anybody asks for those to come. Safe to add to
    from every thread."""

    def __init__(self, mark: Callable[[], Mark]) -> None:
        self.counting = False
        self._mark = mark
        self._spans: list[tuple[str, str, Mark, Mark]] = []  # (track, name, before, after)
        self._lock = threading.Lock()

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Around a wait of computation, whether the host waits for it or the device does."""
        if not self.counting:
            yield
            return
        before = self._mark()
        yield
        self.add("waits of compute", name, before, self._mark())

    def add(self, track: str, name: str, before: Mark, after: Mark) -> None:
        if self.counting:
            with self._lock:
                self._spans.append((track, name, before, after))

    def take(self, seconds: Callable[[Mark], float], trace: Trace | None) -> dict[str, float]:
        """Seconds by name, which are forgotten here and noted in the trace. Computation is over up to now."""
        with self._lock:
            spans, self._spans = self._spans, []
        total: dict[str, float] = defaultdict(float)
        for track, name, before, after in spans:
            if trace is not None:
                trace.add(track, name, before, after)
            total[name] += max(0.0, seconds(after) - seconds(before))
        return total

    def forget(self) -> None:
        """Of a pass that was given up."""
        with self._lock:
            self._spans.clear()
