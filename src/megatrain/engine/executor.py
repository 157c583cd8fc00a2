"""Walks units through their runs: the only file that waits. It is the `UnitHost` that units call."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from megatrain.device.base import ComputeDevice
from megatrain.engine.gradients import GradientBook
from megatrain.engine.kept_graphs import KeptGraphs
from megatrain.engine.updates import PendingUpdates
from megatrain.memory.arena import trim_freed_memory
from megatrain.memory.store import HostStore
from megatrain.model.block import LOOK_STEPS, DirectLeaves
from megatrain.model.micro_batches import HandOver
from megatrain.model.partition import Partition, Unit
from megatrain.model.side_effects import WrittenAttributes

_LARGE_UNIT_BYTES = 64 * 1024**2
FORWARD, HEAD, BACKWARD = (
    0,
    1,
    2,
)  # phases of a micro-batch; none enters one before all have left the one before


class Executor:
    """Fetches weights when units are called and passes their gradients on.

    Units are ranked by the order of their first calls, so that micro-batches meet at the same unit.
    """

    def __init__(
        self,
        part: Partition,
        store: HostStore,
        device: ComputeDevice,
        updates: PendingUpdates,
        gradients: GradientBook,
        kept_graphs: KeptGraphs,
    ) -> None:
        self.generation = 0
        self.compute_device = device.torch_device
        self.hand_over = HandOver(device.torch_device)
        self.kept_units: set[int] = set()
        self.watched: list[WrittenAttributes] = []
        self._device = device
        self._updates = updates
        self._gradients = gradients
        self._kept_graphs = kept_graphs
        self._rank: dict[int, int] = {}
        self._local = threading.local()
        self._weights = {
            unit.index: {s.index: store.slots[s.index].slot.parameter.detach() for s in unit.slots}
            for unit in part.units
        }
        self._unit_bytes = {
            unit.index: sum(w.nbytes for w in self._weights[unit.index].values()) for unit in part.units
        }
        self._fetched = -1
        self.fetched_bytes = 0

    # -- what units call --------------------------------------------------------------------------------------

    def arrive(self, unit: Unit, *, backward: bool) -> None:
        if self.direct_leaves() is not None:
            return  # the head runs through without changing places
        if not backward and self.takes_turns():
            for attributes in self.watched:
                attributes.refuse_shared(first=self.hand_over.number == 0)
        rank = self._rank.setdefault(unit.index, len(self._rank))
        self.hand_over.boundary((BACKWARD, -rank) if backward else (FORWARD, rank))

    def takes_turns(self) -> bool:
        return self.generation < LOOK_STEPS and self.hand_over.takes_turns()

    def fetch(self, unit: Unit) -> dict[int, Tensor]:
        self._updates.wait_for(unit)
        if self._fetched != unit.index:  # the next micro-batch finds the weights still there
            self._fetched = unit.index
            if self._unit_bytes[unit.index] >= _LARGE_UNIT_BYTES:
                trim_freed_memory()  # small blocks lie free in the heap; its gradient needs large ones of its own
            self.fetched_bytes += self._unit_bytes[unit.index]
        return self._device.fetch(unit.index, self._weights[unit.index])

    def computing(self) -> AbstractContextManager[Any]:
        return self._device.computing()

    def opened(self, unit: Unit) -> None:
        self._gradients.opened(unit)

    def abandoned(self, unit: Unit) -> None:
        self._gradients.abandoned(unit)

    def receive(self, unit: Unit, gradients: dict[int, Tensor]) -> None:
        self._gradients.receive(unit, gradients)

    def keeps_graph(self, unit: Unit) -> bool:
        return unit.index in self.kept_units

    def graph_meter(self, unit: Unit, given: list[Tensor]) -> Callable[[Tensor], Any]:
        return self._kept_graphs.meter(unit, given) if self._kept_graphs.measuring else _drop

    def direct_leaves(self) -> DirectLeaves | None:
        return getattr(self._local, "direct", None)

    # -- what a step calls ------------------------------------------------------------------------------------

    @contextmanager
    def direct(self) -> Iterator[DirectLeaves]:
        """Units called by this thread inside join its own graph with leaf weights."""
        assert self.direct_leaves() is None
        self._local.direct = DirectLeaves()
        try:
            yield self._local.direct
        finally:
            self._local.direct = None

    def enter_phase(self, phase: int) -> None:
        """Wait until every micro-batch has come this far."""
        self.hand_over.boundary((phase, -len(self._rank) - 1))

    def forget_order(self) -> None:
        """What was called so far was no step (the probe of the head): rank units by the next calls."""
        self._rank.clear()

    def weights_changed(self) -> None:
        """From here on a backward of an earlier forward is an error."""
        self.generation += 1
        self._fetched = -1

    @property
    def total_bytes(self) -> int:
        """Bytes of one pass over all weights."""
        return sum(self._unit_bytes.values())


def _drop(_tensor: Tensor) -> None:
    """Keep nothing of what a graph saves: it will not be differentiated."""


def backward(tensors: list[Tensor], gradients: list[Tensor | None]) -> None:
    """torch.autograd.backward on the calling thread alone, so that a micro-batch's backward can change places."""
    with torch.autograd.set_multithreading_enabled(False):
        torch.autograd.backward(tensors, gradients)
