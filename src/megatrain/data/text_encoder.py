"""Texts to tokens, a block at a time: what worker processes do. A pure function of settings and texts.

Long documents are cut into pieces, but only where the tokens stay what they are of the whole document: a cut is tried
out on the text around it. A tokenizer that puts something before every text, such as Llama 2's space, allows none.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.data.packing import Tokens

PIECES_PER_BLOCK = 128  # of streaming texts, reading ends after so many
_CHARACTERS_PER_PIECE = 1 << 20  # bounds, with that of a block, what a tokenizer holds at once
_CHARACTERS_PER_BLOCK = 1 << 20
_TRIED_CHARACTERS = 256  # on either side of a cut
_TRIED_CUTS = 16  # at line ends, and as many before spaces, in each piece
_PROBE = "Hello  world\n\n\tof 123,4 ünïcödé 文字 👋🏽 <s></s>"

Piece = tuple[str, bool]  # True with the last of a document
IdsOf = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class TextSettings:
    """All that tokens depend on beside texts; plain values, so that processes can be given them. `backend`: the
    tokenizer as tokenizers' JSON, with what that does not hold beside it."""

    backend: str
    split_special_tokens: bool
    vocabulary: int
    eos_id: int

    @property
    def dtype(self) -> Any:
        return np.uint16 if self.vocabulary <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class TextBlock:
    """Pieces as tokens, with end-of-text after each document; utf8_bytes: length of the pieces."""

    tokens: Tokens
    utf8_bytes: int


class TextEncoder:
    """Encodes pieces as `settings` say; adds no tokens but end-of-text. `ids_of`: a tokenizer that is code of its own,
    in place of the backend."""

    def __init__(self, settings: TextSettings, ids_of: IdsOf | None = None) -> None:
        self.settings = settings
        self.ids_of = ids_of or _backend_of(settings)

    def encode(self, pieces: Sequence[Piece]) -> TextBlock:
        ids: list[NDArray[Any]] = [np.zeros(0, self.settings.dtype)]
        for (_, last), tokens in zip(pieces, self.ids_of([text for text, _ in pieces]), strict=True):
            ids.append(np.array([*tokens, self.settings.eos_id] if last else tokens, self.settings.dtype))
        return TextBlock(np.concatenate(ids), sum(len(text.encode()) for text, _ in pieces))

    def blocks(self, documents: Iterable[str], before: int) -> Iterator[list[Piece]]:
        """Documents in pieces, as many as are encoded at once. With the `before` pieces that came first, a block ends
        after each PIECES_PER_BLOCK of them."""
        pending = self._pieces(documents)
        while block := list(
            _up_to(_CHARACTERS_PER_BLOCK, islice(pending, PIECES_PER_BLOCK - before % PIECES_PER_BLOCK))
        ):
            before += len(block)
            yield block

    def _pieces(self, documents: Iterable[str]) -> Iterator[Piece]:
        for text in documents:
            start = reach = 0
            while len(text) - max(start, reach) > _CHARACTERS_PER_PIECE:
                reach = max(start, reach) + _CHARACTERS_PER_PIECE
                cut = next((place for place in _places(text, start, reach) if self._is_exact(text, start, place)), None)
                if cut is not None:
                    yield text[start:cut], False
                    start = reach = cut
            yield text[start:], True

    def _is_exact(self, text: str, start: int, cut: int) -> bool:
        """Whether what is around the cut has the same tokens in two texts as in one."""
        first = text[max(start, cut - _TRIED_CHARACTERS) : cut]
        second = text[cut : cut + _TRIED_CHARACTERS]
        one, other, both = self.ids_of([first, second, first + second])
        return one + other == both


def _up_to(characters: int, pieces: Iterator[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        characters -= len(piece[0])
        if characters <= 0:
            return


def _places(text: str, start: int, reach: int) -> Iterator[int]:
    """Where a piece of text[start:reach] might end: after the last lines, else before the last spaces."""
    for mark, offset in (("\n", 1), (" ", 0)):
        place = reach
        for _ in range(_TRIED_CUTS):
            place = text.rfind(mark, start + 1, place)
            if place < 0:
                break
            yield place + offset


def _backend_of(settings: TextSettings) -> IdsOf:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(settings.backend)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # special tokens written out in a text are what the tokenizer takes them for: chat text may come with them
    tokenizer.encode_special_tokens = settings.split_special_tokens
    return lambda texts: [one.ids for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def text_encoder(tokenizer: Any) -> tuple[TextEncoder, bool]:
    """Of a transformers tokenizer; and whether its settings are all that there is to it, so that other processes can do
    the same, and what they did can be known again."""

    def ids_of(texts: Sequence[str]) -> list[list[int]]:
        found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in found["input_ids"]]

    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = "" if backend is None else backend.to_str()
    settings = TextSettings(
        described, bool(tokenizer.split_special_tokens), len(tokenizer), int(tokenizer.eos_token_id)
    )
    if described and (encoder := TextEncoder(settings)).ids_of([_PROBE]) == ids_of([_PROBE]):
        return encoder, True
    return TextEncoder(settings, ids_of), False
