"""YAML files read strictly: a mapping at the top, no key twice, one-line errors."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from megatrain.errors import ConfigError

# PyYAML follows YAML 1.1, which takes a number with an exponent but no point or no sign (1e-5, 1.5e5) for a text;
# YAML 1.2 and JSON take it for a number.
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML where a key given twice is an error, not silently the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for name_node, _ in node.value:
            if name_node.tag == "tag:yaml.org,2002:merge":  # `<<`: what it brings in gives way, by YAML's rules
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
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all (a NUL in it)
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read {str(path)!r}: {reason}") from None
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
    try:
        return yaml.load(text, UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        assert where is not None
        raise ValueError(f"{error.problem}, line {where.line + 1}, column {where.column + 1}") from None
    except yaml.YAMLError as error:
        raise ValueError(error) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


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
