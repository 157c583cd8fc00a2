"""One autograd node per unit: run once, keep only the inputs, recompute and differentiate in backward.

The unit's own `forward` is replaced on the instance, so the model's forward stays the model's. What a run needs from
outside, it asks of a `UnitHost`: weights to bind, where gradients go, when other micro-batches may run.

    forward   host.arrive -> host.fetch -> bind -> run on detached inputs -> unbind      keeps: inputs, RNG, autocast
    backward  host.arrive -> host.fetch -> bind -> run with grad on detached inputs -> autograd.grad -> host.receive

With `keeps_graph` the first run's graph is kept, with the weights where they are, and backward skips the second run.
Inside `Executor.direct()` units join the surrounding graph with leaf weights: the head, whose backward follows its
forward at once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from megatrain.errors import UnsupportedModelError
from megatrain.model.binding import bound
from megatrain.model.digest import Digest
from megatrain.model.first_run import SavedTensors
from megatrain.model.foreign import refuse_foreign_tensors
from megatrain.model.partition import Unit
from megatrain.model.side_effects import (
    Attributes,
    AutocastState,
    BufferState,
    CapturedOutputs,
    RandomState,
    WrittenAttributes,
    WrittenBuffers,
    no_autocast_cache,
)
from megatrain.model.stand_in import StandIn
from megatrain.model.trees import FlatTree
from megatrain.model.unit_graph import UnitGraph, UnitResult, leaf_of

LOOK_STEPS = 2  # a model does what it does from its first steps on: costly checks are made in these


class UnitHost(Protocol):
    """What units need from the engine. `generation` changes when weights do; `compute_device` is where they run."""

    generation: int
    compute_device: torch.device

    def arrive(self, unit: Unit, *, backward: bool) -> None:
        """The unit is about to run: the one place where another micro-batch's thread may take over."""

    def takes_turns(self) -> bool:
        """Whether several micro-batches run in turns, in a step early enough to look for what they share."""

    def fetch(self, unit: Unit, *, backward: bool = False) -> dict[int, Tensor]:
        """Current weights of the unit on the compute device, by slot index, without gradient history."""

    def keep_inputs(self, unit: Unit, tensors: dict[int, Tensor]) -> dict[int, Any]:
        """Keep inputs of a call that is about to run for its backward, by position; those that are not in the result
        autograd keeps."""

    def take_inputs(self, unit: Unit, kept: dict[int, Any]) -> dict[int, Tensor]:
        """What `keep_inputs` was given, on the compute device, for the backward that has begun."""

    def drop_inputs(self, unit: Unit, kept: dict[int, Any]) -> None:
        """What `keep_inputs` was given, of a call that will have no backward. Any thread may say so."""

    def computing(self) -> AbstractContextManager[Any]:
        """Entered around a unit's run and its differentiation, for what the device needs."""

    def opened(self, unit: Unit) -> None:
        """A call whose backward is still to come."""

    def abandoned(self, unit: Unit) -> None:
        """A call whose graph was dropped without a backward."""

    def receive(self, unit: Unit, gradients: dict[int, Tensor]) -> None:
        """Gradients of one backward call, by slot index; parameters that got none are absent."""

    def keeps_graph(self, unit: Unit) -> bool:
        """Whether this call keeps its graph instead of recomputing."""

    def graph_meter(self, unit: Unit, given: list[Tensor]) -> Callable[[Tensor], None]:
        """Is shown each tensor that the graph of a first run would save."""

    def direct_leaves(self) -> "DirectLeaves | None":
        """Set while the calling thread runs units inside a graph of its own."""


class DirectLeaves:
    """Leaf weights of the units that ran directly, to differentiate by once the loss is there."""

    def __init__(self) -> None:
        self.leaves: dict[int, Tensor] = {}
        self.units: dict[int, Unit] = {}

    def leaves_of(self, unit: Unit, weights: dict[int, Tensor]) -> dict[int, Tensor]:
        self.units[unit.index] = unit
        for slot in unit.slots:
            if slot.index not in self.leaves:
                self.leaves[slot.index] = leaf_of(weights[slot.index], slot.parameter.requires_grad)
        return {slot.index: self.leaves[slot.index] for slot in unit.slots}


class UnitForward:
    """Stands in for `unit.module.forward`."""

    def __init__(self, unit: Unit, host: UnitHost) -> None:
        self.unit = unit
        self.host = host
        self.forward: Callable[..., Any] = unit.module.forward
        self._own_forward = self.forward
        self._stand_in: StandIn | None = None
        self._removed = False
        self.where = f"unit {unit.name or type(unit.module).__name__}"
        self.attributes = WrittenAttributes(unit.module, self.where)
        self.buffers = WrittenBuffers(unit.module, self.where)
        self.anchor = torch.zeros((), requires_grad=True, device="cpu")
        self.differentiates = False  # inside its forward, as far as is known

    def notice_differentiation(self) -> None:
        self.differentiates = True

    def install(self) -> None:
        self._stand_in = StandIn(self.unit.module, "forward", self)

    def remove(self) -> None:
        """Give the module its forward back. What somebody has wrapped around this one goes on calling it."""
        self._removed, self.forward = True, self._own_forward
        if self._stand_in is not None:
            self._stand_in.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed:
            return self.forward(*args, **kwargs)
        self.host.arrive(self.unit, backward=False)
        if not self.host.takes_turns():
            return self._call(args, kwargs)
        result = self._call(args, kwargs)
        self.attributes.ran()
        return result

    def _call(self, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._run_plain(args, kwargs, self._leaves())
        direct = self.host.direct_leaves()
        if direct is not None:
            return self._run_plain(args, kwargs, direct.leaves_of(self.unit, self.host.fetch(self.unit)))
        flat = FlatTree((args, kwargs), self.where)
        if not self.unit.trainable and not any(t.requires_grad for t in flat.tensors):
            with torch.no_grad():  # frozen, and nothing to pass a gradient to: never recomputed
                return self._run_plain(args, kwargs, self._leaves())
        return UnitCall(self, flat).apply()

    def _leaves(self) -> dict[int, Tensor]:
        """Weights that require gradients as the parameters do: what PyTorch folds depends on it, with them off too."""
        weights = self.host.fetch(self.unit)
        return {s.index: leaf_of(weights[s.index], s.parameter.requires_grad) for s in self.unit.slots}

    def _run_plain(self, args: Any, kwargs: Any, weights: dict[int, Tensor]) -> Any:
        with self.host.computing(), no_autocast_cache(), bound(self.unit, weights):
            return self.forward(*args, **kwargs)


class UnitCall:
    """One call of a unit under gradients: the record from which backward repeats it."""

    open = False  # its backward is still to come (torch.compile makes objects that are never initialised)

    def __init__(self, block: UnitForward, flat: FlatTree) -> None:
        self.block = block
        self.flat = flat
        self.generation = block.host.generation
        self.capture = CapturedOutputs()
        self.random: RandomState | None = None
        self.autocast = AutocastState(block.host.compute_device)
        self.buffers: list[BufferState] = []  # that the forward changed, as it found them
        self.attributes: Attributes = {}  # as the forward found them
        self.graph: UnitGraph | None = None
        self.result: UnitResult | None = None
        self.own_outputs: list[bool] = []  # whether each output requires a gradient
        self.kept_inputs: dict[int, Any] = {}  # by position, those that the host keeps
        self.inputs_are_gone = False  # those, after a backward
        self.digest: Digest | None = None  # of the first run's results, while the model is being learnt

    def __del__(self) -> None:
        kept = self.__dict__.get("kept_inputs")  # also of a call whose forward failed
        if (self.open or kept) and self.generation == self.block.host.generation:
            if self.open:
                self.block.host.abandoned(self.block.unit)
            if kept:
                self.block.host.drop_inputs(self.block.unit, kept)

    def apply(self) -> Any:
        block = self.block
        outputs = _UnitNode.apply(self, block.anchor, *self.flat.tensors)
        result, self.result = self.result, None
        assert result is not None
        return result.deliver(outputs, self)

    def run_first(self, inputs: list[Tensor], hidden: list[int]) -> list[Tensor]:
        """The forward run; `inputs` are the flat tensors, `hidden` the positions of those that come from other units.
        Returns the node's outputs."""
        block, host = self.block, self.block.host
        weights = host.fetch(block.unit)
        self.kept_inputs = host.keep_inputs(block.unit, {n: inputs[n] for n in hidden})  # copied beside the run
        versions = [t._version for t in inputs]
        self.random = RandomState(host.compute_device)
        buffers = block.buffers.before()
        attributes = block.attributes.snapshot()
        if not _graphs_are_watched() and host.keeps_graph(block.unit):
            self.graph = UnitGraph(self, inputs, weights, attributes)
            result = self.graph.result
        else:
            # Gradients on, as in plain PyTorch: whether a product is folded, and so its last bit, depends on it.
            # What the graph would save is dropped, so memory is that of a run without gradients.
            meter = host.graph_meter(block.unit, [*inputs, *weights.values()])
            hold = block.differentiates or self.generation == 0
            with SavedTensors(block.where, meter, hold, block.notice_differentiation).during_run():
                graph = UnitGraph(self, inputs, weights, attributes)
            graph.refuse_backward()
            result = graph.result
        if not self.random.drawn():
            self.random = None
        self.buffers = block.buffers.changed(buffers)
        self.attributes = block.attributes.worth_keeping(attributes)
        if self.buffers:
            self.graph = None  # it may have saved a buffer that the next forward changes
        if any(t._version != v for t, v in zip(inputs, versions, strict=True)):
            raise UnsupportedModelError(f"{block.where}: it changed an input tensor in place; it cannot be recomputed")
        if self.generation < LOOK_STEPS:
            self.digest = Digest(result.tensors)
            refuse_foreign_tensors(block.where, result.tensors, [*result.given])
        self.result = result
        self.own_outputs = [t.requires_grad for t in result.tensors]
        return [t.detach() for t in result.tensors]

    def differentiate(
        self, saved: tuple[Tensor | None, ...], needed: list[bool], output_gradients: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the inputs that need one; the parameters' go to the host. `saved`: inputs that autograd kept."""
        block, host = self.block, self.block.host
        host.arrive(block.unit, backward=True)
        if self.generation != host.generation:
            raise RuntimeError(f"{block.where}: backward of a forward that ran before step(); its weights have changed")
        if self.inputs_are_gone:
            raise RuntimeError(
                f"{block.where}: backward through the same graph a second time; what the unit was called with has been"
                " given up after the first (retain_graph has no effect here)"
            )
        self.inputs_are_gone = bool(self.kept_inputs)
        graph, self.graph = self.graph, None
        weights = host.fetch(block.unit, backward=True)
        kept = host.take_inputs(block.unit, self.kept_inputs)
        inputs = [kept[n] if tensor is None else tensor for n, tensor in enumerate(saved)]
        self.kept_inputs = {}
        if graph is None:
            graph = self._recompute(inputs, needed, weights)
            if self.digest is not None and not self.digest.matches(graph.result.tensors):
                raise UnsupportedModelError(
                    f"{block.where}: run again in backward, it gave another result: it depends on something besides its"
                    " arguments that has changed since its forward (an object that the model changes, random numbers"
                    " that are not torch's, a tensor changed in place). Pass it as an argument"
                )
        input_gradients, parameter_gradients = graph.differentiate(output_gradients)
        self.open = False
        host.receive(block.unit, parameter_gradients)
        return input_gradients

    def _recompute(self, inputs: list[Tensor], needed: list[bool], weights: dict[int, Tensor]) -> UnitGraph:
        block = self.block
        with ExitStack() as stack:
            stack.enter_context(self.autocast.entered())
            stack.enter_context(block.attributes.replaying(self.attributes))
            if self.random is not None:
                stack.enter_context(self.random.replaying())
            stack.enter_context(WrittenBuffers.replaying(self.buffers))
            return UnitGraph(self, inputs, weights, block.attributes.snapshot(), needed)


def _graphs_are_watched() -> bool:
    """Whether somebody outside decides what graphs save (torch.utils.checkpoint around calls of units): a graph that is
    kept would be saved through their hooks, and what is kept the first time might not be kept when it is run again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class _UnitNode(torch.autograd.Function):
    """Inputs: the call, an anchor that makes outputs differentiable even without a differentiable input, tensors."""

    @staticmethod
    def forward(ctx: Any, call: UnitCall, anchor: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = call.run_first(list(inputs), [n for n in range(len(inputs)) if ctx.needs_input_grad[n + 2]])
        ctx.call = call
        ctx.save_for_backward(*[None if n in call.kept_inputs else t for n, t in enumerate(inputs)])
        # as in plain PyTorch, what depends on no weight and no input with a gradient requires none
        ctx.mark_non_differentiable(*[t for t, own in zip(outputs, call.own_outputs, strict=True) if not own])
        ctx.set_materialize_grads(False)
        call.open = True
        call.block.host.opened(call.block.unit)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: UnitCall = ctx.call
        needed = list(ctx.needs_input_grad[2:])
        return (None, None, *call.differentiate(ctx.saved_tensors, needed, list(output_gradients)))


def install_units(units: list[Unit], host: UnitHost) -> list[UnitForward]:
    """Replace the forward of every unit's module; `remove()` on each undoes it."""
    blocks = [UnitForward(unit, host) for unit in units]
    for block in blocks:
        block.install()
    return blocks
