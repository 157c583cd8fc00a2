"""Scalar helpers over float32 and the bits of bf16, inlined into the kernels.

bf16 values are their bits as uint16. Every step is wrapped in np.uint32: numba widens integer arithmetic to 64 bits
otherwise, and the loop no longer vectorises.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload


@njit(nogil=True)
def from_bits(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@njit(nogil=True)
def bits_of(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


def widen(value: Any) -> Any:
    """The float32 value of a float32, or of the uint16 bits of a bf16."""
    raise NotImplementedError("inside kernels only")


@overload(widen)
def _choose_widen(value: Any) -> Any:
    def same(value: Any) -> Any:
        return value

    def shifted(value: Any) -> Any:
        return from_bits(np.uint32(value) << np.uint32(16))

    return {types.float32: same, types.uint16: shifted}.get(value)


@njit(nogil=True)
def round_to_even(value: Any) -> Any:
    """The bf16 bits (uint16) nearest to a float32, ties to even; every NaN becomes 0x7fc0."""
    bits = bits_of(value)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    return np.uint16(0x7FC0) if value != value else rounded
