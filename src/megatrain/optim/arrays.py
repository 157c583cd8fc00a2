"""Arrays that the kernels take: 1-D and contiguous, bf16 values as their bits (`tensor.view(torch.uint16).numpy()`)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bf16Bits = NDArray[np.uint16]
Grad = NDArray[Any]  # float32 values, or uint16 bits of bf16 values


def check_lengths(**arrays: NDArray[Any]) -> None:
    """Raises ValueError unless all are 1-D, contiguous and as long as the first."""
    length = next(iter(arrays.values())).size
    for name, array in arrays.items():
        if array.shape != (length,) or not array.flags.c_contiguous:
            raise ValueError(f"{name} has shape {array.shape}; 1-D, contiguous and of length {length} is needed")


def check_dtype(dtype: Any, **arrays: NDArray[Any]) -> None:
    """Raises TypeError unless all have this dtype."""
    for name, array in arrays.items():
        if array.dtype != dtype:
            raise TypeError(f"{name} is {array.dtype}, not {np.dtype(dtype)}")


def check_gradient(array: NDArray[Any]) -> None:
    """Raises TypeError unless these are float32 values or the bits of bf16 values."""
    if array.dtype not in (np.float32, np.uint16):
        raise TypeError(f"gradients are {array.dtype}, not float32 or the uint16 bits of bfloat16")
