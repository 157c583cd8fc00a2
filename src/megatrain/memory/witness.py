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

    Weights are given as the whole parameter, 1-D, int16 bits of bf16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._rows, self._columns = _rows_and_columns(shape)
        self._seen: Tensor | None = None

    def look(self, weights: Tensor) -> None:
        """The engine has written `weights`."""
        self._seen = weights[self._where(weights.device)]

    def recognises(self, weights: Tensor) -> Tensor:
        """Bool of no dimension, where the weights are: nothing waits for a device here."""
        if self._seen is None:
            return torch.ones((), dtype=torch.bool, device=weights.device)
        return (weights[self._where(weights.device)] == self._seen).all()

    @property
    def n_bytes(self) -> int:
        """Kept."""
        return 0 if self._seen is None else self._seen.nbytes

    def _where(self, device: torch.device) -> Tensor:
        """Along diagonals. Not kept: the places of weights would take four times what the weights do."""
        number = torch.arange(max(self._rows, self._columns) if self._rows else 0, device=device)
        return number % max(1, self._rows) * self._columns + number % max(1, self._columns)


def witness_bytes(shape: tuple[int, ...]) -> int:
    """That a witness keeps."""
    rows, columns = _rows_and_columns(shape)
    return 2 * max(rows, columns) if rows else 0


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    columns = shape[-1] if shape else 1
    return (prod(shape) // columns if columns else 0), columns
