"""Weights on a device with memory of its own: each unit's are copied into a slot before it computes.

A schedule is played: the first pass of a kind is fetched unit by unit as it comes and recorded; from the second on,
each arrival issues everything that the schedule has up to that visit, so that copies run ahead. A pass that takes
another way is fetched as it comes from there on, said once, and recorded anew.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from megatrain.device.base import StreamingDevice
from megatrain.engine.device_checks import DeviceChecks
from megatrain.engine.device_slots import DeviceSlot, Fetch, UnitImage
from megatrain.engine.host_thread import HostThread
from megatrain.engine.saved_inputs import SavedInputs
from megatrain.engine.updates import PendingUpdates
from megatrain.engine.weights import EVALUATION, FREE, STEP, Weights
from megatrain.errors import CapacityError
from megatrain.memory.checksum import SUMS_BYTES
from megatrain.memory.store import ALL_UNITS_STRAY, HostStore
from megatrain.model.partition import Partition, Unit
from megatrain.schedule.build import build_schedule
from megatrain.schedule.check import check_schedule
from megatrain.schedule.operations import Kind, Schedule, Sizes, SlotClass, Visit, class_of, slot_classes
from megatrain.schedule.walk import Walk

DEFAULT_SLOTS = 2  # one computes, the next one arrives
_SMALL_UNIT_SHARE = 64  # units below this fraction of the largest have device memory of their own


def small_units(unit_bytes: Mapping[int, int]) -> set[int]:
    """Units that have device memory of their own: what they take is nothing beside a slot of the largest."""
    largest = max(unit_bytes.values(), default=0)
    return {u for u, n in unit_bytes.items() if n * _SMALL_UNIT_SHARE <= largest}


@dataclass(frozen=True, slots=True)
class Order:
    """What the last recorded pass of a kind did: visits, bytes of saved inputs by unit, the most of them at a time, and
    whether they left the device, elements, peak device bytes, the bytes among them that were allocated for good, and
    the small units, in the order of their first use."""

    visits: tuple[Visit, ...]
    inputs: dict[int, int]
    inputs_bytes: int
    inputs_left: bool
    elements: int
    peak_bytes: int
    fixed_bytes: int
    small: tuple[int, ...]


class WeightStream(Weights):
    """Copies each unit's weights into a device slot before it computes. `slots_per_class`: how many units of about
    the same size may be there at once. `checks`: looks at what has arrived; None: nobody does."""

    def __init__(
        self,
        device: StreamingDevice,
        store: HostStore,
        part: Partition,
        updates: PendingUpdates,
        slots_per_class: int,
        checks: DeviceChecks | None = None,
    ) -> None:
        self._device = device
        self._checks = checks
        self._updates = updates
        self._per_class = slots_per_class
        self.inputs: SavedInputs = SavedInputs(device)
        self._units = {unit.index: unit for unit in part.units}
        # weights that are on the device for good
        self._residents = {
            u.index: {slot.index: slot.parameter.detach() for slot in u.slots}
            for u in part.units
            if u.index in store.on_device
        }
        streamed_units = [unit for unit in part.units if unit.index not in self._residents]
        self._images = {unit.index: UnitImage.of(unit.index, unit.slots, store) for unit in streamed_units}
        self.unit_bytes = {u: image.n_bytes for u, image in self._images.items()}
        self._homes = {unit.index: sorted({slot.units[0] for slot in unit.slots}) for unit in part.units}
        self._small = small_units(self.unit_bytes)
        # a fetch ahead of all others must not wait for the update of a large unit
        self._ahead = frozenset(u for u in self._small if self._small.issuperset(self._homes[u]))
        updates.first = self._ahead
        self._fixed_bytes = 0
        self._own = {u: self._new_slot(self.unit_bytes[u]) for u in sorted(self._small)}
        self._strays: DeviceSlot | None = None
        if part.strays:
            self._images[ALL_UNITS_STRAY] = UnitImage.of(ALL_UNITS_STRAY, part.strays, store)
            self._homes[ALL_UNITS_STRAY] = [ALL_UNITS_STRAY]
            self._strays = self._new_slot(self._images[ALL_UNITS_STRAY].n_bytes)
        streamed = {u: n for u, n in self.unit_bytes.items() if u not in self._small}
        self._streamed_bytes = streamed
        self._classes = tuple(SlotClass(c.slot_bytes, 1) for c in slot_classes(streamed, (), 1))
        self._slots: list[list[DeviceSlot]] = [[self._new_slot(c.slot_bytes)] for c in self._classes]
        self._issuer = HostThread("copy-issuer")
        self._orders: dict[str, Order] = {}
        self._schedules: dict[tuple[str, bool], Schedule] = {}
        self._walk = Walk("", None)
        self._pinned: Counter[int] = Counter()  # kept graphs by unit
        self._outer: list[Walk] = []
        self._told = False
        self._last_fetch: Fetch | None = None

    # -- a pass -----------------------------------------------------------------------------------------------

    def begin(self, kind: str, elements: int = 0) -> None:
        if self._walk.kind:  # a pass inside another: an evaluation between a forward and its backward
            self._walk.deviated = True
            self._outer.append(self._walk)
        else:
            self.inputs.begin()
            self._device.start_step()
            self.inputs.offload(self._inputs_must_leave(kind, elements))
            if self._checks is not None:
                self._checks.check_residents()
        schedule = self.schedule_of(kind)
        saves = {op.unit for op in schedule.operations if op.kind is Kind.SAVE} if schedule is not None else self._units
        self.inputs.staying = frozenset(self._units).difference(saves)
        self._walk = Walk(kind, schedule, elements)
        self._device.waits.counting = kind in (STEP, FREE)  # nobody asks how long an evaluation waited
        self._forget_slots()
        order = self._orders.get(kind)
        for unit in order.small if order is not None else ():
            self._issue(unit, self._own[unit])  # on demand they would come behind large units that are copied ahead

    def further_forward(self, elements: int) -> None:
        walk = self._walk
        if walk.kind != FREE:
            return
        walk.further_forward(elements)
        if not self.inputs.offloading and self._inputs_must_leave(FREE, walk.elements):
            self.inputs.offload(True)
            self.inputs.staying = frozenset()

    def end(self) -> None:
        walk = self._walk
        if not walk.kind:
            return
        if walk.visits and (walk.schedule is None or walk.deviated):
            self._learn(walk)
        self._walk = self._outer.pop() if self._outer else Walk("", None)
        self._device.waits.counting = self._walk.kind in (STEP, FREE)
        self._forget_slots()

    def _inputs_must_leave(self, kind: str, elements: int) -> bool:
        """Whether a pass of this size might not fit if the units' inputs stayed on the device."""
        memory, known = self._device.memory_bytes, self._orders.get(kind)
        if memory is None:
            return False
        if known is None or not (elements and known.elements):
            return True  # too little is known to let them stay
        needed = known.peak_bytes + (known.inputs_bytes if known.inputs_left else 0)
        return needed * max(1.0, elements / known.elements) + self._fixed_bytes - known.fixed_bytes > memory

    def abort(self) -> None:
        """The pass ended in an exception: what it recorded is no order to follow."""
        self._outer.clear()
        self._walk = Walk("", None)
        self._issuer.drain()
        with suppress(Exception):  # of the pass that is being given up
            self._device.drain()  # memory that copies still write to must not be freed
        self._device.waits.forget()
        if self._checks is not None:
            self._checks.forget()
        self._forget_slots()

    def forget(self) -> None:
        self._orders.clear()
        self._schedules.clear()

    def fetch(self, unit: Unit, *, backward: bool, together: bool) -> dict[int, Tensor]:
        if not self._walk.kind:
            self._updates.flush()  # called outside the model's forward, by code that may read other weights itself
        if unit.index in self._residents:
            return self._residents[unit.index]
        if unit.index in self._small:
            slot = self._own[unit.index]
            self._walk.use_small(unit.index)
            if slot.fetch is None:
                self._issue(unit.index, slot)
        else:
            slot = self._visit(unit.index, backward, together)
        self._await(slot)
        return slot.views

    def strays(self) -> dict[int, Tensor]:
        """Parameters that belong to no unit, on the device until the next step."""
        if self._strays is None:
            return {}
        if self._strays.fetch is None:
            self._issue(ALL_UNITS_STRAY, self._strays)
        self._await(self._strays)
        return self._strays.views

    def held_units(self) -> frozenset[int] | None:
        walk = self._walk
        # in a caller's own loop an evaluation may come in between
        followed = walk.kind == STEP and walk.schedule is not None and not walk.deviated
        held = walk.schedule.held if followed and walk.schedule is not None else frozenset()
        return held.union(self._residents)

    @contextmanager
    def holding(self, n_bytes: int) -> Iterator[None]:
        self._device.hold(n_bytes)
        try:
            yield
        finally:
            self._device.hold(-n_bytes)

    def pin(self, unit: int) -> None:
        self._pinned[unit] += 1

    def unpin(self, unit: int) -> None:
        if self._pinned[unit]:
            self._pinned[unit] -= 1

    def check(self) -> None:
        if self._checks is not None:
            self._checks.finish()

    def before_update(self) -> None:
        self.check()
        fetch, self._last_fetch = self._last_fetch, None
        if fetch is not None:  # copies are carried out in order: the last one is over when all are
            with self._device.waits.during("weights_read"):
                self._device.host_wait("weights_read", fetch.wait_until_over)

    def changed(self) -> None:
        self._forget_slots()
        if self._strays is not None and self._strays.fetch is not None:
            self._release(self._strays)

    def close(self) -> None:
        self._issuer.close()
        self._residents = {}
        self._slots, self._own, self._strays = [], {}, None  # the engine may be held for its optimizer's state
        self._walk = Walk("", None)
        self.inputs.begin()

    # -- visits -----------------------------------------------------------------------------------------------

    def _visit(self, unit: int, backward: bool, together: bool) -> DeviceSlot:
        walk = self._walk
        new = walk.arrive(unit, backward, together)
        if walk.schedule is not None and not walk.deviated:
            if new and not walk.as_expected():
                self._leave_schedule(unit)
            elif new:
                self._play(walk)
        slot = self._slot_of(unit)
        if slot is None:
            slot = self._fetch_now(unit)
        slot.last_visit = walk.number
        return slot

    def _play(self, walk: Walk) -> None:
        """Issue all operations up to the visit that has begun."""
        for operation in walk.operations_up_to_now():
            if operation.kind is Kind.RELEASE:
                self._release(self._numbered(operation.slot))
            elif operation.kind is Kind.FETCH:
                self._issue(operation.unit, self._numbered(operation.slot))
            elif operation.kind is Kind.RESTORE:
                self.inputs.restore(operation.unit)

    def _leave_schedule(self, unit: int) -> None:
        walk = self._walk
        walk.deviated = True
        if not self._told:
            self._told = True
            warnings.warn(
                f"{self._units[unit].name or 'the model'} was called out of the order of earlier steps; from here on"
                " weights of this step are fetched as they are needed, and the order is recorded again",
                stacklevel=2,
            )

    def _learn(self, walk: Walk) -> None:
        """Keep the order of this kind of pass, what it needed, and allocate the slots for its schedule. An evaluation
        makes do with those that training has: it keeps no inputs, so what it leaves free is not free in a step."""
        fixed = self._fixed_bytes
        wanted = slot_classes(self._streamed_bytes, walk.visits, self._per_class)
        memory = self._device.memory_bytes
        ahead = max(self.inputs.bytes_by_unit.values(), default=0)  # by schedule, inputs come back one visit earlier
        room = None if memory is None else memory - self._device.peak_bytes() - ahead
        for group, slots in zip(self._slots, wanted, strict=True) if walk.kind != EVALUATION else ():
            room = self._grow(group, slots, room)
        self._orders[walk.kind] = Order(
            tuple(walk.visits),
            dict(self.inputs.bytes_by_unit),
            self.inputs.most_bytes,
            self.inputs.offloading,
            walk.elements,
            self._device.peak_bytes(),
            fixed,
            tuple(u for u in walk.small if u in self._ahead),
        )
        # evaluations may follow one that was made for fewer slots
        self._schedules = {k: s for k, s in self._schedules.items() if k[0] not in (walk.kind, EVALUATION)}

    def schedule_of(self, kind: str) -> Schedule | None:
        """What the next pass of this kind follows; None before the first. Made from the last recorded order, with
        inputs that leave or stay as it is now, and proved (ScheduleError) before anything follows it."""
        order = self._orders.get(kind)
        if order is None:
            return None
        key = (kind, self.inputs.offloading)
        if key not in self._schedules:
            counts = [SlotClass(c.slot_bytes, len(group)) for c, group in zip(self._classes, self._slots, strict=True)]
            sizes = Sizes(self._streamed_bytes, {}, order.inputs, inputs_leave=self.inputs.offloading)
            schedule = build_schedule(order.visits, sizes, counts)
            check_schedule(schedule, sizes)
            self._schedules[key] = schedule
        return self._schedules[key]

    # -- slots ------------------------------------------------------------------------------------------------

    def _new_slot(self, n_bytes: int) -> DeviceSlot:
        if self._checks is None:
            buffer, expected = self._device.allocate(n_bytes, "weight slots"), None
        else:  # behind the weights, so that the waits for the slot are those for its checksum
            buffer = self._device.allocate(n_bytes + SUMS_BYTES, "weight slots")
            expected = buffer[n_bytes:].view(torch.int64)
        self._fixed_bytes += buffer.nbytes
        return DeviceSlot(buffer, expected)

    def _grow(self, group: list[DeviceSlot], wanted: SlotClass, room: int | None) -> int | None:
        """Allocate slots as long as there is `room` (None: no limit) beside what a pass has needed; returns the rest.
        With fewer slots less is copied ahead, and nothing else changes."""
        while len(group) < wanted.count and (room is None or room >= wanted.slot_bytes):
            try:
                group.append(self._new_slot(wanted.slot_bytes))
            except CapacityError:
                return 0
            room = None if room is None else room - wanted.slot_bytes
        return room

    def _numbered(self, number: int) -> DeviceSlot:
        for group in self._slots:
            if number < len(group):
                return group[number]
            number -= len(group)
        raise IndexError(number)

    def _slot_of(self, unit: int) -> DeviceSlot | None:
        return next((slot for group in self._slots for slot in group if slot.unit == unit), None)

    def _fetch_now(self, unit: int) -> DeviceSlot:
        """A fetch that nothing has foreseen: into the slot that was used longest ago."""
        number = class_of(self.unit_bytes[unit], [c.slot_bytes for c in self._classes])
        group, needed = self._slots[number], set(self._walk.visits[-1].units)
        movable = [slot for slot in group if slot.unit not in needed and not self._pinned[slot.unit]]
        if not movable:
            group.append(self._new_slot(self._classes[number].slot_bytes))
            movable = group[-1:]
        slot = min(movable, key=lambda s: s.last_visit)
        if slot.unit >= 0:
            self._release(slot)
        self._issue(unit, slot)
        return slot

    def _release(self, slot: DeviceSlot) -> None:
        slot.unit, slot.fetch, slot.views = -1, None, {}
        slot.free = self._device.release(slot.buffer)

    def _issue(self, unit: int, slot: DeviceSlot) -> None:
        """Hand a fetch to the issuer thread, which waits for the unit's update; this thread does not."""
        slot.unit, fetch = unit, Fetch()
        self._last_fetch = fetch
        slot.fetch = fetch
        free, image = slot.free, self._images[unit]
        slot.views = image.views(slot.buffer)
        self.fetched_bytes += image.n_bytes if unit != ALL_UNITS_STRAY else 0

        def issue() -> None:
            started = perf_counter()
            try:
                for home in self._homes[unit]:
                    self._device.host_wait("update", partial(self._updates.settle, home))
                if self._device.trace is not None:
                    self._device.trace.add("waits of fetches", "update", started, perf_counter())
                after = [("slot_free", free)] if free is not None else []
                pairs = image.pairs(slot.buffer)
                looked_at = self._checks.expect(unit, image) if self._checks is not None else None
                if looked_at is not None and slot.expected is not None:
                    pairs.append((slot.expected, looked_at[0]))
                    fetch.checked = looked_at[1]
                fetch.arrived = self._device.up.copy(pairs, after, label=self._name(unit))
            except BaseException as error:
                fetch.error = error
            finally:
                fetch.issued.set()

        self._issuer.submit(issue)

    def _name(self, unit: int) -> str:
        return self._units[unit].name or "weights" if unit in self._units else "stray parameters"

    def _await(self, slot: DeviceSlot) -> None:
        fetch = slot.fetch
        assert fetch is not None
        if fetch.waited:
            return
        try:
            with self._device.waits.during("weights_arrived"):
                started = perf_counter()
                self._device.host_wait("weights_arrived", fetch.wait_until_issued)
                self.exposed_seconds += perf_counter() - started
                if fetch.error is not None:
                    raise fetch.error
                if fetch.arrived is not None:
                    self._device.wait("weights_arrived", fetch.arrived)
                    fetch.waited = True
            if fetch.waited and fetch.checked and self._checks is not None and slot.expected is not None:
                # before computation reads it; the next one to overwrite it waits for what is given to the device here
                self._checks.arrived(slot.unit, slot.buffer, fetch.checked, slot.expected)
        except BaseException:
            self._release(slot)  # a caller's own loop, whose pass goes on, may try again
            raise

    def waited_seconds(self) -> dict[str, float]:
        return self._device.waits.take(self._device.seconds, self._device.trace)

    def _forget_slots(self) -> None:
        """What lies in the slots may be old by the next fetch."""
        self._pinned.clear()
        for slot in [*self._own.values(), *(slot for group in self._slots for slot in group)]:
            if slot.unit >= 0:
                self._release(slot)
                slot.last_visit = -1
