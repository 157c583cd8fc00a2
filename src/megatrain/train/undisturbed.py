"""A look at the model in the middle of training that leaves it, and what it draws from, as it was found."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatrain.model.side_effects import RandomState

# transformers' note that it has put its hooks on the modules: they stay, and without it they would be put there again
_STAYS = frozenset({"_output_capturing_hooks_installed"})
_HELD_BY_TORCH = frozenset({"_parameters", "_modules", "_buffers"})


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, `model` runs in evaluation mode and without gradients. Afterwards buffers, plain attributes of its
    modules (training mode is one) and all random generators are what they were: to training nothing has happened.

    `device`: where the model computes. An object that a module holds and changes in place is not noticed.
    """
    attributes, buffers, numbers = _Attributes(model), _Buffers(model), RandomNumbers(device)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        attributes.restore()
        buffers.restore()
        numbers.restore()


class _Attributes:
    """A model may note on itself what it saw last: the longest sequence, positions of a picture."""

    def __init__(self, model: nn.Module) -> None:
        self._found = [(module, _plain(module)) for module in model.modules()]

    def restore(self) -> None:
        for module, found in self._found:
            now = _plain(module)
            for name in now.keys() - found.keys() - _STAYS:
                del module.__dict__[name]
            module.__dict__.update({name: value for name, value in found.items() if now.get(name, now) is not value})


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _HELD_BY_TORCH}


class _Buffers:
    """Of a rotary embedding that grows with the sequence, for one. Copies of them wait on the host."""

    def __init__(self, model: nn.Module) -> None:
        self._found: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        self._copies: dict[int, tuple[int, Tensor]] = {}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                self._found.append((module._buffers, name, buffer))
                if buffer is not None and not buffer.is_meta and id(buffer) not in self._copies:
                    self._copies[id(buffer)] = buffer._version, buffer.detach().to("cpu", copy=True)

    def restore(self) -> None:
        for holder, name, buffer in self._found:
            if holder.get(name) is not buffer:
                holder[name] = buffer
            if buffer is not None and id(buffer) in self._copies:
                version, copy = self._copies[id(buffer)]
                if buffer._version != version:
                    buffer.copy_(copy)


class RandomNumbers:
    """Of torch, Python and NumPy: checkpoints hold them all."""

    def __init__(self, device: torch.device) -> None:
        self._torch = RandomState(device)
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        self._torch.restore()
        random.setstate(self._python)
        np.random.set_state(self._numpy)
