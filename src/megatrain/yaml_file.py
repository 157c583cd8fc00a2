"""YAML files read strictly: a mapping at the top, no key twice, one-line errors, and no more work than they are long.

Aliases and `<<` let a few lines stand for billions of values, which are shared until somebody writes or copies them.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from megatrain.errors import ConfigError

# PyYAML follows YAML 1.1, which takes a number with an exponent but no point or no sign (1e-5, 1.5e5) for a text;
# YAML 1.2 and JSON take it for a number.
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


_MERGE = "tag:yaml.org,2002:merge"
_MOST_MERGED_MAPPINGS, _MOST_MERGED_KEYS = 16, 1000
_MOST_JSON_BYTES, _MOST_YAML_CHARACTERS = 16 << 20, 512 << 10  # the parser of YAML is slow
_MOST_VALUES = 1_000_000


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML where a key given twice is an error, not silently the last one."""

    def flatten_mapping(self, node: Any) -> None:
        """Carry out `<<`, within limits."""
        merged = [value for name, value in node.value if name.tag == _MERGE]
        parts = [part for value in merged for part in (value.value if value.id == "sequence" else [value])]
        if len(parts) > _MOST_MERGED_MAPPINGS:
            raise yaml.YAMLError(f"`<<` brings in {len(parts)} mappings; expected at most {_MOST_MERGED_MAPPINGS}")
        super().flatten_mapping(node)
        if parts and len(node.value) > _MOST_MERGED_KEYS:
            raise yaml.YAMLError(f"`<<` makes {len(node.value)} keys; expected at most {_MOST_MERGED_KEYS}")

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for name_node, _ in node.value:
            if name_node.tag == _MERGE:  # `<<`: what it brings in gives way, by YAML's rules
                continue
            name = self.construct_object(name_node, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.YAMLError(f"key {name!r} is given twice, line {name_node.start_mark.line + 1}")
            seen.add(str(name))
        return super().construct_mapping(node, deep)


class PlainDumper(yaml.SafeDumper):
    """Writes what `UniqueKeyLoader` reads back equal: a text that looks like a number is quoted."""


for kind in (UniqueKeyLoader, PlainDumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in YAML file `path` (or JSON, if it is called .json). Raises ConfigError where there is none."""
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(_MOST_JSON_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all (a NUL in it)
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read {str(path)!r}: {reason}") from None
    if len(data) > _MOST_JSON_BYTES:
        raise ConfigError(f"{path}: more than {_MOST_JSON_BYTES} bytes; expected settings")
    kind, parse = ("JSON", _parse_json) if Path(path).suffix == ".json" else ("YAML", parse_yaml)
    try:
        content = parse(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid {kind}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found a {type(content).__name__}")
    return content


def parse_yaml(text: str) -> Any:
    """What YAML `text` says. Raises ValueError where it is none."""
    if len(text) > _MOST_YAML_CHARACTERS:
        raise ValueError(f"{len(text)} characters; expected at most {_MOST_YAML_CHARACTERS}")
    try:
        content = yaml.load(text, UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        assert where is not None
        raise ValueError(f"{error.problem}, line {where.line + 1}, column {where.column + 1}") from None
    except yaml.YAMLError as error:
        raise ValueError(error) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, AttributeError, TypeError, OverflowError):  # such as `!!int ''` or `!!bool x`
        raise ValueError("a value does not fit the tag before it") from None
    _refuse_too_many(content)
    return content


def _refuse_too_many(content: Any) -> None:
    """Raise ValueError where values, each counted wherever an alias brings it in, are too many or go in a circle."""
    waiting, count = [content], 0
    while waiting:
        value = waiting.pop()
        count += 1 + (len(value) >> 6 if isinstance(value, str) else 0)
        if count > _MOST_VALUES:
            raise ValueError(f"aliases make more than {_MOST_VALUES} values of it")
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value


def _parse_json(text: str) -> Any:
    """What JSON `text` says: it is YAML but for tabs. Raises ValueError where it is none."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return found
