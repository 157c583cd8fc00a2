"""A learning rate scheduler's `state_dict()` as JSON, and back to the same values.

JSON has no inf (ReduceLROnPlateau holds one), no tuples and no keys that are numbers (the milestones of MultiStepLR):
these become a mapping of one entry whose name says what it is, {"$float": "inf"}.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatrain.errors import ConfigError, IntegrityError

_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_MARK = "$"


def to_json(state: Mapping[str, Any], where: str = "lr_scheduler") -> dict[str, Any]:
    """Raises ConfigError where a value could not be read back as it is."""
    encoded: dict[str, Any] = {}
    for name, value in state.items():
        if type(name) is not str or name.startswith(_MARK):
            raise _cannot(f"{where}: the key {name!r:.60}")
        encoded[name] = _to_json(value, f"{where}.{name}")
    return encoded


def _to_json(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):  # NumPy's, too: metrics may be of that
        number = float(value)
        return number if math.isfinite(number) else {"$float": str(number)}
    if type(value) is list:
        return [_to_json(one, where) for one in value]
    if type(value) is tuple:
        return {"$tuple": [_to_json(one, where) for one in value]}
    if type(value) is Counter and all(type(n) is int for entry in value.items() for n in entry):
        return {"$counter": [list(entry) for entry in value.items()]}
    if type(value) is dict:
        return to_json(value, where)
    raise _cannot(f"{where} of type {type(value).__name__}")


def _cannot(what: str) -> ConfigError:
    return ConfigError(
        f"{what} cannot be saved; use a scheduler whose state_dict() is of numbers, texts, lists, tuples and mappings"
        " by name, or save_strategy='no'"
    )


def from_json(encoded: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """The state that a scheduler is to take on whose state is `own` now. Raises IntegrityError for what `to_json` does
    not write, ConfigError for the state of another kind of scheduler."""
    try:
        state = _mapping_from_json(encoded)
    except RecursionError:
        raise IntegrityError("lr_scheduler is damaged in this checkpoint: it is nested too deeply") from None
    for name, value in state.items():
        if name not in own or len({_kind(value), _kind(own[name])} - {"nothing"}) > 1:
            has = f"of type {type(own[name]).__name__}" if name in own else "not there"
            raise ConfigError(
                f"lr_scheduler: the checkpoint's has {name} = {value!r:.60}, which is {has} in this one's; use the"
                " lr_scheduler_type that the checkpoint was made with"
            )
    return state


def _mapping_from_json(encoded: Any) -> dict[str, Any]:
    if not isinstance(encoded, Mapping) or any(name.startswith(_MARK) for name in encoded):
        raise _damaged(encoded)
    return {name: _from_json(value) for name, value in encoded.items()}


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) != 1 or not next(iter(value)).startswith(_MARK):
        return _mapping_from_json(value)
    ((mark, content),) = value.items()
    if mark == "$float" and isinstance(content, str) and content in _FLOATS:
        return _FLOATS[content]
    if mark == "$tuple" and isinstance(content, list):
        return tuple(_from_json(one) for one in content)
    if mark == "$counter" and isinstance(content, list) and all(map(_is_count, content)):
        return Counter(dict(content))
    raise _damaged(value)


def _is_count(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(type(number) is int for number in entry)


def _damaged(value: Any) -> IntegrityError:
    return IntegrityError(f"lr_scheduler is damaged in this checkpoint: it holds {value!r:.60}")


def _kind(value: Any) -> str:
    """As far as a scheduler can tell: whole numbers are floats to it, and earlier checkpoints have lists for tuples."""
    kinds: tuple[tuple[str, Any], ...] = (
        ("nothing", type(None)),
        ("truth", bool),
        ("number", (int, float)),
        ("text", str),
        ("list", (list, tuple)),
        ("mapping", Mapping),
    )
    return next((name for name, types in kinds if isinstance(value, types)), type(value).__name__)
