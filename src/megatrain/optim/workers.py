"""A thread pool of our own for host kernels: one large contiguous slice per thread.

numba's thread layers are not used: `workqueue` aborts the process when two Python threads call it at once,
and the OpenMP layers stall when torch computes at the same time.
"""

import hashlib
import threading
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from numba import njit

from megatrain.threads import KeptThread

# Below this many elements (a fraction of a millisecond of work) waking threads costs more than it saves.
INLINE_ELEMENTS = 1 << 16

_Done = SimpleQueue[tuple[int, BaseException | None]]


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compiles `function` with numba for `Workers.run`: it releases the GIL, and the machine code is cached
    on disk.

    Used bare or with numba `options`. Where no cache directory can be written, the code is compiled once per
    process instead.
    """
    if function is None:
        return lambda decorated: kernel(decorated, **options)
    try:
        compiled = njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # numba's "cannot cache function: no locator available"
        return njit(nogil=True, **options)(function)
    _renew_with_any_source(compiled)
    return compiled


def _renew_with_any_source(compiled: Any) -> None:
    """Let a cached kernel be compiled anew when any file of this folder has changed.

    numba looks at the file that defines a kernel alone. One that calls into another file would keep the old code of
    that after an upgrade. numba has no public way to say so; without the attributes below nothing can be said.
    """
    index: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if hasattr(index, "_source_stamp"):
        index._source_stamp = (index._source_stamp, _sources_hash())


@cache
def _sources_hash() -> str:
    found = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        found.update(source.read_bytes())
    return found.hexdigest()


def slices(length: int, parts: int, align: int) -> list[tuple[int, int]]:
    """[0, length) as at most `parts` non-empty (start, stop), every start a multiple of `align` elements."""
    chunks = -(-length // align)
    edges = [min(length, chunks * part // parts * align) for part in range(parts + 1)]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop]


class Workers:
    """`threads` slices at a time: one on the calling thread, the others on threads of its own.

    Safe to share: concurrent callers of `run` take turns. A kernel must not call `run` of its own pool.
    """

    def __init__(self, threads: int) -> None:
        """`threads`: slices per `run`, the caller's included. Raises ValueError below 1."""
        if threads < 1:
            raise ValueError(f"threads={threads}: at least 1 is needed")
        self.threads = threads
        self._turn = threading.Lock()
        self._closed = False
        self._threads = [KeptThread(f"megatrain-worker-{index}") for index in range(1, threads)]

    def run(self, fn: Callable[..., Any], length: int, *args: Any, align: int = 64) -> None:
        """Calls `fn(start, stop, *args)` on slices that cover [0, length) once, and returns when all are
        done.

        Slices start at multiples of `align` elements (64: whole cache lines of every dtype here). Fewer than
        INLINE_ELEMENTS run as one slice on the calling thread. If slices raise, the others still finish, and
        the exception of the lowest slice is raised. Raises RuntimeError after `close`.
        """
        with self._turn:
            if self._closed:
                raise RuntimeError("these workers are closed")
            parts = slices(length, self.threads if length >= INLINE_ELEMENTS else 1, align)
            done: _Done = SimpleQueue()  # one per run: an interrupted run leaves nothing behind for the next
            errors: dict[int, BaseException] = {}
            sent = 0
            try:
                for thread, (start, stop) in zip(self._threads, parts[1:], strict=False):
                    thread.start(partial(fn, start, stop, *args), partial(_report, done, sent + 1))
                    sent += 1
                for start, stop in parts[:1]:
                    fn(start, stop, *args)
            except BaseException as error:
                errors[0] = error
            _gather(done, sent, errors)
        if errors:
            raise errors[min(errors)]

    def close(self) -> None:
        """Ends the threads, after a `run` under way; a second call does nothing."""
        with self._turn:
            self._closed = True
        for thread in self._threads:
            thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _report(done: _Done, index: int, error: BaseException | None) -> None:
    done.put((index, error))


def _gather(done: _Done, count: int, errors: dict[int, BaseException]) -> None:
    """Waits for `count` slices; an interrupt (Ctrl-C) is held back until they no longer touch the arrays."""
    while count > 0:
        try:
            index, error = done.get()
        except KeyboardInterrupt as interrupt:
            errors[0] = interrupt
            continue
        count -= 1
        if error is not None:
            errors[index] = error
