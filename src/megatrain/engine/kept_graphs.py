"""Which units keep their graph from forward to backward instead of being recomputed: the same bits in less time.

A forward and a backward cost three units of work, a recomputation a fourth; where memory is left over it is better
spent on not repeating it. What a unit's graph holds is measured in the first step, on runs whose saved tensors are
dropped afterwards; from the second step on as many of the last units keep theirs as fit into half of what was free.
"""

from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.model.partition import Unit

KeepGraphs = str | int  # 'auto', 'off', or the number of last units


def check_keep_graphs(value: KeepGraphs) -> None:
    """Raise ConfigError unless `value` is 'auto', 'off' or a whole number >= 0."""
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value not in ("auto", "off") and not number:
        raise ConfigError(f"engine.keep_graphs is {value!r}; it must be auto, off or a number of units")


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
        chosen, used = set(), 0
        for unit in reversed(self._units):
            used += self._measured.get(unit.index, 0) * elements // self._elements
            if used > self.budget_bytes:
                break
            chosen.add(unit.index)
        return chosen

    @property
    def measuring(self) -> bool:
        return self._elements < 0

    def finish_measuring(self, free_bytes: int) -> None:
        """The first step is over: `free_bytes` of memory are left beside everything that stays."""
        if self.measuring:
            self._elements = -self._elements
            self.budget_bytes = free_bytes // 2

    def meter(self, unit: Unit, given: list[Tensor]) -> "GraphMeter":
        return GraphMeter(self._measured, unit.index, given)


class GraphMeter:
    """Shown what one run's graph saves, adds up what it would hold beyond weights and inputs (`given`)."""

    def __init__(self, measured: dict[int, int], unit: int, given: list[Tensor]) -> None:
        self._measured = measured
        self._unit = unit
        self._seen = {t.untyped_storage().data_ptr() for t in given}
        self._alive: list[Tensor] = []  # an address is only unique while its tensor lives

    def __call__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(tensor)
            self._measured[self._unit] = self._measured.get(self._unit, 0) + storage.nbytes()
