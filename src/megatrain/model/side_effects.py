"""What a unit changes besides returning a result, made to happen exactly once and with its gradient.

A unit runs twice, forward and recomputation, and its first run has gradients off. Each class below closes one hole
that this opens: outputs captured by hooks, tensors assigned to module attributes, buffers updated in place, random
numbers drawn, and autocast.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class CapturedOutputs:
    """Outputs that transformers collects by hooks inside the unit (router logits for the MoE loss).

    The unit runs under a collector of its own; what was collected leaves as further outputs of the autograd node
    and is then added to the collector that was active outside.
    """

    def __init__(self) -> None:
        capturing = sys.modules.get("transformers.utils.output_capturing")
        self._active = capturing._active_collector if capturing is not None else None
        self._outer: dict[str, Any] | None = self._active.get() if self._active is not None else None
        # hooks look at the length of the list (a hidden state's number), so the outer lengths are kept
        self._lengths = {k: len(v) for k, v in (self._outer or {}).items() if isinstance(v, list)}

    @contextmanager
    def collecting(self) -> Iterator[dict[str, list[Any]]]:
        """Yields the dict that, after the block, holds what the run captured, by key."""
        captured: dict[str, list[Any]] = {}
        if not self._lengths or self._active is None or self._outer is None:
            yield captured
            return
        inner = dict(self._outer)
        for key, length in self._lengths.items():
            inner[key] = [None] * length
        token = self._active.set(inner)
        try:
            yield captured
        finally:
            self._active.reset(token)
        for key, length in self._lengths.items():
            captured[key] = inner[key][length:]

    def deliver(self, captured: dict[str, list[Any]]) -> None:
        """Add what the node returned to the collector outside."""
        for key, values in captured.items():
            assert self._outer is not None
            self._outer[key].extend(values)


class WrittenAttributes:
    """Tensors that the unit assigns to plain module attributes (`self.aux_loss = ...`), as outputs of its node."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = [m for m in module.modules() if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]
        self._known: list[tuple[nn.Module, str]] | None = None

    def snapshot(self) -> dict[tuple[int, str], int]:
        """Identities before the first run; later runs look only at the attributes found then."""
        return {} if self._known is not None else {k: id(v) for k, v in self._scan()}

    def written(self, before: dict[tuple[int, str], int]) -> list[tuple[nn.Module, str, Tensor]]:
        if self._known is None:
            by_number = {k: v for k, v in self._scan() if before.get(k) != id(v)}
            self._known = [(self._modules[number], name) for number, name in by_number]
        return [(m, name, m.__dict__[name]) for m, name in self._known if isinstance(m.__dict__.get(name), Tensor)]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leave the attributes as they are now: what the forward delivered, not what recomputation makes."""
        now = [(m, name, m.__dict__.get(name)) for m, name in self._known or []]
        try:
            yield
        finally:
            for module, name, value in now:
                module.__dict__[name] = value

    def _scan(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        for number, module in enumerate(self._modules):
            for name, value in module.__dict__.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield (number, name), value


class WrittenBuffers:
    """Buffers that the unit updates in place (running statistics): updated by the forward, not again by recompute."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._known: list[tuple[nn.Module, str]] | None = None

    def before(self) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[nn.Module, str, Tensor, int]]]:
        """(buffer, copy of its value) pairs, and what is needed to notice writes on the first run."""
        if self._known is not None:
            pairs = [(m._buffers[name], m._buffers[name]) for m, name in self._known]
            return [(b, b.clone()) for b, _ in pairs if b is not None], []
        watched = [
            (m, name, b, b._version) for m in self._module.modules() for name, b in m._buffers.items() if b is not None
        ]
        return [(b, b.clone()) for _, _, b, _ in watched], watched

    def changed(
        self, values: list[tuple[Tensor, Tensor]], watched: list[tuple[nn.Module, str, Tensor, int]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Of `values`, those whose buffer the run wrote; what recomputation has to start from."""
        if self._known is None:
            self._known = [(m, name) for m, name, b, version in watched if b._version != version]
            written = {id(m._buffers[name]) for m, name in self._known}
            return [(b, value) for b, value in values if id(b) in written]
        return values

    @staticmethod
    @contextmanager
    def replaying(values: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Run with the buffers as the forward found them, and leave them as they are now."""
        now = [(buffer, buffer.clone()) for buffer, _ in values]
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in now:
                    buffer.copy_(value)


class RandomState:
    """Random generators of the host and of the compute device, so that dropout repeats in recomputation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_state = torch.get_rng_state()
        self.device_state = _device_rng(device).get_rng_state(device) if device.type != "cpu" else None

    def drawn(self) -> bool:
        """Whether anything was drawn since this state was taken."""
        if not torch.equal(self.host_state, torch.get_rng_state()):
            return True
        if self.device_state is None:
            return False
        return not torch.equal(self.device_state, _device_rng(self.device).get_rng_state(self.device))

    def restore(self) -> None:
        torch.set_rng_state(self.host_state)
        if self.device_state is not None:
            _device_rng(self.device).set_rng_state(self.device_state, self.device)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        now = RandomState(self.device)
        self.restore()
        try:
            yield
        finally:
            now.restore()


def _device_rng(device: torch.device) -> Any:
    return torch.get_device_module(device)


class AutocastState:
    """Autocast as it is on this thread, for recomputation and for the threads of other micro-batches."""

    def __init__(self, device: torch.device) -> None:
        self._states = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys(("cpu", device.type))
        ]
        self._cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype in self._states:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self._cache))
            yield
