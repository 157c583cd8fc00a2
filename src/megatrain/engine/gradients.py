"""From the gradients of single backward calls to complete ones on the host, and their norm.

Contributions to a parameter (micro-batches, chunks of the head, units that share it) add up in fp32 in the order in
which they come. When the last backward call of every unit that reads it is done, the sum is rounded once to the
gradient's dtype and written to the host, with its sum of squares taken in the same pass.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatrain.memory.arena import allocate
from megatrain.memory.store import HostStore, SlotState, bits, gradient_buffers
from megatrain.model.partition import Partition, Unit
from megatrain.optim.kernels import accumulate, copy_with_square_sum, round_to_bf16, square_sum


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
    ) -> None:
        self._store = store
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
            if slot in self.squares and not self.keep:
                name = self._store.slots[slot].slot.name
                raise RuntimeError(f"{name} got a gradient after its update; use clip_norm with clip_scope='global'")
            self._sums[slot] = gradient
        elif slot in self._owned:
            held.add_(gradient)
        else:
            self._sums[slot] = torch.add(held, gradient) if held.dtype == torch.float32 else held.float().add_(gradient)
            self._owned.add(slot)

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
        self._sums.clear()
        self._owned.clear()
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
        for entry in entries:
            self.squares[entry.slot.index] = self._write_gradient(entry, self._sums.pop(entry.slot.index))
            self._owned.discard(entry.slot.index)
        if not self.keep:
            self._complete(home, entries)
            for slab in self._store.units[home].slabs:
                slab.gradient = None  # it was lent

    def _write_gradient(self, entry: SlotState, gradient: Tensor) -> float:
        """Bring a complete gradient to the host; returns its sum of squares (float64)."""
        if self.keep and entry.slot.index in self.squares:
            return self._accumulate(entry, gradient)
        self._ensure_gradient_buffers(entry.unit)
        slab = entry.slab
        target_of = slab.accumulated if self.keep and slab.accumulated is not None else slab.gradient
        assert target_of is not None
        return _store_gradient(self._store, target_of[slab.range_of(entry.place)], gradient)

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
