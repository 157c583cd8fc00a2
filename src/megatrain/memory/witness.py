"""Notices writes into bf16 weights of which torch's version counters do not tell (`p.data.zero_()`).

The low bits of a master belong to the weight that the engine wrote. With another weight they are wrong, and with a zero
they can make a NaN.
"""

from math import prod

import torch
from torch import Tensor


class Witness:
    """What some of a parameter's weights were when the engine left them: one at least in every row and every column, so
    that a write into whole rows, columns or most of the parameter does not escape it. One into single elements may.

    Weights are given as the whole parameter, 1-D, int16 bits of bf16, on `device`."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        columns = shape[-1] if shape else 1
        rows = prod(shape) // columns if columns else 0
        number = torch.arange(max(rows, columns) if rows else 0, device=device)
        self._where = number % max(1, rows) * columns + number % max(1, columns)
        self._seen: Tensor | None = None

    def look(self, weights: Tensor) -> None:
        """The engine has written `weights`."""
        self._seen = weights[self._where]

    def recognises(self, weights: Tensor) -> Tensor:
        """Bool of no dimension, where the weights are: nothing waits for a device here."""
        if self._seen is None:
            return torch.ones((), dtype=torch.bool, device=weights.device)
        return (weights[self._where] == self._seen).all()
