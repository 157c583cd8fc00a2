"""All sources of data.train or of data.eval, and how many of the examples of each an epoch has.

A source of weight 1 has each of its examples once in an epoch, of weight 2 twice, of weight 0.5 half of them, drawn
from the seed: n examples come to round(weight * n) in all. Of a source with num_samples, these are its examples, drawn
from the seed. The mixture is one set of examples; batches shuffle it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.data.bad_rows import BadRows, say_skipped
from megatrain.data.examples import Examples, PreferenceExamples
from megatrain.data.row_source import Source, open_source
from megatrain.data.sources import Split
from megatrain.data.splits import Part
from megatrain.data.tokenising import Tokenised
from megatrain.errors import ConfigError


class Mixture:
    """The sources of one `data.train` or `data.eval` setting, found and their formats known."""

    def __init__(
        self,
        specs: Sequence[str | Mapping[str, Any]],
        *,
        split: Split,
        key: str,
        form: str = "auto",
        text_field: str = "text",
        bad_rows: str = "fail",
        method: str = "auto",
    ) -> None:
        self.key, self.bad_rows = key, bad_rows
        self.sources = [
            open_source(spec, key=key, split=split, form=form, text_field=text_field, method=method) for spec in specs
        ]
        self.described = ", ".join(source.described for source in self.sources)
        self.parts: list[Part] = [part for source in self.sources for part in source.parts]
        self.files: list[Path] = [path for source in self.sources for path in source.files]
        self._said: set[str] = set()
        _check_kinds(self.sources, key)

    @property
    def kind(self) -> str:
        """text, chat or preference."""
        return _kind(self.sources[0]) if self.sources else "text"

    @property
    def detected(self) -> list[str]:
        """What was found out about formats, a line for each source."""
        return [
            f"{self.key}: {one.described} is in format {one.layout.format}"
            + (f" (it could be {' or '.join(one.others)}, too, which format says)" if one.others else "")
            for one in self.sources
            if one.detected
        ]

    def documents(self) -> Iterator[str]:
        """Of texts: every document that is not empty, in order, those of a source as often as it weighs."""
        for source in self.sources:
            bad = BadRows(self.key, skip=self.bad_rows == "skip")
            for _ in range(round(source.weight)):
                yield from source.documents(bad)
            if source.described not in self._said:
                self._said.add(source.described)
                say_skipped(self.key, source.described, bad.count, bad.first)


def _kind(source: Source) -> str:
    form = source.layout.format
    return form if form in ("text", "preference") else "chat"


def _check_kinds(sources: Sequence[Source], key: str) -> None:
    kinds = {_kind(source): source.described for source in reversed(sources)}
    if len(kinds) > 1:
        several = " and ".join(f"{described!r} ({kind})" for kind, described in kinds.items())
        raise ConfigError(f"{key}: {several} cannot be in one mixture; give sources of one kind")
    for source in sources:
        if kinds.keys() == {"text"} and (source.weight != round(source.weight) or source.weight < 1 or source.samples):
            raise ConfigError(
                f"{key}: weight {source.weight} of {source.described!r} is wrong; expected a whole number from 1: "
                "joined texts have no examples to leave out"
            )


def copies_of(count: int, source: Source, seed: int, number: int) -> NDArray[np.int64]:
    """Which of a source's `count` examples an epoch has, in order; `number`: the source's place in the mixture."""
    every = np.arange(count, dtype=np.int64)
    if source.samples is None:
        return _repeated(every, round(source.weight * count), [seed, number])
    drawn = _repeated(every, source.samples, [seed, number])
    return _repeated(drawn, round(source.weight * len(drawn)), [seed, number, 1])


def _repeated(rows: NDArray[np.int64], wanted: int, seed: list[int]) -> NDArray[np.int64]:
    """`wanted` of the rows: all as often as they go into it, the rest drawn."""
    whole, rest = divmod(wanted, len(rows)) if len(rows) else (0, 0)
    part = np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))[:rest])
    return np.concatenate([np.tile(rows, whole), rows[part]])


def mixed(sources: Sequence[Tokenised], seed: int) -> Examples | PreferenceExamples:
    """The examples of an epoch: those of each source, as its weight says, one source after the other."""
    chosen = [copies_of(len(one.examples), one.source, seed, number) for number, one in enumerate(sources)]
    if len(sources) == 1 and len(chosen[0]) == len(sources[0].examples) and sources[0].source.weight == 1:
        return sources[0].examples
    parts = [one.examples for one in sources]
    if all(isinstance(part, PreferenceExamples) for part in parts):
        pairs = [part for part in parts if isinstance(part, PreferenceExamples)]
        return PreferenceExamples(
            _joined([pair.chosen for pair in pairs], chosen), _joined([pair.rejected for pair in pairs], chosen)
        )
    return _joined([part for part in parts if isinstance(part, Examples)], chosen)


def _joined(parts: Sequence[Examples], chosen: Sequence[NDArray[np.int64]]) -> Examples:
    lengths = np.concatenate([np.zeros(0, np.int64), *(p.lengths[rows] for p, rows in zip(parts, chosen, strict=True))])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    tokens = np.empty(offsets[-1], parts[0].tokens.dtype)
    targets = np.empty(offsets[-1], np.bool_)
    utf8_bytes, number = 0, 0
    for part, rows in zip(parts, chosen, strict=True):
        for row in rows.tolist():
            here, there = slice(*offsets[number : number + 2]), slice(*part.offsets[row : row + 2])
            tokens[here], targets[here] = part.tokens[there], part.targets[there]
            number += 1
        utf8_bytes += round(part.utf8_bytes * len(rows) / max(1, len(part)))
    return Examples(tokens, targets, offsets, utf8_bytes)


def say_counts(one: Tokenised, mixed_count: int, key: str) -> list[str]:
    """What became of a source, in lines for people."""
    counts, source = one.counts, one.source
    lines = [f"{source.described}: {counts.examples:,} examples of {counts.rows:,} rows"]
    if mixed_count != counts.examples:
        how = f"weight {source.weight:g}"
        if source.samples is not None:
            how = f"num_samples {source.samples:,}" + (f", {how}" if source.weight != 1 else "")
        lines[0] += f", {mixed_count:,} in an epoch ({how})"
    if counts.truncated:
        lines.append(f"{source.described}: {counts.truncated:,} examples are cut at data.seq_len")
    if counts.left_out:
        lines.append(f"{source.described}: {counts.left_out:,} examples are left out, which have no target within it")
    if counts.unended:
        lines.append(
            f"warning: {source.described}: {counts.unended:,} answers end with no special token; nothing teaches the "
            "model to stop there"
        )
    say_skipped(key, source.described, counts.skipped, counts.first_bad)
    return lines
