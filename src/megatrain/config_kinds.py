"""What a setting accepts: how its value is read, and how an error says what would be right."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatrain.sizes import parse_bytes


@dataclass(frozen=True)
class Kind:
    """What a key accepts: `expected` completes 'expected ...'; `parse` raises ValueError or TypeError."""

    expected: str
    parse: Callable[[Any], Any]


class WrongPartError(ValueError):
    """A part of a value is wrong: `place` in it, such as `[0].lr`, and what was expected there."""

    def __init__(self, place: str, value: Any, expected: str) -> None:
        super().__init__(place)
        self.place, self.value, self.expected = place, value, expected


def parse_number(value: Any) -> float:
    """A finite number; a bool is none. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def real(expected: str, accepts: Callable[[float], bool]) -> Kind:
    """Numbers that `accepts` accepts."""

    def parse(value: Any) -> float:
        number = parse_number(value)
        if not accepts(number):
            raise ValueError
        return number

    return Kind(expected, parse)


def whole(minimum: int) -> Kind:
    """Whole numbers from `minimum` up to what a signed 64-bit integer holds; 1e9 is one."""

    def parse(value: Any) -> int:
        number = value if type(value) is int else parse_number(value)  # a float would round a large int
        if number != int(number) or number < minimum:
            raise ValueError
        if number >= 1 << 63:
            raise WrongPartError("", value, "a whole number below 2**63")
        return int(number)

    return Kind(f"a whole number of at least {minimum}", parse)


def _sequence_length(value: Any) -> int:
    found = whole(2).parse(value)
    if found > LONGEST_SEQUENCE:
        raise ValueError
    return int(found)


LONGEST_SEQUENCE = 1 << 24  # 32 times what anybody has trained at once; planning longer ones takes minutes
SEQUENCE_LENGTH = Kind(f"a whole number from 2 to {LONGEST_SEQUENCE:,}", _sequence_length)


def choice(*names: str) -> Kind:
    """One of `names`."""

    def parse(value: Any) -> str:
        if value is False and "off" in names:  # YAML 1.1 reads a bare `off` as false
            return "off"
        if value not in names:
            raise ValueError
        return str(value)

    return Kind("one of " + ", ".join(names), parse)


def either(first: Kind, second: Kind) -> Kind:
    """What `first` accepts, else what `second` does."""

    def parse(value: Any) -> Any:
        try:
            return first.parse(value)
        except (ValueError, TypeError):
            return second.parse(value)

    return Kind(f"{first.expected} or {second.expected}", parse)


def or_null(kind: Kind) -> Kind:
    """What `kind` accepts, or nothing (None)."""
    return Kind(f"{kind.expected} or null", lambda value: None if value is None else kind.parse(value))


def to_be_given(kind: Kind) -> Kind:
    """What `kind` accepts; None stands for a value that is still missing, which is no choice to offer."""
    return Kind(kind.expected, or_null(kind).parse)


def _parse_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _parse_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _parse_path(value: Any) -> str:
    text = _parse_text(value)
    text.encode()  # a ValueError for bytes that are no UTF-8: not all that write files can write such a name
    if "\0" in text or (text.startswith("~") and os.path.expanduser(text) == text):  # a home that does not exist
        raise ValueError
    return text


def _parse_sources(value: Any) -> tuple[str | dict[str, Any], ...]:
    given = value if isinstance(value, (list, tuple)) else [value]
    sources = tuple(
        _parse_source(item, f"[{number}]" if given is value else "") if isinstance(item, Mapping) else _parse_path(item)
        for number, item in enumerate(given)
    )
    if not sources:
        raise ValueError
    return sources


def _parse_source(source: Mapping[Any, Any], place: str) -> dict[str, Any]:
    if "path" not in source or not set(source) <= set(_SOURCE_KINDS):
        raise WrongPartError(place, dict(source), _SOURCE)
    return _parse_parts(source, _SOURCE_KINDS, place)


def _parse_columns(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError
    for name, column in value.items():
        without = name == "images" and column is None
        if name not in SOURCE_FIELDS or (not without and (not isinstance(column, str) or not column)):
            raise WrongPartError("", dict(value), f"names of columns by any of {', '.join(SOURCE_FIELDS)}")
    return dict(value)


def _parse_loggers(value: Any) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(set(names)) != len(names) or not set(names) <= {"tensorboard", "wandb"}:
        raise ValueError
    return names


def _parse_prompts(value: Any) -> int | tuple[Any, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(_parse_prompt(prompt, f"[{number}]") for number, prompt in enumerate(value))
    return int(whole(0).parse(value))


def _parse_prompt(value: Any, place: str) -> Any:
    """A text, or the messages of a chat."""
    try:
        if isinstance(value, (list, tuple)) and value:
            return [_parse_message(message) for message in value]
        return _parse_utf8(value)
    except ValueError:
        raise WrongPartError(place, value, "a text, or a list of messages {role, content}") from None


def _parse_message(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or set(value) != {"role", "content"}:
        raise ValueError
    return {name: _parse_utf8(text) for name, text in value.items()}


def _parse_utf8(value: Any) -> str:
    text = _parse_text(value)
    text.encode()  # a ValueError where it cannot be written into a file
    return text


def _parse_betas(value: Any) -> tuple[float, float]:
    first, second = (FRACTION.parse(item) for item in value)
    return first, second


def _parse_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError
    json.dumps(value)  # it is saved with the model: a ValueError or TypeError for dates and circles
    return {str(name): item for name, item in value.items()}


def _parse_bpe(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or set(value) != {"train", "vocab_size"} or value["train"] != "bpe":
        raise ValueError
    return {"train": "bpe", "vocab_size": whole(259).parse(value["vocab_size"])}


def _parse_size(value: Any) -> int:
    size = parse_bytes(value)
    if size < 1:
        raise ValueError
    return size


def _parse_groups(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError
    return tuple(_parse_group(group, f"[{number}]") for number, group in enumerate(value))


def _parse_group(group: Any, place: str) -> dict[str, Any]:
    if not isinstance(group, Mapping) or "match" not in group or not set(group) <= set(_GROUP_KINDS):
        raise WrongPartError(place, group, _GROUP)
    return _parse_parts(group, _GROUP_KINDS, place)


def _parse_parts(parts: Mapping[str, Any], kinds: Mapping[str, Kind], place: str) -> dict[str, Any]:
    values = {}
    for name, value in parts.items():
        kind = kinds[name]
        try:
            values[name] = kind.parse(value)
        except WrongPartError as part:
            raise WrongPartError(f"{place}.{name}{part.place}", part.value, part.expected) from None
        except (ValueError, TypeError, OverflowError):
            raise WrongPartError(f"{place}.{name}", value, kind.expected) from None
    return values


def _parse_patterns(value: Any) -> tuple[str, ...]:
    patterns = tuple(_parse_text(item) for item in (value if isinstance(value, (list, tuple)) else [value]))
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise WrongPartError("", pattern, f"a regular expression ({error})") from None
    if not patterns:
        raise ValueError
    return patterns


AT_LEAST_0 = real("a number of at least 0", lambda number: number >= 0)
ABOVE_0 = real("a number above 0", lambda number: number > 0)
FRACTION = real("a number from 0 up to but not 1", lambda number: 0 <= number < 1)
RATIO = real("a number from 0 to 1", lambda number: 0 <= number <= 1)
BOOL = Kind("true or false", _parse_bool)
TEXT = Kind("a text", _parse_text)
PATH = Kind("a path", _parse_path)
SOURCES = Kind("a path, stdlib, or a list of these, or a mapping with path", _parse_sources)
FORMAT = choice("auto", "text", "messages", "alpaca", "sharegpt", "prompt-completion", "preference")
BETAS = Kind("two numbers from 0 up to but not 1, such as [0.9, 0.95]", _parse_betas)
MAPPING = Kind("a mapping with model_type", _parse_mapping)
BPE = Kind("{train: bpe, vocab_size: N} with N of at least 259", _parse_bpe)


def _parse_device(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|lagged|cuda(:\d{1,3})?", value):
        raise ValueError
    return value


DEVICE = Kind("one of auto, cpu, cuda, cuda:0 (or another number), lagged", _parse_device)
BYTES = Kind("a size such as 24GiB", _parse_size)
LOGGERS = Kind("tensorboard, wandb, or a list of these", _parse_loggers)
TEMPERATURE = real("0 or a number of at least 0.0001", lambda number: number == 0 or number >= 1e-4)
PROMPTS = Kind("a whole number, or a list of texts and chats", _parse_prompts)
PATTERNS = Kind("a regular expression, or a list of these", _parse_patterns)
_GROUP_KINDS = {
    "match": PATTERNS,
    "lr": AT_LEAST_0,
    "betas": BETAS,
    "eps": ABOVE_0,
    "weight_decay": AT_LEAST_0,
}
SOURCE_FIELDS = (
    *("text", "messages", "tools", "system", "instruction", "input", "output", "history"),
    *("prompt", "completion", "chosen", "rejected", "images"),
)
_SOURCE_KINDS = {
    "path": PATH,
    "name": TEXT,
    "split": TEXT,
    "revision": TEXT,
    "format": FORMAT,
    "weight": real("a number above 0, at most 1000", lambda number: 0 < number <= 1000),
    "text_field": TEXT,
    "columns": Kind("a mapping such as {messages: chat}", _parse_columns),
    "streaming": BOOL,
    "dataset_info": PATH,
    "images_folder": PATH,
}
_SOURCE = f"a mapping with path and any of {', '.join(_SOURCE_KINDS)[len('path, ') :]}"
_GROUP = f"a mapping with match and any of {', '.join(_GROUP_KINDS)[len('match, ') :]}"
GROUPS = Kind(f"a list, each {_GROUP}", _parse_groups)
