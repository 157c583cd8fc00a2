"""Passes over gradients: sums of squares, alone and on the way of a copy, an accumulation or a rounding to bf16.

Each is one pass over memory, spread over `Workers`. Sums are taken over fixed blocks and added up in order, so no
result depends on the number of threads. Products of two float32 values are exact in float64, so only the order of
additions decides the last bits: it is free inside a block, for the vectoriser to choose (the same on one CPU and
build), and fixed between blocks.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.optim.arrays import Bf16Bits, Floats, Grad, check_dtype, check_gradient, check_lengths
from megatrain.optim.scalars import round_to_even, widen
from megatrain.optim.workers import Workers, kernel

# Elements per partial sum: few enough to share evenly among threads, enough that adding the partials is free.
BLOCK = 16384


@kernel(fastmath={"reassoc"})
def _square_sums(start: int, stop: int, source: Any, partials: Any) -> None:
    for begin in range(start, stop, BLOCK):
        block = source[begin : min(begin + BLOCK, stop)]
        total = 0.0
        for i in range(block.size):
            value = np.float64(widen(block[i]))
            total += value * value
        partials[begin // BLOCK] = total


@kernel(fastmath={"reassoc"})
def _accumulate(start: int, stop: int, source: Any, target: Any, partials: Any) -> None:
    for begin in range(start, stop, BLOCK):
        end = min(begin + BLOCK, stop)
        block, sums = source[begin:end], target[begin:end]
        total = 0.0
        for i in range(block.size):
            value = np.float32(sums[i] + widen(block[i]))
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
            bits = round_to_even(block[i])
            rounded[i] = bits
            value = np.float64(widen(bits))
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
            value = np.float64(widen(block[i]))
            total += value * value
        partials[begin // BLOCK] = total


@kernel
def in_order(partials: Any) -> float:
    """The sum of float64 values, added from the first to the last."""
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
    return float(in_order(partials))


def square_sum(workers: Workers, grad: Grad) -> float:
    """The float64 sum of squares of float32 values or bf16 bits; inf and NaN propagate.

    The same bits for every number of threads (see the top of this file on other CPUs).
    """
    check_lengths(grad=grad)
    check_gradient(grad)
    return _run_sum(workers, _square_sums, grad)


def accumulate(workers: Workers, total: Floats, grad: Grad) -> float:
    """Adds `grad` (float32 or bf16 bits) to `total`; returns `square_sum` of the new total, in one pass."""
    check_lengths(total=total, grad=grad)
    check_dtype(np.float32, total=total)
    check_gradient(grad)
    return _run_sum(workers, _accumulate, grad, total)


def round_to_bf16(workers: Workers, source: Floats, target: Bf16Bits) -> float:
    """Writes the bf16 bits of `source`, rounded as torch's cast rounds (a NaN stays some NaN).

    Returns `square_sum` of what it wrote.
    """
    check_lengths(source=source, target=target)
    check_dtype(np.float32, source=source)
    check_dtype(np.uint16, target=target)
    return _run_sum(workers, _round_and_sum, source, target)


def copy_with_square_sum(workers: Workers, source: Grad, target: Grad) -> float:
    """Copies float32 values or bf16 bits to a `target` of the same dtype; returns `square_sum` of them."""
    check_lengths(source=source, target=target)
    check_gradient(source)
    check_dtype(source.dtype, target=target)
    return _run_sum(workers, _copy_and_sum, source, target)
