"""AdamW with moments of one byte each: 2.125 bytes per parameter in place of 8.

Every block of 64 elements has a scale of its own for each moment, its largest value. A byte q stands for

    exp_avg     scale x sign(q) x (q / 127)^2         q from -127 to 127
    exp_avg_sq  (scale x (q / 255)^2)^2               q from 0 to 255; the scale is that of its square root

Squares spread the levels as the values lie: near a block's largest value they are 1.6% (0.8%) of it apart, and they
reach down to 1/16129 (1/65025) of it. Values between two levels go to one of the two by chance, in proportion to how
near it is: to the nearest, an average that moves by a thousandth a step would stay where it is for good. Chance is a
hash of the element's place and the step, so results depend neither on threads nor on time. What is not zero in
exp_avg_sq never becomes zero: dividing by it would make a large step of a small one.

The update itself is computed in fp32 from the stored moments, before the new ones are rounded. Storing them moves
each by less than the distance of two levels.
After T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861, with other levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from megatrain.optim.adamw_kernels import Segment, first_segment, segment_table, update_plain, update_split
from megatrain.optim.arrays import Floats, Grad, check_dtype, check_gradient, check_lengths
from megatrain.optim.scalars import bits_of, from_bits
from megatrain.optim.workers import Workers, kernel

BLOCK = 64  # elements that share their scales
TILE = 2048  # elements at a time: both moments as fp32 stay in the first cache


@dataclass(frozen=True, slots=True)
class Int8Moments:
    """Both moments of n elements: bytes (n), and scales float32 (blocks of n, the last one may be short)."""

    exp_avg: NDArray[np.int8]
    exp_avg_sq: NDArray[np.uint8]
    exp_avg_scale: Floats
    exp_avg_sq_scale: Floats

    @classmethod
    def zeros(cls, count: int) -> "Int8Moments":
        scales = (np.zeros(blocks(count), np.float32) for _ in range(2))
        return cls(np.zeros(count, np.int8), np.zeros(count, np.uint8), *scales)

    def decoded(self) -> tuple[Floats, Floats]:
        """(exp_avg, exp_avg_sq) as float32."""
        averages, squares, scratch = (np.empty(self.exp_avg.size, np.float32) for _ in range(3))
        _decode(self.exp_avg, self.exp_avg_sq, self.exp_avg_scale, self.exp_avg_sq_scale, 0, averages, squares, scratch)
        return averages, squares


def blocks(count: int) -> int:
    """Blocks that `count` elements lie in."""
    return -(-count // BLOCK)


def seed_bits(seed: int) -> int:
    """The 32 bits that a step's `seed` gives to chance."""
    return seed * 0x9E3779B9 & 0xFFFFFFFF


@njit(nogil=True)
def _spread(scales: Any, first: int, target: Any) -> None:
    """Every element's scale, from that of block `first` on: loops over many elements then need no second one."""
    for start in range(0, target.size, BLOCK):
        target[start : start + BLOCK] = scales[first + start // BLOCK]


@njit(nogil=True)
def _decode_avg(values: Any, scales: Any, target: Any) -> None:
    for i in range(target.size):
        part = np.float32(values[i]) * np.float32(1 / 127)
        target[i] = scales[i] * part * abs(part)


@njit(nogil=True)
def _decode_sq(values: Any, scales: Any, target: Any) -> None:
    for i in range(target.size):
        part = np.float32(values[i]) * np.float32(1 / 255)
        root = scales[i] * part * part
        target[i] = root * root


@njit(nogil=True)
def _decode(
    avg: Any, sq: Any, avg_scale: Any, sq_scale: Any, start: int, averages: Any, squares: Any, scales: Any
) -> None:
    """Elements from `start` on, a multiple of BLOCK, as many as `averages` and `squares` have; `scales` is scratch."""
    stop = start + averages.size
    _spread(avg_scale, start // BLOCK, scales)
    _decode_avg(avg[start:stop], scales, averages)
    _spread(sq_scale, start // BLOCK, scales)
    _decode_sq(sq[start:stop], scales, squares)


@njit(nogil=True)
def _chance(place: Any, seed: Any) -> Any:
    """32 random bits of an element (C. Wellons' lowbias32)."""
    x = np.uint32(np.uint32(place) + seed)
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(16))) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ np.uint32(x >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(x ^ np.uint32(x >> np.uint32(16)))


@njit(nogil=True)
def _largest(values: Any) -> Any:
    """The largest magnitude. Without their signs, values are in the order of their bits; a maximum of floats would not
    be vectorised."""
    most = np.uint32(0)
    for i in range(values.size):
        most = max(most, np.uint32(bits_of(values[i]) & np.uint32(0x7FFFFFFF)))
    return from_bits(most)


@njit(nogil=True, error_model="numpy")
def _rescale(values: Any, scales: Any, first: int, inverses: Any) -> None:
    """Write each block's largest magnitude to `scales`, from block `first` on, and its inverse for every element."""
    for start in range(0, values.size, BLOCK):
        scale = _largest(values[start : start + BLOCK])
        scales[first + start // BLOCK] = scale
        inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
        inverses[start : start + BLOCK] = inverse


@njit(nogil=True)
def _roots(values: Any) -> None:
    for i in range(values.size):
        values[i] = np.sqrt(values[i])


@njit(nogil=True)
def _encode_avg(values: Any, inverses: Any, place: int, seed: Any, target: Any) -> None:
    for i in range(values.size):
        chance = np.float32(_chance(place + i, seed) & np.uint32(0xFFFF)) * np.float32(1 / 65536)
        level = np.int32(np.float32(127) * np.sqrt(abs(values[i]) * inverses[i]) + chance)
        level = min(level, np.int32(127))
        target[i] = np.int8(-level if values[i] < np.float32(0) else level)


@njit(nogil=True)
def _encode_sq(roots: Any, inverses: Any, place: int, seed: Any, target: Any) -> None:
    for i in range(roots.size):
        chance = np.float32(_chance(place + i, seed) >> np.uint32(16)) * np.float32(1 / 65536)
        level = np.int32(np.float32(255) * np.sqrt(roots[i] * inverses[i]) + chance)
        level = max(min(level, np.int32(255)), np.int32(roots[i] > np.float32(0)))
        target[i] = np.uint8(level)


@njit(nogil=True)
def _encode(
    averages: Any, squares: Any, seed: Any, start: int, avg: Any, sq: Any, avg_scale: Any, sq_scale: Any, scales: Any
) -> None:
    """The inverse of `_decode`; `squares` become their roots."""
    stop = start + averages.size
    _rescale(averages, avg_scale, start // BLOCK, scales)
    _encode_avg(averages, scales, start, seed, avg[start:stop])
    _roots(squares)
    _rescale(squares, sq_scale, start // BLOCK, scales)
    _encode_sq(squares, scales, start, seed, sq[start:stop])


@kernel
def _adamw(
    start: int, stop: int, weight: Any, remainder: Any, avg: Any, sq: Any, avg_scale: Any, sq_scale: Any, grad: Any,
    scale: Any, bounds: Any, rows: Any, seed: Any,
) -> None:  # fmt: skip
    """`remainder` None: numba compiles the one branch that its type leaves."""
    averages, squares, scales = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    index = first_segment(bounds, start)
    while index < bounds.shape[0] and bounds[index, 0] < stop:
        end = min(stop, bounds[index, 1])
        for a in range(max(start, bounds[index, 0]), end, TILE):
            b = min(a + TILE, end)
            m, v, scratch = averages[: b - a], squares[: b - a], scales[: b - a]
            _decode(avg, sq, avg_scale, sq_scale, a, m, v, scratch)
            if remainder is None:
                update_plain(weight[a:b], m, v, grad[a:b], scale, rows[index])
            else:
                update_split(weight[a:b], remainder[a:b], m, v, grad[a:b], scale, rows[index])
            _encode(m, v, seed, a, avg, sq, avg_scale, sq_scale, scratch)
        index += 1


def adamw_int8(
    workers: Workers,
    weight: NDArray[Any],
    remainder: NDArray[np.int16] | None,
    moments: Int8Moments,
    grad: Grad,
    segments: Sequence[Segment],
    grad_scale: float = 1.0,
    seed: int = 0,
    first: int = 0,
) -> None:
    """As `adamw_kernels.adamw`, with `moments` of one byte each. `seed` is to differ from step to step. Chance counts
    elements from `first`, which is where a piece of a longer array begins.

    Segments begin at multiples of `BLOCK` elements, and a block belongs to one segment. Raises ValueError for
    lengths and segments, TypeError for dtypes.
    """
    check_lengths(weight=weight, exp_avg=moments.exp_avg, exp_avg_sq=moments.exp_avg_sq, grad=grad)
    check_lengths(exp_avg_scale=moments.exp_avg_scale, exp_avg_sq_scale=moments.exp_avg_sq_scale)
    check_gradient(grad)
    if moments.exp_avg_scale.size != blocks(weight.size):
        raise ValueError(f"{weight.size} elements need {blocks(weight.size)} scales, not {moments.exp_avg_scale.size}")
    bounds, rows = segment_table(segments, weight.size)
    for bound in bounds[:, 0][bounds[:, 0] % BLOCK != 0]:
        raise ValueError(f"a segment begins at element {bound}; with moments of one byte, at multiples of {BLOCK}")
    state = (moments.exp_avg, moments.exp_avg_sq, moments.exp_avg_scale, moments.exp_avg_sq_scale)
    # chance takes the sum of an element's number and this
    start = np.uint32((seed_bits(seed) + first) & 0xFFFFFFFF)
    rest = (grad, np.float32(grad_scale), bounds, rows, start)
    if remainder is None:
        check_dtype(np.float32, weight=weight)
    else:
        check_dtype(np.uint16, weight=weight)
        check_dtype(np.int16, remainder=remainder)
        check_lengths(weight=weight, remainder=remainder)
    workers.run(_adamw, weight.size, weight, remainder, *state, *rest, align=BLOCK)
