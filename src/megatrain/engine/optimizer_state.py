"""Steps and moments of the parameters as torch numbers them: along the param groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatrain.errors import ConfigError
from megatrain.memory.slab_state import MOMENTS
from megatrain.memory.store import HostStore, SlotState
from megatrain.model.partition import Partition
from megatrain.optim.int8_moments import blocks


class OptimizerState:
    """Reads and writes what the store holds for each parameter in the `groups`."""

    def __init__(self, store: HostStore, part: Partition, groups: Sequence[Mapping[str, Any]]) -> None:
        slot_of = {id(slot.parameter): slot.index for slot in part.slots}
        self._store = store
        self._entries = [store.slots[slot_of[id(p)]] for group in groups for p in group["params"]]

    def read(self) -> dict[int, dict[str, Any]]:
        """By parameter number: step, exp_avg and exp_avg_sq in the parameter's shape (views of float32, copies where
        the state is on disk; with moments of one byte int8 and uint8, and the scales of their blocks)."""
        return {number: self._state_of(entry) for number, entry in enumerate(self._entries) if entry.steps}

    def write(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Raises ConfigError for moments of another kind."""
        for number, entry in enumerate(self._entries):
            if number not in state:
                self._store.reset_moments(entry.slot.index)
                continue
            for name, dtype in MOMENTS[self._store.moments].items():
                self._check(state[number], name, dtype)
                self._check_shape(entry, name, state[number][name])
            entry.steps = int(state[number]["step"])
            self._store.write_moments(entry.slot.index, state[number])

    def _state_of(self, entry: SlotState) -> dict[str, Any]:
        step = torch.tensor(float(entry.steps), device="cpu")
        return {"step": step} | self._store.read_moments(entry.slot.index)

    def _check(self, given: Mapping[str, Any], name: str, dtype: torch.dtype) -> None:
        same_kind = name in given and given[name].is_floating_point() == dtype.is_floating_point
        if not same_kind or not (dtype.is_floating_point or given[name].dtype == dtype):
            held = given["exp_avg"].dtype
            raise ConfigError(f"optimizer.moments is {self._store.moments}; the state given holds {held}")

    def _check_shape(self, entry: SlotState, name: str, given: torch.Tensor) -> None:
        place = entry.place
        expected = (blocks(place.count),) if name.endswith("scale") else place.shape
        if tuple(given.shape) != expected:
            raise ConfigError(
                f"optimizer state of {entry.slot.name}: {name} has the shape {list(given.shape)}; it must be"
                f" {list(expected)}"
            )
