"""Work of the host beside the step: one thread, first come first served."""

import threading
from collections.abc import Callable

from megatrain.threads import KeptThread


class Ticket:
    """A piece of work; `wait` returns when it is done and raises what it raised."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._error: BaseException | None = None

    def over(self, error: BaseException | None) -> None:
        self._error = error
        self._done.set()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Return when it is done, whatever it raised."""
        self._done.wait()

    @property
    def done(self) -> bool:
        return self._done.is_set()


class HostThread:
    """Carries out what it is given, in order, until `close` or until nobody holds it."""

    def __init__(self, name: str) -> None:
        self._thread = KeptThread(f"megatrain-{name}")

    def submit(self, run: Callable[[], None]) -> Ticket:
        ticket = Ticket()
        self._thread.start(run, ticket.over)
        return ticket

    def drain(self) -> None:
        """Return when everything submitted so far is done; errors stay with their tickets."""
        self.submit(_nothing).settle()

    def close(self) -> None:
        self._thread.close()


def _nothing() -> None:
    """The end of what came before it."""
