"""What a unit changes besides returning a result, made to happen exactly once and with its gradient.

A unit runs twice, forward and recomputation, and its first run has gradients off. Each class below closes one hole
that this opens: outputs captured by hooks, tensors assigned to module attributes, buffers updated in place, random
numbers drawn, and autocast.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.errors import UnsupportedModelError


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


Attributes = dict[tuple[int, str], Any]  # by number of the module's dict in the unit and name


class WrittenAttributes:
    """Attributes and buffers of the unit's modules: those its forward assigns, and those that others set for it.

    A tensor that the forward assigns (`self.aux_loss = ...`) becomes an output of the node, so that it keeps its
    gradient. A list or dict into which it puts tensors cannot be followed and is refused. Whatever else it finds on
    its modules (a counter of its own, a flag or a mask that the model sets on them, training or evaluation mode),
    recomputation finds as it was. What is changed in place behind this record, `digest.Digest` notices.
    """

    def __init__(self, module: nn.Module, where: str) -> None:
        modules = list(module.modules())
        self._names = [type(m).__name__ for m in modules] * 2
        self._plain = len(
            modules
        )  # the first so many hold attributes, the rest buffers (`WrittenBuffers` follows those)
        self._holders: list[dict[str, Any]] = [*(m.__dict__ for m in modules), *(m._buffers for m in modules)]
        self._where = where
        self._left: Attributes = {}  # by the last run or the model, while it is watched
        self._set_by_model: set[tuple[int, str]] = set()
        self._kept: Attributes = {}
        self.known: set[tuple[int, str]] = set()  # attributes whose tensors the forward assigns

    def snapshot(self) -> Attributes:
        """What there is before a run."""
        return {key: _Listed(value) if isinstance(value, (list, dict)) else value for key, value in self._scan()}

    def watch(self) -> None:
        """A step with several micro-batches begins."""
        self._left = self._versions()
        self._set_by_model.clear()

    def ran(self) -> None:
        """What is there now, the unit has left."""
        self._left = self._versions()

    def shared(self, first: bool) -> str | None:
        """What the model has set since it was last looked: of micro-batches that run in turns, each would read the
        other's. The `first` one may set each attribute once: a model may set constants in its first forward."""
        found = self._versions()
        new = [key for key, value in found.items() if key not in self.known and _differ(value, self._left.get(key))]
        shared = [key for key in new if key in self._set_by_model or not first]
        self._set_by_model.update(new)
        self._left = found
        if not shared:
            return None
        number, name = shared[0]
        return (
            f"{self._where}: the model sets {self._names[number]}.{name} while it runs, and micro-batches that run in"
            " turns would read one another's; pass it as an argument, or give each step one micro-batch"
        )

    def written(self, before: Attributes, weights: Iterable[Tensor]) -> tuple[list[tuple[Any, str]], list[Tensor]]:
        """(places, tensors) that the run assigned: each place is a dict and a name in it. A list of the unit's own
        `weights` (recurrent layers make one) is put back. Raises UnsupportedModelError for a container it changed or
        deleted."""
        places, tensors = [], []
        own = {id(w) for w in weights}
        for (number, name), value in list(self._scan()):
            was = before.get((number, name))
            if number >= self._plain:
                continue
            if isinstance(value, Tensor) and value is not was:
                places.append((self._holders[number], name))
                tensors.append(value)
                self.known.add((number, name))
            elif isinstance(value, (list, dict)) and (was is None or not was.same(value)):
                if not isinstance(was, _Listed) or any(
                    isinstance(v, Tensor) and id(v) not in own for v in _items(value)
                ):
                    raise UnsupportedModelError(
                        f"{self._where}: its forward puts tensors into the attribute {name}; recomputation would put"
                        " them there twice. Return them, or assign a tensor to an attribute"
                    )
                self._holders[number][name] = was.original
        for (number, name), was in before.items():
            if isinstance(was, _Listed) and name not in self._holders[number]:
                raise UnsupportedModelError(
                    f"{self._where}: its forward deletes the attribute {name}, a list or dict that recomputation would"
                    " not find again; set it to None instead, or pass it as an argument"
                )
        return places, tensors

    def worth_keeping(self, found: Attributes) -> Attributes:
        """Of what a run found: not lists, and not tensors of the forward's own that hold other calls' graphs. Most
        calls find the same, and share one record of it."""
        kept = {
            key: value
            for key, value in found.items()
            if not isinstance(value, _Listed)
            and not (key in self.known and isinstance(value, Tensor) and value.requires_grad)
        }
        if kept.keys() != self._kept.keys() or any(_differ(value, self._kept[k]) for k, value in kept.items()):
            self._kept = kept
        return self._kept

    @contextmanager
    def replaying(self, found: Attributes) -> Iterator[None]:
        """Run with everything as the forward found it, and leave it as it is now."""
        restore = self.save()
        current = []
        for (number, name), value in found.items():
            holder = self._holders[number]
            now = holder.get(name, _DELETED)
            if _differ(now, value):
                current.append((holder, name, now))
                holder[name] = value
        try:
            yield
        finally:
            for holder, name, now in current:
                if now is not _DELETED:
                    holder[name] = now
                else:
                    holder.pop(name, None)
            restore()

    def save(self) -> Callable[[], None]:
        """Remember the assigned tensors; the result puts them back (another micro-batch may run in between)."""
        values = [
            (self._holders[n], name, self._holders[n][name]) for n, name in self.known if name in self._holders[n]
        ]

        def restore() -> None:
            for holder, name, value in values:
                holder[name] = value

        return restore

    def _versions(self) -> Attributes:
        """What there is, with the version of each tensor: changing it in place counts as setting it."""
        return {k: _Version(v, v._version) if isinstance(v, Tensor) else v for k, v in self.snapshot().items()}

    def _scan(self) -> Iterator[tuple[tuple[int, str], Any]]:
        for number, holder in enumerate(self._holders):
            for name, value in holder.items():
                if name not in _MODULE_ATTRIBUTES and not isinstance(value, _NOT_FOLLOWED):
                    yield (number, name), value


@dataclass(frozen=True, slots=True)
class _Version:
    tensor: Tensor
    version: int


class _Listed:
    """A list or dict and what was in it."""

    def __init__(self, container: Any) -> None:
        self.original = container
        self.content = [id(v) if isinstance(v, Tensor) else v for v in _items(container) if isinstance(v, _COMPARED)]

    def same(self, container: Any) -> bool:
        return self.content == _Listed(container).content


_DELETED = object()  # by the forward, which found it
_COMPARED = (Tensor, int, float, str, type(None))
_NOT_FOLLOWED = (nn.Module, set)
_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__) - {"training"} | {"forward", "_apply", "to", "__reduce_ex__"}


def _items(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _differ(value: Any, other: Any) -> bool:
    """Whether two found values are not the same: numbers and text by value, all else by identity."""
    if isinstance(value, (bool, int, float, str)) and isinstance(other, (bool, int, float, str)):
        return bool(value != other)
    if isinstance(value, _Version) and isinstance(other, _Version):
        return value.tensor is not other.tensor or value.version != other.version
    if isinstance(value, _Listed) and isinstance(other, _Listed):
        return value.original is not other.original or value.content != other.content
    return value is not other


@dataclass(frozen=True, slots=True)
class BufferState:
    """A buffer before a run: the tensor, its version, and a copy of its value (None where it is large and has not
    been seen to change)."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int
    value: Tensor | None


class WrittenBuffers:
    """Buffers that the unit's forward updates (running statistics): updated once, not again by recomputation.

    Values are compared, not only versions: batch normalisation writes its statistics past the version counter.
    """

    _LARGE_BYTES = 1024**2
    _LOOK_RUNS = 8

    def __init__(self, module: nn.Module, where: str) -> None:
        self._owners = [m for m in module.modules() if m._buffers]
        self._where = where
        self._runs = 0
        self._written: set[tuple[int, str]] = set()

    def before(self) -> list[BufferState]:
        """State of every buffer. The first run copies large ones too, to learn which of them change."""
        self._runs += 1
        states = []
        for owner in self._owners:
            for name, tensor in owner._buffers.items():
                if tensor is not None:
                    copied = (id(owner), name) in self._written or self._compares(tensor)
                    value = tensor.clone() if copied else None
                    states.append(BufferState(owner, name, tensor, tensor._version, value))
        return states

    def changed(self, states: list[BufferState]) -> list[BufferState]:
        """Of `states`, those that the run changed or replaced; what recomputation has to start from."""
        found = []
        for state in states:
            tensor = state.module._buffers.get(state.name)
            if tensor is None:
                raise UnsupportedModelError(f"{self._where}: its forward removed the buffer {state.name}")
            same = tensor is state.tensor and tensor._version == state.version
            if same and (state.value is None or not self._changed_past_counter(state, tensor)):
                continue
            if state.value is None:
                raise UnsupportedModelError(f"{self._where}: its forward changed the large buffer {state.name}")
            self._written.add((id(state.module), state.name))
            found.append(state)
        return found

    def _compares(self, tensor: Tensor) -> bool:
        """Whether to compare values, on a device which waits for that only while the model is being learnt."""
        if tensor.device.type != "cpu":
            return self._runs <= self._LOOK_RUNS
        return self._runs == 1 or tensor.nbytes <= self._LARGE_BYTES

    def _changed_past_counter(self, state: BufferState, tensor: Tensor) -> bool:
        assert state.value is not None
        if not self._compares(tensor):
            return True  # it is known to change
        equal = torch.equal(tensor, state.value)
        return not equal and not bool(torch.isnan(tensor).any())  # a NaN is unequal to itself

    @staticmethod
    @contextmanager
    def replaying(states: list[BufferState]) -> Iterator[None]:
        """Run with copies of the buffers as the forward found them; the real ones stay as they are."""
        now = [(state, state.module._buffers[state.name]) for state in states]
        for state in states:
            assert state.value is not None
            state.module._buffers[state.name] = state.value.clone()
        try:
            yield
        finally:
            for state, tensor in now:
                state.module._buffers[state.name] = tensor


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


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Autocast keeps a cast copy of every weight it meets until its context ends: not of weights that come and go."""
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)
