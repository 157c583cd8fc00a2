"""`training.json`: what of the training state is no tensor."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.errors import IntegrityError

FILE = "training.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Description:
    """`step`: optimizer steps done, skipped ones included, from which micro-batches take their random streams; `seed`
    of those. `steps`: updates by parameter. `param_groups`: hyper-parameters of the optimizer, `params` by name.
    `precision`, `moments` as the engine's; `model_dtype`: in which the model was made before the engine took it over.
    `random`: states of Python's and NumPy's generators. `run`: what the caller wants back."""

    step: int
    seed: int
    precision: str
    moments: str
    model_dtype: str
    steps: Mapping[str, int]
    param_groups: Sequence[Mapping[str, Any]]
    random: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return (json.dumps({"format": FORMAT} | asdict(self), indent=1, sort_keys=True) + "\n").encode()


_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("step", "seed"), int),
    **dict.fromkeys(("precision", "moments", "model_dtype"), str),
    **dict.fromkeys(("steps", "random", "run"), dict),
    "param_groups": list,
}


def read_description(folder: Path) -> Description:
    """Of the checkpoint in `folder`. Raises IntegrityError where it is none that this version has written."""
    path = folder / FILE
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{folder} is no checkpoint: {FILE} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is damaged: it is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise IntegrityError(f"{path}: format is {found!r}; this version reads {FORMAT}")
    for name, kind in _KINDS.items():
        if not isinstance(content.get(name), kind) or isinstance(content[name], bool):
            raise IntegrityError(f"{path} is damaged: {name} is {content.get(name)!r:.60}")
    if any(type(n) is not int or n < 0 for n in content["steps"].values()) or content["step"] < 0:
        raise IntegrityError(f"{path} is damaged: a count of steps is no number from 0 up")
    return Description(**{name: content[name] for name in _KINDS})


def random_numbers() -> dict[str, Any]:
    """The states of Python's and NumPy's own generators, which a user's code may draw from."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), [int(n) for n in keys], int(position), int(has_gauss), float(cached)],
    }


def set_random_numbers(states: Mapping[str, Any]) -> None:
    """Raises IntegrityError for states that they do not take."""
    try:
        if "python" in states:
            version, numbers, gauss = states["python"]
            random.setstate((version, tuple(numbers), gauss))
        if "numpy" in states:
            name, keys, *rest = states["numpy"]
            np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    except (TypeError, ValueError, OverflowError) as error:
        raise IntegrityError(f"{FILE}: the random state is damaged: {str(error).splitlines()[0]}") from None
