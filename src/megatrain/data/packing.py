"""Documents to tokens: joined with end-of-text into one stream, cut into sequences of one length."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHARACTERS_PER_CALL = 1 << 20  # bounds what the tokenizer holds at once
_DOCUMENTS_PER_CALL = 128

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class TokenStream:
    """A text as tokens: an end-of-text token, then each document with one after it.

    tokens:     all tokens, in 2 bytes each where the vocabulary allows, else 4.
    utf8_bytes: length of the documents; every byte of them lies in a token that has a token before it.
    """

    tokens: Tokens
    utf8_bytes: int

    def sequences(self, seq_len: int) -> Tokens:
        """All whole sequences, [sequences, seq_len], without a copy; the rest at the end is left out."""
        count = len(self.tokens) // seq_len
        return self.tokens[: count * seq_len].reshape(count, seq_len)


def tokenize(documents: Iterable[str], tokenizer: Any, *, enough: int | None = None) -> TokenStream:
    """Tokenize `documents` into one stream; the tokenizer adds no tokens of its own. Empty: one token. Where so many
    tokens are `enough`, no further documents are read."""
    end = tokenizer.eos_token_id
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    parts = [np.array([end], dtype)]
    utf8_bytes = 0
    pending = _pieces(documents)
    while pieces := list(islice(pending, _DOCUMENTS_PER_CALL)):
        texts = [text for text, _ in pieces]
        utf8_bytes += sum(len(text.encode()) for text in texts)
        # special tokens written out in a text are what the tokenizer takes them for: chat text may come with them
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[int] = []
        for (_, last), tokens in zip(pieces, encoded["input_ids"], strict=True):
            ids += [*tokens, end] if last else tokens
        parts.append(np.array(ids, dtype))
        if enough is not None and sum(len(part) for part in parts) >= enough:
            break
    return TokenStream(np.concatenate(parts), utf8_bytes)


def _pieces(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Documents in parts of a million characters at most, cut at line ends; True with the last of each."""
    for text in documents:
        start = 0
        while len(text) - start > _CHARACTERS_PER_CALL:
            cut = text.rfind("\n", start, start + _CHARACTERS_PER_CALL) + 1
            cut = cut if cut > start else start + _CHARACTERS_PER_CALL
            yield text[start:cut], False
            start = cut
        yield text[start:], True
