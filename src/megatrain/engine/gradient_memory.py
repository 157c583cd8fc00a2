"""Where gradients lie. What a streaming device copies them to on the host is page-locked as long as it is held; those
of units whose state lies in the device's memory have a place there for good."""

from collections import deque

import torch
from torch import Tensor

from megatrain.device.base import ComputeDevice, streams
from megatrain.memory.arena import allocate_elements
from megatrain.memory.plan import ARRIVING_UNITS
from megatrain.memory.store import TORCH_DTYPE, HostStore, Slab


class GradientMemory:
    """`lends`: gradients go to the optimizer unit by unit and have no place of their own for good."""

    def __init__(self, store: HostStore, device: ComputeDevice, *, lends: bool) -> None:
        self._store = store
        self._device = device if streams(device) else None
        self._arriving: deque[Tensor] = deque()
        if lends and self._device is not None:
            self._allocate_arriving()

    def keep(self, unit: int) -> None:
        """Places for the unit's gradients until the step ends, and for the next ones."""
        for slab in self._store.units[unit].slabs:
            if slab.gradient is None and slab.accumulated is None:
                slab.gradient = self._allocate(slab.layout.state_count, TORCH_DTYPE[slab.layout.dtype])

    def keep_sum(self, slab: Slab) -> Tensor:
        """The slab's gradient as an fp32 sum, which takes its place. On a device there is only room for it: what the
        sum begins with has to be copied in the order of computation."""
        if slab.accumulated is None and slab.layout.dtype == "fp32":
            assert slab.gradient is not None
            return slab.gradient
        if slab.accumulated is None:
            assert slab.gradient is not None
            slab.accumulated = self._allocate_sum(slab)
            if not slab.on_device:
                slab.accumulated.copy_(slab.gradient)
                self._drop(slab.gradient)
                slab.gradient = None
        return slab.accumulated

    def drop_sums(self) -> None:
        """Nothing adds up over several backward calls any more."""
        for unit in self._store.units.values():
            for slab in unit.slabs:
                if slab.on_device and slab.accumulated is not None and self._device is not None:
                    self._device.hold(-slab.accumulated.nbytes)
                elif not slab.on_device:
                    self._drop(slab.accumulated)
                slab.accumulated = None

    def drop_kept(self) -> None:
        """No gradient is kept: a caller's own loop, which does keep them, is over."""
        for index, unit in self._store.units.items():
            for slab in unit.slabs if index not in self._store.on_device else ():
                self._drop(slab.gradient)
                slab.gradient = None

    def lend(self, unit: int) -> list[Tensor]:
        """A buffer for each of the unit's slabs, for as long as its gradient needs one: a later call but one gets the
        same memory where it comes from a device, which copies to it."""
        slabs = self._store.units[unit].slabs
        if self._device is None:
            return [allocate_elements(s.layout.state_count, TORCH_DTYPE[s.layout.dtype]) for s in slabs]
        if not self._arriving:
            self._allocate_arriving()
        buffer, buffers, start = self._arriving[0], [], 0
        self._arriving.rotate(-1)
        for slab in slabs:  # sizes are whole multiples of the alignment
            end = start + slab.layout.gradient_bytes
            buffers.append(buffer[start:end].view(TORCH_DTYPE[slab.layout.dtype]))
            start = end
        return buffers

    def _allocate_arriving(self) -> None:
        units = [unit for index, unit in self._store.units.items() if index not in self._store.on_device]
        largest_bytes = max((sum(s.layout.gradient_bytes for s in unit.slabs) for unit in units), default=0)
        for _ in range(ARRIVING_UNITS):
            self._arriving.append(self._allocate(largest_bytes, torch.uint8))

    def _allocate_sum(self, slab: Slab) -> Tensor:
        if not slab.on_device:
            return self._allocate(slab.layout.state_count, torch.float32)
        assert self._device is not None
        self._device.hold(slab.layout.state_count * 4)
        return torch.empty(slab.layout.state_count, dtype=torch.float32, device=self._device.torch_device)

    def _allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        memory = allocate_elements(count, dtype)
        if self._device is not None:
            self._device.pin(memory)
        return memory

    def _drop(self, memory: Tensor | None) -> None:
        if self._device is not None and memory is not None:
            self._device.unpin(memory)
