"""The micro-batches that a user hands to a step."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from megatrain.errors import ConfigError

Batch = Mapping[str, Any]

# arguments of transformers' losses that a step works out itself, from the labels of all its micro-batches
_WORKED_OUT = {
    "num_items_in_batch": "train_step divides by the target tokens of all micro-batches itself",
    "shift_labels": "train_step shifts the labels itself",
}


def checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The micro-batches of a step as a list. Raises ConfigError where they are not mappings with labels, or say how
    labels become a loss."""
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        raise ConfigError(f"batches is a {type(batches).__name__}; it must be a list of micro-batches, such as [batch]")
    batches = list(batches)
    if not batches:
        raise ConfigError("batches is empty; a step needs at least one micro-batch")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"batches[{number}] is a {type(batch).__name__}; it must be a dict of the model's arguments with labels"
            )
        if "labels" not in batch:
            raise ConfigError(f"batches[{number}] has no labels; it has {', '.join(map(str, batch)) or 'nothing'}")
        if not isinstance(batch["labels"], Tensor):
            kind = type(batch["labels"]).__name__
            raise ConfigError(f"batches[{number}]['labels'] is of type {kind}; it must be a tensor of token ids")
        for name, why in _WORKED_OUT.items():
            if batch.get(name) is not None:
                raise ConfigError(
                    f"batches[{number}] has {name}: {why}; leave it out, or call engine.model(**batch).loss.backward()"
                    " and engine.step()"
                )
    return batches
