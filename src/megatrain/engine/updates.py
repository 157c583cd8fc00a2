"""Optimizer updates of a step that are decided but not yet carried out.

With exact global clipping no unit can be updated before the norm is known, which is when backward ends. The updates
are then carried out in forward order: on the host as device at once, since there is nothing to hide them behind; beside
a streaming device by a host thread, while the next forward already runs. Units whose state lies in the device's memory
are updated there, in the order of computation.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain.device.base import ComputeDevice, Event, StreamingDevice, streams
from megatrain.engine.device_checks import DeviceChecks
from megatrain.engine.host_thread import HostThread, Ticket
from megatrain.errors import IntegrityError
from megatrain.memory.layout import Place
from megatrain.memory.pieces import Piece
from megatrain.memory.slab_state import SlabState
from megatrain.memory.store import HostStore, Slab, SlotState, bits
from megatrain.model.partition import Partition, Unit
from megatrain.optim import device_kernels
from megatrain.optim.adamw import group_hyper_parameters
from megatrain.optim.adamw_kernels import Segment, adamw
from megatrain.optim.int8_moments import Int8Moments, adamw_int8
from megatrain.optim.workers import Workers


@dataclass(frozen=True, slots=True)
class SlabUpdate:
    """One pass of AdamW over a slab: whose elements and which, from which gradient, scaled by what."""

    entries: list[SlotState]
    slab: Slab
    gradient: Tensor
    segments: list[Segment]
    gradient_scale: float
    seed: int  # of rounding to moments of one byte

    def run(self, workers: Workers, piece: Piece, state: SlabState) -> None:
        """Of the elements in `piece`, whose state is in memory: on the device in the order of computation."""
        if self.slab.on_device:
            weights = self.slab.weight[: self.slab.layout.state_count]
            update = (self.gradient, self.segments, self.gradient_scale, self.seed)
            device_kernels.adamw(weights, state.remainder, state.moments, *update)
            return
        here = slice(piece.start, piece.stop)
        remainder = None if state.remainder is None else state.remainder.numpy()
        held = {name: part.numpy() for name, part in state.moments.items()}
        weight, rest = (
            self.slab.weight_bits[here],
            (bits(self.gradient[here]), self._within(piece), self.gradient_scale),
        )
        if "exp_avg_scale" in held:
            adamw_int8(workers, weight, remainder, Int8Moments(**held), *rest, seed=self.seed, first=piece.start)
        else:
            adamw(workers, weight, remainder, held["exp_avg"], held["exp_avg_sq"], *rest)

    def _within(self, piece: Piece) -> list[Segment]:
        """The segments that reach into a piece, cut, counted from its first element."""
        return [
            replace(s, start=max(s.start, piece.start) - piece.start, stop=min(s.stop, piece.stop) - piece.start)
            for s in self.segments
            if s.start < piece.stop and s.stop > piece.start
        ]


class PendingUpdates:
    """Updates by the unit that holds the state, and the wait for those that a unit depends on.

    One that fails leaves weights of two steps beside each other for good: every wait after it raises IntegrityError.
    """

    def __init__(
        self,
        store: HostStore,
        part: Partition,
        device: ComputeDevice,
        background: HostThread | None = None,
        checks: DeviceChecks | None = None,
    ) -> None:
        self._store = store
        self._checks = checks
        self._device = device
        self._names = {u.index: u.name for u in part.units}
        self._background = background
        self.first: frozenset[int] = frozenset()  # carried out before the others: small, and fetched ahead of them
        self._pending: dict[int, list[SlabUpdate]] = {}
        self._tickets: dict[int, Ticket] = {}
        self._on_device: Event | None = None  # the last update there
        self._order: list[int] = []  # in which units were updated as their gradients came
        self._failed: tuple[str, BaseException] | None = None  # the unit, and what its update raised
        self.unseen = False  # updates have begun beside the caller, who has not waited for them since
        self.before_update: Callable[[int], object] = _nothing  # called with a unit that is about to change
        self.exposed_seconds = 0.0  # spent on updates while compute waited
        # a unit that reads a parameter homed elsewhere needs that unit's update too
        self._needed = {u.index: sorted({slot.units[0] for slot in u.slots}) for u in part.units}

    def schedule(self, unit: int, updates: list[SlabUpdate]) -> None:
        self._tickets.pop(unit, None)
        self._pending[unit] = updates

    def start(self) -> None:
        """All updates of a step are scheduled: the host thread begins; without one they are carried out here."""
        for unit in sorted(self._store.on_device.intersection(self._pending)):
            self._update_on_device(unit, self._pending.pop(unit))
        order = sorted(self._pending, key=lambda u: (u not in self.first, u))
        self._store.expect(order)
        if self._background is None:
            self.flush()
            return
        for unit in order:
            self.unseen = True
            run = partial(self._carry_out, unit, self._pending.pop(unit), self._step)
            self._tickets[unit] = self._background.submit(run)

    def carry_out_now(self, unit: int, updates: list[SlabUpdate]) -> None:
        """The unit's gradient is complete and waits for no other: updates come in the order of backward, which is that
        of the step before."""
        if unit in self._store.on_device:
            self._update_on_device(unit, updates)
            return
        if self._store.spilled is not None:
            if unit in self._order:
                later = self._order[self._order.index(unit) + 1 :]
                self._store.expect(later)
                self._order = []
            self._order.append(unit)
        self.schedule(unit, updates)
        self.settle(unit)

    def wait_for(self, unit: Unit) -> None:
        """Return when all parameters that `unit` reads are up to date."""
        if self._pending or self._tickets or self._failed is not None:
            for home in self._needed[unit.index]:
                self.settle(home)

    def flush(self) -> None:
        """Return when no update is pending."""
        for unit in sorted([*self._pending, *self._tickets]):
            self.settle(unit)
        if self._on_device is not None:
            last, self._on_device = self._on_device, None
            self._streaming.host_wait("state_updated", last.wait)
        self._refuse_half_updated()
        self.unseen = False

    def settle(self, unit: int) -> None:
        """Return when the update of the parameters whose state lives with `unit`, if one was scheduled, is done."""
        ticket = self._tickets.get(unit)
        if ticket is not None:
            ticket.wait()
        elif unit in self._pending:
            started = time.perf_counter()
            self._carry_out(unit, self._pending.pop(unit), self._step)
            self.exposed_seconds += time.perf_counter() - started
        self._refuse_half_updated()

    def _update_on_device(self, unit: int, updates: list[SlabUpdate]) -> None:
        """Computation that comes after it finds new weights; the host has to wait (`flush`)."""
        self.unseen, step = True, self._step
        self.before_update(unit)

        def run() -> None:
            with torch.no_grad():
                self._carry_out(unit, updates, step)

        self._on_device = self._streaming.compute(run, (), f"update of {self._names[unit]}")
        if self._checks is not None:
            self._checks.updated(unit, step)

    def is_pending(self, unit: int) -> bool:
        """Whether an update of the unit in host memory is decided and not known to be over."""
        ticket = self._tickets.get(unit)
        return unit in self._pending or (ticket is not None and not ticket.done)

    @property
    def _step(self) -> int:
        """Which one is under way; it decides what is checked, and nothing else."""
        return 0 if self._store.book is None else self._store.book.step

    @property
    def _streaming(self) -> StreamingDevice:
        assert streams(self._device)
        return self._device

    def _carry_out(self, unit: int, updates: list[SlabUpdate], step: int) -> None:
        if self._failed is not None:
            return  # what is still of one step stays so
        started, name = time.perf_counter(), self._names.get(unit, "stray parameters")
        try:
            self._update(unit, updates, step)
        except BaseException as error:
            self._failed = self._failed or (name, error)
            if not isinstance(error, Exception):
                raise
        if self._device.trace is not None and unit not in self._store.on_device:
            self._device.trace.add("host", f"update of {name}", started, time.perf_counter())

    def _update(self, unit: int, updates: list[SlabUpdate], step: int) -> None:
        entries = [entry for update in updates for entry in update.entries]
        if unit not in self._store.on_device:
            self.before_update(unit)
        book = self._store.book
        if book is not None:
            book.check_weights(unit)  # the last look at them: a changed bit would go into the new checksum
        for entry in entries:
            self._store.notice_silent_write(entry)
        state = self._store.units[unit]
        looked_at_next = book is not None and book.due(unit, step + 1)
        for piece in state.pieces:
            with self._store.state_of(piece, summed=looked_at_next) as held:
                for update in updates:
                    if update.slab is state.slabs[piece.slab]:
                        update.run(self._store.workers, piece, held)
        for entry in entries:
            entry.written()
        if book is not None:
            (book.note_weights if looked_at_next else book.forget_weights)(unit)

    def _refuse_half_updated(self) -> None:
        if self._failed is None:
            return
        name, error = self._failed
        raise IntegrityError(
            f"the update of {name or 'the model'} failed ({type(error).__name__}: {error}): weights of two steps lie"
            " beside each other, and nothing is trained or saved from here on; go on from the last save"
        ) from error


def _nothing(_unit: int) -> None:
    """Nobody has to be asked."""


def unit_updates(
    entries: list[SlotState],
    groups: list[dict[str, Any]],
    gradient_scale: float,
    gradients: dict[int, Tensor],
) -> list[SlabUpdate]:
    """The updates of one unit for the parameters in `entries` (those that got a gradient), counting a step for each.

    `gradients`: by id of slab, the flat tensor to read. Neighbours with equal hyper-parameters and step count become
    one segment; what got no gradient is left out, so it sees no decay, no moment and no step.
    """
    by_slab: dict[int, list[SlotState]] = {}
    for entry in entries:
        by_slab.setdefault(id(entry.slab), []).append(entry)
    updates = []
    for key, members in by_slab.items():
        segments: list[Segment] = []
        for entry in sorted(members, key=lambda e: e.place.start):
            entry.steps += 1
            segment = _segment(entry.place, entry.steps, groups[entry.place.group])
            if segments and replace(segment, start=segments[-1].start) == replace(segments[-1], stop=segment.stop):
                if segments[-1].stop == segment.start:
                    segments[-1] = replace(segments[-1], stop=segment.stop)
                    continue
            segments.append(segment)
        # of what is saved with the state, so that a run that is taken up again rounds as it would have
        seed = members[0].slot.index * 0x85EBCA6B + max(entry.steps for entry in members)
        updates.append(SlabUpdate(members, members[0].slab, gradients[key], segments, gradient_scale, seed))
    return updates


def _segment(place: Place, step: int, group: dict[str, Any]) -> Segment:
    return Segment(start=place.start, stop=place.start + place.count, step=step, **group_hyper_parameters(group))


def held_gradients(entries: list[SlotState]) -> dict[int, Tensor]:
    """The kept gradient of each slab, by its id: the fp32 sum over several backward calls where there is one."""
    gradients = {}
    for entry in entries:
        slab = entry.slab
        held = slab.accumulated if slab.accumulated is not None else slab.gradient
        assert held is not None
        gradients[id(slab)] = held
    return gradients
