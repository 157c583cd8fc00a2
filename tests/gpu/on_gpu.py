"""The device under test, and one that is late on purpose."""

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatrain.device.base import WAITS, After
from megatrain.device.cuda import CudaDevice, CudaEvent, CudaStream
from megatrain.device.lagged import LaggedDevice

DRY = os.environ.get("MEGATRAIN_TEST_DEVICE") == "lagged"
AVAILABLE = DRY or torch.cuda.is_available()
WHERE = torch.device("cpu") if DRY else torch.device("cuda", 0)
needs_cuda = pytest.mark.skipif(DRY, reason="needs CUDA itself")
MIB = 1024**2

_CYCLES = 4_000_000  # about two milliseconds of a GPU


def make_device(memory_bytes: int | None = None, precision: str = "fp32") -> Any:
    if DRY:
        return LaggedDevice(precision, memory_bytes, longest_delay_seconds=0.0005)
    return CudaDevice(0, memory_bytes)


def slow_device(slow: str, without: Collection[str] = (), cycles: int = _CYCLES) -> Any:
    """`slow`: 'up', 'down' or 'compute', late by so many `cycles` each time; `without`: names of waits to leave out.
    What was in a freed slot is NaN."""
    if DRY:
        return LaggedDevice("fp32", slow=slow, without=without)
    return SlowDevice(slow, without, cycles)


class SlowStream(CudaStream):
    def __init__(self, track: str, device: "SlowDevice") -> None:
        super().__init__(track, device.torch_device, device._locked)
        self._owner = device

    def copy(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: After, *, computed: bool = False, label: str = ""
    ) -> CudaEvent:
        if self._owner.slow == self._track:
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(self._owner.cycles)
        kept = [(name, event) for name, event in after if name not in self._owner.without]
        return super().copy(pairs, kept, computed=computed and "computed" not in self._owner.without, label=label)


class SlowDevice(CudaDevice):
    def __init__(self, slow: str, without: Collection[str], cycles: int) -> None:
        super().__init__()
        assert not set(without) - set(WAITS)
        self.slow, self.without, self.cycles = slow, frozenset(without), cycles
        self.up, self.down = SlowStream("up", self), SlowStream("down", self)

    def computing(self) -> Any:
        if self.slow == "compute":
            torch.cuda._sleep(self.cycles)
        return super().computing()

    def release(self, buffer: Tensor) -> CudaEvent:
        with torch.no_grad():
            buffer.fill_(0xFF)  # NaN in bf16 and in fp32
        return super().release(buffer)

    def wait(self, name: str, event: Any) -> None:
        if name not in self.without:
            super().wait(name, event)

    def host_wait(self, name: str, wait: Callable[[], None]) -> None:
        if name not in self.without:
            super().host_wait(name, wait)

    def let_go(self, tensor: Tensor, copied: Any) -> None:
        if "inputs_saved" not in self.without:
            super().let_go(tensor, copied)
