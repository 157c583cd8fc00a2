"""The processor of a model that sees: loaded for its image data, and its files kept with what is saved."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.data.chat_template import ChatTemplate
from megatrain.errors import ConfigError

_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


def load_processor(source: str, tokenizer: Any, *, key: str = "model.path") -> Any:
    """transformers' processor of a folder or hub id, with images prepared by Pillow, which gives the same pixels
    wherever it runs; `tokenizer`: the run's own, which it uses. Raises ConfigError."""
    from megatrain.model.loading import check_config, one_line

    if not has_processor(source):
        raise ConfigError(f"{key}: {source!r} has none of {', '.join(_FILES)}; images need a model that sees")
    try:
        check_config(source)
        processor = _loaded(os.path.expanduser(source))
    except ConfigError:
        raise
    except Exception as error:  # OSError, ValueError, ImportError, by file and cause
        needs = "; install the torchvision that fits this torch" if "torchvision" in str(error).lower() else ""
        raise ConfigError(f"{key}: no processor for images in {source!r}: {one_line(error)}{needs}") from None
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ConfigError(f"{key}: {source!r} has no processor for images; images need a model that sees")
    if len(tokenizer) != len(processor.tokenizer):
        raise ConfigError(
            f"model.tokenizer: it has {len(tokenizer)} tokens and the processor's has {len(processor.tokenizer)}; rows "
            "with images need the model's own, leave it out"
        )
    return processor


def _loaded(source: str) -> Any:
    """Of a family that takes videos, too, only what images need: transformers prepares videos with torchvision alone,
    which has to fit torch exactly."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    options: dict[str, Any] = {"backend": "pil", "trust_remote_code": False}
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    family = PROCESSOR_MAPPING.get(type(config), None)
    if family is not None and "video_processor" in family.get_attributes():
        return _class_without_videos(family).from_pretrained(source, **options)
    return AutoProcessor.from_pretrained(source, **options)


class _WithoutVideos:
    """Before a family's processor in a class: its other parts alone."""

    family: Any

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in cls.family.get_attributes() if name != "video_processor"]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.family, dict(self.__dict__))


def _class_without_videos(family: Any) -> Any:
    return type(family.__name__, (_WithoutVideos, family), {"family": family})


def _restored(family: Any, state: dict[str, Any]) -> Any:
    """In another process."""
    processor = object.__new__(_class_without_videos(family))
    processor.__dict__.update(state)
    return processor


def template_of(processor: Any, tokenizer_template: ChatTemplate | None, *, chosen: bool) -> ChatTemplate:
    """The processor's own chat template, or where it has none, or one was `chosen`, the tokenizer's. Raises
    ConfigError."""
    text = processor.chat_template
    text = text.get("default") if isinstance(text, dict) else text
    if tokenizer_template is not None and (chosen or not isinstance(text, str)):
        return tokenizer_template
    if not isinstance(text, str):
        raise ConfigError("data.chat_template: missing; the model's processor has no template for conversations")
    names = {n: str(v) for n, v in processor.tokenizer.special_tokens_map.items() if isinstance(v, str)}
    special = {t.content for t in processor.tokenizer.added_tokens_decoder.values() if t.special}
    special |= set(processor.tokenizer.all_special_tokens)
    return ChatTemplate(text, names, tuple(sorted(special, key=lambda token: (-len(token), token))))


@dataclass(frozen=True)
class WithProcessorFiles:
    """A tokenizer that is saved together with the files of a processor, as they were."""

    tokenizer: Any
    files: dict[str, bytes]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        self.tokenizer.save_pretrained(folder)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def has_processor(source: str) -> bool:
    """Whether a folder or hub id has a processor's files: its model sees, or hears."""
    return bool(_files_of(source))


def with_processor_files(tokenizer: Any, source: str) -> Any:
    """`tokenizer`, or one that brings along the processor's files where the folder or hub id `source` has some."""
    files = _files_of(source)
    return WithProcessorFiles(tokenizer, files) if files else tokenizer


def _files_of(source: str) -> dict[str, bytes]:
    from megatrain.model.weight_files import find_file

    files = {}
    for name in _FILES:
        try:
            found = find_file(source, name, {"local_files_only": False, "revision": "main"})
        except (OSError, ValueError):
            found = None
        if found is not None:
            files[name] = found.read_bytes()
    return files
