"""What units keep from forward to backward: their inputs, on the device or, where its memory is short, on the host.

They are the one thing on the device that grows with the model's depth. A unit's inputs leave right after its forward
and come back one visit ahead of its backward.
"""

from collections import defaultdict, deque
from dataclasses import dataclass

from torch import Tensor

from megatrain.device.base import Event, StreamingDevice
from megatrain.errors import CapacityError, UnsupportedModelError
from megatrain.memory.limits import host_memory_limits
from megatrain.sizes import format_bytes


@dataclass(slots=True)
class SavedInput:
    """One tensor: on the device (`tensor`), on the host, or on its way."""

    tensor: Tensor | None
    host: Tensor | None = None
    saved: Event | None = None
    restored: Event | None = None
    over: bool = False  # taken or dropped


class SavedInputs:
    """`offloading`: whether inputs go to the host. `bytes_by_unit` is what a pass has kept, wherever it is, and
    `most_bytes` the most of it at a time."""

    def __init__(self, device: StreamingDevice) -> None:
        self._device = device
        self.offloading = False
        self.staying: frozenset[int] = frozenset()  # units whose backward comes too soon for their inputs to leave
        self.bytes_by_unit: dict[int, int] = defaultdict(int)
        self.most_bytes = 0
        self._kept_bytes = 0
        self._away: dict[int, list[SavedInput]] = defaultdict(list)
        self._leaving: list[tuple[SavedInput, Tensor, int]] = []  # with its version counter
        self._dropped: deque[tuple[int, SavedInput]] = deque()  # of calls that will have no backward
        self._held_bytes = 0
        self.host_bytes = 0  # the most that inputs took on the host at a time, in this pass
        self._host_bytes = 0  # that they take now
        self._pooled_bytes = 0  # that the device keeps for them from earlier passes
        self._room_bytes = 0  # for more than that

    def begin(self) -> None:
        """A pass begins: nothing is kept, not even for calls whose backward never came."""
        self._hold(-self._held_bytes)
        self.bytes_by_unit.clear()
        self.most_bytes = self._kept_bytes = 0
        self._away.clear()
        self._leaving.clear()
        self._dropped.clear()
        # a pass without any gives the pool back
        self._pooled_bytes = max(self._pooled_bytes, self.host_bytes) if self.host_bytes else 0
        self.host_bytes = self._host_bytes = 0

    def offload(self, offloading: bool) -> None:
        """Whether inputs go to the host from here on."""
        self.offloading = offloading
        if offloading:
            pooled = self._pooled_bytes if self._device.pools_host_memory else 0
            self._room_bytes = host_memory_limits().free_bytes + pooled

    def keep(self, unit: int, tensor: Tensor) -> SavedInput:
        """An input of a call of `unit`, until `take`."""
        self.let_go()
        self._hold(tensor.nbytes)
        self.bytes_by_unit[unit] += tensor.nbytes
        self._kept_bytes += tensor.nbytes
        self.most_bytes = max(self.most_bytes, self._kept_bytes)
        kept = SavedInput(tensor.detach())
        if self.offloading and unit not in self.staying:
            self._take_host_memory(tensor.nbytes)
            host = self._device.host_memory(tensor)
            kept.host, kept.tensor = host, None
            kept.saved = self._device.down.copy([(host, tensor.detach())], (), computed=True, label="inputs")
            self._away[unit].append(kept)
            self._leaving.append((kept, tensor.detach(), tensor._version))
        return kept

    def let_go(self) -> None:
        """Device memory of inputs that have left is free. Raises UnsupportedModelError if one was written into."""
        for kept, tensor, version in self._leaving:
            assert kept.saved is not None
            self._device.let_go(tensor, kept.saved)
            self._hold(-tensor.nbytes)
            if tensor._version != version:
                raise UnsupportedModelError(
                    f"the input of shape {tuple(tensor.shape)} of a unit was changed in place after the unit had run,"
                    " while it was on its way to the host"
                )
        self._leaving.clear()
        while self._dropped:
            self._forget(*self._dropped.popleft())

    def drop(self, unit: int, kept: list[SavedInput]) -> None:
        """Calls of `unit` will have no backward. Said by the garbage collector, on any thread: their memory is given
        up where the next inputs come or go."""
        self._dropped.extend((unit, one) for one in kept)

    def _forget(self, unit: int, kept: SavedInput) -> None:
        if kept.over:
            return
        if kept.restored is not None:  # nothing else may get the memory that a copy still writes to
            self._device.wait("inputs_restored", kept.restored)
        self._away[unit] = [one for one in self._away[unit] if one is not kept]
        self._count_out(kept)

    def _count_out(self, kept: SavedInput) -> None:
        kept.over = True
        there = kept.tensor if kept.tensor is not None else kept.host
        assert there is not None
        if kept.host is not None:
            self._host_bytes -= self._device.host_memory_bytes(kept.host.nbytes)
        if kept.tensor is not None:
            self._hold(-kept.tensor.nbytes)
        self._kept_bytes -= there.nbytes

    def restore(self, unit: int) -> None:
        """Bring the inputs of all calls of `unit` back to the device; returns at once."""
        self.let_go()
        for kept in self._away.pop(unit, []):
            self._bring_back(kept)

    def take(self, unit: int, kept: SavedInput) -> Tensor:
        """The tensor, on the device, for the backward of its call. It is kept no longer."""
        if kept.tensor is None:
            self.restore(unit)  # nobody has foreseen it
        assert kept.tensor is not None
        if kept.restored is not None:
            with self._device.waits.during("inputs_restored"):
                self._device.wait("inputs_restored", kept.restored)
        self._count_out(kept)
        return kept.tensor

    def _take_host_memory(self, n_bytes: int) -> None:
        """Count it. Raises CapacityError where the host has not so much."""
        needed = self._host_bytes + self._device.host_memory_bytes(n_bytes)
        if needed > self._room_bytes:
            raise CapacityError(
                f"host memory: inputs of units that wait there for backward need {format_bytes(needed)} (page-locked),"
                f" and {format_bytes(self._room_bytes)} can be had: {format_bytes(needed - self._room_bytes)} missing;"
                " give steps smaller or fewer micro-batches, or raise engine.device_memory so that more inputs stay"
            )
        self._host_bytes = needed
        self.host_bytes = max(self.host_bytes, needed)

    def _bring_back(self, kept: SavedInput) -> None:
        assert kept.host is not None and kept.saved is not None
        self._hold(kept.host.nbytes)
        kept.tensor = self._device.memory_for(kept.host)
        pairs, after = [(kept.tensor, kept.host)], [("inputs_saved", kept.saved)]
        kept.restored = self._device.up.copy(pairs, after, computed=True, label="inputs")

    def _hold(self, n_bytes: int) -> None:
        self._device.hold(n_bytes)
        self._held_bytes += n_bytes
