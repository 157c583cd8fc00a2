"""Parameters as the model's own code sees them while its units' values are not on the compute device."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.errors import UnsupportedModelError
from megatrain.model.partition import ParameterSlot, Partition

_HARMLESS = frozenset(
    {"__get__", "requires_grad_", "size", "dim", "numel", "nelement", "stride", "element_size", "is_floating_point"}
)


class HiddenParameter(Tensor):
    """A parameter's shape, dtype and compute device, and no value: reading one raises UnsupportedModelError."""

    hidden_name: str

    @classmethod
    def of(cls, slot: ParameterSlot, device: torch.device) -> "HiddenParameter":
        nothing = torch.zeros((), dtype=slot.parameter.dtype, device=device).expand(slot.parameter.shape)
        hidden: HiddenParameter = nothing.as_subclass(cls)  # type: ignore[assignment]
        hidden.requires_grad_(slot.parameter.requires_grad)
        hidden.hidden_name = slot.name
        return hidden

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ in _HARMLESS:
                return func(*args, **(kwargs or {}))
        names = [a.hidden_name for a in [*args, *(kwargs or {}).values()] if isinstance(a, HiddenParameter)]
        raise UnsupportedModelError(
            f"parameter {', '.join(names) or '(in a list)'} is read outside the forward of the module that owns it"
            f" ({func.__name__}), where its value is not on the device; train this model with engine.device cpu"
        )


class HiddenParameters:
    """What stands in the model's modules while its own forward runs around the units: placeholders for the units'
    parameters, and the device's copies of those that belong to no unit (stray).

    strays:        their values on the device, by slot index.
    take_gradient: is given (slot index, gradient) when autograd reaches one.
    """

    def __init__(
        self,
        part: Partition,
        device: torch.device,
        strays: Callable[[], dict[int, Tensor]],
        take_gradient: Callable[[int, Tensor], None],
    ) -> None:
        self._hidden = {slot.index: HiddenParameter.of(slot, device) for slot in part.slots if slot.units}
        self._slots = part.slots
        self._strays = strays
        self._take_gradient = take_gradient
        self._entered = 0
        self._lock = threading.Lock()

    @contextmanager
    def hiding(self) -> Iterator[None]:
        """Forwards of several micro-batches may be under way at once: the last one out brings the parameters back."""
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                self._put({**self._hidden, **self._leaves()})
        try:
            yield
        finally:
            with self._lock:
                self._entered -= 1
                if not self._entered:
                    self._put({slot.index: slot.parameter for slot in self._slots})

    def show(self, module: nn.Module, values: Mapping[int, Tensor]) -> None:
        """Until the forwards under way are over, `module`'s parameters are these values, by slot index, on the device:
        leaves, whose gradients count."""
        for slot in self._slots:
            for owner, attribute in slot.places:
                if owner is module and slot.index in values:
                    owner._parameters[attribute] = self._leaf(slot, values[slot.index])  # type: ignore[assignment]

    def _put(self, tensors: dict[int, Tensor]) -> None:
        for slot in self._slots:
            for owner, attribute in slot.places:
                owner._parameters[attribute] = tensors[slot.index]  # type: ignore[assignment]

    def _leaves(self) -> dict[int, Tensor]:
        slots = {slot.index: slot for slot in self._slots}
        return {index: self._leaf(slots[index], value) for index, value in self._strays().items()}

    def _leaf(self, slot: ParameterSlot, value: Tensor) -> Tensor:
        leaf = value.detach().requires_grad_(slot.parameter.requires_grad)
        if leaf.requires_grad:
            leaf.register_post_accumulate_grad_hook(partial(self._hand_over, slot.index))
        return leaf

    def _hand_over(self, index: int, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            self._take_gradient(index, gradient)
