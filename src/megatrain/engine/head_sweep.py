"""The head differentiated chunk by chunk: what the default loss and a loss of the caller's have in common."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatrain.engine.executor import backward
from megatrain.model.block import DirectLeaves

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine

# (hidden states of a chunk, its shifted labels, its tokens) -> (what is differentiated, its gradient; None: 1)
ChunkEnd = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor | None]]


@dataclass(slots=True)
class Losses:
    """Of a micro-batch: (scalar, factor) of what adds up to its loss; sums over its units of what a loss reports."""

    parts: list[tuple[Tensor, float]]
    reported: dict[str, Tensor] = field(default_factory=dict)


def differentiate_head(engine: "Engine", hidden: Tensor, labels_on_host: Tensor, end_of: ChunkEnd) -> Tensor:
    """The gradient of the hidden states; those of the weights are handed on. In a function of its own, whose names are
    gone when the base is differentiated: the last chunk is a view of all hidden states."""
    hidden_gradient = torch.zeros_like(hidden)
    for part, labels, where in engine.head.chunks(hidden, labels_on_host):
        with engine.weights.holding(engine.head.logits_bytes(labels.numel())):
            leaf = part.detach().requires_grad_()
            with engine.executor.direct() as weights:
                end, gradient = end_of(leaf, labels, where)
            with engine.device.computing():
                backward([end], [gradient])
            if leaf.grad is not None:
                hidden_gradient.view(-1, hidden.shape[-1])[where] = leaf.grad.view(-1, hidden.shape[-1])
            _take_weight_gradients(engine, weights)
            del end, gradient, leaf, weights
    return hidden_gradient


def _take_weight_gradients(engine: "Engine", weights: DirectLeaves) -> None:
    """In a function of its own: a name left over in the caller's would keep the last gradient through all of backward,
    in every micro-batch."""
    for slot, weight in weights.leaves.items():
        if weight.grad is not None:
            engine.gradients.add(slot, weight.grad)
