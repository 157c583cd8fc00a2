"""Rows with images: conversations for a model's own processor, whose image tokens are never targets.

A row says where its images belong by parts `{"type": "image"}` of a message, or by `<image>` in its text, as LLaVA and
LLaMA-Factory write it; the images are in those parts, or in a field `images` or `image`. What the processor makes of a
row (tokens for each image, pixels) is worked out once to see whether it fits, and again for each step that needs it:
pixels of a whole data set are never held.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain.data.bad_rows import BadRowError, BadRows
from megatrain.data.chat_template import ChatTemplate, NotDerivableError
from megatrain.data.encode import target_tokens
from megatrain.data.examples import NO_TARGET, Examples
from megatrain.data.formats import Chat, Layout, sample_of
from megatrain.data.image_files import ImageReference, open_image, reference_to
from megatrain.data.jinja_chat import Span
from megatrain.data.row_source import Source
from megatrain.data.rows import Place, rows_at
from megatrain.errors import ConfigError

_MARK = "<image>"
_FIELDS = ("images", "image")
_PLACES = ("image", "path", "url", "bytes")
_PEEKED = 16


@dataclass(frozen=True)
class ImageExample:
    """A conversation as the template writes it, an image's token once for each of `images`; `spans`: the characters to
    learn. `tokens` counts those of images, too."""

    where: str
    text: str
    spans: tuple[Span, ...]
    images: tuple[ImageReference, ...]
    tokens: int = 0


@dataclass
class ImageCounts:
    """What became of rows: `long` have more tokens than fit, and none of an example with images is ever cut off."""

    rows: int = 0
    long: int = 0
    skipped: int = 0
    images: int = 0
    tokens: int = 0


def has_images(source: Source) -> bool:
    """Whether one of the first rows names an image."""
    if source.rows is None:
        return False
    return any(row.wrong is None and _names_images(row.fields) for row in islice(source.rows.read(), _PEEKED))


def _names_images(fields: Mapping[str, Any]) -> bool:
    turns = fields.get("messages") or fields.get("conversations") or ()
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(fields.get(name) for name in _FIELDS) or any(
        isinstance(part, Mapping) and part.get("type") == "image" for part in parts
    )


class ImageEncoder:
    """A processor of transformers and its chat template, from rows to batches. `everything`: all text is a target."""

    def __init__(self, processor: Any, template: ChatTemplate, *, everything: bool) -> None:
        self.processor, self.template, self.everything = processor, template, everything

    def examples(self, source: Source, seq_len: int, bad: BadRows, counts: ImageCounts) -> Iterator[ImageExample]:
        """Of each row that is good and fits into `seq_len`. All images are decoded once. Raises ConfigError."""
        assert source.rows is not None
        folder = source.files[0].parent if source.files else Path()
        for row in source.rows.read():
            counts.rows += 1
            try:
                if row.wrong is not None:
                    raise BadRowError(row.wrong)
                found = self.example(row.fields, source.layout, folder, row.where)
                made, labels = self._processed([found])
            except BadRowError as error:
                bad.found(row.where, str(error))
                continue
            except NotDerivableError as error:
                raise ConfigError(
                    f"data.train_on: what the assistant says in {row.where} cannot be told from the chat template: "
                    f"{error}; give data.train_on: all, or a data.chat_template with {{% generation %}} around it"
                ) from None
            tokens = made["input_ids"].shape[1]
            if tokens > seq_len:
                counts.long += 1
                continue
            if not bool((labels[:, 1:] != NO_TARGET).any()):
                bad.found(row.where, "has nothing to learn")
                continue
            counts.images += len(found.images)
            counts.tokens += tokens
            yield ImageExample(found.where, found.text, found.spans, found.images, tokens)
        counts.skipped = bad.count

    def example(self, fields: Mapping[str, Any], layout: Layout, folder: Path, where: str) -> ImageExample:
        """A row rendered, its images not yet decoded. Raises BadRowError."""
        texts, given = _with_marks(fields)
        chat = sample_of(texts, layout)
        if not isinstance(chat, Chat):
            raise BadRowError(f"has images, which format {layout.format} has no place for")
        images = tuple(reference_to(value, folder) for value in given)
        rendered = self.template.render(_in_parts(chat, len(images)), everything=self.everything)
        return ImageExample(where, rendered.text, tuple(rendered.spans), images)

    def question(self, text: str, images: Sequence[ImageReference]) -> dict[str, Tensor]:
        """What the model takes where a user says `text` about `images` and it is to answer. Raises BadRowError."""
        asked = self.template.asking(_in_parts(Chat([{"role": "user", "content": text}]), len(images)))
        made, _ = self._processed([ImageExample("the prompt", asked, (), tuple(images))])
        return _tensors(made)

    def batch(self, examples: Sequence[ImageExample]) -> dict[str, Tensor]:
        """What the model takes: tokens filled up on the right, labels, and the images of all rows as its family wants
        them. Raises ConfigError where an image cannot be read any more."""
        try:
            made, labels = self._processed(examples)
        except BadRowError as error:
            places = ", ".join(example.where for example in examples)
            raise ConfigError(f"data.train: one of {places} {error}; it could be read when the run began") from None
        return _tensors(made) | {"labels": labels}

    def _processed(self, examples: Sequence[ImageExample]) -> tuple[dict[str, Any], Tensor]:
        """(what the processor makes of the examples together, labels)."""
        images = [[open_image(image) for image in example.images] for example in examples]
        try:
            made = self.processor(
                text=[example.text for example in examples],
                images=images if any(images) else None,
                add_special_tokens=False,
                padding=True,
                padding_side="right",
                return_tensors="pt",
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
            )
        except (ValueError, TypeError, IndexError, RuntimeError, StopIteration) as error:
            raise BadRowError(f"is refused by the processor: {' '.join(str(error).split())[:200]}") from error
        made = dict(made)
        offsets, replaced = made.pop("offset_mapping").numpy(), made.pop("text_replacement_offsets", None) or []
        if any(images) and not any(replaced):
            raise ConfigError(f"{type(self.processor).__name__} does not say where it puts images; it cannot be used")
        targets = np.zeros(offsets.shape[:2], np.bool_)
        for row, example in enumerate(examples):
            count = int(made["attention_mask"][row].sum())
            found = replaced[row] if row < len(replaced) else []
            targets[row, :count] = _targets(offsets[row, :count], example.spans, found)
        return made, torch.where(torch.from_numpy(targets), made["input_ids"], NO_TARGET)


def _tensors(made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _targets(offsets: NDArray[np.int64], spans: Sequence[Span], replaced: Sequence[Any]) -> NDArray[np.bool_]:
    """Tokens inside `spans` of the text before images' tokens were put in, and of no image."""

    def shifted(place: int) -> int:
        before = [r for r in replaced if r["span"][1] <= place]
        return place + (before[-1]["new_span"][1] - before[-1]["span"][1] if before else 0)

    inside = target_tokens(offsets, [(shifted(start), shifted(end)) for start, end in spans])
    return inside & ~target_tokens(offsets, [tuple(r["new_span"]) for r in replaced])


class ImageRows:
    """One example with its images to a row, decoded when the row is wanted; padded as the family's processor does."""

    def __init__(self, encoder: ImageEncoder, examples: Sequence[ImageExample], *, shuffle: bool, seed: int) -> None:
        self.count, self.tokens = len(examples), sum(example.tokens for example in examples)
        self.kind = f"{self.count:,} examples with images, one to a row"
        self.examples = examples
        self._encoder, self._shuffle, self._seed = encoder, shuffle, seed

    def batch(self, places: Sequence[Place]) -> dict[str, Tensor]:
        rows = rows_at(places, self.count, shuffle=self._shuffle, seed=self._seed)
        return self._encoder.batch([self.examples[row] for row in rows])

    def without_pixels(self) -> Examples:
        """All examples with the tokens of their images, in their order; each is processed once more for it."""
        made = [self._encoder.batch([example]) for example in self.examples]
        tokens = np.concatenate([one["input_ids"][0].numpy() for one in made])
        targets = np.concatenate([one["labels"][0].numpy() != NO_TARGET for one in made])
        offsets = np.cumsum([0, *(one["input_ids"].shape[1] for one in made)])
        return Examples(tokens, targets, offsets, sum(len(example.text.encode()) for example in self.examples))


# -- where images belong ---------------------------------------------------------------------------------


def _with_marks(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """(the row with marks in its texts in place of images, its images in the order of the marks)."""
    inline: list[Any] = []
    texts = dict(fields)
    for name in ("messages", "conversations"):
        if isinstance(fields.get(name), list):
            texts[name] = [_marked(turn, inline) for turn in fields[name]]
    column: Any = next((fields[name] for name in _FIELDS if fields.get(name)), [])
    given = list(column) if isinstance(column, (list, tuple)) else [column]
    if given and any(image is not None for image in inline):
        raise BadRowError("has images both in its messages and in a field of their own")
    return texts, given or inline


def _marked(turn: Any, inline: list[Any]) -> Any:
    """A message whose parts are one text."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), list):
        return turn
    parts = []
    for part in turn["content"]:
        if isinstance(part, Mapping) and part.get("type") == "image":
            inline.append(next((part[name] for name in _PLACES if part.get(name) is not None), None))
            part = {"type": "text", "text": _MARK}
        parts.append(part)
    return {**turn, "content": parts}


def _in_parts(chat: Chat, images: int) -> Chat:
    """The conversation with its contents as lists of parts, as processors' templates take them. Images that have no
    mark come first in what the user says first."""
    marks = sum(str(message["content"]).count(_MARK) for message in chat.messages)
    messages = [dict(message) for message in chat.messages]
    if images and not marks:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise BadRowError("has images and no message of a user to put them in")
        first["content"], marks = _MARK * images + first["content"], images
    if marks != images:
        raise BadRowError(f"has {images} images and {marks} places for them")
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and _MARK in message["content"]:
            raise BadRowError(f"has an image in message {number}, which the assistant says")
        message["content"] = list(_parts(message["content"]))
    return replace(chat, messages=messages)


def _parts(text: str) -> Iterator[dict[str, str]]:
    for piece in re.split(f"({_MARK})", text):
        if piece == _MARK:
            yield {"type": "image"}
        elif piece.strip() or (piece and _MARK not in text):
            yield {"type": "text", "text": piece}
