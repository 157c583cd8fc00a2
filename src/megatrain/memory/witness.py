"""Notices writes into bf16 weights of which torch's version counters do not tell (`p.data.zero_()`).

The low bits of a master belong to the weight that the engine wrote. With another weight they are wrong, and with a zero
they can make a NaN.
"""

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]


class Witness:
    """What some of a parameter's weights were when the engine left them: one at least in every row and every column, so
    that a write into whole rows, columns or most of the parameter does not escape it. One into single elements may."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        columns = shape[-1] if shape else 1
        rows = int(np.prod(shape)) // columns if columns else 0
        number = np.arange(max(rows, columns) if rows else 0)
        self._where = number % max(1, rows) * columns + number % max(1, columns)
        self._seen: Bits | None = None

    def look(self, weights: Bits) -> None:
        """The engine has written `weights`, the whole parameter, 1-D."""
        self._seen = weights[self._where]

    def recognises(self, weights: Bits) -> bool:
        return self._seen is None or np.array_equal(weights[self._where], self._seen)
