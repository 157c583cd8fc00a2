"""`train.deterministic`: a GPU adds up in the same order each time."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from megatrain.errors import ConfigError

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE = (":4096:8", ":16:8")  # cuBLAS's own names of workspaces with which its sums have one order


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """While entered, torch takes algorithms that give the same bits each time; where there is none it raises its own
    error. Not `wanted`: nothing changes. Raises ConfigError where it is too late for cuBLAS."""
    if not wanted:
        yield
        return
    given = os.environ.get(_VARIABLE)
    if given is None and torch.cuda.is_initialized():
        raise ConfigError(
            f"train.deterministic: CUDA has started without {_VARIABLE}; set it to {_REPEATABLE[0]} before"
        )
    if given is not None and given not in _REPEATABLE:
        raise ConfigError(
            f"train.deterministic: {_VARIABLE} is {given!r}; expected {' or '.join(_REPEATABLE)}, or unset"
        )
    os.environ[_VARIABLE] = given or _REPEATABLE[0]  # stays: cuBLAS reads it when it starts, and torch at each product
    switches: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = False  # a help in finding errors, which writes all memory twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        switches.fill_uninitialized_memory = before[1]
