"""Rows to tokens and targets, a block at a time: what worker processes do. A pure function of settings and rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.data.bad_rows import BadRowError
from megatrain.data.chat_template import ChatTemplate, NotDerivableError, Rendered, without
from megatrain.data.formats import Chat, Completion, Layout, Pair, Sample, Text, sample_of
from megatrain.data.packing import Tokens


@dataclass(frozen=True)
class EncoderSettings:
    """All that tokens depend on beside the rows; plain values, so that processes can be given them.

    backend:  the tokenizer as tokenizers' JSON, with what that does not hold beside it.
    begin:    the tokens that the tokenizer puts before a text by itself (none or begin-of-text).
    """

    layout: Layout
    backend: str
    split_special_tokens: bool
    vocabulary: int
    begin: tuple[int, ...]
    eos_id: int
    template: ChatTemplate | None
    seq_len: int
    everything: bool


@dataclass
class Block:
    """What a block of rows became. `rejected`: of pairs, the other answers, in the same order.

    bad: (number of the row in the block, what is wrong with it); truncated and left_out count rows; unended: answers
    that end with no special token.
    fatal: the row that the template gives no targets for, and why.
    """

    tokens: Tokens
    targets: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    utf8_bytes: int = 0
    truncated: int = 0
    left_out: int = 0
    unended: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    fatal: tuple[int, str] | None = None
    rejected: "Block | None" = None


@dataclass(frozen=True)
class _Piece:
    """One example: tokens, targets, bytes of text that the targets encode, without special tokens."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.bool_]
    utf8_bytes: int
    truncated: bool


class Encoder:
    """Encodes rows as `settings` say."""

    def __init__(self, settings: EncoderSettings) -> None:
        from tokenizers import Tokenizer

        self.settings = settings
        self.dtype: Any = np.uint16 if settings.vocabulary <= 1 << 16 else np.uint32
        self._tokenizer = Tokenizer.from_str(settings.backend)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = settings.split_special_tokens
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = np.array([number for number, token in added.items() if token.special], np.int64)

    def encode(self, rows: Sequence[Mapping[str, Any] | None]) -> Block:
        """All examples of the rows, in order; None is a row that could not be read."""
        bad: list[tuple[int, str]] = []
        unended = 0
        # (row, texts with their spans): several texts for a pair
        waiting: list[tuple[int, list[Rendered]]] = []
        for number, row in enumerate(rows):
            if row is None:
                continue
            try:
                rendered = self._rendered(sample_of(row, self.settings.layout))
            except BadRowError as error:
                bad.append((number, str(error)))
                continue
            except NotDerivableError as error:
                block = self._block([], bad=bad, fatal=(number, str(error)))
                block.rejected = self._block([])
                return block
            unended += sum(one.unended for one in rendered)
            waiting.append((number, rendered))
        encodings = self._encodings([one for _, several in waiting for one in several])
        examples = [[self._pieces(one, next(encodings)) for one in several] for _, several in waiting]
        if self.settings.layout.format != "preference":
            kept = [piece for several in examples for piece in several[0]]
            return self._block(kept, bad=bad, left_out=sum(not several[0] for several in examples), unended=unended)
        pairs = [(chosen[0], rejected[0]) for chosen, rejected in examples if chosen and rejected]
        left_out = len(examples) - len(pairs)
        block = self._block([one for one, _ in pairs], bad=bad, left_out=left_out, unended=unended)
        block.rejected = self._block([other for _, other in pairs])
        block.truncated = sum(one.truncated or other.truncated for one, other in pairs)
        return block

    def _rendered(self, sample: Sample) -> list[Rendered]:
        if isinstance(sample, Pair):
            return [self._rendered(one)[0] for one in (sample.chosen, sample.rejected)]
        if isinstance(sample, Chat):
            if self.settings.template is None:
                raise BadRowError(
                    "is a conversation, and the tokenizer has no chat template (data.chat_template gives one)"
                )
            everything = self.settings.everything and self.settings.layout.format != "preference"
            return [self.settings.template.render(sample, everything=everything)]
        return [_plain(sample, self.settings)]

    def _encodings(self, several: Sequence[Rendered]) -> Iterator[Any]:
        """In order. Special tokens that a template writes are special; in a plain text the tokenizer decides."""
        found: dict[int, Any] = {}
        for plain in (False, True):
            self._tokenizer.encode_special_tokens = plain and self.settings.split_special_tokens
            numbers = [number for number, one in enumerate(several) if one.plain == plain]
            texts = [several[number].text for number in numbers]
            encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            found |= dict(zip(numbers, encoded, strict=True))
        return (found[number] for number in range(len(several)))

    def _pieces(self, rendered: Rendered, encoding: Any) -> list[_Piece]:
        """The examples of a text: one, cut at seq_len; of a document as many as it takes; none without a target."""
        settings = self.settings
        text = rendered.text
        ids, offsets = np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2)
        targets, ends = target_tokens(offsets, rendered.spans), np.maximum.accumulate(offsets[:, 1])
        # how a special token is spelled is no text: another tokenizer spells it in other words
        words = without(rendered.spans, offsets[np.isin(ids, self._special)].tolist())
        if rendered.plain:  # what stands around it, which a template writes itself where it wants it
            before = settings.begin if tuple(ids[: len(settings.begin)]) != settings.begin else ()
            after = (settings.eos_id,) if not len(ids) or ids[-1] != settings.eos_id else ()
            ids = np.concatenate([np.array(before, np.int64), ids, np.array(after, np.int64)])
            targets = np.pad(targets, (len(before), len(after)), constant_values=((False, True),))
            ends = np.pad(ends, (len(before), len(after)), constant_values=((0, len(text)),))
        size = settings.seq_len
        starts = range(0, len(ids), size) if settings.layout.format == "text" else range(min(1, len(ids)))
        pieces = []
        for start in starts:
            stop = min(start + size, len(ids))
            learned = targets[start:stop].copy()
            learned[:1] = False  # nothing stands before it in the example
            if not learned.any():
                continue
            first = int(ends[start - 1]) if start else 0
            last = int(ends[stop - 1]) if stop < len(ids) else len(text)
            length = sum(len(text[max(s, first) : min(e, last)].encode()) for s, e in words)
            cut = stop < len(ids) and settings.layout.format != "text"
            pieces.append(_Piece(ids[start:stop], learned, length, cut))
        return pieces

    def _block(self, pieces: Sequence[_Piece], **facts: Any) -> Block:
        none = np.zeros(0, np.int64)
        return Block(
            np.concatenate([none, *(piece.tokens for piece in pieces)]).astype(self.dtype),
            np.concatenate([none.astype(bool), *(piece.targets for piece in pieces)]),
            np.array([len(piece.tokens) for piece in pieces], np.int64),
            utf8_bytes=sum(piece.utf8_bytes for piece in pieces),
            truncated=sum(piece.truncated for piece in pieces),
            **facts,
        )


def _plain(sample: Text | Completion, settings: EncoderSettings) -> Rendered:
    before, learned = ("", sample.text) if isinstance(sample, Text) else (sample.prompt, sample.completion)
    everything = isinstance(sample, Text) or (settings.everything and settings.layout.format != "preference")
    text = before + learned
    return Rendered(text, [(0 if everything else len(before), len(text))], plain=True)


def target_tokens(offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens, by their characters [tokens, 2], hold a character of a span.

    Tokenizers may leave spaces out of a token's characters, and give several tokens the same one, of which each encodes
    some bytes. So a token reaches from its own first character, or from where those before it end, to its last.
    """
    if not len(offsets) or not len(spans):
        return np.zeros(len(offsets), bool)
    ends = np.maximum.accumulate(offsets[:, 1])
    starts = np.minimum(offsets[:, 0], np.concatenate([[0], ends[:-1]]))
    firsts, lasts = np.array(spans, np.int64).T
    nearest = np.searchsorted(lasts, starts, side="right")  # the first span that ends after the token begins
    inside = nearest < len(spans)
    found = np.zeros(len(offsets), bool)
    found[inside] = firsts[nearest[inside]] < np.maximum(ends, starts + 1)[inside]
    return found


def encoder_settings(
    tokenizer: Any, layout: Layout, *, template: ChatTemplate | None, seq_len: int, everything: bool
) -> EncoderSettings:
    """Of a transformers tokenizer. Raises ValueError where it cannot say which characters a token stands for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"a {type(tokenizer).__name__} does not say which characters its tokens stand for")
    with_all, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    bos = tokenizer.bos_token_id
    begin = (bos,) if bos is not None and with_all[:1] == [bos] and bare[:1] != [bos] else ()
    return EncoderSettings(
        layout=layout,
        backend=backend.to_str(),
        split_special_tokens=bool(tokenizer.split_special_tokens),
        vocabulary=len(tokenizer),
        begin=begin,
        eos_id=int(tokenizer.eos_token_id),
        template=template,
        seq_len=seq_len,
        everything=everything,
    )
