"""Threads that live on between calls: starting one takes a fifth of a millisecond, and OpenMP then starts its own."""

import threading
import weakref
from collections.abc import Callable
from contextvars import Context
from queue import SimpleQueue

Over = Callable[[BaseException | None], object]
_Calls = SimpleQueue[tuple[Callable[[], object], Over] | None]


class KeptThread:
    """A daemon thread that carries out one call after the other, until `close` or until nobody holds this object."""

    def __init__(self, name: str) -> None:
        self._calls: _Calls = SimpleQueue()
        # the thread holds the queue and not this object, which can therefore be dropped without `close`
        self._thread = threading.Thread(target=_serve, args=(self._calls,), name=name, daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, self._calls.put, None)
        self._end.atexit = False  # woken while Python ends, the thread would run into what is being taken apart

    def start(self, call: Callable[[], object], over: Over) -> None:
        """Returns at once. When `call` has ended and nothing of it is held here, the thread calls `over` with what it
        raised, or None; `over` must not raise."""
        self._calls.put((call, over))

    def settle(self) -> None:
        """Returns when the thread holds nothing of the calls before, not even what they raised."""
        settled = threading.Event()
        self._calls.put((_nothing, lambda _error: settled.set()))
        settled.wait()

    def close(self) -> None:
        """Ends the thread after the calls that have been started."""
        self._end()
        self._thread.join()


def _nothing() -> None:
    """A call that shows that those before it are over."""


def _serve(calls: _Calls) -> None:
    """The life of a thread. Context variables begin empty in each call, as in a thread of its own."""
    while (task := calls.get()) is not None:
        call, over = task
        error: BaseException | None = None
        try:
            Context().run(call)
        except BaseException as raised:
            error = raised
        # a caller may unmap the arrays that the call used as soon as it hears that it is over
        del task, call
        over(error)
        del over, error
