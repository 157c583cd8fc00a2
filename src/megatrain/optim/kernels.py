"""Host kernels over flat unit buffers: AdamW, sums of squares, gradient accumulation, rounding to bf16.

All arrays are 1-D and contiguous, bf16 values are their bits as uint16 (`tensor.view(torch.uint16).numpy()`),
and each function is one pass over memory, spread over `Workers`. No result depends on the number of threads:
elementwise work is the same for every element wherever a slice begins, and sums are taken over fixed blocks,
added up in order.

numba compiles with IEEE semantics here (`fastmath` off but for the reassociation of sums), and fused
multiply-adds are written out, so elementwise results are the same bits on every CPU.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from megatrain.optim.split_master import master_of, merge, remainder_of, split, weight_of
from megatrain.optim.workers import Workers, kernel

# Elements per partial sum: few enough to share evenly among threads, enough that adding the partials is free.
BLOCK = 16384

Floats = NDArray[np.float32]
Bf16Bits = NDArray[np.uint16]
Grad = NDArray[Any]  # float32 values, or uint16 bits of bf16 values


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


# --- scalar helpers, inlined into the kernels ---


@intrinsic
def _fma(_typing: Any, x: Any, y: Any, z: Any) -> Any:
    """float32 x * y + z with one rounding."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        single = args[0].type
        declared = ir.FunctionType(single, [single] * 3)
        return builder.call(builder.module.declare_intrinsic("llvm.fma", [single], declared), args)

    return types.float32(types.float32, types.float32, types.float32), generate


@njit(nogil=True)
def _from_bits(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@njit(nogil=True)
def _bits(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


def _widen(value: Any) -> Any:
    """The float32 value of a float32, or of the uint16 bits of a bf16."""
    raise NotImplementedError("inside kernels only")


@overload(_widen)
def _choose_widen(value: Any) -> Any:
    def same(value: Any) -> Any:
        return value

    def shifted(value: Any) -> Any:
        return _from_bits(np.uint32(value) << np.uint32(16))

    return {types.float32: same, types.uint16: shifted}.get(value)


@njit(nogil=True)
def _round(value: Any) -> Any:
    """The bf16 bits (uint16) nearest to a float32, ties to even; every NaN becomes 0x7fc0."""
    bits = _bits(value)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    return np.uint16(0x7FC0) if value != value else rounded


# --- AdamW ---


@njit(nogil=True)
def _first_segment(bounds: Any, start: int) -> int:
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
def _update(p: Any, m: Any, v: Any, g: Any, c: Any) -> Any:
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
def _unpack(c: Any) -> Any:
    return c[0], c[1], c[2] != np.float32(0), c[3], c[4], c[5], c[6], c[7]


@njit(nogil=True)
def _update_split(weight: Any, remainder: Any, exp_avg: Any, exp_avg_sq: Any, grad: Any, scale: Any, row: Any) -> None:
    c = _unpack(row)
    for i in range(weight.size):
        p = _from_bits(master_of(weight[i], remainder[i]))
        p, m, v = _update(p, exp_avg[i], exp_avg_sq[i], _widen(grad[i]) * scale, c)
        bits = _bits(p)
        weight[i] = weight_of(bits)
        remainder[i] = remainder_of(bits)
        exp_avg[i] = m
        exp_avg_sq[i] = v


@njit(nogil=True)
def _update_plain(weight: Any, exp_avg: Any, exp_avg_sq: Any, grad: Any, scale: Any, row: Any) -> None:
    c = _unpack(row)
    for i in range(weight.size):
        p, m, v = _update(weight[i], exp_avg[i], exp_avg_sq[i], _widen(grad[i]) * scale, c)
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
    index = _first_segment(bounds, start)
    while index < bounds.shape[0] and bounds[index, 0] < stop:
        a, b = max(start, bounds[index, 0]), min(stop, bounds[index, 1])
        _update_split(weight[a:b], remainder[a:b], exp_avg[a:b], exp_avg_sq[a:b], grad[a:b], scale, rows[index])
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
    index = _first_segment(bounds, start)
    while index < bounds.shape[0] and bounds[index, 0] < stop:
        a, b = max(start, bounds[index, 0]), min(stop, bounds[index, 1])
        _update_plain(weight[a:b], exp_avg[a:b], exp_avg_sq[a:b], grad[a:b], scale, rows[index])
        index += 1


@lru_cache(maxsize=1024)
def _coefficients(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> tuple[float, ...]:
    """What `_update` computes with, in double precision as torch derives it; the caller rounds to float32."""
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


def _segment_table(segments: Sequence[Segment], length: int) -> tuple[NDArray[np.int64], Floats]:
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
    arrays: dict[str, NDArray[Any]] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad": grad}
    if remainder is not None:
        arrays["remainder"] = remainder
    _check_lengths(weight, arrays)
    bounds, rows = _segment_table(segments, weight.size)
    scale = np.float32(grad_scale)
    if exp_avg.dtype != np.float32 or exp_avg_sq.dtype != np.float32:
        raise TypeError(f"moments are {exp_avg.dtype} and {exp_avg_sq.dtype}, not float32")
    if remainder is not None and weight.dtype == np.uint16 and remainder.dtype == np.int16:
        state = (weight, remainder, exp_avg, exp_avg_sq, _gradient(grad))
        workers.run(_adamw_split, weight.size, *state, scale, bounds, rows)
    elif remainder is None and weight.dtype == np.float32:
        workers.run(_adamw_plain, weight.size, weight, exp_avg, exp_avg_sq, _gradient(grad), scale, bounds, rows)
    else:
        held = None if remainder is None else remainder.dtype
        needed = "uint16 with int16, or float32 with None, is needed"
        raise TypeError(f"weight is {weight.dtype} with remainder {held}; {needed}")


# --- sums of squares, alone and on the way of a copy ---
#
# Products of two float32 values are exact in float64, so only the order of additions decides the last bits.
# It is free inside a block, for the vectoriser to choose (the same on one CPU and build), and fixed between
# blocks.


@kernel(fastmath={"reassoc"})
def _square_sums(start: int, stop: int, source: Any, partials: Any) -> None:
    for begin in range(start, stop, BLOCK):
        block = source[begin : min(begin + BLOCK, stop)]
        total = 0.0
        for i in range(block.size):
            value = np.float64(_widen(block[i]))
            total += value * value
        partials[begin // BLOCK] = total


@kernel(fastmath={"reassoc"})
def _accumulate(start: int, stop: int, source: Any, target: Any, partials: Any) -> None:
    for begin in range(start, stop, BLOCK):
        end = min(begin + BLOCK, stop)
        block, sums = source[begin:end], target[begin:end]
        total = 0.0
        for i in range(block.size):
            value = np.float32(sums[i] + _widen(block[i]))
            sums[i] = value
            total += np.float64(value) * np.float64(value)
        partials[begin // BLOCK] = total


@kernel(fastmath={"reassoc"})
def _round_and_sum(start: int, stop: int, source: Any, target: Any, partials: Any) -> None:
    for begin in range(start, stop, BLOCK):
        end = min(begin + BLOCK, stop)
        block, rounded = source[begin:end], target[begin:end]
        total = 0.0
        for i in range(block.size):
            bits = _round(block[i])
            rounded[i] = bits
            value = np.float64(_widen(bits))
            total += value * value
        partials[begin // BLOCK] = total


@kernel(fastmath={"reassoc"})
def _copy_and_sum(start: int, stop: int, source: Any, target: Any, partials: Any) -> None:
    for begin in range(start, stop, BLOCK):
        end = min(begin + BLOCK, stop)
        block, copy = source[begin:end], target[begin:end]
        total = 0.0
        for i in range(block.size):
            copy[i] = block[i]
            value = np.float64(_widen(block[i]))
            total += value * value
        partials[begin // BLOCK] = total


@kernel
def _in_order(partials: Any) -> float:
    # not Python's sum(): it compensates rounding errors from version 3.12 on, and would give other bits
    total = 0.0
    for i in range(partials.size):
        total += partials[i]
    return total


def _run_sum(workers: Workers, fn: Any, *arrays: NDArray[Any]) -> float:
    """Runs a kernel that fills one partial sum per block; every slice begins at a whole block."""
    length = arrays[0].size
    partials = np.zeros(-(-length // BLOCK), dtype=np.float64)
    workers.run(fn, length, *arrays, partials, align=BLOCK)
    return float(_in_order(partials))


def square_sum(workers: Workers, grad: Grad) -> float:
    """The float64 sum of squares of float32 values or bf16 bits; inf and NaN propagate.

    The same bits for every number of threads (see the note above on other CPUs).
    """
    _check_lengths(grad, {})
    return _run_sum(workers, _square_sums, _gradient(grad))


def accumulate(workers: Workers, total: Floats, grad: Grad) -> float:
    """Adds `grad` (float32 or bf16 bits) to `total`; returns `square_sum` of the new total, in one pass."""
    _check_lengths(total, {"grad": grad})
    _check_dtypes(total, np.float32, total, np.float32)
    return _run_sum(workers, _accumulate, _gradient(grad), total)


def round_to_bf16(workers: Workers, source: Floats, target: Bf16Bits) -> float:
    """Writes the bf16 bits of `source`, rounded as torch's cast rounds (a NaN stays some NaN).

    Returns `square_sum` of what it wrote.
    """
    _check_lengths(source, {"target": target})
    _check_dtypes(source, np.float32, target, np.uint16)
    return _run_sum(workers, _round_and_sum, source, target)


def copy_with_square_sum(workers: Workers, source: Grad, target: Grad) -> float:
    """Copies float32 values or bf16 bits to a `target` of the same dtype; returns `square_sum` of them."""
    _check_lengths(source, {"target": target})
    _check_dtypes(source, source.dtype, target, source.dtype)
    return _run_sum(workers, _copy_and_sum, _gradient(source), target)


# --- checks and compilation ---


def _check_lengths(first: NDArray[Any], others: dict[str, NDArray[Any]]) -> None:
    for name, array in {"the first array": first, **others}.items():
        if array.shape != (first.size,) or not array.flags.c_contiguous:
            raise ValueError(f"{name} has shape {array.shape}; 1-D, contiguous and {first.size} elements are needed")


def _check_dtypes(source: NDArray[Any], needed: Any, target: NDArray[Any], wanted: Any) -> None:
    if source.dtype != needed or target.dtype != wanted:
        raise TypeError(f"dtypes are {source.dtype} and {target.dtype}, not {np.dtype(needed)} and {np.dtype(wanted)}")


def _gradient(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype not in (np.float32, np.uint16):
        raise TypeError(f"gradients are {array.dtype}, not float32 or the uint16 bits of bfloat16")
    return array


def compile_kernels() -> None:
    """Compiles every kernel for every dtype it takes, so that no training step waits for it.

    Takes about 10 s, or half a second where an earlier process left its machine code in numba's cache. Where
    nothing can be written to that cache, each process spends the 10 s.
    """
    floats, bits, low = np.zeros(64, np.float32), np.zeros(64, np.uint16), np.zeros(64, np.int16)
    other_floats, other_bits, moments = floats.copy(), bits.copy(), (floats.copy(), floats.copy())
    segments = [Segment(0, 64, lr=0.0, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=1)]
    with Workers(1) as workers:
        _first_call(_in_order, np.zeros(1))
        _first_call(round_to_bf16, workers, floats, bits)
        _first_call(split, workers, floats, bits, low)
        _first_call(merge, workers, bits, low, floats)
        for grad, copy in ((floats, other_floats), (bits, other_bits)):
            _first_call(adamw, workers, other_bits, low, *moments, grad, segments)
            _first_call(adamw, workers, other_floats, None, *moments, grad, segments)
            _first_call(square_sum, workers, grad)
            _first_call(accumulate, workers, other_floats, grad)
            _first_call(copy_with_square_sum, workers, grad, copy)


def _first_call(function: Callable[..., Any], *args: Any) -> None:
    """Calls a function that compiles one kernel."""
    try:
        function(*args)
    except OSError:
        # numba compiled, kept the code and failed to save it (a full disk, say): it is in memory now
        function(*args)
