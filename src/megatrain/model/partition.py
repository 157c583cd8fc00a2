"""A model's module tree cut into units, each parameter exactly once.

A *unit* is what streams as one piece: every element of a repeated `ModuleList`, and outside of those the
highest module that owns parameters and encloses no other unit (an embedding, a norm, a head, a projector).
Parameters owned by a module that encloses units are *stray*: they stay on the compute device.
Structure decides; the model's name and class never do.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from megatrain.errors import UnsupportedModelError


@dataclass(slots=True)
class ParameterSlot:
    """One distinct parameter of the model, and every place in the module tree that holds it."""

    index: int
    name: str  # the first qualified name, as in `named_parameters()`
    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    units: list[int] = field(default_factory=list)  # units that read it; the first is its home; none: stray


@dataclass(slots=True)
class Unit:
    """A module that streams as one piece. `places` binds: (owner, attribute, slot) in tree order."""

    index: int
    name: str
    module: nn.Module
    places: list[tuple[nn.Module, str, ParameterSlot]] = field(default_factory=list)

    @property
    def slots(self) -> list[ParameterSlot]:
        """The unit's distinct parameters, those homed in other units included."""
        return list({slot.index: slot for _, _, slot in self.places}.values())

    @property
    def trainable(self) -> bool:
        return any(slot.parameter.requires_grad for _, _, slot in self.places)


@dataclass(slots=True)
class Partition:
    """Units in tree order, all slots in `named_parameters()` order, and the stray slots among them."""

    units: list[Unit]
    slots: list[ParameterSlot]

    @property
    def strays(self) -> list[ParameterSlot]:
        return [slot for slot in self.slots if not slot.units]

    def homes(self, unit: Unit) -> list[ParameterSlot]:
        """The slots whose host state lives with `unit`: those it is the first to read."""
        return [slot for slot in unit.slots if slot.units[0] == unit.index]


def partition(model: nn.Module) -> Partition:
    """Cut `model` into units. Raises ValueError for a model without parameters, UnsupportedModelError for a scripted
    one."""
    _refuse_scripted(model)
    slots: dict[int, ParameterSlot] = {}
    for name, parameter in model.named_parameters():
        slots[id(parameter)] = ParameterSlot(len(slots), name, parameter)
    if not slots:
        raise ValueError(f"{type(model).__name__} has no parameters to train")
    units = [Unit(i, name, module) for i, (name, module) in enumerate(_unit_modules(model))]
    for unit in units:
        for owner, attribute, parameter in _parameter_places(unit.module):
            slot = slots[id(parameter)]
            unit.places.append((owner, attribute, slot))
            if unit.index not in slot.units:
                slot.units.append(unit.index)
    for owner, attribute, parameter in _parameter_places(model):
        slots[id(parameter)].places.append((owner, attribute))
    return Partition(units, list(slots.values()))


def _refuse_scripted(model: nn.Module) -> None:
    """A scripted module's parameters belong to its C++ side, where no others can be bound; it takes no hooks either."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{name or 'model'}: it is made by torch.jit.script or torch.jit.trace, which the engine cannot reach"
                " into; give it the module that this was made from (compile='blocks' compiles it)"
            )


def _parameter_places(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for owner in module.modules():
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, attribute, parameter


def _unit_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The unit modules in tree order; a module reachable by several names appears once."""
    repeated = {id(element) for element in _repeated_elements(model)}
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen or not _has_parameters(module):
            return
        seen.add(id(module))
        if id(module) in repeated or (_has_forward(module) and not _encloses(module, repeated)):
            found.append((name, module))
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return found


def _repeated_elements(module: nn.Module) -> Iterator[nn.Module]:
    """Elements of the outermost lists of modules below `module` that can be called one by one."""
    for child in module.children():
        yield from _elements_of(child) if _is_repetition(child) else _repeated_elements(child)


def _elements_of(repetition: nn.Module) -> Iterator[nn.Module]:
    for element in repetition.children():
        if _has_forward(element) and _has_parameters(element):
            yield element
        else:  # a list of lists, or something that cannot be called
            yield from _elements_of(element) if _is_repetition(element) else _repeated_elements(element)


def _is_repetition(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return True
    # a Sequential of composite modules of one class is a stack of blocks; one of plain layers is a block
    if isinstance(module, nn.Sequential):
        elements = [e for e in module if _has_parameters(e)]
        return len(elements) > 1 and len({type(e) for e in elements}) == 1 and any(True for _ in elements[0].children())
    return False


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not isinstance(
        module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    )


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _encloses(module: nn.Module, ids: set[int]) -> bool:
    return any(id(m) in ids for m in module.modules())
