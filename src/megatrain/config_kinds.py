"""What a setting accepts: how its value is read, and how an error says what would be right."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatrain.sizes import parse_bytes


@dataclass(frozen=True)
class Kind:
    """What a key accepts: `expected` completes 'expected ...'; `parse` raises ValueError or TypeError."""

    expected: str
    parse: Callable[[Any], Any]


def parse_number(value: Any) -> float:
    """A finite number; a bool is none. Raises ValueError."""
    # PyYAML follows YAML 1.1, where 1e-5 (no point) is a string: what looks like a number is one
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
    """Whole numbers from `minimum` up; 1e9 is one."""

    def parse(value: Any) -> int:
        number = parse_number(value)
        if number != int(number) or number < minimum:
            raise ValueError
        return int(number)

    return Kind(f"a whole number of at least {minimum}", parse)


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


def _parse_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _parse_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _parse_sources(value: Any) -> tuple[str, ...]:
    sources = tuple(_parse_text(item) for item in (value if isinstance(value, (list, tuple)) else [value]))
    if not sources:
        raise ValueError
    return sources


def _parse_betas(value: Any) -> tuple[float, float]:
    first, second = (FRACTION.parse(item) for item in value)
    return first, second


def _parse_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError
    return {str(name): item for name, item in value.items()}


def _parse_bpe(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or set(value) != {"train", "vocab_size"} or value["train"] != "bpe":
        raise ValueError
    return {"train": "bpe", "vocab_size": whole(259).parse(value["vocab_size"])}


AT_LEAST_0 = real("a number of at least 0", lambda number: number >= 0)
ABOVE_0 = real("a number above 0", lambda number: number > 0)
FRACTION = real("a number from 0 up to but not 1", lambda number: 0 <= number < 1)
RATIO = real("a number from 0 to 1", lambda number: 0 <= number <= 1)
BOOL = Kind("true or false", _parse_bool)
TEXT = Kind("a text", _parse_text)
PATH = Kind("a path", _parse_text)
SOURCES = Kind("a path, stdlib, or a list of these", _parse_sources)
BETAS = Kind("two numbers from 0 up to but not 1, such as [0.9, 0.95]", _parse_betas)
MAPPING = Kind("a mapping with model_type", _parse_mapping)
BPE = Kind("{train: bpe, vocab_size: N} with N of at least 259", _parse_bpe)
DEVICE = choice("auto", "cpu")
BYTES = Kind("a size such as 24GiB", parse_bytes)
