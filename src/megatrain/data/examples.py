"""Tokenised examples: what conversations and other rows become, and packing and batches begin with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatrain.data.packing import Tokens, TokenStream

NO_TARGET = -100  # the label that transformers' losses leave out


@dataclass(frozen=True)
class Examples:
    """Tokenised examples, one after the other in flat arrays, which may lie in a file and not in memory.

    tokens:     all tokens, in 2 bytes each where the vocabulary allows, else 4.
    targets:    for each token, whether the model learns to predict it.
    offsets:    int64 [count + 1]; example n is tokens[offsets[n] : offsets[n + 1]], never empty.
    utf8_bytes: length of the text that the targets encode; special tokens are no text.
    """

    tokens: Tokens
    targets: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    utf8_bytes: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @property
    def target_tokens(self) -> int:
        """Targets of all examples."""
        return int(np.count_nonzero(self.targets))

    def tokens_of(self, example: int) -> NDArray[np.int64]:
        """An example's tokens."""
        return self.tokens[self.offsets[example] : self.offsets[example + 1]].astype(np.int64)

    def labels_of(self, example: int) -> NDArray[np.int64]:
        """An example's labels as transformers has them, not shifted: the token, or -100 where it is no target."""
        targets = self.targets[self.offsets[example] : self.offsets[example + 1]]
        return np.where(targets, self.tokens_of(example), NO_TARGET)


class Drawn:
    """Examples of several sources, of which each epoch has others: `choose` says by the epoch which, as numbers among
    all, those of one source after those of another. Nothing is copied."""

    def __init__(self, parts: Sequence[Examples], choose: Callable[[int], NDArray[np.int64]]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.of_epoch = lru_cache(maxsize=2)(choose)  # a step may span two epochs

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens_of(self, example: int) -> NDArray[np.int64]:
        """As Examples has it."""
        part, number = self._place(example)
        return part.tokens_of(number)

    def labels_of(self, example: int) -> NDArray[np.int64]:
        """As Examples has it."""
        part, number = self._place(example)
        return part.labels_of(number)

    def _place(self, example: int) -> tuple[Examples, int]:
        part = int(np.searchsorted(self._starts, example, side="right")) - 1
        return self._parts[part], example - int(self._starts[part])


@dataclass(frozen=True)
class PreferenceExamples:
    """Pairs of answers to one prompt: chosen[n] and rejected[n] begin with it, and it is no target in either."""

    chosen: Examples | Drawn
    rejected: Examples | Drawn

    def __len__(self) -> int:
        return len(self.chosen)


HeldOutData = TokenStream | Examples | PreferenceExamples | None
"""What data.eval becomes; None where there is none."""


def numbers_in(examples: Examples | Drawn, epoch: int) -> NDArray[np.int64]:
    """Which examples an epoch has."""
    return examples.of_epoch(epoch) if isinstance(examples, Drawn) else np.arange(len(examples))


def of_one_epoch(examples: object) -> Examples:
    """What is known to be the same in every epoch."""
    assert isinstance(examples, Examples)
    return examples
