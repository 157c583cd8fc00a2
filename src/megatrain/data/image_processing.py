"""A source's rows to examples with images: read and rendered here in order, their images decoded by worker processes.

Results come back in the order of the rows, so they are the same for any number of workers.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain, islice
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from megatrain.data.bad_rows import BadRowError, BadRows
from megatrain.data.chat_template import NotDerivableError, not_derivable
from megatrain.data.images import ImageEncoder, ImageExample
from megatrain.data.progress import RowProgress
from megatrain.data.row_source import Source
from megatrain.errors import ConfigError, MegaTrainError

_ROWS_WITHOUT_WORKERS = 64  # starting processes takes longer than this many
_MOST_WORKERS = 8  # each has the processor's libraries in memory

_Tokens = tuple[NDArray[np.int32], NDArray[np.bool_]]
_Waiting = tuple[str, ImageExample | BadRowError | NotDerivableError]
_Made = tuple[_Waiting, _Tokens | str | None]  # a text says what is wrong


@dataclass(frozen=True)
class ProcessedExample:
    """An example and what the processor made of its text: tokens with those of its images, and which are targets."""

    example: ImageExample
    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]


@dataclass
class ImageCounts:
    """What became of rows: `long` have more tokens than fit, and none of an example with images is ever cut off."""

    rows: int = 0
    long: int = 0
    images: int = 0
    tokens: int = 0


def read_examples(
    encoder: ImageEncoder, source: Source, *, seq_len: int, bad: BadRows, counts: ImageCounts, workers: int | None
) -> Generator[ProcessedExample, None, None]:
    """Of each row that is good and fits into `seq_len`. Raises ConfigError."""
    assert source.rows is not None
    with RowProgress(f"processing images of {source.described}", source.rows.count) as progress:
        for (where, example), made in _processed(_rendered(encoder, source), encoder, workers):
            progress.update(1)
            counts.rows += 1
            if isinstance(example, NotDerivableError):
                raise ConfigError(not_derivable(where, example, everything=encoder.everything))
            if isinstance(example, BadRowError) or made is None or isinstance(made, str):
                bad.found(where, str(example) if isinstance(example, BadRowError) else str(made))
                continue
            tokens, targets = made
            if len(tokens) > seq_len:
                counts.long += 1
                continue
            if not targets[1:].any():
                bad.found(where, "has nothing to learn")
                continue
            counts.images += len(example.images)
            counts.tokens += len(tokens)
            yield ProcessedExample(replace(example, tokens=len(tokens)), tokens, targets)


def _rendered(encoder: ImageEncoder, source: Source) -> Iterator[_Waiting]:
    assert source.rows is not None
    for row in source.rows.read():
        try:
            yield row.where, encoder.example(row, source)
        except (BadRowError, NotDerivableError) as error:
            yield row.where, error


def _made_of(encoder: ImageEncoder, example: ImageExample) -> _Tokens | str:
    try:
        return encoder.tokens_of(example)
    except BadRowError as error:
        return str(error)


def _processed(rows: Iterator[_Waiting], encoder: ImageEncoder, workers: int | None) -> Iterator[_Made]:
    """Each row with what it became, in order. Where nobody said how many workers, there are none for few rows."""

    def here(some: Iterable[_Waiting]) -> Iterator[_Made]:
        for row in some:
            yield row, _made_of(encoder, row[1]) if isinstance(row[1], ImageExample) else None

    if workers is None:
        yield from here(islice(rows, _ROWS_WITHOUT_WORKERS))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, min(_MOST_WORKERS, cores - 1))
        first = list(islice(rows, 1))
        if not first:
            return
        rows = chain(first, rows)
    yield from here(rows) if workers <= 1 else _by_workers(rows, encoder, workers)


# -- processes -------------------------------------------------------------------------------------------

_encoder: ImageEncoder | None = None  # of a worker process


def _by_workers(rows: Iterator[_Waiting], encoder: ImageEncoder, workers: int) -> Iterator[_Made]:
    """At most a few rows are on their way at a time."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (encoder,)) as pool:
        under_way: deque[tuple[_Waiting, Callable[[], _Tokens | str | None]]] = deque()
        try:
            for row in rows:
                under_way.append((row, _asked(pool, row[1])))
                if len(under_way) > 4 * workers:
                    first, result = under_way.popleft()
                    yield first, result()
            while under_way:
                first, result = under_way.popleft()
                yield first, result()
        except BrokenProcessPool:
            raise MegaTrainError(
                "a process that decodes images ended by itself; data.workers: 1 does without them"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _asked(pool: ProcessPoolExecutor, example: object) -> Callable[[], _Tokens | str | None]:
    if not isinstance(example, ImageExample):
        return lambda: None
    future: Future[_Tokens | str] = pool.submit(_process, example)
    return future.result


def _begin(encoder: ImageEncoder) -> None:
    """A worker's first call. Ctrl-C is for the process that it works for; threads of its own would be too many."""
    import torch

    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _encoder = encoder


def _process(example: ImageExample) -> _Tokens | str:
    assert _encoder is not None
    return _made_of(_encoder, example)
