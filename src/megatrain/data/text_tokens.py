"""Sources of texts to one stream of tokens: each source's encoded by worker processes and kept in the cache."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from megatrain.data.bad_rows import BadRows, say_skipped
from megatrain.data.packing import Tokens, TokenStream
from megatrain.data.progress import RowProgress
from megatrain.data.row_source import Source
from megatrain.data.text_encoder import PIECES_PER_BLOCK, TextBlock, TextEncoder, text_encoder
from megatrain.data.token_files import Entry, TokenCache, hash_of
from megatrain.data.workers import encoded, processes_for

_CODE = 1  # raise it where the same texts become other tokens than before: what is cached is made anew


@dataclass
class TextCounts:
    """What became of a source: `pieces` of documents, of so many bytes; `skipped` rows or files were bad."""

    pieces: int = 0
    utf8_bytes: int = 0
    skipped: int = 0
    first_bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """Of a streaming source: reading ends where there are so many `tokens` after a whole number of blocks, `before`
    pieces having come first."""

    tokens: int
    before: int


def tokenise_texts(
    sources: Sequence[Source],
    tokenizer: Any,
    *,
    bad_rows: str,
    workers: int | None,
    cache_of: Callable[[Source], TokenCache],
    enough: int | None = None,
) -> TokenStream:
    """The documents of all sources, of each as often as it weighs; none: one token. Where so many tokens are `enough`,
    no further documents are read. Raises ConfigError for the first bad row or file, unless `bad_rows` is 'skip'."""
    encoder, plain = text_encoder(tokenizer)
    end = np.array([encoder.settings.eos_id], encoder.settings.dtype)
    parts: list[Tokens] = []
    total, pieces, utf8_bytes = 1, 0, 0
    for source in sources:
        for time in range(round(source.weight)):
            if enough is not None and pieces and pieces % PIECES_PER_BLOCK == 0 and total >= enough:
                break
            if time == 0 or enough is not None:
                wanted = None if enough is None else Wanted(enough - total, pieces % PIECES_PER_BLOCK)
                cache = cache_of(source) if plain else TokenCache(None)
                count = processes_for(source, workers) if plain else 1
                tokens, counts = _tokenised(source, encoder, bad_rows, count, cache, wanted)
                say_skipped(source.key, source.described, counts.skipped, counts.first_bad)
            parts.append(tokens)
            total, pieces = total + len(tokens) - 1, pieces + counts.pieces
            utf8_bytes += counts.utf8_bytes
    whole = [parts[0], *(part[1:] for part in parts[1:])] if parts else [end]
    return TokenStream(whole[0] if len(whole) == 1 else np.concatenate(whole), utf8_bytes)


def _tokenised(
    source: Source, encoder: TextEncoder, bad_rows: str, workers: int, cache: TokenCache, wanted: Wanted | None
) -> tuple[Tokens, TextCounts]:
    """A source's documents, with an end-of-text token before the first."""
    settings, layout = encoder.settings, source.layout.columns["text"]
    facts = ["texts", _CODE, asdict(settings), layout, bad_rows, source.identity, wanted and asdict(wanted)]

    def fill(entry: Entry) -> dict[str, Any]:
        bad = BadRows(source.key, skip=bad_rows == "skip")
        counts = _fill(entry, source, encoder, bad, workers, wanted)
        counts.skipped, counts.first_bad = bad.count, bad.first
        return asdict(counts)

    name = "" if cache.folder is None else hash_of(source.files, facts=facts, key=source.key)
    arrays, told = cache.get(name, fill)
    return arrays["tokens"], TextCounts(**told)


def _fill(
    entry: Entry, source: Source, encoder: TextEncoder, bad: BadRows, workers: int, wanted: Wanted | None
) -> TextCounts:
    counts, total, before = TextCounts(), 0, 0 if wanted is None else wanted.before
    tokens = entry.array("tokens", encoder.settings.dtype)
    tokens.append(np.array([encoder.settings.eos_id]))
    make = partial(TextEncoder, encoder.settings) if workers > 1 else lambda: encoder
    blocks = encoder.blocks(source.documents(bad), before)
    with RowProgress(f"tokenising {source.described}", None, unit="tokens") as progress:
        for block, found in encoded(blocks, list, make, workers):
            assert isinstance(found, TextBlock)
            tokens.append(found.tokens)
            total += len(found.tokens)
            counts.pieces += len(block)
            counts.utf8_bytes += found.utf8_bytes
            progress.update(len(found.tokens))
            if wanted is not None and total >= wanted.tokens and (before + counts.pieces) % PIECES_PER_BLOCK == 0:
                break
    return counts
