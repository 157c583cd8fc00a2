"""Binding: the tensors a unit computes with, assigned into its modules for the length of one run."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from megatrain.model.partition import Unit

Place = tuple[nn.Module, str]  # (owner, name of its parameter)


def bound(unit: Unit, tensors: dict[int, Tensor]) -> AbstractContextManager[None]:
    """Put `tensors` (by slot index) in place of the unit's parameters; no copy is made.

    A parameter shared with other modules is bound wherever this unit holds it.
    """
    places = [(owner, attribute) for owner, attribute, _ in unit.places]
    return bound_at(places, [tensors[slot.index] for _, _, slot in unit.places])


@contextmanager
def bound_at(places: Sequence[Place], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put `tensors` at `places`. What was there comes back even when the run raises."""
    kept = [(owner, attribute, owner._parameters[attribute]) for owner, attribute in places]
    try:
        for (owner, attribute), tensor in zip(places, tensors, strict=True):
            # straight into the dict: Module.__setattr__ accepts only nn.Parameter for a registered name
            owner._parameters[attribute] = tensor  # type: ignore[assignment]
        yield
    finally:
        for owner, attribute, parameter in kept:
            owner._parameters[attribute] = parameter
