"""Ctrl-C: the first time ends what is going on in an orderly way, the second time ends the process at once."""

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_INTERRUPTED = 130  # what shells report for a program that SIGINT ended


class StopOnInterrupt:
    """While entered, SIGINT sets `requested`; a second SIGINT exits with 130 without unwinding.

    `promise` is what the user is told will happen. Works in the main thread, where Python delivers signals;
    elsewhere it changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.promise = "finishing this step, then saving"
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> Self:
        try:
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
            self._installed = True
        except ValueError:  # not the main thread
            self._installed = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # worker threads may hold locks or be deep in native code: nothing is worth waiting for now
            os._exit(EXIT_INTERRUPTED)
        self.requested = True
        # os.write, not print: the handler may have interrupted a print
        message = f"\nmegatrain: {self.promise} (Ctrl-C again to stop at once)\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
