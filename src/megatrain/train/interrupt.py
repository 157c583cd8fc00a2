"""Ctrl-C, or SIGTERM, by which a batch system or a container ends a program: the first time ends what is going on in
an orderly way, the second time ends the process at once."""

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_EXIT_BY_SIGNAL = 128  # plus the signal's number is what shells report for a program that it ended


class StopOnInterrupt:
    """While entered, SIGINT or SIGTERM sets `requested`; a second one exits with 130 or 143 without unwinding.

    `promise` is what the user is told will happen. Works in the main thread, where Python delivers signals;
    elsewhere it changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.promise = "finishing this step, then saving"
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # not the main thread
            self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # worker threads may hold locks or be deep in native code: nothing is worth waiting for now
            os._exit(_EXIT_BY_SIGNAL + number)
        self.requested = True
        again = "Ctrl-C again" if number == signal.SIGINT else "once more"
        # os.write, not print: the handler may have interrupted a print
        message = f"\nmegatrain: {self.promise} ({again} to stop at once)\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
