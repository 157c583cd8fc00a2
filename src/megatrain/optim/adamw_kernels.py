"""AdamW over flat unit buffers, one pass over memory, spread over `Workers`.

Elementwise work is the same for every element wherever a slice begins, so no result depends on the number of
threads. numba compiles with IEEE semantics here (`fastmath` off) and fused multiply-adds are written out, so the
results are the same bits on every CPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from megatrain.optim.adamw_vector import LANES, update_blocks
from megatrain.optim.arrays import Floats, Grad, check_dtype, check_gradient, check_lengths
from megatrain.optim.scalars import bits_of, from_bits, widen
from megatrain.optim.split_master import master_of, remainder_of, weight_of
from megatrain.optim.workers import Workers, kernel


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements [start, stop) of a unit buffer that share hyper-parameters, as in torch.optim.AdamW.

    `step` is the number of this update of these elements: 1 for the first.
    """

    start: int
    stop: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


@intrinsic
def _fma(_typing: Any, x: Any, y: Any, z: Any) -> Any:
    """float32 x * y + z with one rounding."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        single = args[0].type
        declared = ir.FunctionType(single, [single] * 3)
        return builder.call(builder.module.declare_intrinsic("llvm.fma", [single], declared), args)

    return types.float32(types.float32, types.float32, types.float32), generate


@njit(nogil=True)
def first_segment(bounds: Any, start: int) -> int:
    """Index of the first segment that ends after `start`; `bounds` is int64 [segments, 2], ascending."""
    low, high = 0, bounds.shape[0]
    while low < high:
        middle = (low + high) // 2
        if bounds[middle, 1] > start:
            high = middle
        else:
            low = middle + 1
    return low


@njit(nogil=True, error_model="numpy")  # no test for division by zero, which would keep the loop scalar
def _updated(p: Any, m: Any, v: Any, g: Any, c: Any) -> Any:
    """One AdamW update of one element, all float32; `c` as `_coefficients` gives it. Returns p, m, v.

    The order of operations, and where two of them share a rounding, is that of torch's vectorised fused AdamW
    on CPU: `exp_avg.lerp_(grad, 1 - beta1)`, which torch takes from whichever end is nearer; then the second
    moment with its last product fused; then decay and step. Any other order differs in the last bits.
    """
    decay, lerp, from_grad, beta2, rest2, step_size, root_scale, eps = c
    m = _fma(lerp, g - m, g if from_grad else m)
    v = _fma(rest2 * g, g, v * beta2)
    return p * decay + (step_size * m) / (np.sqrt(v) / root_scale + eps), m, v


@njit(nogil=True)
def _unpacked(c: Any) -> Any:
    return c[0], c[1], c[2] != np.float32(0), c[3], c[4], c[5], c[6], c[7]


@njit(nogil=True)
def update_split(weight: Any, remainder: Any, exp_avg: Any, exp_avg_sq: Any, grad: Any, scale: Any, row: Any) -> None:
    c = _unpacked(row)
    update_blocks(weight, remainder, exp_avg, exp_avg_sq, grad, scale, c)
    for i in range(weight.size // LANES * LANES, weight.size):
        p = from_bits(master_of(weight[i], remainder[i]))
        p, m, v = _updated(p, exp_avg[i], exp_avg_sq[i], widen(grad[i]) * scale, c)
        bits = bits_of(p)
        weight[i] = weight_of(bits)
        remainder[i] = remainder_of(bits)
        exp_avg[i] = m
        exp_avg_sq[i] = v


@njit(nogil=True)
def update_plain(weight: Any, exp_avg: Any, exp_avg_sq: Any, grad: Any, scale: Any, row: Any) -> None:
    c = _unpacked(row)
    for i in range(weight.size):
        p, m, v = _updated(weight[i], exp_avg[i], exp_avg_sq[i], widen(grad[i]) * scale, c)
        weight[i] = p
        exp_avg[i] = m
        exp_avg_sq[i] = v


@kernel
def _adamw_split(
    start: int,
    stop: int,
    weight: Any,
    remainder: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    grad: Any,
    scale: Any,
    bounds: Any,
    rows: Any,
) -> None:
    index = first_segment(bounds, start)
    while index < bounds.shape[0] and bounds[index, 0] < stop:
        a, b = max(start, bounds[index, 0]), min(stop, bounds[index, 1])
        update_split(weight[a:b], remainder[a:b], exp_avg[a:b], exp_avg_sq[a:b], grad[a:b], scale, rows[index])
        index += 1


@kernel
def _adamw_plain(
    start: int,
    stop: int,
    weight: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    grad: Any,
    scale: Any,
    bounds: Any,
    rows: Any,
) -> None:
    index = first_segment(bounds, start)
    while index < bounds.shape[0] and bounds[index, 0] < stop:
        a, b = max(start, bounds[index, 0]), min(stop, bounds[index, 1])
        update_plain(weight[a:b], exp_avg[a:b], exp_avg_sq[a:b], grad[a:b], scale, rows[index])
        index += 1


@lru_cache(maxsize=1024)
def _coefficients(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> tuple[float, ...]:
    """What `_updated` computes with, in double precision as torch derives it; the caller rounds to float32."""
    lerp = np.float32(1 - beta1)
    near = abs(lerp) < 0.5
    return (
        1 - lr * weight_decay,
        float(lerp if near else lerp - np.float32(1)),
        0.0 if near else 1.0,
        beta2,
        1 - beta2,
        -(lr / (1 - math.pow(beta1, step))),
        math.sqrt(1 - math.pow(beta2, step)),
        eps,
    )


def segment_table(segments: Sequence[Segment], length: int) -> tuple[NDArray[np.int64], Floats]:
    """Bounds (int64 [n, 2]) and coefficients (float32 [n, 8]); neighbours with equal ones are merged."""
    bounds: list[list[int]] = []
    rows: list[tuple[float, ...]] = []
    end = 0
    for segment in segments:
        if not end <= segment.start <= segment.stop <= length:
            raise ValueError(f"{segment} overlaps the one before it or leaves the {length} elements of the buffer")
        if segment.step < 1:
            raise ValueError(f"{segment}: the first update of an element is step 1")
        row = _coefficients(segment.lr, segment.beta1, segment.beta2, segment.eps, segment.weight_decay, segment.step)
        if bounds and segment.start == end and row == rows[-1]:
            bounds[-1][1] = segment.stop
        else:
            bounds.append([segment.start, segment.stop])
            rows.append(row)
        end = segment.stop
    table = np.array(bounds, dtype=np.int64).reshape(-1, 2)
    return table, np.array(rows, dtype=np.float64).reshape(-1, 8).astype(np.float32)


def adamw(
    workers: Workers,
    weight: NDArray[Any],
    remainder: NDArray[np.int16] | None,
    exp_avg: Floats,
    exp_avg_sq: Floats,
    grad: Grad,
    segments: Sequence[Segment],
    grad_scale: float = 1.0,
) -> None:
    """One AdamW update in place, of the elements in `segments` (ascending, disjoint); others are not touched.

    `weight` is float32 with `remainder` None, or uint16 bits of bf16 with its int16 `remainder` (see
    split_master: the update acts on the fp32 master, bit for bit). `grad` is float32 or uint16 bits of bf16,
    multiplied by float32(`grad_scale`) first, a factor of 1 being exact. All arrays have one length.

    The result has the bits of torch.optim.AdamW(fused=True) on fp32 CPU tensors. One exception is torch's
    own: it handles the last `numel % 16` (AVX2: `% 8`) elements of a tensor by scalar code, whose second
    moment is rounded differently. Here every element follows the vectorised order, wherever it lies.

    Raises ValueError for lengths and segments, TypeError for dtypes.
    """
    check_lengths(weight=weight, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, grad=grad)
    check_dtype(np.float32, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_gradient(grad)
    bounds, rows = segment_table(segments, weight.size)
    rest = (exp_avg, exp_avg_sq, grad, np.float32(grad_scale), bounds, rows)
    if remainder is not None and weight.dtype == np.uint16 and remainder.dtype == np.int16:
        check_lengths(weight=weight, remainder=remainder)
        workers.run(_adamw_split, weight.size, weight, remainder, *rest)
    elif remainder is None and weight.dtype == np.float32:
        workers.run(_adamw_plain, weight.size, weight, *rest)
    else:
        held = None if remainder is None else remainder.dtype
        needed = "uint16 with int16, or float32 with None, is needed"
        raise TypeError(f"weight is {weight.dtype} with remainder {held}; {needed}")
