"""The host as its own compute device: weights are bound where they lie, nothing is copied."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from megatrain.device.cpu_bf16 import Bf16ThroughFp32
from megatrain.device.trace import Mark, Trace


class CpuDevice:
    name = "cpu"
    torch_device = torch.device("cpu")
    h2d_bytes = 0
    d2h_bytes = 0

    def __init__(self, precision: str = "auto") -> None:
        self.trace: Trace | None = None
        # a product that is not bf16 needs no help
        self._native = precision == "fp32" or self.native_bf16()

    def mark(self) -> Mark:
        return time.perf_counter()

    def seconds(self, mark: Mark) -> float:
        return float(mark)

    def computing(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._native else Bf16ThroughFp32()

    def same_order(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def native_bf16(self) -> bool:
        # without AVX512-BF16 or AMX, bf16 matrix products are emulated and several times slower than fp32
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

    def peak_bytes(self) -> int:
        return 0
