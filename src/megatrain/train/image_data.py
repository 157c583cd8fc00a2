"""From a run's settings to examples with images: the sources' rows and the model's processor."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from megatrain.config import Config
from megatrain.data.bad_rows import BadRows, say_skipped
from megatrain.data.examples import Examples
from megatrain.data.image_fields import MARK, has_images
from megatrain.data.image_files import require_pillow
from megatrain.data.image_processing import ImageCounts, ProcessedExample, read_examples
from megatrain.data.images import ImageEncoder, ImageExample, ImageRows
from megatrain.data.mixture import Mixture, copies_of
from megatrain.data.row_source import Source
from megatrain.errors import ConfigError
from megatrain.train.processor import has_processor, load_processor, template_of
from megatrain.train.row_data import chat_template, enough_of
from megatrain.train.run_folder import model_folder

_WITHOUT = "columns: {images: null} of the source leaves them aside"


@dataclass(frozen=True)
class ImageData:
    """An epoch's rows, the length of their texts, and what became of what was read, in lines for people. `examples`:
    the same rows as tokens, where they were to be kept."""

    rows: ImageRows
    utf8_bytes: int
    said: tuple[str, ...]
    examples: Examples | None


def names_images(config: Config, mixture: Mixture) -> bool:
    """Whether rows of one of the sources have images: then all of them are for the model's processor. Of a model that
    sees, also whether one has a place for an image. Raises ConfigError for images that nothing can be done with."""
    marks = mixture.kind != "text" and _sees(config)
    source = next((source for source in mixture.sources if has_images(source, marks=marks)), None)
    if source is None:
        return False
    key, described = mixture.key, source.described
    if mixture.kind == "text":
        raise ConfigError(
            f"{key}: rows of {described!r} have images, and format text has no place for any; give conversations "
            f"(format: messages); {_WITHOUT}"
        )
    if mixture.kind == "preference":
        raise ConfigError(
            f"{key}: rows of {described!r} have images (or {MARK}), and preference pairs with images (DPO) are not "
            "supported yet; give pairs of texts"
        )
    return True


def _sees(config: Config) -> bool:
    path = config.model.path
    return path is not None and has_processor(model_folder(path))


def prepare_images(config: Config, mixture: Mixture, tokenizer: Any, *, keep_tokens: bool = False) -> ImageData:
    """All rows, each looked at once. Raises ConfigError where there is no example, and where rows or settings are
    wrong."""
    encoder = _encoder(config, mixture, tokenizer)
    examples: list[ImageExample] = []
    kept: list[ProcessedExample] = []
    said: list[str] = []
    long = skipped = 0
    for number, source in enumerate(mixture.sources):
        counts, bad = ImageCounts(), BadRows(mixture.key, skip=config.data.bad_rows == "skip")
        read = read_examples(
            encoder, source, seq_len=config.data.seq_len, bad=bad, counts=counts, workers=config.data.workers
        )
        found = []
        with closing(read):
            for one in islice(read, _most(config, source)):
                found.append(one.example)
                if keep_tokens:
                    kept.append(one)
        before = len(kept) - len(found)
        chosen = copies_of(len(found), source, config.train.seed, number).tolist()
        examples += [found[row] for row in chosen]
        if keep_tokens:
            kept[before:] = [kept[before + row] for row in chosen]
        said += _lines(source, counts, len(found), len(chosen))
        long, skipped = long + counts.long, skipped + bad.count
        say_skipped(mixture.key, source.described, bad.count, bad.first)
    if not examples:
        raise ConfigError(
            f"{mixture.key}: no example is left of {mixture.described}: bad rows: {skipped:,}, rows with more than "
            f"data.seq_len tokens: {long:,}"
        )
    if config.data.cache not in ("auto", "off"):
        said.append("data.cache: nothing is kept of rows with images; pixels take many times the room of image files")
    rows = ImageRows(encoder, examples, shuffle=config.data.shuffle, seed=config.train.seed, key=mixture.key)
    utf8_bytes = sum(len(example.text.encode()) for example in examples)
    return ImageData(rows, utf8_bytes, tuple(said), _as_examples(kept, utf8_bytes) if keep_tokens else None)


def _encoder(config: Config, mixture: Mixture, tokenizer: Any) -> ImageEncoder:
    if config.model.path is None:
        raise ConfigError("model.path: missing; rows with images need a pretrained model and its processor")
    if config.data.packing not in ("auto", "joined", "none"):
        raise ConfigError(f"data.packing: {config.data.packing!r} is wrong for rows with images; expected none")
    require_pillow(mixture.key)
    processor = load_processor(model_folder(config.model.path), tokenizer)
    template = template_of(processor, chat_template(tokenizer), chosen=config.data.chat_template is not None)
    return ImageEncoder(processor, template, everything=config.data.train_on == "all")


def _most(config: Config, source: Source) -> int | None:
    """How many examples of a stream a run of a given number of steps can use; None: all."""
    enough = enough_of(config) if source.streaming and source.key == "data.train" else None
    return None if enough is None else enough.examples


def _lines(source: Source, counts: ImageCounts, found: int, in_epoch: int) -> list[str]:
    line = (
        f"{source.described}: {found:,} examples of {counts.rows:,} rows, with {counts.images:,} images and "
        f"{counts.tokens:,} tokens"
    )
    if in_epoch != found:
        how = f"{source.samples:,} samples" if source.samples is not None else f"weight {source.weight:g}"
        line += f", {in_epoch:,} in an epoch ({how})"
    if not counts.long:
        return [line]
    return [
        line,
        f"warning: {source.described}: {counts.long:,} examples are left out, which have more tokens than "
        "data.seq_len with those of their images",
    ]


def _as_examples(made: Sequence[ProcessedExample], utf8_bytes: int) -> Examples:
    offsets = np.cumsum([0, *(len(one.tokens) for one in made)])
    tokens = np.concatenate([one.tokens for one in made]).astype(np.uint32)
    return Examples(tokens, np.concatenate([one.targets for one in made]), offsets, utf8_bytes)
