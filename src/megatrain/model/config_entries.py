"""The entries of a model's configuration, checked before transformers acts on them.

Configurations come with models from anybody, and transformers does as they say: it builds as many layers, allocates
as many labels, and loads the code, kernels and weight files that they name.
"""

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError
from megatrain.regular_file import read_regular

MAX_CONFIG_BYTES = 16 << 20
_MAX_DEPTH = 32

# What is made one by one, even without memory. Everything else costs a number, or a shape that is checked later.
_MOST = (
    (re.compile(r"\w*(layers?|blocks?)|depths?"), 10_000, "layers"),
    (re.compile(r"\w*experts?"), 100_000, "experts"),
    (re.compile(r"num_labels"), 1_000_000, "labels"),
)
_CODE = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_OWN_FILES = ("model.safetensors", "model.safetensors.index.json")


def read_entries(file: Path) -> dict[str, Any]:
    """The entries of a model's `config.json`, checked. Raises ConfigError, which names the file and the entry."""
    try:
        entries = json.loads(read_regular(file, MAX_CONFIG_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{file} is not JSON that can be read: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not JSON: it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from None
    except ValueError as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"{file} is {reprlib.repr(entries)}; expected a mapping with an entry model_type")
    check_entries(entries, f"{file}: ")
    return entries


def check_entries(entries: Mapping[str, Any], place: str) -> None:
    """Raise ConfigError where an entry would take for ever, run code, or lead to other files. `place` precedes its
    name in the message."""
    for path, value in _walk(entries, place):
        name = next((part for part in reversed(path) if isinstance(part, str)), "")
        shown = f"{place}{_dotted(path)}"
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{shown}: NaN is wrong; expected a number")
        if isinstance(value, int) and not isinstance(value, bool):
            _check_count(shown, name, value)
        if isinstance(value, str) and "/" in value and any(_CODE.fullmatch(str(part)) for part in path):
            raise ConfigError(
                f"{shown}: {reprlib.repr(value)} is code from a hub, which a model's configuration cannot ask for; "
                "remove the entry and, if you trust that code, name it as model.attn_implementation"
            )
        if name == "auto_map" and len(path) > 1:
            raise ConfigError(f"{shown}: code from a model repository is never run; remove the entry")
    _check_files(entries, place)


def has_code(entries: Mapping[str, Any]) -> bool:
    """Whether the model comes with code of its own."""
    return bool(entries.get("auto_map"))


def _check_count(shown: str, name: str, value: int) -> None:
    for pattern, most, what in _MOST:
        if value > most and pattern.fullmatch(name):
            raise ConfigError(f"{shown}: {reprlib.repr(value)} is wrong; expected at most {most} {what}")
    if abs(value) >= 1 << 63:
        raise ConfigError(f"{shown}: {reprlib.repr(value)} is wrong; expected a whole number below 2**63")


def _check_files(entries: Mapping[str, Any], place: str) -> None:
    """Weights and configuration are read from the files that everybody looks into, and from no others."""
    weights = entries.get("transformers_weights")
    if weights is not None and weights not in _OWN_FILES:
        raise ConfigError(
            f"{place}transformers_weights: {reprlib.repr(weights)} is wrong; expected one of {', '.join(_OWN_FILES)}, "
            "the files that weights are read from"
        )
    if "configuration_files" in entries:
        raise ConfigError(f"{place}configuration_files: other configurations are not read; rename one to config.json")


_Path = tuple[Any, ...]


def _walk(entries: Mapping[str, Any], place: str) -> Iterator[tuple[_Path, Any]]:
    """Every value with the names and numbers that lead to it. Raises ConfigError where they are too many."""
    waiting: list[tuple[_Path, Any]] = [((), entries)]
    while waiting:
        path, value = waiting.pop()
        if len(path) > _MAX_DEPTH:
            raise ConfigError(f"{place}{_dotted(path[:3])}: nested more than {_MAX_DEPTH} levels deep")
        if path:
            yield path, value
        if isinstance(value, Mapping):
            waiting += [((*path, name), item) for name, item in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [((*path, number), item) for number, item in enumerate(value)]


def _dotted(path: _Path) -> str:
    return ".".join(map(str, path))
