"""The micro-batches that a user hands to a step."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from megatrain.errors import ConfigError

Batch = Mapping[str, Any]


def checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The micro-batches of a step as a list. Raises ConfigError where they are not mappings with labels."""
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
    return batches
