"""A source's rows to Examples: read here in order, encoded by worker processes, kept in the cache.

Blocks come back in the order in which they were sent, so the result is the same for any number of workers.
"""

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np

from megatrain.data.bad_rows import BadRows
from megatrain.data.encode import Block, Encoder, EncoderSettings
from megatrain.data.examples import Examples, PreferenceExamples
from megatrain.data.image_fields import rows_of_text
from megatrain.data.progress import RowProgress
from megatrain.data.row_files import Row
from megatrain.data.row_source import Source
from megatrain.data.token_files import Arrays, Entry, TokenCache, hash_of
from megatrain.errors import ConfigError, MegaTrainError

_CODE = 2  # raise it where the same rows become other tokens than before: what is cached is made anew
_ROWS_PER_BLOCK = 128
_SMALL_BYTES = 4 << 20  # starting processes takes longer than encoding this much
_MOST_WORKERS = 16


@dataclass
class Counts:
    """What became of a source's rows: `examples` were kept, of them `truncated` are cut at seq_len; `left_out` had no
    target within it; `skipped` were bad, the first of them in `first_bad`; `unended` end with no special token."""

    rows: int = 0
    examples: int = 0
    truncated: int = 0
    left_out: int = 0
    skipped: int = 0
    unended: int = 0
    utf8_bytes: int = 0
    rejected_utf8_bytes: int = 0
    first_bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Enough:
    """What a run of so many steps can use at most: it has both."""

    tokens: int
    examples: int


@dataclass(frozen=True)
class Tokenised:
    """A source's examples and what became of its rows."""

    source: Source
    examples: Examples | PreferenceExamples
    counts: Counts


def tokenise(
    source: Source,
    settings: EncoderSettings,
    *,
    bad_rows: str,
    workers: int | None,
    cache: TokenCache,
    enough: Enough | None = None,
) -> Tokenised:
    """All rows of `source`, or, of a streaming one, as many as are enough. Raises ConfigError for the first bad row,
    unless `bad_rows` is 'skip'."""
    enough = enough if source.streaming else None
    facts_of_it = [*_facts(source, settings, bad_rows), None if enough is None else asdict(enough)]
    name = hash_of(source.files, facts=facts_of_it, key=source.key)
    found = cache.read(name)
    if found is not None:
        arrays, facts = found
        counts = Counts(**facts)
        return Tokenised(source, _examples(arrays, counts), counts)
    counts = Counts()
    with cache.writing(name) as entry:
        _fill(entry, source, settings, BadRows(source.key, skip=bad_rows == "skip"), workers, counts, enough)
        arrays = entry.finish(asdict(counts))
    return Tokenised(source, _examples(arrays, counts), counts)


def is_small(source: Source) -> bool:
    """Whether all that it reads is little; of a table that is not here nobody knows."""
    if not source.files:
        return False
    return sum(path.stat().st_size for path in source.files) <= _SMALL_BYTES


def _facts(source: Source, settings: EncoderSettings, bad_rows: str) -> list[Any]:
    assert source.rows is not None
    kinds = [path.suffix.lower() for path in source.files]
    return [_CODE, asdict(settings), bad_rows, kinds, source.rows.identity, source.described if not kinds else ""]


def _fill(
    entry: Entry,
    source: Source,
    settings: EncoderSettings,
    bad: BadRows,
    workers: int | None,
    counts: Counts,
    enough: Enough | None,
) -> None:
    columns = [_Columns(entry, "", settings), *([_Columns(entry, "rejected_", settings)] if _pairs(settings) else [])]
    assert source.rows is not None
    with RowProgress(f"tokenising {source.described}", source.rows.count) as progress:
        for rows, block in _encoded(_blocks(rows_of_text(source)), settings, _processes(source, workers)):
            _check(rows, block, bad, source)
            for column, one in zip(columns, (block, block.rejected), strict=False):
                assert one is not None
                column.append(one)
            counts.rows += len(rows)
            counts.examples += len(block.lengths)
            counts.truncated += block.truncated
            counts.left_out += block.left_out
            counts.unended += block.unended
            counts.utf8_bytes += block.utf8_bytes
            counts.rejected_utf8_bytes += 0 if block.rejected is None else block.rejected.utf8_bytes
            progress.update(len(rows))
            if enough is not None and columns[0].total >= enough.tokens and counts.examples >= enough.examples:
                break
    counts.skipped, counts.first_bad = bad.count, bad.first
    for column in columns:
        column.offsets.append(np.array([column.total], np.int64))


def _pairs(settings: EncoderSettings) -> bool:
    return settings.layout.format == "preference"


class _Columns:
    """The growing arrays of one set of examples."""

    def __init__(self, entry: Entry, prefix: str, settings: EncoderSettings) -> None:
        self.tokens = entry.array(f"{prefix}tokens", np.uint16 if settings.vocabulary <= 1 << 16 else np.uint32)
        self.targets = entry.array(f"{prefix}targets", np.bool_)
        self.offsets = entry.array(f"{prefix}offsets", np.int64)
        self.total = 0

    def append(self, block: Block) -> None:
        self.tokens.append(block.tokens)
        self.targets.append(block.targets)
        self.offsets.append(self.total + np.cumsum(block.lengths) - block.lengths)
        self.total += int(block.lengths.sum())


def _examples(arrays: Arrays, counts: Counts) -> Examples | PreferenceExamples:
    def of(prefix: str, utf8_bytes: int) -> Examples:
        tokens, targets, offsets = (arrays[f"{prefix}{name}"] for name in ("tokens", "targets", "offsets"))
        return Examples(tokens, targets, offsets, utf8_bytes)

    chosen = of("", counts.utf8_bytes)
    if "rejected_tokens" not in arrays:
        return chosen
    return PreferenceExamples(chosen, of("rejected_", counts.rejected_utf8_bytes))


def _check(rows: Sequence[Row], block: Block, bad: BadRows, source: Source) -> None:
    """Say what is wrong with rows, in their order."""
    if block.fatal is not None:
        number, reason = block.fatal
        raise ConfigError(
            f"data.train_on: what the assistant says in {rows[number].where} cannot be told from the chat template: "
            f"{reason}; give data.train_on: all, or a data.chat_template with {{% generation %}} around what is learned"
        )
    wrong = {number: row.wrong for number, row in enumerate(rows) if row.wrong is not None}
    reasons = dict(block.bad) | wrong
    for number in sorted(reasons):
        bad.found(rows[number].where, reasons[number])


def _blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    waiting = iter(rows)
    while block := list(islice(waiting, _ROWS_PER_BLOCK)):
        yield block


# -- processes -------------------------------------------------------------------------------------------

_encoder: Encoder | None = None  # of a worker process


def _processes(source: Source, workers: int | None) -> int:
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if is_small(source) else max(1, min(_MOST_WORKERS, cores - 1))


def _encoded(blocks: Iterator[list[Row]], settings: EncoderSettings, workers: int) -> Iterator[tuple[list[Row], Block]]:
    """Each block with what it became, in order; at most a few are on their way at a time."""
    if workers <= 1:
        encoder = Encoder(settings)
        yield from ((block, encoder.encode(_fields(block))) for block in blocks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin, (settings,)) as pool:
        under_way: deque[tuple[list[Row], Future[Block]]] = deque()
        try:
            for block in blocks:
                under_way.append((block, pool.submit(_encode, _fields(block))))
                if len(under_way) > 2 * workers:
                    rows, future = under_way.popleft()
                    yield rows, future.result()
            while under_way:
                rows, future = under_way.popleft()
                yield rows, future.result()
        except BrokenProcessPool:
            raise MegaTrainError(
                "a process that tokenises ended by itself; data.workers: 1 does without them"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _fields(block: Sequence[Row]) -> list[Any]:
    return [None if row.wrong is not None else dict(row.fields) for row in block]


def _begin(settings: EncoderSettings) -> None:
    """A worker's first call. Ctrl-C is for the process that it works for; threads of its own would be too many."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(settings)


def _encode(rows: list[Any]) -> Block:
    assert _encoder is not None
    return _encoder.encode(rows)
