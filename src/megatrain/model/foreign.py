"""Tensors that reach a unit past its arguments, and would lose their gradient."""

from typing import Any

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
    ahead = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # only AccumulateGrad, where a graph ends, has one
        if (variable is not None and id(variable) not in own) or node.name() == "_UnitNodeBackward":
            what = f"a tensor of shape {tuple(variable.shape)}" if variable is not None else "another unit's output"
            raise ForeignTensorError(
                f"{where}: it reads {what} that is not among its arguments and would get no gradient from it;"
                " pass it as an argument"
            )
        ahead.extend(following for following, _ in node.next_functions if following is not None)
