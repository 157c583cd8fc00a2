"""Blocks of what is to be encoded, and what worker processes make of them, in the order in which they came: the result
is the same for any number of processes.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

from megatrain.data.row_source import Source
from megatrain.errors import MegaTrainError

_SMALL_BYTES = 4 << 20  # starting processes takes longer than encoding this much
_MOST_WORKERS = 16

Block = TypeVar("Block")


class Encodes(Protocol):
    """What a process makes for itself, once."""

    def encode(self, block: Any, /) -> Any: ...


def is_small(source: Source) -> bool:
    """Whether all that it reads is little; of a table that is not here nobody knows."""
    if not source.files:
        return False
    return sum(path.stat().st_size for path in source.files) <= _SMALL_BYTES


def processes_for(source: Source, workers: int | None) -> int:
    """How many to take where `data.workers` says so, or not."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if is_small(source) else max(1, min(_MOST_WORKERS, cores - 1))


def encoded(
    blocks: Iterator[Block], plain: Callable[[Block], Any], make: Callable[[], Encodes], workers: int
) -> Iterator[tuple[Block, Any]]:
    """Each block with what became of `plain(block)`; at most a few are on their way at a time. `make` and all that it
    is given goes to the processes; with one worker there is none but this."""
    if workers <= 1:
        encoder = make()
        yield from ((block, encoder.encode(plain(block))) for block in blocks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (make,)) as pool:
        under_way: deque[tuple[Block, Future[Any]]] = deque()
        try:
            for block in blocks:
                under_way.append((block, pool.submit(_encode, plain(block))))
                if len(under_way) > 2 * workers:
                    first, future = under_way.popleft()
                    yield first, future.result()
            while under_way:
                first, future = under_way.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            raise MegaTrainError(
                "a process that tokenises ended by itself; data.workers: 1 does without them"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_encoder: Encodes | None = None  # of a worker process


def _begin(make: Callable[[], Encodes]) -> None:
    """A worker's first call. Ctrl-C is for the process that it works for; threads of its own would be too many."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = make()


def _encode(block: Any) -> Any:
    assert _encoder is not None
    return _encoder.encode(block)
