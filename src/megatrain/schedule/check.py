"""Proves on the operation list that no slot is reused before its readers are done. Independent of how it was built."""

from collections.abc import Mapping

from megatrain.schedule.operations import Kind, Operation, Schedule, Sizes


class ScheduleError(AssertionError):
    """A schedule that would compute with wrong weights or lose a gradient."""


def check_schedule(schedule: Schedule, sizes: Sizes) -> int:
    """Raise ScheduleError where `schedule` is wrong; returns the largest number of bytes it holds on the device:
    slots, saved inputs (from their visit to their backward visit, while not on the host), gradients that add up, and
    what a unit holds while it runs.

    What is proved: a slot is fetched into only while it is empty and large enough; every unit of a visit lies in a
    slot, fetched before and not released since, when the visit runs; all visits run, in order; what is saved is
    restored once, before its backward; each gradient leaves once, after its unit's last backward visit.
    """
    capacities = [c.slot_bytes for c in schedule.classes for _ in range(c.count)]
    state = _State(schedule, sizes, capacities)
    for position, operation in enumerate(schedule.operations):
        try:
            state.apply(operation)
        except ScheduleError as error:
            raise ScheduleError(f"operation {position} ({operation}): {error}") from None
    state.finish()
    return schedule.slot_bytes + state.peak_other_bytes


class _State:
    def __init__(self, schedule: Schedule, sizes: Sizes, capacities: list[int]) -> None:
        self.schedule = schedule
        self.sizes = sizes
        self.capacities = capacities
        self.slots: dict[int, int] = {}
        self.next_visit = 0
        self.on_host: set[int] = set()
        self.on_device: dict[int, int] = {}  # saved inputs
        self.sums: dict[int, int] = {}
        self.peak_other_bytes = 0
        self.offloaded: set[int] = set()

    def apply(self, operation: Operation) -> None:
        {
            Kind.FETCH: self._fetch,
            Kind.RELEASE: self._release,
            Kind.COMPUTE: self._compute,
            Kind.SAVE: self._save,
            Kind.RESTORE: self._restore,
            Kind.OFFLOAD: self._offload,
        }[operation.kind](operation)
        held = sum(self.on_device.values()) + sum(self.sums.values())
        if operation.kind is Kind.COMPUTE:
            held += sum(self.sizes.working.get(unit, 0) for unit in self.schedule.visits[operation.visit].units)
        self.peak_other_bytes = max(self.peak_other_bytes, held)

    def _fetch(self, op: Operation) -> None:
        _require(0 <= op.slot < len(self.capacities), f"there is no slot {op.slot}")
        _require(op.slot not in self.slots, f"slot {op.slot} still holds unit {self.slots.get(op.slot)}")
        _require(op.unit not in self.slots.values(), f"unit {op.unit} is in a slot already")
        _require(op.n_bytes == self.sizes.weights[op.unit], f"{op.n_bytes} bytes are not the unit's weights")
        _require(op.n_bytes <= self.capacities[op.slot], f"it does not fit into {self.capacities[op.slot]} bytes")
        self.slots[op.slot] = op.unit

    def _release(self, op: Operation) -> None:
        _require(self.slots.get(op.slot) == op.unit, f"slot {op.slot} holds {self.slots.get(op.slot)}")
        del self.slots[op.slot]

    def _compute(self, op: Operation) -> None:
        _require(op.visit == self.next_visit, f"visit {self.next_visit} is next")
        self.next_visit += 1
        visit = self.schedule.visits[op.visit]
        for unit in visit.units:
            _require(unit in self.slots.values(), f"unit {unit} is in no slot")
            _require(not (visit.backward and unit in self.on_host), f"inputs of unit {unit} are on the host")
            if visit.backward:
                self.on_device.pop(unit, None)
                self.sums[unit] = self.sizes.gradient_sums.get(unit, 0)
            elif self.sizes.saved_inputs.get(unit):
                self.on_device[unit] = self.sizes.saved_inputs[unit]

    def _save(self, op: Operation) -> None:
        _require(op.unit in self.on_device, "nothing to save")
        _require(op.n_bytes == self.on_device.pop(op.unit), "wrong number of bytes")
        self.on_host.add(op.unit)

    def _restore(self, op: Operation) -> None:
        _require(op.unit in self.on_host, "nothing was saved")
        self.on_host.discard(op.unit)
        self.on_device[op.unit] = op.n_bytes

    def _offload(self, op: Operation) -> None:
        _require(op.unit not in self.offloaded, "its gradient has left already")
        _require(op.n_bytes == self.sizes.gradients[op.unit], "wrong number of bytes")
        self.offloaded.add(op.unit)
        self.sums.pop(op.unit, None)

    def finish(self) -> None:
        visits = self.schedule.visits
        _require(self.next_visit == len(visits), f"visit {self.next_visit} of {len(visits)} never runs")
        _require(not self.on_host, f"inputs of units {sorted(self.on_host)} never come back")
        backwards = {unit for visit in visits if visit.backward for unit in visit.units}
        missing = {u for u in backwards if self.sizes.gradients.get(u)} - self.offloaded
        _require(not missing, f"gradients of units {sorted(missing)} never leave")
        self._check_offloads_come_last()

    def _check_offloads_come_last(self) -> None:
        last = {unit: n for n, visit in enumerate(self.schedule.visits) if visit.backward for unit in visit.units}
        for op in self.schedule.operations:
            if op.kind is Kind.OFFLOAD and op.unit in last:
                _require(op.visit >= last[op.unit], f"the gradient of unit {op.unit} leaves before its last backward")


def held_over_backward(schedule: Schedule) -> Mapping[int, bool]:
    """By unit with a forward and a backward visit: whether its slot is untouched from the one to the other."""
    visits = schedule.visits
    since_forward: dict[int, bool] = {}
    held: dict[int, bool] = {}
    for op in schedule.operations:
        if op.kind is Kind.RELEASE:
            since_forward[op.unit] = False
        elif op.kind is Kind.COMPUTE:
            for unit in visits[op.visit].units:
                if not visits[op.visit].backward:
                    since_forward[unit] = True
                elif unit in since_forward and unit not in held:
                    held[unit] = since_forward[unit]
    return held


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise ScheduleError(why)
