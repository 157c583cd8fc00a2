"""Steps and moments of the parameters as torch numbers them: along the param groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatrain.memory.store import HostStore, SlotState
from megatrain.model.partition import Partition


class OptimizerState:
    """Reads and writes what the store holds for each parameter in the `groups`."""

    def __init__(self, store: HostStore, part: Partition, groups: Sequence[Mapping[str, Any]]) -> None:
        slot_of = {id(slot.parameter): slot.index for slot in part.slots}
        self._store = store
        self._entries = [store.slots[slot_of[id(p)]] for group in groups for p in group["params"]]

    def read(self) -> dict[int, dict[str, Any]]:
        """By parameter number: step, exp_avg and exp_avg_sq (views, in the parameter's shape)."""
        return {number: _state_of(entry) for number, entry in enumerate(self._entries) if entry.steps}

    def write(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        for number, entry in enumerate(self._entries):
            if number not in state:
                self._store.reset_moments(entry.slot.index)
                continue
            entry.steps = int(state[number]["step"])
            views = _state_of(entry)
            for name in ("exp_avg", "exp_avg_sq"):
                views[name].copy_(state[number][name])


def _state_of(entry: SlotState) -> dict[str, Any]:
    slab = entry.slab
    return {
        "step": torch.tensor(float(entry.steps), device="cpu"),
        "exp_avg": entry.view(torch.from_numpy(slab.exp_avg)),
        "exp_avg_sq": entry.view(torch.from_numpy(slab.exp_avg_sq)),
    }
