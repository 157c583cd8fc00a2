"""The configuration of the model that a run trains, every entry of it checked."""

import dataclasses
import difflib
import functools
import inspect
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.config import Config, shown
from megatrain.errors import ConfigError
from megatrain.model.config_entries import check_entries, read_entries
from megatrain.model.loading import load_config, one_line
from megatrain.train.run_folder import model_folder
from megatrain.yaml_file import read_yaml

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MISSING = re.compile(r"config\.(\w+) has to be|Config' object has no attribute '(\w+)'")
_BLAME_SECONDS = 8.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """What a model has to know of its tokenizer; `special` are the ids of its special tokens by name."""

    size: int
    special: Mapping[str, int | None]

    @staticmethod
    def of(tokenizer: Any) -> "Vocabulary":
        return Vocabulary(len(tokenizer), {name: getattr(tokenizer, name) for name in _SPECIAL_TOKENS})


@dataclass(frozen=True)
class ModelSettings:
    """A transformers configuration, and the entries of model.config that it was made of (of model.path: none)."""

    config: Any
    entries: Mapping[str, Any]

    @property
    def key(self) -> str:
        return "model.config" if self.entries else "model.path"

    def fit(self, vocabulary: Vocabulary) -> None:
        """Give a new model the tokenizer's vocabulary and special tokens, where its entries leave them open."""
        if not self.entries or "text_config" in self.entries:
            return
        for name, value in {"vocab_size": vocabulary.size, **vocabulary.special}.items():
            if name not in self.entries:
                setattr(self.config, name, value)


def read_model_settings(config: Config) -> ModelSettings:
    """The configuration that model.path or model.config gives. Raises ConfigError."""
    if config.model.path is not None:
        try:
            return ModelSettings(load_config(model_folder(config.model.path)), {})
        except ConfigError as error:
            raise ConfigError(f"model.path: {error}") from None
    entries = _model_entries(config.model.config)
    check_entries(entries, "model.config.")
    try:
        found = load_config(entries)
    except ConfigError as error:
        raise blame(entries, error, load_config) from None
    _check_names(entries, found, strict=isinstance(config.model.config, dict))
    return ModelSettings(found, entries)


def check_fit(settings: ModelSettings, vocabulary: Vocabulary, config: Config) -> None:
    """Raise ConfigError where the model is too small for the tokenizer or for data.seq_len."""
    text = settings.config.get_text_config()
    size = getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        raise ConfigError(
            f"{settings.key}: model type {settings.config.model_type} has no vocabulary; give one that reads text"
        )
    if size < vocabulary.size:
        needed = f"{size} is wrong; expected at least the tokenizer's {vocabulary.size} tokens"
        if not settings.entries:
            raise ConfigError(f"model.path: its vocab_size {needed}")
        nested = "text_config." if "text_config" in settings.entries else ""
        raise ConfigError(f"model.config.{nested}vocab_size: {needed}")
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and config.data.seq_len > longest:
        raise ConfigError(
            f"data.seq_len: {config.data.seq_len} is more than the model's max_position_embeddings, {longest}"
        )


def blame(entries: Mapping[str, Any], error: Exception, attempt: Callable[[Mapping[str, Any]], Any]) -> ConfigError:
    """`error`, which `attempt(entries)` raised, as one that names the entry it is due to where that can be told.

    That is the first one without which the attempt succeeds (it returns the configuration), or the first two, or
    one that the message says is missing.
    """
    message = one_line(error)
    give_up = time.monotonic() + _BLAME_SECONDS
    for count in (1,) if isinstance(error, RuntimeError) else (1, 2):  # torch's errors may be the trial's own
        for paths in itertools.combinations(_paths(entries), count):
            if time.monotonic() > give_up:
                break
            try:
                found = attempt(functools.reduce(_without, paths, entries))
            except Exception:
                continue
            return _blamed(entries, paths, found, message)
    missing = _MISSING.search(message)
    if missing and (name := missing[1] or missing[2]) not in entries:
        return ConfigError(f"model.config.{name}: missing ({message})")
    return ConfigError(f"model.config: {message}")


_Path = tuple[str, ...]


def _blamed(entries: Mapping[str, Any], paths: tuple[_Path, ...], found: Any, message: str) -> ConfigError:
    wrong = " and ".join(f"{_dotted(path)}: {shown(_at(entries, path))}" for path in paths)
    if len(paths) > 1:
        return ConfigError(f"{wrong} are wrong together ({message})")
    default = _at(found, paths[0])
    hint = "transformers chooses" if default is None else f"it is {shown(default)}"
    return ConfigError(f"{wrong} is wrong ({message}); left out, {hint}")


def _paths(entries: Mapping[str, Any]) -> Iterator[_Path]:
    """Where each entry is, the nested ones before the mapping that holds them."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from ((name, *path) for path in _paths(value))
        if name != "model_type":
            yield (name,)


def _at(holder: Any, path: _Path) -> Any:
    """What is at `path` in entries or in a configuration; None where nothing is."""
    for name in path:
        holder = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
    return holder


def _dotted(path: _Path) -> str:
    return ".".join(("model.config", *map(str, path)))


def _without(entries: Mapping[str, Any], path: _Path) -> Mapping[str, Any]:
    first, *rest = path
    if not rest:
        return {name: value for name, value in entries.items() if name != first}
    return {**entries, first: _without(entries.get(first, {}), tuple(rest))}


def _model_entries(setting: str | dict[str, Any] | None) -> dict[str, Any]:
    """The entries of model.config, which may be a file of them."""
    if isinstance(setting, dict):
        return setting
    path = Path(os.path.expanduser(str(setting)))
    try:
        return read_entries(path / "config.json") if path.is_dir() else read_yaml(path)
    except ConfigError as error:
        raise ConfigError(f"model.config: {error}") from None


def _check_names(entries: Mapping[str, Any], found: Any, *, strict: bool, place: str = "model.config") -> None:
    """Find misspelt entries: transformers takes any name and ignores those that it does not know.

    What was written by hand (`strict`) may hold nothing unknown. Files of other people's models do, from older
    versions; there only a name that is nearly a known one is an error.
    """
    known = {spec.name for spec in dataclasses.fields(type(found))} | set(found.attribute_map)
    for name, value in entries.items():
        if isinstance(value, Mapping) and hasattr(getattr(found, name, None), "attribute_map"):
            _check_names(value, getattr(found, name), strict=strict, place=f"{place}.{name}")
        taken_as_it_is = name in vars(found) and not name.startswith("_") and not hasattr(type(found), name)
        if not taken_as_it_is or name in known or _is_read(name, type(found)):
            continue
        near = difflib.get_close_matches(name, known, 1, 0.8)
        hint = f"did you mean {near[0]}?" if near else f"its entries are those of transformers' {type(found).__name__}"
        if near or strict:
            raise ConfigError(f"{place}.{name}: unknown to model type {found.model_type}; {hint}")
        _log.warning("%s.%s is unknown to model type %s and has no effect", place, name, found.model_type)


def _is_read(name: str, config_class: type) -> bool:
    """Whether transformers' code of that model reads `name`: not every entry that it reads is declared."""
    word = re.compile(rf"""(\bconfig\.|["']|\bself\.(?=\w+ = )){re.escape(name)}\b""")
    folder = Path(inspect.getfile(config_class)).parent
    return any(word.search(file.read_text(encoding="utf-8")) for file in folder.glob("*.py"))
