"""Compiling every kernel before it is needed."""

from collections.abc import Callable
from typing import Any

import numpy as np

from megatrain.optim.adamw_kernels import Segment, adamw
from megatrain.optim.gradient_kernels import accumulate, copy_with_square_sum, in_order, round_to_bf16, square_sum
from megatrain.optim.int8_moments import Int8Moments, adamw_int8
from megatrain.optim.split_master import merge, split
from megatrain.optim.workers import Workers


def compile_kernels(moments: str = "fp32") -> None:
    """Compiles every kernel for every dtype it takes, so that no training step waits for it: those of AdamW for
    `moments`, fp32 or int8.

    Takes about 10 s, or half a second where an earlier process left its machine code in numba's cache. Where
    nothing can be written to that cache, each process spends the 10 s.
    """
    floats, bits, low = np.zeros(64, np.float32), np.zeros(64, np.uint16), np.zeros(64, np.int16)
    other_floats, other_bits, fp32_moments = floats.copy(), bits.copy(), (floats.copy(), floats.copy())
    segments = [Segment(0, 64, lr=0.0, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=1)]
    with Workers(1) as workers:
        _first_call(in_order, np.zeros(1))
        _first_call(round_to_bf16, workers, floats, bits)
        _first_call(split, workers, floats, bits, low)
        _first_call(merge, workers, bits, low, floats)
        for grad, copy in ((floats, other_floats), (bits, other_bits)):
            for weight, remainder in ((other_bits, low), (other_floats, None)):
                if moments == "int8":
                    _first_call(adamw_int8, workers, weight, remainder, Int8Moments.zeros(64), grad, segments)
                else:
                    _first_call(adamw, workers, weight, remainder, *fp32_moments, grad, segments)
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
