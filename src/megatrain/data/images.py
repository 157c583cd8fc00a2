"""Rows with images: conversations for a model's own processor, whose image tokens are never targets.

A row says where its images belong by parts `{"type": "image"}` of a message, or by `<image>` in its text, as LLaVA and
LLaMA-Factory write it; the images are in those parts, or in a field `images` or `image`. What the processor makes of a
row (tokens for each image, pixels) is worked out once to see whether it fits, and again for each step that needs it:
pixels of a whole data set are never held.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain.data.bad_rows import BadRowError
from megatrain.data.chat_template import ChatTemplate, without
from megatrain.data.encode import target_tokens
from megatrain.data.examples import NO_TARGET
from megatrain.data.formats import Chat, sample_of
from megatrain.data.image_fields import folder_of, in_parts, with_marks
from megatrain.data.image_files import ImageReference, content_sha256, open_image, reference_to
from megatrain.data.jinja_chat import Span
from megatrain.data.row_files import Row
from megatrain.data.row_source import Source
from megatrain.data.rows import Place, rows_at
from megatrain.errors import ConfigError


@dataclass(frozen=True)
class ImageExample:
    """A conversation as the template writes it, an image's token once for each of `images`; `spans`: the characters to
    learn; `words`: of those what is no special token. `tokens` counts those of images, too."""

    where: str
    text: str
    spans: tuple[Span, ...]
    words: tuple[Span, ...]
    images: tuple[ImageReference, ...]
    tokens: int = 0

    @property
    def learned_bytes(self) -> int:
        """Of the text to learn, in UTF-8; how special tokens are spelled does not count."""
        return sum(len(self.text[start:end].encode()) for start, end in self.words)


class ImageEncoder:
    """A processor of transformers and its chat template, from rows to batches. `everything`: all text is a target."""

    def __init__(self, processor: Any, template: ChatTemplate, *, everything: bool) -> None:
        self.processor, self.template, self.everything = processor, template, everything

    def example(self, row: Row, source: Source) -> ImageExample:
        """A row rendered, its images not yet decoded. Raises BadRowError and NotDerivableError."""
        if row.wrong is not None:
            raise BadRowError(row.wrong)
        texts, given = with_marks(row.fields, source.layout)
        chat = sample_of(texts, source.layout)
        if not isinstance(chat, Chat):
            raise BadRowError("is no conversation, and images are for conversations; give lists of messages")
        folder = folder_of(row, source)
        images = tuple(reference_to(value, folder) for value in given)
        rendered = self.template.render(in_parts(chat, len(images)), everything=self.everything)
        words = without(rendered.spans, list(self._special_tokens(rendered.text)))
        return ImageExample(row.where, rendered.text, tuple(rendered.spans), tuple(words), images)

    def _special_tokens(self, text: str) -> Iterator[Span]:
        special = self.template.special  # the longest first
        return (found.span() for found in re.finditer("|".join(map(re.escape, special)), text)) if special else iter(())

    def tokens_of(self, example: ImageExample) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """(tokens with those of the images, which of them are targets). All images are decoded. Raises BadRowError."""
        made, labels = self._processed([example])
        return made["input_ids"][0].numpy().astype(np.int32), (labels[0] != NO_TARGET).numpy()

    def question(self, text: str, images: Sequence[ImageReference]) -> dict[str, Tensor]:
        """What the model takes where a user says `text` about `images` and it is to answer. Raises BadRowError."""
        asked = self.template.asking(in_parts(Chat([{"role": "user", "content": text}]), len(images)))
        made, _ = self._processed([ImageExample("the prompt", asked, (), (), tuple(images))])
        return _tensors(made)

    def batch(self, examples: Sequence[ImageExample], key: str) -> dict[str, Tensor]:
        """What the model takes: tokens filled up on the right, labels, and the images of all rows as its family wants
        them. Raises ConfigError where an image cannot be read any more."""
        try:
            made, labels = self._processed(examples)
        except BadRowError as error:
            places = ", ".join(example.where for example in examples)
            raise ConfigError(f"{key}: one of {places} {error}; it could be read when the run began") from None
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

    def __init__(
        self, encoder: ImageEncoder, examples: Sequence[ImageExample], *, shuffle: bool, seed: int, key: str
    ) -> None:
        self.count, self.tokens = len(examples), sum(example.tokens for example in examples)
        self.kind = f"{self.count:,} examples with images, one to a row"
        self.examples, self._key = examples, key
        self._encoder, self._shuffle, self._seed = encoder, shuffle, seed

    def batch(self, places: Sequence[Place]) -> dict[str, Tensor]:
        rows = rows_at(places, self.count, shuffle=self._shuffle, seed=self._seed)
        return self._encoder.batch([self.examples[row] for row in rows], self._key)

    def in_order(self, first: int, stop: int) -> dict[str, Tensor]:
        """Examples `first` to `stop` together, as they were read."""
        return self._encoder.batch(self.examples[first:stop], self._key)

    @property
    def learns_everything(self) -> bool:
        return self._encoder.everything

    def sha256(self, count: int) -> str:
        """Of the first `count` examples, with the contents of their images."""
        digest = hashlib.sha256()
        for example in self.examples[:count]:
            images = [content_sha256(image) for image in example.images]
            digest.update(repr((example.text, example.spans, example.tokens, images)).encode())
        return digest.hexdigest()
