"""What the entries of `training.json` have to be, so that nothing that is read from one surprises whoever uses it.

A checkpoint may come from anybody, with a manifest that fits. What is checked here: that each entry is of its kind, in
a range that training can have left. That the whole fits an engine is for the engine to say.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatrain.errors import ConfigError
from megatrain.optim.adamw import MOMENTS, AdamW

MOST_STEPS = 10**12  # thirty years of a thousand a second
_WORD = 1 << 32  # the generators' states are 32-bit words
_TWISTER_WORDS = 624


def wrong_entry(content: Mapping[str, Any]) -> str | None:
    """Which entry is not what it has to be, what it is, and what would be right; None where all are."""
    for name, (is_right, expected) in _ENTRIES.items():
        if name not in content:
            return f"{name} is missing; expected {expected}"
        if not is_right(content[name]):
            return f"{name} is {content[name]!r:.60}; expected {expected}"
    if unknown := sorted(content.keys() - _ENTRIES.keys()):
        return f"{unknown[0]!r:.60} is no entry; expected {', '.join(_ENTRIES)}"
    for number, group in enumerate(content["param_groups"]):
        if (wrong := _wrong_group(group)) is not None:
            return f"param_groups[{number}]{wrong}"
    for name, steps in content["steps"].items():
        if not _is_count(steps):
            return f"steps of {name!r:.60} is {steps!r:.60}; expected a whole number from 0 to {MOST_STEPS}"
    for name, state in content["random"].items():
        if not _RANDOM[name](state):
            return f"random.{name} is {state!r:.60}; expected the state of a Mersenne twister"
    return None


def _is_whole(value: object, least: int, below: int) -> bool:
    return type(value) is int and least <= value < below


def _is_number(value: object) -> bool:
    """Whether it is a finite number that 64 bits hold; JSON's true is none."""
    return _is_whole(value, -1 << 63, 1 << 63) or (type(value) is float and math.isfinite(value))


def _is_count(value: object) -> bool:
    return _is_whole(value, 0, MOST_STEPS + 1)


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


def _is_list_of_groups(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(group, dict) for group in value)


_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda value: type(value) is int, "a whole number"),
    "step": (_is_count, f"a whole number from 0 to {MOST_STEPS}"),
    "seed": (lambda value: _is_whole(value, 0, 1 << 63), "a whole number from 0 up, below 2**63"),
    "precision": _one_of("bf16", "fp32"),
    "moments": _one_of(*MOMENTS),
    "model_dtype": _one_of("float64", "float32", "bfloat16", "float16"),
    "steps": (lambda value: isinstance(value, dict), "counts of updates by parameter"),
    "param_groups": (_is_list_of_groups, "a list of mappings with params"),
    "random": (lambda value: isinstance(value, dict) and value.keys() <= _RANDOM.keys(), "states of python and numpy"),
    "run": (lambda value: isinstance(value, dict), "a mapping"),
}


def _wrong_group(group: Mapping[str, Any]) -> str | None:
    params = group.get("params")
    if not isinstance(params, list) or not all(isinstance(name, str) for name in params):
        return f".params is {params!r:.60}; expected a list of names"
    if missing := {"betas", "eps", "weight_decay", "lr_scale"} - group.keys():  # not lr: a tensor's is not saved
        return f" has no {min(missing)}; expected one"
    for name, value in group.items():  # schedulers add some of their own
        if not all(type(one) in (bool, str) or _is_number(one) for one in (value if type(value) is list else [value])):
            return f".{name:.60} is {value!r:.60}; expected a finite number, a text, or a list of such"
    if not _is_number(group["lr_scale"]) or group["lr_scale"] < 0:
        return f".lr_scale is {group['lr_scale']!r:.60}; expected a number >= 0"
    try:
        AdamW(**{name: group[name] for name in ("lr", "betas", "eps", "weight_decay") if name in group})
    except ConfigError as error:
        return f": {error}"
    return None


def _are_words(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(_is_whole(word, 0, _WORD) for word in value)


def _is_python_state(value: object) -> bool:
    """The last of the numbers is the place in them."""
    if not isinstance(value, list) or len(value) != 3 or not _are_words(value[1], _TWISTER_WORDS + 1):
        return False
    return _is_whole(value[0], 3, 4) and value[1][-1] <= _TWISTER_WORDS and (value[2] is None or _is_number(value[2]))


def _is_numpy_state(value: object) -> bool:
    """NumPy itself does not look at the place: beyond the end, it would read memory that is not the generator's."""
    if not isinstance(value, list) or len(value) != 5 or value[0] != "MT19937":
        return False
    place = _is_whole(value[2], 0, _TWISTER_WORDS + 1)
    return place and _are_words(value[1], _TWISTER_WORDS) and _is_whole(value[3], 0, 2) and _is_number(value[4])


_RANDOM: dict[str, Callable[[Any], bool]] = {"python": _is_python_state, "numpy": _is_numpy_state}
