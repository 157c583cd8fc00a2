"""One run of a unit with gradients on: its graph, what it produced, and its gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatrain.errors import UnsupportedModelError
from megatrain.model.binding import bound
from megatrain.model.side_effects import Attributes, no_autocast_cache
from megatrain.model.trees import FlatTree, written_entries

if TYPE_CHECKING:
    from megatrain.model.block import UnitCall, UnitForward

_PAST_IT = ": what its forward has computed is differentiated past it; return the tensor from it"


class UnitGraph:
    """A run of the unit with gradients on, over detached inputs and leaf weights."""

    def __init__(
        self,
        call: "UnitCall",
        inputs: list[Tensor],
        weights: dict[int, Tensor],
        attributes: Attributes,
        needed: list[bool] | None = None,
    ) -> None:
        if needed is None:
            needed = [t.requires_grad for t in call.flat.tensors]
        slots = call.block.unit.slots
        self.where = call.block.where
        self.computing = call.block.host.computing
        self.leaves = {s.index: leaf_of(weights[s.index], s.parameter.requires_grad) for s in slots}
        self.inputs = [leaf_of(t, need) for t, need in zip(inputs, needed, strict=True)]
        with torch.enable_grad():
            self.result = UnitResult(call, call.flat, self.inputs, self.leaves, attributes)
        if any(leaf.grad is not None for leaf in (*self.inputs, *self.leaves.values())):
            raise UnsupportedModelError(
                f"{call.block.where}: it calls backward() in its forward, whose gradients would be lost; use"
                " torch.autograd.grad there"
            )

    def refuse_backward(self) -> None:
        """Nobody differentiates this run: a gradient that reaches its inputs or weights all the same, from an
        activation that a hook has captured, would be lost."""
        refuse = partial(_refuse_gradient, self.where)
        for leaf in (*self.inputs, *self.leaves.values()):
            if leaf.requires_grad:
                leaf.register_hook(refuse)

    def differentiate(self, output_gradients: list[Tensor | None]) -> tuple[list[Tensor | None], dict[int, Tensor]]:
        """(gradient per input or None, gradient per slot index of parameters that got one)."""
        pairs = [
            (t, g)
            for t, g in zip(self.result.tensors, output_gradients, strict=True)
            if g is not None and t.requires_grad
        ]
        wanted = [t for t in self.inputs if t.requires_grad]
        leaves = {index: leaf for index, leaf in self.leaves.items() if leaf.requires_grad}
        if not pairs or not (wanted or leaves):
            return [None] * len(self.inputs), {}
        with self.computing(), _saying_what_is_wrong(self.where):
            found = torch.autograd.grad(
                [t for t, _ in pairs], [*wanted, *leaves.values()], [g for _, g in pairs], allow_unused=True
            )
        if any(leaf.grad is not None for leaf in (*wanted, *leaves.values())):
            raise UnsupportedModelError(self.where + _PAST_IT)
        by_input = iter(found[: len(wanted)])
        input_gradients = [next(by_input) if t.requires_grad else None for t in self.inputs]
        by_slot = zip(leaves, found[len(wanted) :], strict=True)
        return input_gradients, {index: g for index, g in by_slot if g is not None}


class UnitResult:
    """What one run produced: the returned tree, entries written into mappings, captured outputs, attributes.

    `tensors` are the distinct ones among them that are not simply inputs, in a fixed order: the node's outputs.
    """

    def __init__(
        self,
        call: "UnitCall",
        flat: FlatTree,
        inputs: list[Tensor],
        weights: dict[int, Tensor],
        attributes: Attributes,
    ) -> None:
        block = call.block
        seen = flat.build(inputs)
        args, kwargs = seen
        with (
            block.host.computing(),
            no_autocast_cache(),
            call.capture.collecting() as captured,
            bound(block.unit, weights),
        ):
            returned = _without_leaf_errors(block, args, kwargs)
        entries = written_entries(flat, seen, inputs)
        self.attributes, assigned = block.attributes.written(attributes, weights.values())
        self.given = [*inputs, *weights.values()]
        self.owners = [(mapping, key) for mapping, key, _ in entries]
        tree = (returned, [value for _, _, value in entries], captured, assigned)
        self.flat = FlatTree(tree, block.where)
        self._inputs = {id(t): i for i, t in enumerate(inputs)}
        self._from_input = [self._inputs.get(id(t)) for t in self.flat.tensors]
        self.tensors = [t for t, i in zip(self.flat.tensors, self._from_input, strict=True) if i is None]

    def deliver(self, outputs: tuple[Tensor, ...], call: "UnitCall") -> Any:
        """Hand the node's outputs to the caller, the mappings, the collector and the attributes."""
        own = iter(outputs)
        tensors = [call.flat.tensors[i] if i is not None else next(own) for i in self._from_input]
        returned, entry_values, captured, attribute_values = self.flat.build(tensors)
        for (mapping, key), value in zip(self.owners, entry_values, strict=True):
            mapping[key] = value  # type: ignore[index]
        call.capture.deliver(captured)
        for (holder, name), value in zip(self.attributes, attribute_values, strict=True):
            holder[name] = value
        return returned


def _without_leaf_errors(block: "UnitForward", args: Any, kwargs: Any) -> Any:
    try:
        return block.forward(*args, **kwargs)
    except RuntimeError as error:
        if "leaf Variable that requires grad" not in str(error):
            raise
        raise UnsupportedModelError(f"{block.where}: it changes an input or a parameter in place: {error}") from error


@contextmanager
def _saying_what_is_wrong(where: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "through the graph a second time" in str(error):
            raise UnsupportedModelError(where + _PAST_IT) from error
        if "use_reentrant=True" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{where}: it calls torch.utils.checkpoint with use_reentrant=True, which cannot give a unit's gradients by"
            " themselves; leave it out (the engine recomputes every unit anyway) or pass use_reentrant=False"
        ) from error


def _refuse_gradient(where: str, _gradient: Tensor) -> None:
    raise UnsupportedModelError(where + _PAST_IT)


def leaf_of(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)
