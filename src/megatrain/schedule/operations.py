"""What a pass over the model consists of, as plain data. Nothing here imports torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise


class Kind(Enum):
    """FETCH copies a unit's weights into a device slot, COMPUTE runs the units of one visit, RELEASE gives a slot up.

    SAVE and RESTORE move a unit's saved inputs to the host and back, OFFLOAD brings its gradient to the host, UPDATE
    is the host's optimizer. The first five are in the order in which the executor issues them; OFFLOAD and UPDATE
    follow the visit whose end makes them possible.
    """

    FETCH = "fetch"
    COMPUTE = "compute"
    RELEASE = "release"
    SAVE = "save"
    RESTORE = "restore"
    OFFLOAD = "offload"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Visit:
    """Units that the pass needs at the same time: one, but for a head that consists of several. All micro-batches run
    during one visit. `backward`: its first run is a backward."""

    units: tuple[int, ...]
    backward: bool = False


@dataclass(frozen=True, slots=True)
class SlotClass:
    """`count` device slots of `slot_bytes` each."""

    slot_bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class Operation:
    """One entry of a schedule. `visit` numbers the visit it belongs to; `unit` is -1 for COMPUTE, `slot` -1 where
    none is concerned."""

    kind: Kind
    visit: int
    unit: int = -1
    slot: int = -1
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes by unit: of its weights and its gradient as they cross the link, of its saved inputs (all micro-batches
    together), of its gradient as it adds up on the device, and of what there is only while it runs. `inputs_leave`:
    saved inputs wait on the host."""

    weights: Mapping[int, int]
    gradients: Mapping[int, int]
    saved_inputs: Mapping[int, int]
    inputs_leave: bool = True
    gradient_sums: Mapping[int, int] = field(default_factory=dict)
    working: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A pass as a list of operations. Slots are numbered through all classes, in their order.

    `held`: units whose weights stay in their slot from their last forward to their first backward visit, so that a
    graph may be kept over it.
    """

    visits: tuple[Visit, ...]
    operations: tuple[Operation, ...]
    classes: tuple[SlotClass, ...]
    held: frozenset[int]

    def total_bytes(self, *kinds: Kind) -> int:
        return sum(op.n_bytes for op in self.operations if op.kind in kinds)

    @property
    def h2d_bytes(self) -> int:
        """Bytes copied to the device."""
        return self.total_bytes(Kind.FETCH, Kind.RESTORE)

    @property
    def d2h_bytes(self) -> int:
        """Bytes copied from the device."""
        return self.total_bytes(Kind.OFFLOAD, Kind.SAVE)

    @property
    def slot_bytes(self) -> int:
        return sum(c.slot_bytes * c.count for c in self.classes)


def slot_classes(unit_bytes: Mapping[int, int], visits: Sequence[Visit], per_class: int) -> tuple[SlotClass, ...]:
    """Size classes for `unit_bytes`: a slot is at most a third larger than what it holds. A class gets `per_class`
    slots, fewer where it has fewer units, one where no two visits in a row need it."""
    capacities: list[int] = []
    for size in sorted(unit_bytes.values(), reverse=True):
        if not capacities or size * 4 < capacities[-1] * 3:
            capacities.append(size)
    return tuple(SlotClass(c, _slots_needed(c, capacities, unit_bytes, visits, per_class)) for c in capacities)


def class_of(n_bytes: int, capacities: Sequence[int]) -> int:
    """Number of the smallest class that holds `n_bytes`; `capacities` descend."""
    return max(number for number, capacity in enumerate(capacities) if capacity >= n_bytes)


def _slots_needed(
    capacity: int, capacities: Sequence[int], unit_bytes: Mapping[int, int], visits: Sequence[Visit], per_class: int
) -> int:
    members = {u for u, n in unit_bytes.items() if capacities[class_of(n, capacities)] == capacity}
    together = max((len(members & set(v.units)) for v in visits), default=1)
    neighbours = any(len(members & (set(a.units) | set(b.units))) > 1 for a, b in pairwise(visits))
    wanted = per_class if neighbours or not visits else 1
    return max(together, min(wanted, len(members)))
