"""The store: weights, remainders, moments and gradients of every unit, exactly as large as they must be.

They lie in host memory, but for units that have their place in a compute device's memory. Each unit's weights are one
contiguous buffer (page-aligned on the host), and the model's own `nn.Parameter`s are views of it, so
`named_parameters`, `state_dict` and saving keep working and nothing is held twice. A bf16 weight is the rounded upper
half of its fp32 master; `remainder` holds the rest (2 + 2 + 4 + 4 = 12 bytes per parameter with both moments).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatrain.errors import IntegrityError
from megatrain.memory.arena import allocate, allocate_elements, discard_pages
from megatrain.memory.checksum_book import DISK, ChecksumBook, Region, as_bytes
from megatrain.memory.layout import Place, SlabLayout
from megatrain.memory.pieces import Piece, cut, whole
from megatrain.memory.slab_state import SlabState, empty_state, moment_bytes, state_bytes, unit_state_bytes, where
from megatrain.memory.spilled_states import SpilledStates
from megatrain.memory.witness import Witness
from megatrain.model.partition import ParameterSlot, Partition
from megatrain.optim import device_kernels
from megatrain.optim.split_master import merge, split
from megatrain.optim.workers import Workers

TORCH_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALL_UNITS_STRAY = -1


@dataclass(slots=True)
class Slab:
    """Arrays of one dtype's parameters of a unit, all 1-D views of page-aligned buffers in host memory, or of a compute
    device's memory (`on_device`).

    weight (count), bf16 or fp32; state (of state_count elements), or None where it is on disk; gradient (state_count),
    of the weight's dtype, or None while none is held; accumulated fp32 or None.
    """

    layout: SlabLayout
    weight: Tensor
    state: SlabState | None = None
    gradient: Tensor | None = None
    accumulated: Tensor | None = None
    on_device: bool = False

    @property
    def weight_bits(self) -> np.ndarray:
        """The weights that carry state, as the kernels take them: uint16 for bf16, float32 otherwise."""
        return bits(self.weight[: self.layout.state_count])

    def range_of(self, place: Place) -> slice:
        return slice(place.start, place.start + place.count)


@dataclass(slots=True)
class UnitState:
    """All that is held for one unit. `pieces`: its optimizer state, as much of each as is in memory at a time."""

    slabs: list[Slab]
    pieces: list[Piece]


@dataclass(slots=True)
class SlotState:
    """Where a parameter's state lives, and the number of updates it has had (AdamW skips what got no gradient)."""

    slot: ParameterSlot
    unit: int
    slab: Slab
    place: Place
    steps: int = 0
    version: int = 0  # of the parameter, when the engine last saw it
    own_hooks: int = 0  # of each kind that the engine has put on the parameter
    witness: Witness | None = None  # where there is a remainder

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's part of a 1-D tensor that is laid out like its slab, in its own shape."""
        return flat[self.slab.range_of(self.place)].view(self.place.shape)

    @property
    def weight(self) -> Tensor:
        """In the parameter's own shape."""
        return self.view(self.slab.weight)

    @property
    def carries_remainder(self) -> bool:
        """Whether there is a rest of the master; else the weight is all there is: fp32, or frozen."""
        return self.slab.layout.dtype == "bf16" and self.place.trainable

    def written(self) -> None:
        """The engine has written weight and remainder."""
        if self.witness is not None:
            self.witness.look(self._weight_bits)

    @property
    def remainder_is_valid(self) -> Tensor | None:
        """Whether nobody has written the weight past torch's version counter, since which low bits of the master would
        have to go: a bool of no dimension where the weight is; None where there is no remainder."""
        return None if self.witness is None else self.witness.recognises(self._weight_bits)

    @property
    def _weight_bits(self) -> Tensor:
        return self.slab.weight[self.slab.range_of(self.place)].view(torch.int16)


@dataclass(slots=True)
class HostStore:
    """States by unit index (stray: -1) and by slot index. `moments`: fp32 or int8; `spilled`: holds the optimizer state
    of some units on disk; `on_device`: units of which all is in a compute device's memory; `book`: checksums of what is
    in host memory and on disk, None where nobody looks for bits that change by themselves."""

    workers: Workers
    moments: str = "fp32"
    spilled: SpilledStates | None = None
    book: ChecksumBook | None = None
    units: dict[int, UnitState] = field(default_factory=dict)
    slots: dict[int, SlotState] = field(default_factory=dict)
    on_device: set[int] = field(default_factory=set)

    def take_over(
        self,
        unit: int,
        slabs: list[SlabLayout],
        slots: dict[int, ParameterSlot],
        *,
        mapped: bool = False,
        device_memory: Tensor | None = None,
    ) -> None:
        """Allocate the unit's buffers, copy its parameters in and make them views of the buffers.

        Each source tensor is released as soon as it is copied, so the peak is the larger of the two states plus one
        parameter. fp32 and fp16 sources become exact masters. `mapped`: sources are pages of a checkpoint's file that
        nobody else reads; they are given back one by one, since the mapping itself goes only with its last tensor.
        `device_memory`: where the unit lies for good, in place of host memory: `resident_bytes`, uint8.
        """
        state = self._place_unit(unit, slabs, device_memory)
        for slab in state.slabs:
            for place in slab.layout.places:
                self.slots[place.slot] = entry = SlotState(slots[place.slot], unit, slab, place)
                if entry.carries_remainder:
                    entry.witness = Witness(place.shape)
        if self.book is not None and device_memory is None:
            self.book.watch(unit, self.unit_memory(unit))
        for slab in state.slabs:
            for place in slab.layout.places:
                self._take_parameter(self.slots[place.slot], mapped)

    def _place_unit(self, unit: int, slabs: list[SlabLayout], device_memory: Tensor | None) -> UnitState:
        pieces = cut(unit, slabs) if self.spills(unit) else whole(unit, slabs)
        n_bytes, on_device = sum(layout.weight_bytes for layout in slabs), device_memory is not None
        weights = allocate(n_bytes) if device_memory is None else device_memory
        held = [Slab(layout, weight, on_device=on_device) for layout, weight in _weight_views(slabs, weights)]
        self.units[unit] = state = UnitState(held, pieces)
        if device_memory is not None:
            self.on_device.add(unit)
            rest = device_memory[n_bytes:].zero_()
            self._bind(unit, rest)
            rest = rest[unit_state_bytes(slabs, self.moments) :]
            for slab in state.slabs:
                slab.gradient = rest[: slab.layout.gradient_bytes].view(TORCH_DTYPE[slab.layout.dtype])
                rest = rest[slab.layout.gradient_bytes :]
        elif not self.spills(unit):
            self._bind(unit, allocate(unit_state_bytes(slabs, self.moments)))
        return state

    def _take_parameter(self, entry: SlotState, mapped: bool) -> None:
        parameter = entry.slot.parameter
        source = parameter.data
        self.write_master(entry.slot.index, source)
        parameter.data = entry.weight
        entry.version = parameter._version
        if mapped:
            discard_pages(source)

    @contextmanager
    def state_of(self, piece: Piece, *, changes: bool = True, summed: bool | None = None) -> Iterator[SlabState]:
        """The optimizer state of a piece, in memory while this is entered; what is changed of it is kept. `summed`:
        whether its new checksum is taken, where there are any; None: that of state on disk, which is at hand only here.

        Raises IntegrityError where a disk fails, or a checksum says that the state is not what it was left as.
        """
        slab = self.units[piece.unit].slabs[piece.slab]
        if slab.state is not None:
            with self._checked(piece, slab.state, changes=changes, summed=bool(summed)):
                yield slab.state
            return
        assert self.spilled is not None
        memory = self.spilled.take(piece)
        try:
            state = SlabState.within(memory, piece.stop - piece.start, slab.layout.dtype, self.moments)
            with self._checked(piece, state, changes=changes, summed=summed):
                yield state
        finally:
            self.spilled.give_back(piece, changed=changes)

    @contextmanager
    def _checked(self, piece: Piece, state: SlabState, *, changes: bool, summed: bool | None) -> Iterator[None]:
        """Its checksum must hold before anything is changed, and belongs to the new values afterwards. Also where it is
        only read, if it came from a disk; of state that is in memory many readers take one parameter's part each."""
        book, spilled = self.book, self.spills(piece.unit)
        if book is None or piece.unit in self.on_device or not (changes or spilled):
            yield
            return
        book.check_state(piece, state, *([DISK] if spilled else []))
        try:
            yield
        finally:
            if changes and (book.due(piece.unit) if summed is None else summed):
                book.note_state(piece, state)
            elif changes:
                book.forget_state(piece)

    def parts_of(self, entry: SlotState) -> Iterator[tuple[Piece, slice, slice]]:
        """The pieces in which a parameter's state lies: where in the piece, and where in the parameter."""
        unit = self.units[entry.unit]
        for piece in unit.pieces:
            overlap = piece.overlap(entry.place) if unit.slabs[piece.slab] is entry.slab else None
            if overlap is not None:
                yield piece, *overlap

    def expect(self, units: Iterable[int]) -> None:
        """The state of `units` will be taken next, in this order."""
        if self.spilled is not None:
            self.spilled.expect(piece for unit in units for piece in self.units[unit].pieces)

    def spills(self, unit: int) -> bool:
        """Whether the unit's optimizer state is on disk."""
        return self.spilled is not None and unit in self.spilled

    def _bind(self, unit: int, memory: Tensor) -> None:
        for slab in self.units[unit].slabs:
            slab.state = SlabState.within(memory, slab.layout.state_count, slab.layout.dtype, self.moments)
            memory = memory[state_bytes(slab.layout, self.moments) :]

    def take_over_as_it_is(self, slot: ParameterSlot) -> Tensor:
        """Make a parameter that is not floating point, and never changes, a view of whole pages of its own, which can
        be page-locked; returns them."""
        source = slot.parameter.data
        memory = allocate(source.nbytes)[: source.nbytes]
        slot.parameter.data = memory.view(source.dtype).view(source.shape)
        slot.parameter.data.copy_(source)
        return memory

    def write_master(self, slot: int, source: Tensor) -> None:
        """Set a parameter's master from `source` (any float dtype, the parameter's shape); steps and moments stay."""
        entry = self.slots[slot]
        self._forget_checksums(entry)
        if not entry.carries_remainder or source.dtype == torch.bfloat16:
            entry.weight.copy_(source)
            self._drop_remainder(entry)
            return
        masters, weights = source.detach().to(torch.float32).contiguous().view(-1), entry.weight.view(-1)
        for piece, here, there in self.parts_of(entry):
            with self.state_of(piece) as state:
                assert state.remainder is not None
                parts = (weights[there], state.remainder[here])
                if entry.slab.on_device:
                    device_kernels.split(masters[there], *parts)
                else:
                    split(self.workers, masters[there].numpy(), bits(parts[0]), parts[1].numpy())
        entry.written()

    def read_master(self, slot: int) -> Tensor:
        """A parameter's exact master as a new fp32 tensor in its own shape, in host memory (frozen: its weight)."""
        entry = self.slots[slot]
        if not entry.carries_remainder:
            return entry.weight.detach().to("cpu", torch.float32, copy=True)
        self.notice_silent_write(entry)
        master = torch.empty(entry.place.shape, dtype=torch.float32, device="cpu")
        masters, weights = master.view(-1), entry.weight.view(-1)
        for piece, here, there in self.parts_of(entry):
            with self.state_of(piece, changes=False) as state:
                assert state.remainder is not None
                parts = (weights[there], state.remainder[here])
                if entry.slab.on_device:
                    device_kernels.merge(*parts, masters[there])
                else:
                    merge(self.workers, bits(parts[0]), parts[1].numpy(), masters[there].numpy())
        return master

    def read_moments(self, slot: int) -> dict[str, Tensor]:
        """A parameter's moments by name, in its shape (scales of its blocks: 1-D): views of host memory, or copies of
        what lies elsewhere."""
        return {name: part for name, part in self.read_state(slot).items() if name != "remainder"}

    def read_state(self, slot: int) -> dict[str, Tensor]:
        """Likewise, and the remainder of its master where it has one."""
        entry = self.slots[slot]
        state = entry.slab.state
        if state is not None:
            found = state.parts_of(entry.slab.range_of(entry.place))
            if entry.slab.on_device:
                found = {name: part.to("cpu", copy=True) for name, part in found.items()}
        else:
            found = empty_state(entry.place.count, entry.slab.layout.dtype, self.moments)
            for piece, here, there in self.parts_of(entry):
                with self.state_of(piece, changes=False) as held:
                    for name, part in held.parts_of(here).items():
                        found[name][where(name, there)] = part
        return {n: part if n.endswith("scale") else part.view(entry.place.shape) for n, part in found.items()}

    def state_shapes(self, slot: int) -> dict[str, Tensor]:
        """What `read_state` would give, without memory; nothing of a parameter that is not trained."""
        entry = self.slots[slot]
        if not entry.place.trainable:
            return {}
        held = empty_state(entry.place.count, entry.slab.layout.dtype, self.moments, "meta")
        return {n: part if n.endswith("scale") else part.view(entry.place.shape) for n, part in held.items()}

    def write_moments(self, slot: int, moments: Mapping[str, Tensor]) -> None:
        """Set them from tensors as `read_moments` gives them, of any floating dtype where they are fp32."""
        self._forget_checksums(self.slots[slot])
        for piece, here, there in self.parts_of(self.slots[slot]):
            with self.state_of(piece) as state:
                for name, part in state.moments_of(here).items():
                    part.copy_(moments[name].reshape(-1)[where(name, there)])

    def write_state(self, slot: int, weight: Tensor | None, state: Mapping[str, Tensor]) -> None:
        """Set a parameter from what `read_state` gave, and from its weight, in the dtype that it is held in (None: it
        is there already)."""
        entry = self.slots[slot]
        if weight is not None:
            entry.weight.copy_(weight)
            if self.book is not None:
                self.book.forget(entry.unit)
        for piece, here, there in self.parts_of(entry) if state else ():
            with self.state_of(piece) as held:
                for name, part in held.parts_of(here).items():
                    part.copy_(state[name].reshape(-1)[where(name, there)])
        entry.written()

    def give_back(self, dtypes: dict[int, torch.dtype]) -> None:
        """Make every parameter again what it was before it was taken over, by its dtype: the exact master."""
        for index, entry in self.slots.items():
            if entry.slot.parameter.dtype != dtypes[index] or entry.slab.on_device:
                entry.slot.parameter.data = self.read_master(index).to(dtypes[index])

    def reset_moments(self, slot: int) -> None:
        """Forget moments and step count; the master stays."""
        entry = self.slots[slot]
        entry.steps = 0
        self._forget_checksums(entry)
        for piece, here, _ in self.parts_of(entry):
            with self.state_of(piece) as state:
                for part in state.moments_of(here).values():
                    part.zero_()

    def notice_writes(self) -> None:
        """Find parameters that someone wrote in place (`load_state_dict`, a callback).

        Their low master bits belong to the old values and go; moments and step counts stay, as in PyTorch. The kernels
        write past torch's version counters, so a changed counter is somebody else's doing.
        """
        for entry in self._written():
            entry.version = entry.slot.parameter._version
            self._drop_remainder(entry)

    def notice_silent_write(self, entry: SlotState) -> None:
        """Likewise where somebody has written the weight past torch's version counter. Raises IntegrityError where
        weights are looked after: nothing tells such a write from bits that have changed by themselves."""
        valid = entry.remainder_is_valid
        if valid is None:
            return
        if entry.slab.on_device:
            assert entry.slab.state is not None and entry.slab.state.remainder is not None
            entry.slab.state.remainder[entry.slab.range_of(entry.place)] *= valid
        elif not valid:
            if self.book is not None and entry.version == entry.slot.parameter._version:
                raise IntegrityError(
                    f"engine.integrity: parameter {entry.slot.name} is not what it was left as, and torch's version"
                    " counter tells of no write: it was written by .data, which is not allowed here (write it in place"
                    " under torch.no_grad()), or bits have changed by themselves"
                )
            self._drop_remainder(entry)

    def _drop_remainder(self, entry: SlotState) -> None:
        """The weight has been written: it is the master."""
        self._forget_checksums(entry)
        for piece, here, _ in self.parts_of(entry) if entry.carries_remainder else ():
            with self.state_of(piece) as state:
                assert state.remainder is not None
                state.remainder[here] = 0
        entry.written()

    # -- checksums --------------------------------------------------------------------------------------------

    def regions_read(self, unit: int, slots: Iterable[ParameterSlot]) -> list[Region]:
        """What is known of the weights in host memory that a unit of `slots` reads: its own, and parameters at home in
        other units, which have checksums of their own from here on."""
        assert self.book is not None
        held = [self.unit_memory(unit)] if unit in self.units and unit not in self.on_device else []
        for slot in slots:
            entry = self.slots.get(slot.index)
            if entry is not None and entry.unit != unit and entry.weight.numel():
                held.append(as_bytes(entry.weight))
                if self.book.region_of(held[-1]) is None:
                    self.book.watch(entry.unit, held[-1])
        return [region for memory in held if (region := self.book.region_of(memory)) is not None]

    def take_checksums(self, is_pending: Callable[[int], bool]) -> None:
        """Those that are missing of units that are looked at in this step, but for state on disk, whose are taken as it
        is written. `is_pending`: whether an update of the unit is under way, which takes them by itself."""
        for unit, held in self.units.items() if self.book is not None else ():
            assert self.book is not None
            if unit in self.on_device or not self.book.due(unit) or is_pending(unit):
                continue
            if not self.book.knows_weights(unit):
                self.book.note_weights(unit)
            for piece in held.pieces if not self.spills(unit) else ():
                state = held.slabs[piece.slab].state
                if state is not None and not self.book.knows_state(piece):
                    self.book.note_state(piece, state)

    def check_checksums(self) -> None:
        """Raises IntegrityError where something in host memory is not what it was left as. No update is pending."""
        self.forget_written_checksums()
        for unit, held in self.units.items() if self.book is not None else ():
            assert self.book is not None
            self.book.check_weights(unit)
            for piece in held.pieces:
                state = held.slabs[piece.slab].state
                if state is not None:
                    self.book.check_state(piece, state)

    def forget_written_checksums(self) -> None:
        """Of units that somebody has written in place and `notice_writes` has not seen: their weights are as they are
        meant to be."""
        for entry in self._written() if self.book is not None else ():
            self._forget_checksums(entry)

    def _forget_checksums(self, entry: SlotState) -> None:
        if self.book is not None:
            self.book.forget(entry.unit)  # of the state, `state_of` knows

    def refuse_writes(self) -> None:
        """Raise IntegrityError where someone has written a parameter since `notice_writes`."""
        for entry in self._written():
            raise IntegrityError(
                f"parameter {entry.slot.name} was written in place before its last update was waited for, which may lie"
                " on top of it; call engine.flush() before writing into parameters"
            )

    def _written(self) -> Iterator[SlotState]:
        return (entry for entry in self.slots.values() if entry.version != entry.slot.parameter._version)

    def unit_memory(self, unit: int) -> Tensor:
        """All weights of a unit as they lie in memory, one behind the other: uint8."""
        slabs = self.units[unit].slabs
        storage = slabs[0].weight.untyped_storage()
        n_bytes = sum(slab.layout.weight_bytes for slab in slabs)
        memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        return memory.set_(storage, slabs[0].weight.storage_offset(), (n_bytes,), (1,))

    def bytes_by_category(self) -> dict[str, int]:
        """Bytes of host memory held now, by category; the plan's counterpart."""
        held = dict.fromkeys(("weights", "remainders", "exp_avg", "exp_avg_sq", "gradients", "accumulated"), 0)
        witnesses = (entry.witness for entry in self.slots.values() if entry.witness is not None)
        held["witnesses"] = sum(witness.n_bytes for witness in witnesses)
        if self.spilled is not None:
            held["disk buffers"] = self.spilled.buffers_bytes
        for unit, state in self.units.items():
            for slab in state.slabs if unit not in self.on_device else ():
                held["weights"] += slab.layout.weight_bytes
                if not self.spills(unit):
                    held["remainders"] += slab.layout.remainder_bytes
                    held["exp_avg"] += moment_bytes(slab.layout, self.moments)
                    held["exp_avg_sq"] += moment_bytes(slab.layout, self.moments)
                held["gradients"] += 0 if slab.gradient is None else slab.layout.gradient_bytes
                held["accumulated"] += 0 if slab.accumulated is None else slab.layout.moment_bytes
        return held

    def bring_home(self) -> None:
        """Weights in a device's memory become the host's, unit by unit. The rest of what lies there is gone."""
        for unit in self.on_device:
            for entry in (e for e in self.slots.values() if e.unit == unit):
                entry.slot.parameter.data = entry.weight.to("cpu", copy=True)
            for slab in self.units[unit].slabs:
                slab.weight, slab.state, slab.gradient, slab.accumulated = slab.weight[:0].cpu(), None, None, None

    def close(self) -> None:
        """Weights stay; state on disk is gone."""
        self.workers.close()
        if self.spilled is not None:
            self.spilled.close()

    def check_addresses(self) -> None:
        """Every parameter must still be the view it was made: `load_state_dict(assign=True)`, `.data =` and casts
        detach it silently, and training would go on with weights that nobody reads. Raises IntegrityError."""
        for entry in self.slots.values():
            slot, expected = entry.slot, entry.slab.weight.data_ptr()
            expected += entry.place.start * entry.slab.weight.element_size()
            moved = slot.parameter.data_ptr() != expected and slot.parameter.numel() > 0
            if moved or any(owner._parameters.get(name) is not slot.parameter for owner, name in slot.places):
                raise IntegrityError(
                    f"parameter {slot.name} was replaced or moved after the engine took the model over; write into it"
                    " in place (load_state_dict without assign=True), or make a new Engine"
                )
            refuse_changed_freezing(entry)
            hooks = (slot.parameter._backward_hooks, slot.parameter._post_accumulate_grad_hooks)
            if any(len(found or ()) > entry.own_hooks for found in hooks):
                raise IntegrityError(
                    f"parameter {slot.name} has a gradient hook (register_hook, register_post_accumulate_grad_hook),"
                    " which the engine would not call with its gradient; remove it"
                )


def refuse_changed_freezing(entry: SlotState) -> None:
    """Raise IntegrityError where a parameter is not trainable or frozen as it was: state is there for the former."""
    if entry.slot.parameter.requires_grad != entry.place.trainable:
        now = "trainable" if entry.slot.parameter.requires_grad else "frozen"
        raise IntegrityError(
            f"parameter {entry.slot.name} was made {now} after the engine took over; make a new Engine"
        )


def gradient_buffers(slabs: list[Slab]) -> Iterator[Tensor]:
    """A page-aligned gradient buffer for each of `slabs`, of its weight's dtype, (state_count)."""
    for slab in slabs:
        yield allocate_elements(slab.layout.state_count, TORCH_DTYPE[slab.layout.dtype])


def bits(tensor: Tensor) -> np.ndarray:
    """A 1-D tensor's memory as numpy sees it: bf16 as uint16, fp32 as float32."""
    tensor = tensor.detach()
    array: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def resident_bytes(slabs: list[SlabLayout], moments: str) -> int:
    """Of a unit that lies in a compute device's memory: weights, state and gradients, one behind the other."""
    return sum(s.weight_bytes + s.gradient_bytes for s in slabs) + unit_state_bytes(slabs, moments)


def _weight_views(slabs: list[SlabLayout], buffer: Tensor) -> Iterator[tuple[SlabLayout, Tensor]]:
    """One buffer for all of a unit's weights, cut into its slabs (their sizes are aligned)."""
    start = 0
    for layout in slabs:
        yield layout, buffer[start : start + layout.weight_bytes].view(TORCH_DTYPE[layout.dtype])
        start += layout.weight_bytes


def home_layouts(part: Partition) -> Iterator[tuple[int, list[ParameterSlot]]]:
    """(unit index or -1, the slots whose state lives there), in tree order, stray parameters last."""
    for unit in part.units:
        yield unit.index, part.homes(unit)
    if part.strays:
        yield ALL_UNITS_STRAY, part.strays
