"""The files that transformers reads for a tokenizer, and how large they may be: each is read as a whole."""

import contextlib
import os
import re
from pathlib import Path

from megatrain.errors import ConfigError
from megatrain.model.weight_files import find_file

MAX_VOCABULARY_BYTES = 512 << 20  # the largest vocabularies take some tens of MB
MAX_SETTINGS_BYTES = 16 << 20

_SETTINGS = re.compile(r"tokenizer_config\.json|special_tokens_map\.json|chat_template\.json|.*\.jinja")
_VOCABULARY = re.compile(
    r".*token.*\.(json|txt|model)|.*vocab.*\.(json|txt|bpe)|merges\.txt|tekken\.json|.*\.(model|spm|bpe|tiktoken)"
)
_TEMPLATES = "additional_chat_templates"
_ON_THE_HUB = (
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.json"),
    *("added_tokens.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
)


def check_tokenizer_files(source: str) -> None:
    """Raise ConfigError where a tokenizer's file in a folder, or of a hub id, is too large to be one, or no file."""
    if os.path.isdir(source):
        folder = Path(source)
        for path in sorted([*folder.iterdir(), *(folder / _TEMPLATES).glob("*.jinja")]):
            _check(path, path.name)
        return
    for name in _ON_THE_HUB:
        with contextlib.suppress(OSError, ValueError):  # whoever needs the file will say so
            found = find_file(source, name, {"local_files_only": False, "revision": "main"})
            if found is not None:
                _check(found, name)


def _check(path: Path, name: str) -> None:
    if _SETTINGS.fullmatch(name):
        most = MAX_SETTINGS_BYTES
    elif _VOCABULARY.fullmatch(name):
        most = MAX_VOCABULARY_BYTES
    else:
        return
    if not path.is_file():
        raise ConfigError(f"{path} is no regular file")
    if (size := path.stat().st_size) > most:
        raise ConfigError(f"{path} has {size} bytes; expected at most {most}")
