"""Log-probabilities of labels, and a model's forward with another loss function in the place of its own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast

from torch import Tensor, nn

from megatrain.model.fused_loss import IGNORED

LossFunction = Callable[[Tensor], Tensor]  # of logits


def label_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """fp32, in the shape of `labels`: each is the target of the logits at its place. 0 where it is ignored."""
    flat = logits.float().reshape(-1, logits.shape[-1])
    losses = nn.functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="none")
    return -losses.view(labels.shape)


def put_loss_function(model: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Put `function` in the place of a transformers model's `loss_function`. Returns what undoes it."""
    own = bool({"loss_function", "_loss_function"} & set(model.__dict__))
    before = cast(Any, model).loss_function
    model.loss_function = function  # type: ignore[assignment]

    def undo() -> None:
        if own:
            model.loss_function = before
        else:
            model.__dict__.pop("_loss_function", None)

    return undo


class LossFunctions:
    """Lets each thread put a function of logits in the place of the model's own loss function, where it has one."""

    def __init__(self, model: nn.Module) -> None:
        self._own: Callable[..., Any] | None = getattr(model, "loss_function", None)
        self._local = threading.local()
        self._remove = put_loss_function(model, self._run) if callable(self._own) else _nothing_to_undo

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    @contextmanager
    def replaced(self, function: LossFunction) -> Iterator[None]:
        """On this thread the model's loss function is `function`."""
        self._local.function = function
        try:
            yield
        finally:
            self._local.function = None

    def _run(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        function: LossFunction | None = getattr(self._local, "function", None)
        assert self._own is not None
        return self._own(logits, *args, **kwargs) if function is None else function(logits)


def _nothing_to_undo() -> None:
    """The model has no loss function that could be replaced."""
