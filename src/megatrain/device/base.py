"""The interface behind which compute devices differ. `cpu` is the first; streaming devices implement the same."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class ComputeDevice(Protocol):
    """Where units run. `torch_device` is where their inputs and activations live."""

    name: str
    torch_device: torch.device

    def fetch(self, unit: int, weights: dict[int, Tensor]) -> dict[int, Tensor]:
        """The unit's weights on the device, by slot index, given the host's views of them."""

    def computing(self) -> AbstractContextManager[Any]:
        """Entered around every run of a unit and every backward."""

    def native_bf16(self) -> bool:
        """Whether the device computes bf16 natively; decides what `precision="auto"` means."""

    def peak_bytes(self) -> int:
        """Largest number of bytes the device has held since the start of the step (0 where it has no memory of its
        own)."""

    @property
    def h2d_bytes(self) -> int:
        """Bytes copied to the device so far."""

    @property
    def d2h_bytes(self) -> int:
        """Bytes copied from the device so far."""
