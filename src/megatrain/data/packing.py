"""Documents as tokens: joined with end-of-text into one stream, cut into sequences of one length."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class TokenStream:
    """A text as tokens: an end-of-text token, then each document with one after it.

    tokens:     all tokens, in 2 bytes each where the vocabulary allows, else 4; they may lie in a file.
    utf8_bytes: length of the documents; every byte of them lies in a token that has a token before it.
    """

    tokens: Tokens
    utf8_bytes: int

    def sequences(self, seq_len: int) -> Tokens:
        """All whole sequences, [sequences, seq_len], without a copy; the rest at the end is left out."""
        count = len(self.tokens) // seq_len
        return self.tokens[: count * seq_len].reshape(count, seq_len)
