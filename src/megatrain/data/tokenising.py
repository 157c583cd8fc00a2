"""A source's rows to Examples: read here in order, encoded by worker processes, kept in the cache.

Blocks come back in the order in which they were sent, so the result is the same for any number of workers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from megatrain.data.bad_rows import BadRows
from megatrain.data.chat_template import not_derivable
from megatrain.data.encode import Block, Encoder, EncoderSettings
from megatrain.data.examples import Examples, PreferenceExamples
from megatrain.data.image_fields import rows_of_text
from megatrain.data.progress import RowProgress
from megatrain.data.row_files import Row
from megatrain.data.row_source import Source
from megatrain.data.token_files import Arrays, Entry, TokenCache, hash_of
from megatrain.data.workers import encoded, processes_for
from megatrain.errors import ConfigError

_CODE = 3  # raise it where the same rows become other tokens than before: what is cached is made anew
_ROWS_PER_BLOCK = 128


@dataclass
class Counts:
    """What became of a source's rows: `examples` were kept, of them `truncated` are cut at seq_len; `left_out` had no
    target within it; `skipped` were bad, the first of them in `first_bad`. `unended` answers end with no special token.
    """

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

    def fill(entry: Entry) -> dict[str, Any]:
        counts = Counts()
        _fill(entry, source, settings, BadRows(source.key, skip=bad_rows == "skip"), workers, counts, enough)
        return asdict(counts)

    arrays, facts = cache.get(name, fill)
    counts = Counts(**facts)
    return Tokenised(source, _examples(arrays, counts), counts)


def _facts(source: Source, settings: EncoderSettings, bad_rows: str) -> list[Any]:
    return [_CODE, asdict(settings), bad_rows, source.identity]


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
    blocks = _blocks(rows_of_text(source))
    with RowProgress(f"tokenising {source.described}", source.count) as progress:
        for rows, block in encoded(blocks, _fields, partial(Encoder, settings), processes_for(source, workers)):
            _check(rows, block, bad, settings)
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


def _check(rows: Sequence[Row], block: Block, bad: BadRows, settings: EncoderSettings) -> None:
    """Say what is wrong with rows, in their order."""
    if block.fatal is not None:
        number, reason = block.fatal
        where, pairs = rows[number].where, _pairs(settings)
        raise ConfigError(not_derivable(where, reason, everything=settings.everything, pairs=pairs))
    wrong = {number: row.wrong for number, row in enumerate(rows) if row.wrong is not None}
    reasons = dict(block.bad) | wrong
    for number in sorted(reasons):
        bad.found(rows[number].where, reasons[number])


def _blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    waiting = iter(rows)
    while block := list(islice(waiting, _ROWS_PER_BLOCK)):
        yield block


def _fields(block: Sequence[Row]) -> list[Any]:
    return [None if row.wrong is not None else dict(row.fields) for row in block]
