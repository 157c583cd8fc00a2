"""An fp32 master weight stored as its bf16 rounding plus a signed 16-bit remainder: 4 bytes, nothing lost.

With `u` the bits of the fp32 value, all modulo 2^32:

    weight    = (u + 0x8000) >> 16      the bits of the bf16 weight that the model computes with
    remainder = int16(u)                the low half of `u`, read as signed
    u         = (weight << 16) + remainder

Rounding is half away from zero, not half to even: the remainder of a tie is then always -32768, which says
that the upper half was rounded up. Half to even would need a 17th bit (32768 patterns could not be told
apart). Against torch's own cast to bf16 the weight differs on ties alone, about 1 value in 100,000.

A master of magnitude 0x7f7f8000 (3.396e38) or more rounds to an infinite weight, and some NaN masters do too:
look for non-finite numbers in gradients, never in these weights.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from megatrain.optim.arrays import check_dtype, check_lengths
from megatrain.optim.workers import Workers, kernel

# Scalar helpers, inlined into the kernels. Every step is wrapped in np.uint32: numba widens integer
# arithmetic to 64 bits otherwise, and the loop no longer vectorises.


@njit(nogil=True)
def weight_of(bits: Any) -> Any:
    """The bf16 weight (its 16 bits, as uint16) of an fp32 master given as uint32 bits."""
    return np.uint16(np.uint32(bits + np.uint32(0x8000)) >> np.uint32(16))


@njit(nogil=True)
def remainder_of(bits: Any) -> Any:
    """The remainder (int16) of an fp32 master given as uint32 bits."""
    return np.int16(bits)


@njit(nogil=True)
def master_of(weight: Any, remainder: Any) -> Any:
    """The uint32 bits of the fp32 master held by a bf16 weight (uint16 bits) and its remainder (int16)."""
    return np.uint32(np.uint32(np.uint32(weight) << np.uint32(16)) + np.uint32(np.int32(remainder)))


@kernel
def _split(start: int, stop: int, master: Any, weight: Any, remainder: Any) -> None:
    source, high, low = master[start:stop], weight[start:stop], remainder[start:stop]
    for i in range(source.size):
        bits = source[i]
        high[i] = weight_of(bits)
        low[i] = remainder_of(bits)


@kernel
def _merge(start: int, stop: int, weight: Any, remainder: Any, master: Any) -> None:
    high, low, target = weight[start:stop], remainder[start:stop], master[start:stop]
    for i in range(target.size):
        target[i] = master_of(high[i], low[i])


def split(
    workers: Workers, master: NDArray[np.float32], weight: NDArray[np.uint16], remainder: NDArray[np.int16]
) -> None:
    """Writes the bf16 bits and the remainder of every `master` element.

    All arrays are 1-D, contiguous and of one length. Raises ValueError for lengths, TypeError for dtypes.
    """
    _check(master, weight, remainder)
    workers.run(_split, master.size, master.view(np.uint32), weight, remainder)


def merge(
    workers: Workers, weight: NDArray[np.uint16], remainder: NDArray[np.int16], master: NDArray[np.float32]
) -> None:
    """Writes the exact fp32 `master` of every weight and remainder: `split` inverted, on the same terms."""
    _check(master, weight, remainder)
    # as integers: a signalling NaN that passed through a float register could change its bits
    workers.run(_merge, master.size, weight, remainder, master.view(np.uint32))


def _check(master: NDArray[np.float32], weight: NDArray[np.uint16], remainder: NDArray[np.int16]) -> None:
    check_dtype(np.float32, master=master)
    check_dtype(np.uint16, weight=weight)
    check_dtype(np.int16, remainder=remainder)
    check_lengths(master=master, weight=weight, remainder=remainder)
