"""From the gradients of single backward calls to complete ones on the host, and their norm.

Contributions to a parameter (micro-batches, chunks of the head, units that share it) add up in fp32 in the order in
which they come. When the last backward call of every unit that reads it is done, the sum is rounded once to the
gradient's dtype and written to the host, with its sum of squares taken in the same pass. From a streaming device it
travels there beside computation, and the host thread takes the sum of squares when it has arrived.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatrain.engine.gradient_stream import GradientStream
from megatrain.memory.arena import allocate
from megatrain.memory.store import HostStore, SlotState, bits, gradient_buffers
from megatrain.model.partition import Partition, Unit
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
        *,
        settle: Callable[[int], None],
        complete: Callable[[int, list[SlotState]], None],
        stream: GradientStream | None = None,
    ) -> None:
        self._store = store
        self._stream = stream
        self._settle = settle
        self._complete = complete
        self.keep = True
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

    # -- completion -------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The step has no further backward: everything outstanding is complete."""
        self._open_calls.clear()
        self._holds = 0
        for home in sorted(self._homes_with_sums()):
            self._write(home)
        if self._stream is not None:
            self._stream.finish()

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
        for unit in self._store.units.values():
            for slab in unit.slabs:
                slab.accumulated = None

    def clear(self) -> None:
        """Forget the step's gradients and calls; kept buffers stay allocated."""
        self.forget_gradients()
        self._open_calls.clear()
        self._holds = 0
        self.keep = True  # a caller's own backward calls are kept until step()

    def forget_gradients(self) -> None:
        """Forget what has been gathered; calls whose backward is still to come stay open."""
        self._hold(-sum(s.nbytes for s in self._sums.values()))
        self._sums.clear()
        self._owned.clear()
        if self._stream is not None:
            self._stream.settle()
        self._written.clear()
        self.squares.clear()

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
        self._settle(home)
        again = [self.keep and e.slot.index in self._written for e in entries]
        self._written.update(e.slot.index for e in entries)
        gradients = [self._sums.pop(e.slot.index) for e in entries]
        self._owned.difference_update(e.slot.index for e in entries)
        if self._stream is None:
            for entry, gradient, is_further in zip(entries, gradients, again, strict=True):
                self.squares[entry.slot.index] = self._write_gradient(entry, gradient, is_further)
            self._written_home(home, entries)
        else:
            self._send(self._stream, home, entries, gradients, again)

    def _send(
        self, stream: GradientStream, home: int, entries: list[SlotState], gradients: list[Tensor], again: list[bool]
    ) -> None:
        """As `_write`, from a streaming device: the host's part is done when the gradient has arrived."""
        if not self.keep:
            stream.wait_for_all_but(1)  # buffers are lent until the update is done: two units' at most
        targets = [self._arrival(e, is_further) for e, is_further in zip(entries, again, strict=True)]

        def land() -> None:
            for entry, target, is_further in zip(entries, targets, again, strict=True):
                square = (
                    self._accumulate(entry, target) if is_further else square_sum(self._store.workers, bits(target))
                )
                self.squares[entry.slot.index] = square
            self._written_home(home, entries)

        stream.send(gradients, targets, land, label=self._names.get(home, "stray parameters"))
        if any(again):
            stream.finish()  # the place of a first gradient changes when a further one has been added

    def _arrival(self, entry: SlotState, is_further: bool) -> Tensor:
        """Host memory for a gradient that comes from the device, 1-D: its place, or a further one's temporary."""
        if is_further:
            return torch.empty(entry.place.count, dtype=entry.slab.weight.dtype)
        return self._place_of(entry)

    def _written_home(self, home: int, entries: list[SlotState]) -> None:
        if not self.keep:
            self._complete(home, entries)
            for slab in self._store.units[home].slabs:
                slab.gradient = None  # it was lent

    def _hold(self, n_bytes: int) -> None:
        if self._stream is not None:
            self._stream.hold(n_bytes)

    def _write_gradient(self, entry: SlotState, gradient: Tensor, is_further: bool) -> float:
        """Bring a complete gradient to the host; returns its sum of squares (float64)."""
        if is_further:
            return self._accumulate(entry, gradient)
        return _store_gradient(self._store, self._place_of(entry), gradient)

    def _place_of(self, entry: SlotState) -> Tensor:
        """Where the first gradient of a step belongs on the host, 1-D."""
        self._ensure_gradient_buffers(entry.unit)
        slab = entry.slab
        held = slab.accumulated if self.keep and slab.accumulated is not None else slab.gradient
        assert held is not None
        return held[slab.range_of(entry.place)]

    def _accumulate(self, entry: SlotState, gradient: Tensor) -> float:
        """A further backward call of the same step: from here on the slab's gradient is an fp32 sum on the host."""
        slab = entry.slab
        if slab.accumulated is None and slab.layout.dtype != "fp32":
            assert slab.gradient is not None
            n_bytes = slab.layout.moment_bytes
            slab.accumulated = allocate(n_bytes)[:n_bytes].view(torch.float32)
            slab.accumulated.copy_(slab.gradient)
            slab.gradient = None
        held = slab.gradient if slab.accumulated is None else slab.accumulated
        assert held is not None
        total = held[slab.range_of(entry.place)]
        return accumulate(self._store.workers, total.numpy(), bits(gradient.detach().contiguous().view(-1)))

    def _ensure_gradient_buffers(self, unit: int) -> None:
        slabs = self._store.units[unit].slabs
        if self.keep:
            for slab in slabs:
                if slab.gradient is None and slab.accumulated is None:
                    (slab.gradient,) = gradient_buffers([slab])
        else:
            self._lend_buffers(unit)

    def _lend_buffers(self, unit: int) -> None:
        """A buffer for as long as it takes to write and apply the unit's gradient."""
        slabs = self._store.units[unit].slabs
        if all(slab.gradient is None for slab in slabs):
            for slab, buffer in zip(slabs, gradient_buffers(slabs), strict=True):
                slab.gradient = buffer


def _store_gradient(store: HostStore, target: Tensor, gradient: Tensor) -> float:
    """Write `gradient` into the flat `target` (bf16 or fp32), rounding once; returns the sum of squares of what was
    written."""
    flat = gradient.detach()
    if not flat.is_contiguous():
        flat = flat.contiguous()
    flat = flat.view(-1)
    if flat.dtype == target.dtype:
        return copy_with_square_sum(store.workers, bits(flat), bits(target))
    if flat.dtype == torch.float32:
        return round_to_bf16(store.workers, bits(flat), bits(target))
    target.copy_(flat)
    return square_sum(store.workers, bits(target))


def _readers_of_home(part: Partition, unit: Unit) -> list[int]:
    return sorted({reader for slot in part.homes(unit) for reader in slot.units})
