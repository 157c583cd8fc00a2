"""A thread pool of our own for host kernels: one large contiguous slice per thread.

numba's thread layers are not used: `workqueue` aborts the process when two Python threads call it at once,
and the OpenMP layers stall when torch computes at the same time.
"""

import threading
from collections.abc import Callable
from itertools import pairwise
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from numba import njit

# Below this many elements (a fraction of a millisecond of work) waking threads costs more than it saves.
INLINE_ELEMENTS = 1 << 16

_Done = SimpleQueue[tuple[int, BaseException | None]]
_Task = tuple[Callable[..., Any], int, int, tuple[Any, ...], _Done]


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Compiles `function` with numba for `Workers.run`: it releases the GIL, and the machine code is cached
    on disk.

    Used bare or with numba `options`. Where no cache directory can be written, the code is compiled once per
    process instead. numba renews a cache entry when the file that defines the kernel changes, not when a
    function that the kernel calls changes in another file.
    """
    if function is None:
        return lambda decorated: kernel(decorated, **options)
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # numba's "cannot cache function: no locator available"
        return njit(nogil=True, **options)(function)


def slices(length: int, parts: int, align: int) -> list[tuple[int, int]]:
    """[0, length) as at most `parts` non-empty (start, stop), every start a multiple of `align` elements."""
    chunks = -(-length // align)
    edges = [min(length, chunks * part // parts * align) for part in range(parts + 1)]
    return [(start, stop) for start, stop in pairwise(edges) if start < stop]


class Workers:
    """`threads` slices at a time: one on the calling thread, the others on daemon threads that live until
    `close`.

    Safe to share: concurrent callers of `run` take turns. A kernel must not call `run` of its own pool.
    """

    def __init__(self, threads: int) -> None:
        """`threads`: slices per `run`, the caller's included. Raises ValueError below 1."""
        if threads < 1:
            raise ValueError(f"threads={threads}: at least 1 is needed")
        self.threads = threads
        self._turn = threading.Lock()
        self._closed = False
        self._tasks: list[SimpleQueue[_Task | None]] = [SimpleQueue() for _ in range(threads - 1)]
        self._threads = [
            threading.Thread(target=self._serve, args=(index,), name=f"megatrain-worker-{index}", daemon=True)
            for index in range(1, threads)
        ]
        for thread in self._threads:
            thread.start()

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
                for tasks, part in zip(self._tasks, parts[1:], strict=False):
                    tasks.put((fn, *part, args, done))
                    sent += 1
                for start, stop in parts[:1]:
                    fn(start, stop, *args)
            except BaseException as error:
                errors[0] = error
            _gather(done, sent, errors)
        if errors:
            raise errors[min(errors)]

    def _serve(self, index: int) -> None:
        """The life of worker `index`: one task after the other until None comes."""
        tasks = self._tasks[index - 1]
        while (task := tasks.get()) is not None:
            fn, start, stop, args, done = task
            error: BaseException | None = None
            try:
                fn(start, stop, *args)
            except BaseException as raised:
                error = raised
            # drop every reference before reporting: a caller may unmap the arrays as soon as run() returns
            del task, fn, args
            done.put((index, error))
            del error, done

    def close(self) -> None:
        """Ends the threads, after a `run` under way; a second call does nothing."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            for tasks in self._tasks:
                tasks.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
