"""Device memory for weights, what lies in it, and how a unit's host memory maps to it."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from megatrain.device.base import Event
from megatrain.memory.layout import OPERAND_BYTES
from megatrain.memory.store import HostStore
from megatrain.model.partition import ParameterSlot


@dataclass(frozen=True, slots=True)
class UnitImage:
    """A unit's weights as they lie in a device slot: pieces of host memory one after the other, and the parameters in
    them (slot index, byte offset, dtype, shape). What is homed in the unit is one piece."""

    unit: int
    pieces: tuple[tuple[int, Tensor], ...]  # (byte offset in the slot, host bytes)
    parameters: tuple[tuple[int, int, torch.dtype, torch.Size], ...]
    n_bytes: int

    @classmethod
    def of(cls, unit: int, slots: list[ParameterSlot], store: HostStore) -> "UnitImage":
        sources: dict[int, Tensor] = {}  # by address of their memory: whole homes first, then single parameters
        if unit in store.units:
            whole = store.unit_memory(unit)
            sources[whole.data_ptr()] = whole
        for slot in slots:
            weight = slot.parameter.detach()
            if weight.numel() and (slot.index not in store.slots or store.slots[slot.index].unit != unit):
                sources[weight.data_ptr()] = weight.reshape(-1).view(torch.uint8)
        ends = image_ends(s.nbytes for s in sources.values())
        pieces = tuple(zip([0, *ends[:-1]], sources.values(), strict=True))
        parameters = []
        for slot in slots:
            weight = slot.parameter.detach()
            parameters.append((slot.index, _offset(weight, pieces), weight.dtype, weight.shape))
        return cls(unit, pieces, tuple(parameters), ends[-1] if ends else 0)

    def pairs(self, buffer: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(buffer[offset : offset + host.nbytes], host) for offset, host in self.pieces]

    def views(self, buffer: Tensor) -> dict[int, Tensor]:
        """Parameters in `buffer`, each with a version counter of its own: autograd must not take the next fetch into
        the same memory for a change of these."""
        storage = buffer.untyped_storage()
        views = {}
        for index, offset, dtype, shape in self.parameters:
            view = torch.empty(0, dtype=dtype, device=buffer.device)
            start = (buffer.storage_offset() + offset) // dtype.itemsize
            views[index] = view.set_(storage, start, shape, _dense_strides(shape))
        return views


def _offset(weight: Tensor, pieces: tuple[tuple[int, Tensor], ...]) -> int:
    """Where a parameter lies in the slot; one without elements lies anywhere."""
    if not weight.numel():
        return 0
    address = weight.data_ptr()
    start, piece = next((o, p) for o, p in pieces if 0 <= address - p.data_ptr() <= p.nbytes - weight.nbytes)
    return start + address - piece.data_ptr()


def image_ends(piece_bytes: Iterable[int]) -> list[int]:
    """Where each piece of a unit's weights ends in a slot; the last one is what the unit takes."""
    return list(accumulate(-(-n // OPERAND_BYTES) * OPERAND_BYTES for n in piece_bytes))


def _dense_strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(prod(shape[n + 1 :]) for n in range(len(shape)))


@dataclass(slots=True)
class Fetch:
    """A fetch under way: `issued` once the copy is in the stream, `arrived` tells when it is done."""

    issued: threading.Event = field(default_factory=threading.Event)
    arrived: Event | None = None
    error: BaseException | None = None
    waited: bool = False  # computation waits for it already
    checked: Sequence[tuple[int, int]] = ()  # parts of the slot (begin, end) whose checksum is compared there

    def wait_until_issued(self) -> None:
        self.issued.wait()

    def wait_until_over(self) -> None:
        """It reads the host's memory no more, whatever came of it."""
        self.issued.wait()
        if self.arrived is not None:
            self.arrived.wait()


@dataclass(slots=True)
class DeviceSlot:
    """A piece of device memory and what lies in it. `expected`: its last bytes, where the checksum of what has come is
    looked at there (int64, 2)."""

    buffer: Tensor
    expected: Tensor | None = None
    unit: int = -1
    fetch: Fetch | None = None
    free: Event | None = None  # what was in it before has been read
    views: dict[int, Tensor] = field(default_factory=dict)
    last_visit: int = -1
