"""Tensors that reach a unit past its arguments, and would lose their gradient."""

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from megatrain.errors import UnsupportedModelError


class ForeignTensorError(UnsupportedModelError):
    """A unit reads something that is not among its arguments and would get no gradient, or another micro-batch's."""


def refuse_foreign_tensors(where: str, outputs: list[Tensor], given: list[Tensor]) -> None:
    """Raise UnsupportedModelError where the graph of `outputs` leads to a tensor that requires a gradient and is
    neither an input nor a weight of the unit (`given`): something the model left on a module, or a weight of another.

    The unit is differentiated by its inputs and its own weights alone, so such a tensor would silently get nothing.
    """
    own = {id(t) for t in given}
    seen: set[Any] = set()
    ahead: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        foreign_leaf = _leaf_id(node) not in own and _holders(node) > _holders_of_none()
        if foreign_leaf or node.name() == "_UnitNodeBackward":
            what = f"a tensor of shape {tuple(node.variable.shape)}" if foreign_leaf else "another unit's output"
            raise ForeignTensorError(
                f"{where}: it reads {what} that is not among its arguments and would get no gradient from it;"
                " pass it as an argument"
            )
        ahead.extend(following for following, _ in node.next_functions if following is not None)


def _leaf_id(node: Any) -> int | None:
    variable = getattr(node, "variable", None)  # only AccumulateGrad, where a graph ends, has one
    return None if variable is None else id(variable)


def _holders(node: Any) -> int:
    """References from Python to the leaf where `node` ends a graph, and those that looking takes; 0 for other nodes.

    A leaf that nobody holds was made inside the unit's forward (`x.detach().requires_grad_()`): nobody can read what
    gradient it gets.
    """
    variable = getattr(node, "variable", None)
    return 0 if variable is None else sys.getrefcount(variable)


@functools.cache
def _holders_of_none() -> int:
    """What `_holders` gives for a leaf that only a graph holds."""
    with torch.enable_grad():
        product = torch.zeros((), requires_grad=True) * 1
    return _holders(product.grad_fn.next_functions[0][0])  # type: ignore[union-attr]
