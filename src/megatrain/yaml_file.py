"""YAML files read strictly: a mapping at the top, no key twice, one-line errors."""

from pathlib import Path
from typing import Any

import yaml

from megatrain.errors import ConfigError


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML where a key given twice is an error, not silently the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for name_node, _ in node.value:
            name = self.construct_object(name_node, deep=True)
            if isinstance(name, str) and name in seen and name != "<<":
                raise yaml.YAMLError(f"key {name!r} is given twice, line {name_node.start_mark.line + 1}")
            seen.add(str(name))
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in YAML (or JSON) file `path`. Raises ConfigError where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read {str(path)!r}: {reason}") from None
    try:
        content = yaml.load(text, UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found a {type(content).__name__}")
    return content
