"""SHA-256 of what is held of a unit, to compare it with what it was: weights, remainders, moments, counters.

Of each tensor by itself, so that several are hashed at once, and then of the list of them, sorted by name:

    exp_avg.lm_head.weight float32 96x32 SHA-256
    steps.lm_head.weight 100

It does not depend on where and how the unit lies: host, disk or device, in one piece or several.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import torch
from torch import Tensor

from megatrain.memory.store import HostStore, SlotState

BUFFERS = "all buffers"  # beside the units' names, which have no spaces


class UnitHash:
    """Of one unit. Tensors are hashed by the threads of `pool`, and must not change before `wait` returns."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._tensors: dict[str, tuple[str, Future[str]]] = {}
        self._counts: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        told = f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
        self._tensors[name] = told, self._pool.submit(tensor_sha256, tensor)

    def add_parameter(self, entry: SlotState, state: Mapping[str, Tensor], steps: int) -> None:
        """`state`: as the store reads it."""
        name = entry.slot.name
        self.add(f"weight.{name}", entry.weight)
        for kind, tensor in state.items():
            self.add(f"{kind}.{name}", tensor)
        self._counts.append(f"steps.{name} {steps}\n")

    def wait(self) -> None:
        for _, done in self._tensors.values():
            done.result()

    def hexdigest(self) -> str:
        lines = [f"{name} {told} {done.result()}\n" for name, (told, done) in self._tensors.items()]
        return hashlib.sha256("".join(sorted(lines + self._counts)).encode()).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Of its elements in order, wherever they are."""
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def hash_buffers(pool: Executor, buffers: Mapping[str, Tensor]) -> str:
    found = UnitHash(pool)
    for name, tensor in buffers.items():
        found.add(name, tensor)
    return found.hexdigest()


def hash_units(
    store: HostStore, names: Mapping[int, str], buffers: Mapping[str, Tensor], threads: int
) -> dict[str, str]:
    """By name, of everything that `store` holds, whose updates are done, and of `buffers`."""
    slots: dict[int, list[int]] = {}
    for index, entry in store.slots.items():
        slots.setdefault(entry.unit, []).append(index)
    with ThreadPoolExecutor(threads, "hash") as pool:
        found = {names[unit]: _hash_unit(store, slots.get(unit, ()), pool) for unit in store.units}
        return found | {BUFFERS: hash_buffers(pool, buffers)}


def _hash_unit(store: HostStore, slots: Iterable[int], pool: Executor) -> str:
    found = UnitHash(pool)
    for index in slots:
        entry = store.slots[index]
        if entry.place.trainable:
            store.notice_silent_write(entry)
        found.add_parameter(entry, store.read_state(index) if entry.place.trainable else {}, entry.steps)
        found.wait()  # no more than one parameter's state is held beside the store
    return found.hexdigest()
