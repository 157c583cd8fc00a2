"""Tokenised examples: what conversations and other rows become, and packing and batches begin with."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class PreferenceExamples:
    """Pairs of answers to one prompt: chosen[n] and rejected[n] begin with it, and it is no target in either."""

    chosen: Examples
    rejected: Examples

    def __len__(self) -> int:
        return len(self.chosen)


HeldOutData = TokenStream | Examples | PreferenceExamples | None
"""What data.eval becomes; None where there is none."""
