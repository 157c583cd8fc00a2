"""What models return."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatrain.errors import ConfigError


def loss_of(result: Any) -> Tensor:
    """The loss in what a model returned: an attribute or key `loss`, the first of a tuple, or the result itself."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple):
        return loss_of(result[0])
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(f"the model returned {type(result).__name__} without a loss; pass labels in every batch")
    return loss


def logits_of(result: Any) -> Tensor:
    """The logits in what a model returned, an attribute or key of that name."""
    logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor):
        raise ConfigError(f"the model returned {type(result).__name__} without logits; log-probabilities need them")
    return logits
