"""Where a unit's weights are while it computes: what the executor asks, and the host's answer.

The host as its own device binds weights where they lie. `weight_stream` copies them to a device with memory of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from megatrain.engine.host_checks import HostChecks
from megatrain.engine.saved_inputs import SavedInputs
from megatrain.engine.updates import PendingUpdates
from megatrain.memory.arena import trim_freed_memory
from megatrain.memory.store import ALL_UNITS_STRAY
from megatrain.model.partition import Partition, Unit

STEP, FREE, EVALUATION = "step", "free", "evaluation"  # kinds of pass; FREE: under a caller's own loop
_LARGE_UNIT_BYTES = 64 * 1024**2


class Weights:
    """Weights by unit, on the compute device. Where nothing is copied, most of this has nothing to do."""

    fetched_bytes = 0
    exposed_seconds = 0.0  # computation waited for the host's updates
    unit_bytes: dict[int, int]
    inputs: SavedInputs | None = None  # keeps units' inputs from forward to backward; None: autograd does

    def begin(self, kind: str, elements: int = 0) -> None:
        """A pass of this kind begins, over a batch of so many label elements (0: not known)."""

    def further_forward(self, elements: int) -> None:
        """Another forward of the pass, which counts where the pass is a caller's own loop."""

    def end(self) -> None:
        """It is over."""

    def abort(self) -> None:
        """It was broken off."""

    def forget(self) -> None:
        """What was fetched so far was no pass to learn from."""

    def fetch(self, unit: Unit, *, backward: bool, together: bool) -> dict[int, Tensor]:
        """Weights on the compute device by slot index. They stay there until another unit is fetched; those fetched
        `together`, until one is fetched that is not."""
        raise NotImplementedError

    def held_units(self) -> frozenset[int] | None:
        """Units whose weights stay from forward to backward; None: all."""
        return None

    def pin(self, unit: int) -> None:
        """A graph over the unit's weights is kept: they stay until `unpin`, whatever comes."""

    def unpin(self, unit: int) -> None:
        """One graph less."""

    def check(self) -> None:
        """Raise IntegrityError where weights that have arrived are not what they were in host memory. Computation with
        them has been given to the device."""

    def before_update(self) -> None:
        """Raise as `check` does. Return when nothing reads the host's weights any more: they are about to change."""

    def changed(self) -> None:
        """The host's weights have changed."""

    @contextmanager
    def holding(self, n_bytes: int) -> Iterator[None]:
        """Computation has so many bytes on the compute device meanwhile, besides what units leave there."""
        yield

    def waited_seconds(self) -> dict[str, float]:
        """How long computation stood still for copies since the last call, by the name of the wait. It is over up to
        now."""
        return {}

    def close(self) -> None:
        """No pass comes after this."""


class HostWeights(Weights):
    """The host as its own device: nothing is copied."""

    def __init__(self, part: Partition, updates: PendingUpdates, checks: HostChecks | None = None) -> None:
        self._updates = updates
        self._checks = checks
        self._weights = {unit.index: {s.index: s.parameter.detach() for s in unit.slots} for unit in part.units}
        self.unit_bytes = {u: sum(w.nbytes for w in weights.values()) for u, weights in self._weights.items()}
        self._fetched = -1

    def begin(self, kind: str, elements: int = 0) -> None:
        if self._checks is not None:
            self._checks.before_use(ALL_UNITS_STRAY)  # no call says when they are read

    def fetch(self, unit: Unit, *, backward: bool, together: bool) -> dict[int, Tensor]:
        self._updates.wait_for(unit)
        if self._fetched != unit.index:  # the next micro-batch finds the weights still there
            self._fetched = unit.index
            if self.unit_bytes[unit.index] >= _LARGE_UNIT_BYTES:
                trim_freed_memory()  # small blocks lie free in the heap; its gradient needs large ones of its own
            if self._checks is not None:
                self._checks.before_use(unit.index)
            self.fetched_bytes += self.unit_bytes[unit.index]
        return self._weights[unit.index]

    def changed(self) -> None:
        self._fetched = -1
