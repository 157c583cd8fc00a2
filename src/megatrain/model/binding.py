"""Binding: the tensors a unit computes with, assigned into its modules for the length of one run."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from megatrain.model.partition import Unit


@contextmanager
def bound(unit: Unit, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Put `tensors` (by slot index) in place of the unit's parameters; no copy is made.

    A parameter shared with other modules is bound wherever this unit holds it. The host parameters come back even
    when the run raises.
    """
    kept = [(owner, attribute, owner._parameters[attribute]) for owner, attribute, _ in unit.places]
    try:
        for owner, attribute, slot in unit.places:
            # straight into the dict: Module.__setattr__ accepts only nn.Parameter for a registered name
            owner._parameters[attribute] = tensors[slot.index]  # type: ignore[assignment]
        yield
    finally:
        for owner, attribute, parameter in kept:
            owner._parameters[attribute] = parameter
