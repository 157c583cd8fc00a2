"""Attributes that the engine puts on single modules, in place of their classes' methods or of somebody's own."""

from typing import Any

from torch import nn

_ABSENT = object()


class StandIn:
    """`value` as the module's attribute `name`. `remove` brings back what was there: a method of the instance's own, or
    none. What somebody has put in its place since (a wrapper around it) stays."""

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self._attributes, self._name, self._value = module.__dict__, name, value
        self._was = self._attributes.get(name, _ABSENT)
        self._attributes[name] = value

    def remove(self) -> None:
        if self._attributes.get(self._name) is not self._value:
            return
        if self._was is _ABSENT:
            del self._attributes[self._name]
        else:
            self._attributes[self._name] = self._was
