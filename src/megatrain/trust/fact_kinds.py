"""What a run's manifests say of where a checkpoint came from, held to its kinds before anybody acts on it."""

from collections.abc import Callable, Mapping
from typing import Any

from megatrain.trust.ledger import is_data


def wrong_fact(facts: Mapping[str, Any]) -> str | None:
    """Which of the facts that `facts.run_facts` and a run give is not of its kind; None where all that are there are.
    A manifest may hold others."""
    for name, (is_right, expected) in _KINDS.items():
        if name in facts and not is_right(facts[name]):
            return f"facts.{name} is {facts[name]!r:.60}; expected {expected}"
    return None


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _are_versions(value: object) -> bool:
    return isinstance(value, dict) and all(version is None or isinstance(version, str) for version in value.values())


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_ledger(value: object) -> bool:
    return isinstance(value, dict) and _is_count(value.get("lines")) and isinstance(value.get("sha256"), str)


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "code": (_is_mapping, "version and sha256"),
    "config_sha256": (lambda value: isinstance(value, str), "a SHA-256"),
    "data": (is_data, "files with path, bytes and sha256"),
    "hardware": (_is_mapping, "a description of the machine"),
    "ledger": (_is_ledger, "lines and sha256"),
    "libraries": (_are_versions, "versions by name"),
    "step": (_is_count, "a whole number from 0 up"),
}
