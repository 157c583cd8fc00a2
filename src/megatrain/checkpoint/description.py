"""`training.json`: what of the training state is no tensor."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.checkpoint.description_entries import wrong_entry
from megatrain.errors import ConfigError, IntegrityError
from megatrain.trust.hashing import read_regular

FILE = "training.json"
FORMAT = 1
_MOST_BYTES = 256 << 20  # some million parameters


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
        """Raises ConfigError where `read_description` would refuse it."""
        try:
            text = json.dumps({"format": FORMAT} | asdict(self), indent=1, sort_keys=True, allow_nan=False)
            wrong = wrong_entry(json.loads(text))
        except ValueError as error:
            wrong = str(error)
        if wrong is not None:
            raise ConfigError(f"{FILE} cannot be written: {wrong}")
        return (text + "\n").encode()


def read_description(folder: Path) -> Description:
    """Of the checkpoint in `folder`. Raises IntegrityError where it is none that this version has written."""
    path = folder / FILE
    try:
        content = json.loads(read_regular(path, _MOST_BYTES), parse_float=_finite, parse_constant=_finite)
    except OSError as error:
        raise IntegrityError(f"{folder} is no checkpoint: {FILE} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise IntegrityError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as error:  # JSON's own errors are ValueErrors
        raise IntegrityError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise IntegrityError(f"{path}: format is {found!r:.60}; this version reads {FORMAT}")
    if (wrong := wrong_entry(content)) is not None:
        raise IntegrityError(f"{path} is damaged: {wrong}")
    return Description(**{name: value for name, value in content.items() if name != "format"})


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds {text:.60}; expected finite numbers")
    return number


def random_numbers() -> dict[str, Any]:
    """The states of Python's and NumPy's own generators, which a user's code may draw from."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), [int(n) for n in keys], int(position), int(has_gauss), float(cached)],
    }


def set_random_numbers(states: Mapping[str, Any]) -> None:
    """`states`: as `random_numbers` gives them, or as they were read."""
    if "python" in states:
        version, numbers, gauss = states["python"]
        random.setstate((version, tuple(numbers), gauss))
    if "numpy" in states:
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
