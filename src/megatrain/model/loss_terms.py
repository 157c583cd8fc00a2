"""What a model's loss is made of, read off its graph.

Where the head runs apart from the model (`head.py`), the loss is put together from two things: the results of its loss
function, chunk by chunk, and what comes out of the base besides (auxiliary losses). The rest of the model's own forward
then sees a stand-in for the first and one token of hidden states, so a term of any other kind, such as a penalty on the
logits, would be lost with its gradient. Each such run therefore shows anew that there is none.
"""

from typing import Any

import torch
from torch import Tensor


class InseparableLossError(Exception):
    """The loss has a term that head and base cannot give one without the other; the message says which."""


class LossStandIn:
    """In place of the loss function's result: `value`, and a node of its own by which a graph is seen to use it."""

    def __init__(self, value: Tensor) -> None:
        self._leaf = value.detach().requires_grad_()
        self.tensor = self._leaf.clone()  # a model may add to it in place, which a leaf does not allow
        self._node = self.tensor.grad_fn

    def is_all_of(self, loss: Any) -> bool:
        """Whether `loss` is this tensor and nothing else."""
        return isinstance(loss, Tensor) and loss.grad_fn is self._node

    def check(self, loss: Any, apart: list[Tensor]) -> None:
        """Raise InseparableLossError unless `loss` is this tensor, as it is, plus terms whose graphs do not reach the
        leaves `apart`. A term without a graph is refused: nobody can tell what it was computed from."""
        if self.is_all_of(loss):
            return
        if not isinstance(loss, Tensor):
            raise InseparableLossError(f"its loss is of type {type(loss).__name__} instead of a tensor")
        found, nodes = 0, [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None:
                raise InseparableLossError("its loss has a term without a gradient besides its loss_function's result")
            if node is self._node:
                found += 1
            elif type(node).__name__ == "AddBackward0" and node._saved_alpha == 1:  # type: ignore[attr-defined]
                nodes += [following for following, _ in node.next_functions]
            elif _reaches(node, [*apart, self._leaf]):
                raise InseparableLossError(
                    "its loss is more than its loss_function's result and terms that the base model gives"
                )
        if found != 1:
            raise InseparableLossError(f"its loss holds its loss_function's result {found} times")


def _reaches(start: Any, leaves: list[Tensor]) -> bool:
    """Whether the graph from `start` on ends in one of `leaves`."""
    wanted = {id(leaf) for leaf in leaves}
    nodes, seen = [start], {start}
    while nodes:
        node = nodes.pop()
        if id(getattr(node, "variable", None)) in wanted:
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return False


def zero_like_loss(logits: Tensor) -> Tensor:
    """What a loss function could return where its value is not needed."""
    return torch.zeros((), dtype=torch.float32, device=logits.device)
