"""LLaMA-Factory's `dataset_info.json`: what it calls a dataset, in our words."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatrain.data.bad_rows import kind_of, names_of
from megatrain.errors import ConfigError

# its names of columns and ours; of a column that it does not name nothing is read, unless rows must have it
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_ALPACA_NEEDS = ("instruction", "output")
_SHARED = {"system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected", "images": "images"}
_TAGS = {
    *("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"),
}
_REFUSED = {"videos", "audios", "kto_tag"}


@dataclass(frozen=True)
class Entry:
    """One dataset of the file, as the mapping that `data.train` takes, and what that has no words for. Columns that
    are not in `spec` are not read."""

    spec: dict[str, Any]
    tags: dict[str, str] = field(default_factory=dict)
    samples: int | None = None


def read_entry(info: Path, name: str, key: str) -> Entry:
    """The dataset `name` of file `info`. Raises ConfigError."""
    try:
        entries = json.loads(info.read_bytes())
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {str(info)!r}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{key}: {str(info)!r} is not JSON") from None
    if not isinstance(entries, dict) or not isinstance(entries.get(name), dict):
        known = names_of(list(entries)) if isinstance(entries, dict) else kind_of(entries)
        raise ConfigError(f"{key}: {str(info)!r} has no dataset {name!r}; it has: {known}")
    return _entry(entries[name], info, f"{key}: {name!r} in {str(info)!r}")


def _entry(entry: Mapping[str, Any], info: Path, where: str) -> Entry:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ConfigError(f"{where}: formatting {formatting!r} is not known; expected alpaca, sharegpt or openai")
    given, tags = _strings(entry, "columns", where), _strings(entry, "tags", where)
    for name in sorted(_REFUSED & set(given)):
        raise ConfigError(f"{where}: columns.{name} is not supported; rows are of text and images")
    columns = {ours: given[theirs] for theirs, ours in (_ALPACA | _SHARED).items() if theirs in given}
    if formatting == "alpaca":
        layout = "alpaca"
        columns = {ours: ours for ours in _ALPACA_NEEDS if ours not in columns} | columns
        if not given:
            columns["input"] = "input"
        if set(given) == {"prompt"}:  # a text to go on pre-training with
            layout, columns = "text", {"text": given["prompt"]}
    else:
        layout = "messages" if formatting == "openai" else "sharegpt"
        columns["messages"] = given.get("messages", "conversations")
    if entry.get("ranking"):
        layout = "preference"
        columns.pop("output", None)
        columns = {"chosen": "chosen", "rejected": "rejected"} | columns
    spec: dict[str, Any] = {"path": _place(entry, info, where), "format": layout, "columns": columns}
    if "images" in given and isinstance(entry.get("file_name"), str):
        spec["images_folder"] = str(info.parent)  # its media_dir, where no other is given
    for theirs, ours in (("subset", "name"), ("split", "split")):
        if entry.get(theirs) is not None:
            spec[ours] = str(entry[theirs])
    samples = entry.get("num_samples")
    if samples is not None and (type(samples) is not int or samples < 1):
        raise ConfigError(f"{where}: num_samples {samples!r} is wrong; expected a whole number of at least 1")
    return Entry(spec, {name: value for name, value in tags.items() if name in _TAGS}, samples)


def _strings(entry: Mapping[str, Any], name: str, where: str) -> dict[str, str]:
    found = entry.get(name) or {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ConfigError(f"{where}: {name} is {kind_of(found)}; expected an object whose values are strings")
    return found


def _place(entry: Mapping[str, Any], info: Path, where: str) -> str:
    """A file beside dataset_info.json, or a hub id."""
    if isinstance(entry.get("file_name"), str):
        return str(info.parent / entry["file_name"])
    if isinstance(entry.get("hf_hub_url"), str):
        return str(entry["hf_hub_url"])
    raise ConfigError(f"{where}: names no file_name and no hf_hub_url; other sources are not supported")
