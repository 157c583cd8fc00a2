"""From a run's settings to examples with images: the sources' rows and the model's processor."""

from dataclasses import dataclass
from typing import Any

from megatrain.config import Config
from megatrain.data.bad_rows import BadRows, say_skipped
from megatrain.data.image_files import require_pillow
from megatrain.data.images import ImageCounts, ImageEncoder, ImageExample, ImageRows, has_images
from megatrain.data.mixture import Mixture, copies_of
from megatrain.errors import ConfigError
from megatrain.train.processor import load_processor, template_of
from megatrain.train.row_data import chat_template
from megatrain.train.run_folder import model_folder


@dataclass(frozen=True)
class ImageData:
    """An epoch's rows, the length of their texts, and what became of what was read, in lines for people."""

    rows: ImageRows
    utf8_bytes: int
    said: tuple[str, ...]


def names_images(mixture: Mixture) -> bool:
    """Whether rows of one of the sources have images: then all of them are for the model's processor."""
    return mixture.kind == "chat" and any(has_images(source) for source in mixture.sources)


def refuse_to_measure(mixture: Mixture) -> None:
    """Raise ConfigError where rows of data.eval have images."""
    if names_images(mixture):
        raise ConfigError(
            f"{mixture.key}: rows with images cannot be measured on; leave {mixture.key} out, or give rows of text"
        )


def prepare_images(config: Config, mixture: Mixture, tokenizer: Any) -> ImageData:
    """All rows, each looked at once. Raises ConfigError where there is no example, and where rows or settings are
    wrong."""
    if config.model.path is None:
        raise ConfigError("model.path: missing; rows with images need a pretrained model and its processor")
    if config.data.packing not in ("auto", "joined", "none"):
        raise ConfigError(f"data.packing: {config.data.packing!r} is wrong for rows with images; expected none")
    require_pillow(mixture.key)
    processor = load_processor(model_folder(config.model.path), tokenizer)
    template = template_of(processor, chat_template(tokenizer), chosen=config.data.chat_template is not None)
    encoder = ImageEncoder(processor, template, everything=config.data.train_on == "all")
    examples: list[ImageExample] = []
    said: list[str] = []
    long = skipped = 0
    for number, source in enumerate(mixture.sources):
        counts, bad = ImageCounts(), BadRows(mixture.key, skip=config.data.bad_rows == "skip")
        found = list(encoder.examples(source, config.data.seq_len, bad, counts))
        examples += [found[row] for row in copies_of(len(found), source, config.train.seed, number)]
        said.append(
            f"{source.described}: {len(found):,} examples of {counts.rows:,} rows, with {counts.images:,} images and "
            f"{counts.tokens:,} tokens"
        )
        if counts.long:
            said.append(
                f"warning: {source.described}: {counts.long:,} examples are left out, which have more tokens than "
                "data.seq_len with those of their images"
            )
        long, skipped = long + counts.long, skipped + counts.skipped
        say_skipped(mixture.key, source.described, bad.count, bad.first)
    if not examples:
        raise ConfigError(
            f"{mixture.key}: no example is left of {mixture.described}: bad rows: {skipped:,}, rows with more than "
            f"data.seq_len tokens: {long:,}"
        )
    rows = ImageRows(encoder, examples, shuffle=config.data.shuffle, seed=config.train.seed)
    return ImageData(rows, sum(len(example.text.encode()) for example in examples), tuple(said))
