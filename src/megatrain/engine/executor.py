"""Walks units through their runs: the only file that waits. It is the `UnitHost` that units call."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from megatrain.device.base import ComputeDevice
from megatrain.device.trace import Mark
from megatrain.engine.gradients import GradientBook
from megatrain.engine.kept_graphs import KeptGraphs
from megatrain.engine.saved_inputs import SavedInput
from megatrain.engine.weights import EVALUATION, FREE, STEP, Weights
from megatrain.model.block import LOOK_STEPS, DirectLeaves
from megatrain.model.foreign import ForeignTensorError
from megatrain.model.micro_batches import HandOver
from megatrain.model.partition import Unit
from megatrain.model.side_effects import WrittenAttributes

FORWARD, HEAD, BACKWARD = (
    0,
    1,
    2,
)  # phases of a micro-batch; none enters one before all have left the one before


class Executor:
    """Fetches weights when units are called and passes their gradients on.

    Units are ranked by the order of their calls, so that micro-batches meet at the same unit, those too of which some
    leave out a part of the model, as text without images leaves out a vision tower.
    """

    def __init__(
        self,
        device: ComputeDevice,
        weights: Weights,
        gradients: GradientBook,
        kept_graphs: KeptGraphs,
    ) -> None:
        self.generation = 0
        self.compute_device = device.torch_device
        self.hand_over = HandOver(device.torch_device, device.same_order)
        self.kept_units: set[int] = set()
        self.watched: list[WrittenAttributes] = []
        self._device = device
        self._weights = weights
        self._gradients = gradients
        self._kept_graphs = kept_graphs
        self._rank: dict[int, int] = {}
        self._called: dict[int | None, list[int]] = {}  # by micro-batch, units in this pass
        self._local = threading.local()
        self._in_pass = self._in_evaluation = False
        self._visit_label = ""
        self._visit_start: Mark | None = None

    # -- what units call --------------------------------------------------------------------------------------

    def arrive(self, unit: Unit, *, backward: bool) -> None:
        if self.direct_leaves() is not None:
            return  # the head runs through without changing places
        if not backward and self.takes_turns():
            first = self.hand_over.number == 0
            shared = [found for attributes in self.watched if (found := attributes.shared(first))]
            if shared:
                raise ForeignTensorError(shared[0])
        rank = self._rank.get(unit.index, 0) if backward else self._ranked(unit.index)
        self.hand_over.boundary((BACKWARD, -rank) if backward else (FORWARD, rank))

    def _ranked(self, unit: int) -> int:
        """The unit's rank: above those of all that micro-batches have called before it. Where they call units in
        contrary orders there is none such; then it stays what it is."""
        called = self._called.setdefault(self.hand_over.number, [])
        if unit not in called:
            least = self._rank[called[-1]] + 1 if called else 0
            rank = max(self._rank.setdefault(unit, 0), least)
            if rank < len(self._rank):
                self._rank[unit] = rank
            called.append(unit)
        return self._rank[unit]

    def takes_turns(self) -> bool:
        return self.generation < LOOK_STEPS and self.hand_over.takes_turns()

    def fetch(self, unit: Unit, *, backward: bool = False) -> dict[int, Tensor]:
        self._trace_visit(unit.name, backward)
        weights = self._weights.fetch(unit, backward=backward, together=self.direct_leaves() is not None)
        if self._device.trace is not None and self._visit_start is None:
            self._visit_start = self._device.mark()
        return weights

    def _trace_visit(self, name: str, backward: bool) -> None:
        """In a trace, computation is what lies between the arrival of one unit's weights and the call of the next."""
        label = f"{name or 'model'}{' backward' if backward else ''}"
        if self._device.trace is None or label == self._visit_label:
            return
        if self._visit_start is not None and self._visit_label:
            self._device.trace.add("compute", self._visit_label, self._visit_start, self._device.mark())
        self._visit_label, self._visit_start = label, None

    def keep_inputs(self, unit: Unit, tensors: dict[int, Tensor]) -> dict[int, SavedInput]:
        inputs = self._weights.inputs
        return {} if inputs is None else {n: inputs.keep(unit.index, t) for n, t in tensors.items()}

    def take_inputs(self, unit: Unit, kept: dict[int, SavedInput]) -> dict[int, Tensor]:
        inputs = self._weights.inputs
        return {} if inputs is None else {n: inputs.take(unit.index, k) for n, k in kept.items()}

    def drop_inputs(self, unit: Unit, kept: dict[int, SavedInput]) -> None:
        if self._weights.inputs is not None:
            self._weights.inputs.drop(unit.index, list(kept.values()))

    def computing(self) -> AbstractContextManager[Any]:
        return self._device.computing()

    def opened(self, unit: Unit) -> None:
        self._gradients.opened(unit)

    def abandoned(self, unit: Unit) -> None:
        self._weights.unpin(unit.index)
        self._gradients.abandoned(unit)

    def receive(self, unit: Unit, gradients: dict[int, Tensor]) -> None:
        self._weights.unpin(unit.index)
        self._gradients.receive(unit, gradients)

    def keeps_graph(self, unit: Unit) -> bool:
        held = self._weights.held_units()
        keeps = unit.index in self.kept_units and (held is None or unit.index in held)
        if keeps:
            self._weights.pin(unit.index)
        return keeps

    def graph_meter(self, unit: Unit, given: list[Tensor]) -> Callable[[Tensor], None]:
        return self._kept_graphs.meter(unit, given) if self._kept_graphs.measuring else _not_measured

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

    @contextmanager
    def forward_pass(self, elements: int) -> Iterator[None]:
        """Around the model's own forward, of so many elements: with gradients on it begins a pass of a caller's loop,
        which ends with the step, or belongs to the one that has begun; with gradients off it is a pass of its own."""
        if torch.is_grad_enabled():
            if not self._in_pass:
                self._begin_pass(FREE, elements)
            else:
                self._weights.further_forward(elements)
            yield
        elif self._in_evaluation:
            yield
        else:
            with self.evaluation():
                yield

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A pass with gradients off, to which all forwards inside belong."""
        self._weights.begin(EVALUATION)
        self._in_evaluation = True
        try:
            yield
            self._weights.check()  # nothing comes after it that would tell
        except BaseException:
            self._weights.abort()
            raise
        finally:
            self._in_evaluation = False
        self._weights.end()

    def begin_step(self, elements: int) -> None:
        """A step over so many label elements begins."""
        self._begin_pass(STEP, elements)

    def _begin_pass(self, kind: str, elements: int = 0) -> None:
        self._in_pass = True
        self._called.clear()
        self._weights.begin(kind, elements)

    def abort_step(self) -> None:
        """The step ended in an exception."""
        self._in_pass = False
        self._weights.abort()

    def enter_phase(self, phase: int) -> None:
        """Wait until every micro-batch has come this far."""
        self.hand_over.boundary((phase, -sys.maxsize))

    def forget_order(self) -> None:
        """What was called so far was no step (the probe of the head): rank units by the next calls."""
        self._rank.clear()
        self._called.clear()
        self._weights.forget()

    def weights_changed(self) -> None:
        """From here on a backward of an earlier forward is an error."""
        self.generation += 1
        self._trace_visit("", False)
        self._visit_label, self._visit_start = "", None
        if self._in_pass:
            self._in_pass = False
            self._weights.end()
        self._weights.changed()


def _not_measured(_tensor: Tensor) -> None:
    """How much a graph would hold is known."""


def backward(tensors: list[Tensor], gradients: list[Tensor | None]) -> None:
    """torch.autograd.backward on the calling thread alone, so that a micro-batch's backward can change places."""
    with torch.autograd.set_multithreading_enabled(False):
        try:
            torch.autograd.backward(tensors, gradients)
        except BaseException:
            _empty_autograds_queue()
            raise


def _empty_autograds_queue() -> None:
    """A failed backward leaves its further nodes in a queue of the thread. There they hold its graph and, should they
    still be there when the thread ends, are freed without Python, which ends the process (SIGABRT) where Python itself
    is about to end. The next backward of the thread takes them out first."""
    torch.zeros((), requires_grad=True).backward()
