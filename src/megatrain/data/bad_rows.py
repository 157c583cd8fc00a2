"""Rows that make no example: what is wrong with one, and whether it ends the run or is left out."""

import logging
from collections.abc import Sequence

from megatrain.errors import ConfigError

_SHOWN = 5
_NAMES_SHOWN = 20
_log = logging.getLogger(__name__)


class BadRowError(ValueError):
    """Why a row makes no example, in words that follow its place: 'has no field ...'."""


class BadRows:
    """The bad rows of one source. `skip`: count them and remember the first; else the first one is a ConfigError."""

    def __init__(self, key: str, *, skip: bool) -> None:
        self.key, self.skip = key, skip
        self.count = 0
        self.first: list[str] = []

    def found(self, where: str, reason: str, *, always_named: bool = False) -> None:
        """Note the row at `where`, or raise ConfigError. `always_named`: it is a whole file, of which all are said."""
        if not self.skip:
            raise ConfigError(f"{self.key}: {where} {reason}; data.bad_rows: skip leaves such rows out")
        self.count += 1
        if always_named or len(self.first) < _SHOWN:
            self.first.append(f"{where} {reason}".strip())


def say_skipped(key: str, described: str, count: int, first: Sequence[str]) -> None:
    """A warning that names the first of `count` rows that were left out of a source."""
    if count:
        more = f"; and {count - len(first):,} more" if count > len(first) else ""
        _log.warning("%s: skipped %s bad rows of %s: %s%s", key, f"{count:,}", described, "; ".join(first), more)


def kind_of(value: object) -> str:
    """What a value is, as JSON's user knows it."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def names_of(fields: Sequence[str]) -> str:
    """Names of fields on one line, not too many of them."""
    names = sorted(fields)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(name[:100] for name in names[:_NAMES_SHOWN]) + more or "none"
