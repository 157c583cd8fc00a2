"""Which units keep their graph from forward to backward instead of being recomputed: the same bits in less time.

A forward and a backward cost three units of work, a recomputation a fourth; where memory is left over it is better
spent on not repeating it. What a unit's graph holds is measured in the first step, on runs whose saved tensors are
dropped afterwards; from the second step on as many of the last units keep theirs as fit into half of what was free.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.model.partition import Unit

KeepGraphs = str | int  # 'auto', 'off', or the number of last units


def check_keep_graphs(value: KeepGraphs) -> None:
    """Raise ConfigError unless `value` is 'auto', 'off' or a whole number >= 0."""
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value not in ("auto", "off") and not number:
        raise ConfigError(f"engine.keep_graphs is {value!r}; it must be auto, off or a number of units")


def graph_budget(free_bytes: int) -> int:
    """What of the memory that is left graphs may take."""
    return free_bytes // 2


def last_that_fit(graph_bytes: Mapping[int, int], budget_bytes: int) -> set[int]:
    """As many of the last units as fit, of graphs by unit in their order."""
    chosen, used = set(), 0
    for unit, n_bytes in reversed([*graph_bytes.items()]):
        used += n_bytes
        if used > budget_bytes:
            break
        chosen.add(unit)
    return chosen


class KeptGraphs:
    """Chooses the units by measured bytes per label element. `budget_bytes` bounds the sum over all micro-batches."""

    def __init__(self, setting: KeepGraphs, units: list[Unit]) -> None:
        check_keep_graphs(setting)
        self.setting = setting
        self.budget_bytes = 0
        self._units = units
        self._measured: dict[int, int] = {}
        self._elements = 0

    def choose(self, elements: int) -> set[int] | None:
        """Units whose graphs fit, for a step with `elements` label elements in all; None: leave it as it is."""
        if isinstance(self.setting, int):
            return {unit.index for unit in self._units[max(0, len(self._units) - self.setting) :]}
        if self.setting == "off":
            return None
        if self._elements <= 0:  # this step measures (again, if an earlier one did not end)
            self._measured.clear()
            self._elements = -elements
            return set()
        graphs = {u.index: self._measured.get(u.index, 0) * elements // self._elements for u in self._units}
        return last_that_fit(graphs, self.budget_bytes)

    @property
    def measuring(self) -> bool:
        return self._elements < 0

    def finish_measuring(self, free_bytes: int) -> None:
        """The first step is over: `free_bytes` of memory are left beside everything that stays."""
        if self.measuring:
            self._elements = -self._elements
            self.budget_bytes = graph_budget(free_bytes)

    def meter(self, unit: Unit, given: list[Tensor]) -> "GraphMeter":
        return GraphMeter(self._measured, unit.index, given)


class GraphMeter:
    """Shown what one run's graph saves, adds up what it would hold beyond weights and inputs (`given`)."""

    def __init__(self, measured: dict[int, int], unit: int, given: list[Tensor]) -> None:
        self._measured = measured
        self._unit = unit
        self._seen = {t.untyped_storage().data_ptr() for t in given}
        # an address is only unique while its memory lives. Of a tensor only that: the tensor itself knows the graph,
        # which knows this hook, and nothing would ever free the three
        self._alive: list[torch.UntypedStorage] = []

    def __call__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(storage)
            self._measured[self._unit] = self._measured.get(self._unit, 0) + storage.nbytes()
