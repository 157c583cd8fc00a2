"""A forward of TRL's that reads the head's weight itself, on a model whose weights are streamed.

TRL's losses compute log-probabilities from hidden states and `lm_head.weight`, in tiles, without calling the head; the
forward that does so takes the place of the model's, and calls the base model. So it is run as the model's own is, and
where the weights are not where the model computes, the head's are brought there when it asks for them.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import nn

from megatrain.engine.engine import Engine

ARGUMENT = "fused_lm_head"  # asks TRL's forward for log-probabilities


class DirectHead:
    """Stands in for the forward that TRL has put in place of `engine`'s."""

    def __init__(self, engine: Engine, fused: Callable[..., Any]) -> None:
        self._engine = engine
        self._fused = fused
        self._own = engine.attachment.root
        self.__signature__ = self._own.__signature__

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return self._own(*args, **kwargs)
        return self._own.run(self._run, args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model: Any = self._engine.model
        find = model.get_output_embeddings

        def find_and_show() -> nn.Module:
            head: nn.Module = find()
            self._engine.show_weights(head)
            return head

        model.get_output_embeddings = find_and_show  # when the base model has run: the copy is as short-lived as it can
        try:
            return self._fused(*args, fused_lm_head=True, **kwargs)
        finally:
            del model.get_output_embeddings


def reads_head(forward: object) -> bool:
    """Whether a model's `forward` is one of those."""
    if not callable(forward) or isinstance(forward, DirectHead):
        return False
    return ARGUMENT in signature(forward, follow_wrapped=False).parameters


def follow_direct_head(engine: Engine) -> None:
    """Where TRL has put its forward into the engine's model, run it as the engine needs it."""
    forward = engine.model.__dict__.get("forward")
    if reads_head(forward):
        engine.model.forward = DirectHead(engine, forward)  # type: ignore[assignment,arg-type]
