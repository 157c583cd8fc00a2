"""Rows of tokens as a model is given them: of a joined text, of several examples, or of one example each.

An epoch has `count` rows; which row is at which place of it is a pure function of seed and epoch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain.data import best_fit
from megatrain.data.best_fit import Packing
from megatrain.data.examples import NO_TARGET, Drawn, Examples, numbers_in
from megatrain.data.packing import Tokens, TokenStream

PADDING = 0  # the token that fills rows up; its label is NO_TARGET
Place = tuple[int, int]  # (epoch, row of it)
_Ids = NDArray[np.int64]


class Rows(Protocol):
    """count: rows of an epoch. tokens: of all of them, padding left out. kind: how they came to be, for people."""

    count: int
    tokens: int
    kind: str

    def batch(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """What a model is given of these rows: input_ids and labels, int64 [rows, tokens], and what else it needs."""
        ...


class JoinedRows:
    """`sequences` [count, seq_len] of a text whose documents follow each other. Labels equal the ids: models shift."""

    def __init__(self, sequences: Tokens, *, shuffle: bool, seed: int) -> None:
        self.count, self.tokens = len(sequences), sequences.size
        self.kind = f"joined documents in {self.count:,} sequences"
        self._sequences, self._shuffle, self._seed = sequences, shuffle, seed

    def batch(self, places: Sequence[Place]) -> dict[str, Tensor]:
        rows = rows_at(places, self.count, shuffle=self._shuffle, seed=self._seed)
        ids = torch.from_numpy(self._sequences[rows].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


class PackedRows:
    """Rows of `seq_len` tokens with several examples each, best-fit decreasing; longer examples are cut.

    position_ids begin anew with each example, which is how a model knows them apart. The first token of an example is
    nobody's target: no example predicts the next. What is left of a row is padding, a document of its own.

    Where each epoch has other examples, it has rows of its own, maybe a few more or less: `count` is that of the first.
    """

    def __init__(self, examples: Examples | Drawn, seq_len: int, *, shuffle: bool, seed: int) -> None:
        self._examples, self._seq_len, self._shuffle, self._seed = examples, seq_len, shuffle, seed
        self._lengths = np.minimum(examples.lengths, seq_len)
        first = numbers_in(examples, 0)
        self._packing = best_fit.in_order(best_fit.pack(self._lengths[first], seq_len))
        self.count, self.tokens = len(self._packing), int(self._lengths[first].sum())
        self._begins = [0, self.count]  # of each epoch that was asked for, and of the next, in the row of all epochs
        self.fill = self.tokens / (self.count * seq_len)
        full = f"{self.fill:.1%} full"
        self.kind = f"{len(first):,} examples, best-fit packed into {self.count:,} rows, {full}"
        self._of_epoch = lru_cache(maxsize=2)(self._packing_of_epoch)  # a step may span two epochs

    def batch(self, places: Sequence[Place]) -> dict[str, Tensor]:
        rows = [self._row(self._of_epoch(epoch).row(row)) for epoch, row in places]
        ids, labels, positions = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def place(self, position: int) -> Place:
        """Of a row in the row of all epochs."""
        if not isinstance(self._examples, Drawn):
            return divmod(position, self.count)
        while self._begins[-1] <= position:
            self._begins.append(self._begins[-1] + len(self._of_epoch(len(self._begins) - 1)))
        epoch = bisect_right(self._begins, position) - 1
        return epoch, position - self._begins[epoch]

    def _packing_of_epoch(self, epoch: int) -> Packing:
        packing, lengths = self._packing, self._lengths
        if isinstance(self._examples, Drawn):
            lengths = lengths[self._examples.of_epoch(epoch)]
            packing = best_fit.in_order(best_fit.pack(lengths, self._seq_len))
        if self._shuffle:
            packing = best_fit.shuffled(packing, lengths, self._seed, epoch)
        if isinstance(self._examples, Drawn):
            packing = Packing(self._examples.of_epoch(epoch)[packing.examples], packing.starts)
        return packing

    def _row(self, examples: NDArray[np.int64]) -> tuple[_Ids, _Ids, _Ids]:
        ids = np.full(self._seq_len, PADDING, np.int64)
        labels = np.full(self._seq_len, NO_TARGET, np.int64)
        positions = np.empty(self._seq_len, np.int64)
        start = 0
        for example in examples.tolist():
            stop = start + int(self._lengths[example])
            ids[start:stop] = self._examples.tokens_of(example)[: stop - start]
            labels[start + 1 : stop] = self._examples.labels_of(example)[1 : stop - start]
            positions[start:stop] = np.arange(stop - start)
            start = stop
        positions[start:] = np.arange(self._seq_len - start)
        return ids, labels, positions


class SeparateRows:
    """One example to a row, padded on the right to the longest of its micro-batch; longer than `seq_len`: cut.

    What a causal model computes of a token does not depend on padding after it. `masked`: give an attention_mask all
    the same, to a model that counts padding in something else, such as the load of its experts.
    """

    def __init__(
        self, examples: Examples | Drawn, seq_len: int, *, shuffle: bool, seed: int, masked: bool = False
    ) -> None:
        self._examples, self._shuffle, self._seed, self._masked = examples, shuffle, seed, masked
        self._lengths = np.minimum(examples.lengths, seq_len)
        first = numbers_in(examples, 0)
        self.count, self.tokens = len(first), int(self._lengths[first].sum())
        self.kind = f"{self.count:,} examples, one to a row"

    def batch(self, places: Sequence[Place]) -> dict[str, Tensor]:
        rows = examples_at(self._examples, places, self.count, shuffle=self._shuffle, seed=self._seed)
        lengths = self._lengths[rows]
        ids = np.full((len(rows), lengths.max()), PADDING, np.int64)
        labels = np.full_like(ids, NO_TARGET)
        for number, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            ids[number, :length] = self._examples.tokens_of(row)[:length]
            labels[number, :length] = self._examples.labels_of(row)[:length]
        found = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self._masked and lengths.min() < lengths.max():
            found["attention_mask"] = torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))
        return found


def documents_as_examples(stream: TokenStream, end: int, seq_len: int) -> Examples:
    """Each document of a text with the end-of-text token after it, all of it targets; what is longer than `seq_len` in
    pieces."""
    tokens = stream.tokens[1:]  # the first ends no document
    ends = np.flatnonzero(tokens == end) + 1
    lengths = np.diff(ends, prepend=0)
    pieces = -(-lengths // seq_len)
    sizes = np.full(int(pieces.sum()), seq_len, np.int64)
    sizes[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * seq_len
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return Examples(tokens[: offsets[-1]], np.ones(offsets[-1], np.bool_), offsets, stream.utf8_bytes)


def examples_at(
    examples: Examples | Drawn, places: Sequence[Place], count: int, *, shuffle: bool, seed: int
) -> list[int]:
    """Which examples are at these places of epochs of `count` each."""
    rows = rows_at(places, count, shuffle=shuffle, seed=seed)
    if not isinstance(examples, Drawn):
        return rows
    return [int(examples.of_epoch(epoch)[row]) for (epoch, _), row in zip(places, rows, strict=True)]


def rows_at(places: Sequence[Place], count: int, *, shuffle: bool, seed: int) -> list[int]:
    """Which of `count` are at these places: in their order, or in one of each epoch's own, by seed and epoch."""
    return [int(_order(count, seed, epoch)[row]) if shuffle else row for epoch, row in places]


@lru_cache(maxsize=2)  # a step may span two epochs
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
