"""From the gradients of single backward calls to complete ones on the host, and their norm.

Contributions to a parameter (micro-batches, chunks of the head, units that share it) add up in fp32 in the order in
which they come. When the last backward call of every unit that reads it is done, the sum is rounded once to the
gradient's dtype and written to the host, with its sum of squares taken in the same pass. From a streaming device it
travels there beside computation, and the host thread takes the sum of squares when it has arrived. Where a unit's
state lies in the device's memory its gradient stays there, until the step ends, and so does its sum of squares.
"""

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from megatrain.engine.gradient_memory import GradientMemory
from megatrain.engine.gradient_stream import GradientStream
from megatrain.engine.resident_gradients import ResidentGradients
from megatrain.engine.shown_gradients import HeldGradient
from megatrain.memory.plan import ARRIVING_UNITS
from megatrain.memory.store import HostStore, SlotState, bits, refuse_changed_freezing
from megatrain.model.partition import Partition, Unit
from megatrain.optim import device_kernels
from megatrain.optim.gradient_kernels import accumulate, copy_with_square_sum, round_to_bf16, square_sum


class GradientBook:
    """Gradients of one optimizer step.

    With `keep` they stay in the slabs' `gradient` until the norm is known; without, `complete(home unit, entries)` is
    called as each unit becomes complete and has to consume them. `settle(home unit)` is called before a unit's
    gradients are written: an update that still reads the old ones must be carried out then.
    """

    def __init__(
        self,
        store: HostStore,
        part: Partition,
        memory: GradientMemory,
        *,
        settle: Callable[[int], None],
        complete: Callable[[int, list[SlotState]], None],
        stream: GradientStream | None = None,
        resident: ResidentGradients | None = None,
    ) -> None:
        self._store = store
        self._memory = memory
        self._stream = stream
        self._resident = resident
        self._settle = settle
        self._complete = complete
        self.keep = True
        self._given_up = False  # the step has failed: what still arrives is not applied
        self._sums: dict[int, Tensor] = {}
        self._owned: set[int] = set()  # slots whose sum is ours to add into
        self._open_calls: dict[int, int] = {}
        self._holds = 0
        # home units with parameters that are read outside their unit's forward: complete only when the step ends
        self._read_directly: set[int] = {-1}
        self.squares: dict[int, float] = {}
        self._written: set[int] = set()  # slots whose gradient is on the host, or on its way there
        self._names = {u.index: u.name for u in part.units}
        self._readers = {u.index: _readers_of_home(part, u) for u in part.units}
        self._shows = True  # to a caller whose own loop this is
        self._shown = {
            index: HeldGradient.of(entry.slot.parameter, _reader(self, index))
            for index, entry in store.slots.items()
            if entry.place.trainable
        }
        self._looked_at: set[int] = set()  # slots whose gradient the caller has read, and may have written
        self._hidden: set[int] = set()  # slots that autograd itself is adding to

    # -- what units report ------------------------------------------------------------------------------------

    def opened(self, unit: Unit) -> None:
        self._open_calls[unit.index] = self._open_calls.get(unit.index, 0) + 1

    def abandoned(self, unit: Unit) -> None:
        """A call that will have no further backward."""
        if self._open_calls.get(unit.index):
            self._open_calls[unit.index] -= 1

    def receive(self, unit: Unit, gradients: dict[int, Tensor]) -> None:
        """Gradients of one backward call of `unit`."""
        for slot, gradient in gradients.items():
            self.add(slot, gradient)
        self.abandoned(unit)
        if not self._open_calls.get(unit.index) and not self._holds:
            self._write_ready(sorted({slot.units[0] for slot in unit.slots}))

    def add(self, slot: int, gradient: Tensor) -> None:
        """One contribution; the first is kept as it is, from the second on they add up in fp32."""
        refuse_changed_freezing(self._store.slots[slot])  # in a caller's own loop nothing else has looked before
        if self._shows:
            self._show(slot)
        held = self._sums.get(slot)
        if held is None:
            if slot in self._written and not self.keep:
                name = self._store.slots[slot].slot.name
                raise RuntimeError(f"{name} got a gradient after its update; use clip_norm with clip_scope='global'")
            self._sums[slot] = gradient
            self._hold(gradient.nbytes)
        elif slot in self._owned:
            held.add_(gradient)
        else:
            self._sums[slot] = torch.add(held, gradient) if held.dtype == torch.float32 else held.float().add_(gradient)
            self._owned.add(slot)
            self._hold(self._sums[slot].nbytes - held.nbytes)

    def add_from_leaf(self, slot: int, gradient: Tensor) -> None:
        """A parameter was read outside its unit's forward and autograd reached it directly."""
        self._read_directly.add(self._store.slots[slot].unit)
        self.add(slot, gradient)

    def hold(self, count: int) -> None:
        """Let nothing become complete until `release_hold` was called `count` times (heads still to run)."""
        self._holds = count

    def release_hold(self) -> None:
        self._holds -= 1
        if not self._holds:
            self._write_ready(sorted(self._homes_with_sums()))

    # -- what a caller does to gradients ----------------------------------------------------------------------

    def read(self, slot: int) -> Tensor:
        """A parameter's gradient so far, where the engine holds it, in the parameter's shape."""
        self.finish()
        entry = self._store.slots[slot]
        if slot not in self._written:
            raise RuntimeError(f"the gradient of {entry.slot.name} was given up by step() or zero_grad()")
        self._looked_at.add(slot)
        return _place_in({}, entry).view(entry.place.shape)

    def follow_caller(self) -> None:
        """Gradients are complete: those that the caller has taken away, replaced or written become what they are."""
        for slot in self._shown:
            self._follow(slot)
        for slot in self._looked_at:
            entry = self._store.slots[slot]
            self.squares[slot] = _square_of(self._store, entry, _place_in({}, entry))

    def hide(self, slot: int) -> None:
        """Autograd is about to add to what it finds as the parameter's `.grad`, which only stands for a gradient."""
        if self._shows:
            self._follow(slot)
            self._hidden.add(slot)
        self._store.slots[slot].slot.parameter.grad = None

    def _show(self, slot: int) -> None:
        if slot not in self._hidden:
            self._follow(slot)
        self._hidden.discard(slot)
        self._store.slots[slot].slot.parameter.grad = self._shown[slot]

    def _follow(self, slot: int) -> None:
        entry = self._store.slots[slot]
        gradient = entry.slot.parameter.grad
        if gradient is self._shown[slot]:
            return
        if slot in self._sums or slot in self._written:
            self._drop(slot)
        if gradient is not None:
            self._settle(entry.unit)
            self._memory.keep(entry.unit)
            self._written.add(slot)
            self.squares[slot] = _store_gradient(self._store, entry, _place_in({}, entry), gradient)

    def _drop(self, slot: int) -> None:
        if self._stream is not None:
            self._stream.finish()  # it may be on its way
        if self._resident is not None:
            self._resident.settle()
            self._resident.drop(slot)
        held = self._sums.pop(slot, None)
        self._hold(0 if held is None else -held.nbytes)
        for slots in (self._owned, self._written, self._looked_at):
            slots.discard(slot)
        self.squares.pop(slot, None)

    # -- completion -------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The step has no further backward: everything outstanding is complete."""
        self._open_calls.clear()
        self._holds = 0
        for home in sorted(self._homes_with_sums()):
            self._write(home)
        if self._stream is not None:
            self._stream.finish()
        if self._resident is not None:
            self._finish_resident(self._resident)

    def _finish_resident(self, resident: ResidentGradients) -> None:
        self.squares.update(resident.squares())
        if self.keep:
            return
        for home, entries in sorted(self.touched().items()):
            if home in self._store.on_device:
                self._complete(home, entries)

    def norm(self) -> float:
        """L2 norm over all gradients of the step; exact sum of the per-parameter squares, so order does not matter."""
        return math.sqrt(math.fsum(self.squares.values()))

    def unit_norm(self, entries: list[SlotState]) -> float:
        return math.sqrt(math.fsum(self.squares[e.slot.index] for e in entries))

    def touched(self) -> dict[int, list[SlotState]]:
        """Parameters that have a gradient on the host, by home unit."""
        homes: dict[int, list[SlotState]] = {}
        for slot in self.squares:
            entry = self._store.slots[slot]
            homes.setdefault(entry.unit, []).append(entry)
        return homes

    def begin(self, *, keep: bool) -> None:
        """A step whose backward calls are all known beforehand: nothing has to accumulate on the host."""
        self.clear()
        self.keep = keep
        self._shows = False
        self._memory.drop_sums()
        if not keep:
            self._memory.drop_kept()

    def give_up(self) -> None:
        """The step has failed: until `clear`, gradients that are still on their way complete no unit."""
        self._given_up = True

    def clear(self) -> None:
        """Forget the step's gradients and calls; kept buffers stay allocated."""
        self.forget_gradients()
        self._open_calls.clear()
        self._holds = 0
        self._given_up = False
        self.keep = self._shows = True  # a caller's own backward calls are kept until step()

    def forget_gradients(self) -> None:
        """Forget what has been gathered; calls whose backward is still to come stay open."""
        self._hold(-sum(s.nbytes for s in self._sums.values()))
        self._sums.clear()
        self._owned.clear()
        if self._stream is not None:
            self._stream.settle()
        if self._resident is not None:
            self._resident.forget()
        self._written.clear()
        self.squares.clear()
        self._looked_at.clear()
        self._hidden.clear()
        for slot in self._shown:
            self._store.slots[slot].slot.parameter.grad = None

    def close(self) -> None:
        """No gradient comes after this."""
        self.clear()
        if self._stream is not None:
            self._stream.close()

    def _homes_with_sums(self) -> set[int]:
        return {self._store.slots[slot].unit for slot in self._sums}

    def _write_ready(self, homes: list[int]) -> None:
        for home in homes:
            ready = home >= 0 and home not in self._read_directly
            if ready and not any(self._open_calls.get(reader) for reader in self._readers[home]):
                self._write(home)

    def _write(self, home: int) -> None:
        entries = [self._store.slots[s] for s in sorted(self._sums) if self._store.slots[s].unit == home]
        if not entries:
            return
        stays = home in self._store.on_device
        if not stays:  # on the device, the order of computation keeps an update before what is written after it
            self._settle(home)
        again = [self.keep and e.slot.index in self._written for e in entries]
        self._written.update(e.slot.index for e in entries)
        gradients = [self._sums.pop(e.slot.index) for e in entries]
        self._owned.difference_update(e.slot.index for e in entries)
        if self.keep:
            self._memory.keep(home)
        if stays and self._resident is not None:
            begun = self._begin_sums_on_device([e for e, is_further in zip(entries, again, strict=True) if is_further])
            places = [_place_in({}, entry) for entry in entries]
            self._resident.write(entries, gradients, again, places, begun, label=self._names[home])
        elif self._stream is None:
            lent = {} if self.keep else self._lend(home)
            for entry, gradient, is_further in zip(entries, gradients, again, strict=True):
                self.squares[entry.slot.index] = self._write_gradient(entry, gradient, is_further, lent)
            self._written_home(home, entries, lent)
        else:
            self._send(self._stream, home, entries, gradients, again)

    def _send(
        self, stream: GradientStream, home: int, entries: list[SlotState], gradients: list[Tensor], again: list[bool]
    ) -> None:
        """As `_write`, from a streaming device: the host's part is done when the gradient has arrived."""
        if not self.keep:
            stream.wait_for_all_but(ARRIVING_UNITS - 1)  # buffers are lent until the update is done
        # a gradient crosses the link in its slab's dtype, also where it goes into an fp32 sum
        through = [f or not self.keep or e.slab.accumulated is not None for e, f in zip(entries, again, strict=True)]
        lent = self._lend(home) if any(through) else {}
        targets = [_place_in(lent if t else {}, e) for e, t in zip(entries, through, strict=True)]

        def land() -> None:
            for entry, target, is_further, is_lent in zip(entries, targets, again, through, strict=True):
                if is_further:
                    square = self._accumulate(entry, target)
                else:
                    square = _square_of(self._store, entry, target)
                    if is_lent and self.keep:
                        _place_in({}, entry).copy_(target)
                self.squares[entry.slot.index] = square
            self._written_home(home, entries, lent)

        stream.send(home, gradients, targets, land, label=self._names.get(home, "stray parameters"))
        if self.keep and lent:
            stream.finish()  # the place of a first gradient changes when a further one has been added

    def _begin_sums_on_device(self, entries: list[SlotState]) -> list[tuple[Tensor, Tensor]]:
        """Room for fp32 sums, and what they begin with."""
        begun = []
        for slab in (entry.slab for entry in entries):
            before = slab.accumulated if slab.accumulated is not None else slab.gradient
            assert before is not None
            total = self._memory.keep_sum(slab)
            if total is not before:
                begun.append((total, before))
        return begun

    def _lend(self, home: int) -> dict[int, Tensor]:
        """Buffers for the unit's slabs, by their ids."""
        slabs = self._store.units[home].slabs
        return {id(slab): buffer for slab, buffer in zip(slabs, self._memory.lend(home), strict=True)}

    def _written_home(self, home: int, entries: list[SlotState], lent: dict[int, Tensor]) -> None:
        if self.keep or self._given_up:
            return
        slabs = self._store.units[home].slabs
        try:
            for slab in slabs:
                slab.gradient = lent[id(slab)]
            self._complete(home, entries)
        finally:
            for slab in slabs:
                slab.gradient = None

    def _hold(self, n_bytes: int) -> None:
        if self._stream is not None:
            self._stream.hold(n_bytes)

    def _write_gradient(self, entry: SlotState, gradient: Tensor, is_further: bool, lent: dict[int, Tensor]) -> float:
        """Bring a complete gradient to the host; returns its sum of squares (float64)."""
        if is_further:
            return self._accumulate(entry, gradient)
        return _store_gradient(self._store, entry, _place_in(lent, entry), gradient)

    def _accumulate(self, entry: SlotState, gradient: Tensor) -> float:
        """A further backward call of the same step: from here on the slab's gradient is an fp32 sum on the host."""
        total = self._memory.keep_sum(entry.slab)[entry.slab.range_of(entry.place)]
        return accumulate(self._store.workers, total.numpy(), bits(gradient.detach().contiguous().view(-1)))


def _reader(book: GradientBook, slot: int) -> Callable[[], Tensor]:
    found = weakref.ref(book)  # the garbage collector does not see what a parameter's gradient holds

    def read() -> Tensor:
        held = found()
        if held is None:
            raise RuntimeError("the engine that held this gradient is gone")
        return held.read(slot)

    return read


def _place_in(lent: dict[int, Tensor], entry: SlotState) -> Tensor:
    """Where a gradient goes on the host, 1-D: into a buffer that is lent, or into the one that is kept."""
    slab = entry.slab
    held = lent.get(id(slab), slab.gradient if slab.accumulated is None else slab.accumulated)
    assert held is not None
    return held[slab.range_of(entry.place)]


def _store_gradient(store: HostStore, entry: SlotState, target: Tensor, gradient: Tensor) -> float:
    """Write `gradient` into the flat `target` (bf16 or fp32), rounding once; returns the sum of squares of what was
    written."""
    flat = gradient.detach()
    if not flat.is_contiguous():
        flat = flat.contiguous()
    flat = flat.view(-1)
    if not entry.slab.on_device:
        if flat.dtype == target.dtype:
            return copy_with_square_sum(store.workers, bits(flat), bits(target))
        if flat.dtype == torch.float32:
            return round_to_bf16(store.workers, bits(flat), bits(target))
    target.copy_(flat)
    return _square_of(store, entry, target)


def _square_of(store: HostStore, entry: SlotState, values: Tensor) -> float:
    """The sum of squares of a parameter's gradient, where it lies."""
    if entry.slab.on_device:
        return float(device_kernels.square_sum(values))
    return square_sum(store.workers, bits(values))


def _readers_of_home(part: Partition, unit: Unit) -> list[int]:
    return sorted({reader for slot in part.homes(unit) for reader in slot.units})
