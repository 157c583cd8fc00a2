"""From the order in which units are visited to the operations of a pass. Pure functions."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatrain.schedule.operations import Kind, Operation, Schedule, Sizes, SlotClass, Visit, class_of

_NEVER = 1 << 60


def build_schedule(
    visits: Sequence[Visit],
    sizes: Sizes,
    classes: Sequence[SlotClass],
    *,
    readers: Mapping[int, Iterable[int]] | None = None,
) -> Schedule:
    """The operations of a pass over `visits`, with every fetch as early as its slot allows.

    A unit that is not in a slot replaces the one whose next visit is farthest (L. Belady, "A study of replacement
    algorithms for a virtual-storage computer", 1966): going backward, the last units of the forward are still there.
    `readers`: units that read parameters whose gradient belongs to a unit; it leaves after the last of their backward
    visits.
    """
    slots = _Slots(classes, visits)
    fetches: dict[int, list[tuple[Operation, ...]]] = {}  # by the visit after which they may be issued (-1: at once)
    held: set[int] = set()
    earliest = -1
    for number, visit in enumerate(visits):
        for unit in visit.units:
            if unit in slots.where:
                if visit.backward and not visits[slots.last_visit[unit]].backward:
                    held.add(unit)
            else:
                free_after, operations = slots.fetch(number, unit, sizes.weights[unit])
                earliest = max(earliest, free_after)  # copies are carried out in the order of their issue
                fetches.setdefault(earliest, []).append(operations)
            slots.last_visit[unit] = number
    return Schedule(
        tuple(visits), tuple(_in_order(visits, sizes, fetches, readers or {})), tuple(classes), frozenset(held)
    )


@dataclass(slots=True)
class _Slots:
    """What lies where while the visits are gone through."""

    classes: Sequence[SlotClass]
    visits: Sequence[Visit]
    where: dict[int, int] = field(default_factory=dict)  # unit -> slot
    holds: dict[int, int] = field(default_factory=dict)  # slot -> unit
    last_visit: dict[int, int] = field(default_factory=dict)  # of a unit
    uses: dict[int, list[int]] = field(default_factory=dict)  # visits of a unit

    def __post_init__(self) -> None:
        for number, visit in enumerate(self.visits):
            for unit in visit.units:
                self.uses.setdefault(unit, []).append(number)

    def fetch(self, number: int, unit: int, n_bytes: int) -> tuple[int, tuple[Operation, ...]]:
        """(visit after which the slot is free, the operations that bring `unit` there for visit `number`)."""
        slot = self._choose(number, n_bytes)
        free_after, operations = -1, []
        before = self.holds.get(slot)
        if before is not None:
            free_after = self.last_visit[before]
            operations.append(Operation(Kind.RELEASE, free_after, before, slot))
            del self.where[before]
        self.holds[slot], self.where[unit] = unit, slot
        operations.append(Operation(Kind.FETCH, number, unit, slot, n_bytes))
        return free_after, tuple(operations)

    def _choose(self, number: int, n_bytes: int) -> int:
        wanted = class_of(n_bytes, [c.slot_bytes for c in self.classes])
        first = sum(c.count for c in self.classes[:wanted])
        candidates = range(first, first + self.classes[wanted].count)
        empty = [slot for slot in candidates if slot not in self.holds]
        if empty:
            return empty[0]
        needed_now = set(self.visits[number].units)
        movable = [slot for slot in candidates if self.holds[slot] not in needed_now]
        if not movable:
            raise ValueError(f"visit {number} needs more units at once than there are slots: {self.visits[number]}")
        return max(
            movable, key=lambda slot: (self._next_use(self.holds[slot], number), -self.last_visit[self.holds[slot]])
        )

    def _next_use(self, unit: int, after: int) -> int:
        uses = self.uses[unit]
        position = bisect_right(uses, after)
        return uses[position] if position < len(uses) else _NEVER


def _in_order(
    visits: Sequence[Visit],
    sizes: Sizes,
    fetches: Mapping[int, list[tuple[Operation, ...]]],
    readers: Mapping[int, Iterable[int]],
) -> list[Operation]:
    """Fetches as early as they may be; each restore one visit ahead of its use; gradients once they are complete."""
    restores, saves = _saved_inputs(visits, sizes)
    complete = _gradients_complete(visits, sizes, readers)
    operations = [op for group in fetches.get(-1, ()) for op in group]
    for number in range(len(visits)):
        operations += restores.get(number, ())
        operations.append(Operation(Kind.COMPUTE, number))
        operations += saves.get(number, ())
        operations += [
            Operation(Kind.OFFLOAD, number, unit, n_bytes=sizes.gradients[unit]) for unit in complete.get(number, ())
        ]
        operations += [op for group in fetches.get(number, ()) for op in group]
    return operations


def _saved_inputs(
    visits: Sequence[Visit], sizes: Sizes
) -> tuple[dict[int, list[Operation]], dict[int, list[Operation]]]:
    """(restores by the visit before which they are issued, saves by the visit after which)."""
    restores: dict[int, list[Operation]] = {}
    saves: dict[int, list[Operation]] = {}
    for unit, n_bytes in sizes.saved_inputs.items() if sizes.inputs_leave else ():
        turns = [(number, visit.backward) for number, visit in enumerate(visits) if unit in visit.units]
        # one forward, one backward, and time between them to leave and come back; else inputs stay where they are
        if n_bytes and [backward for _, backward in turns] == [False, True] and turns[1][0] - turns[0][0] > 2:
            (forward, _), (backward, _) = turns
            saves.setdefault(forward, []).append(Operation(Kind.SAVE, forward, unit, n_bytes=n_bytes))
            restores.setdefault(backward - 1, []).append(Operation(Kind.RESTORE, backward, unit, n_bytes=n_bytes))
    return restores, saves


def _gradients_complete(
    visits: Sequence[Visit], sizes: Sizes, readers: Mapping[int, Iterable[int]]
) -> dict[int, list[int]]:
    """Units whose gradient is complete after a visit: the last backward visit of all that read their parameters."""
    last_backward = {unit: number for number, visit in enumerate(visits) if visit.backward for unit in visit.units}
    complete: dict[int, list[int]] = {}
    for unit, n_bytes in sizes.gradients.items():
        ends = [last_backward[reader] for reader in readers.get(unit, (unit,)) if reader in last_backward]
        if ends and n_bytes:
            complete.setdefault(max(ends), []).append(unit)
    return complete
