"""Gradients of units whose state lies in the device's memory. They stay there until the step ends; all that the host
reads of them are their sums of squares, all at once."""

import torch
from torch import Tensor

from megatrain.device.base import Event, StreamingDevice
from megatrain.memory.store import TORCH_DTYPE, SlotState
from megatrain.optim.device_kernels import square_sum


class ResidentGradients:
    def __init__(self, device: StreamingDevice) -> None:
        self._device = device
        self._squares: dict[int, Tensor] = {}  # by slot: float64, on the device
        self._last: Event | None = None

    def write(
        self,
        entries: list[SlotState],
        gradients: list[Tensor],
        is_further: list[bool],
        places: list[Tensor],
        begun: list[tuple[Tensor, Tensor]],
        label: str,
    ) -> None:
        """Round complete gradients once to their slab's dtype, as if they crossed the link; each goes to its place, or
        is added to what is there. `begun`: new sums, and what they begin with. In the order of computation."""
        for entry in entries:
            nothing = torch.zeros((), dtype=torch.float64, device=self._device.torch_device)
            self._squares.setdefault(entry.slot.index, nothing)
        squares = [self._squares[entry.slot.index] for entry in entries]
        held = sum(gradient.nbytes for gradient in gradients)

        def run() -> None:
            with torch.no_grad():
                for total, first in begun:
                    total.copy_(first)
                for entry, gradient, further, square, place in zip(
                    entries, gradients, is_further, squares, places, strict=True
                ):
                    value = gradient.detach().reshape(-1).to(TORCH_DTYPE[entry.slab.layout.dtype])
                    if further:
                        place.add_(value)
                    else:
                        place.copy_(value)
                    square.copy_(square_sum(place))
            gradients.clear()
            self._device.hold(-held)

        self._last = self._device.compute(run, (), f"gradient of {label}")

    def settle(self) -> None:
        """Return when all that was written is."""
        last, self._last = self._last, None
        if last is not None:
            self._device.host_wait("squares_summed", last.wait)

    def squares(self) -> dict[int, float]:
        """By slot, of what was written since `forget`."""
        self.settle()
        values = torch.stack(list(self._squares.values())).tolist() if self._squares else []
        return dict(zip(self._squares, values, strict=True))

    def drop(self, slot: int) -> None:
        self._squares.pop(slot, None)

    def forget(self) -> None:
        self._squares.clear()
        self._last = None
