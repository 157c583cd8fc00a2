"""The checksums that weights and optimizer state in host memory must have, and which units are looked at in which step.

A sum is taken when the engine has written something, and forgotten when somebody else has; what has none is not looked
at. With `full` every unit has one. With `sampled` a unit has one in one step of a rotation: it is taken after the
update before that step, and holds until the update after it. Weights that are never written keep theirs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.errors import IntegrityError
from megatrain.memory.checksum import Sums, host_sums
from megatrain.memory.pieces import Piece
from megatrain.memory.slab_state import SlabState
from megatrain.optim.workers import Workers

LEVELS = ("off", "sampled", "full")
ROTATION_STEPS = 16  # after which `sampled` has looked at every unit; fewer where there are fewer units

HOST = "in host memory"
DISK = "as it came back from disk"


@dataclass(slots=True)
class Region:
    """Host memory that travels as one piece: a unit's weights, or a parameter of it that another unit reads, too."""

    unit: int
    memory: Tensor
    sums: Sums | None = None


class ChecksumBook:
    """`names`: of the units that hold parameters. `step`: which one is under way, counted by the engine."""

    def __init__(self, workers: Workers, names: Mapping[int, str], level: str) -> None:
        self.step = 0
        self.rotation_steps = 1 if level == "full" else max(1, min(ROTATION_STEPS, len(names)))
        self.names = {unit: name or "the model" for unit, name in names.items()}
        self.on_device: set[int] = set()  # units in a device's memory whose sums are known there
        self._workers = workers
        self._turns = {unit: number % self.rotation_steps for number, unit in enumerate(sorted(names))}
        self._regions: dict[int, list[Region]] = {}  # by unit: all of its weights first
        self._by_place: dict[tuple[int, int], Region] = {}
        self._states: dict[Piece, dict[str, Sums]] = {}

    def due(self, unit: int, step: int | None = None) -> bool:
        """Whether the unit is looked at in a step, or in the one under way."""
        return (self.step if step is None else step) % self.rotation_steps == self._turns[unit]

    def sums_of(self, memory: Tensor, first: int = 0) -> Sums:
        return host_sums(self._workers, memory, first)

    def forget(self, unit: int) -> None:
        """Somebody has written weights of the unit, who may, or anything of one in a device's memory."""
        self.forget_weights(unit)
        self.on_device.discard(unit)

    # -- weights ----------------------------------------------------------------------------------------------

    def watch(self, unit: int, memory: Tensor) -> None:
        """Weights at home in `unit`, uint8: all of them first, then single parameters that other units read."""
        region = Region(unit, memory)
        self._regions.setdefault(unit, []).append(region)
        self._by_place[_place(memory)] = region

    def region_of(self, memory: Tensor) -> Region | None:
        """What is known of a piece of host memory, given as it was to `watch`."""
        return self._by_place.get(_place(memory))

    def note_weights(self, unit: int) -> None:
        for region in self._regions.get(unit, ()):
            region.sums = self.sums_of(region.memory)

    def forget_weights(self, unit: int) -> None:
        for region in self._regions.get(unit, ()):
            region.sums = None

    def knows_weights(self, unit: int) -> bool:
        return all(region.sums is not None for region in self._regions.get(unit, ()))

    def check_weights(self, unit: int) -> None:
        """Raises IntegrityError where the unit's weights are not what they were left as."""
        for region in self._regions.get(unit, ())[:1]:
            self.check_region(region)

    def check_region(self, region: Region) -> None:
        if self.has_changed(region):
            hint = ", unless somebody has written them past torch's version counters (.data)"
            raise self.error(region.unit, "weights", HOST, hint)

    def has_changed(self, region: Region) -> bool:
        return region.sums is not None and self.sums_of(region.memory) != region.sums

    # -- optimizer state --------------------------------------------------------------------------------------

    def note_state(self, piece: Piece, state: SlabState) -> None:
        self._states[piece] = dict(self._state_sums(state))

    def forget_state(self, piece: Piece) -> None:
        self._states.pop(piece, None)

    def knows_state(self, piece: Piece) -> bool:
        return piece in self._states

    def check_state(self, piece: Piece, state: SlabState, where: str = HOST) -> None:
        """Raises IntegrityError where a piece of state is not what it was left as."""
        expected = self._states.get(piece)
        if expected is None:
            return
        for name, sums in self._state_sums(state):
            if sums != expected[name]:
                raise self.error(piece.unit, f"state ({name})", where)

    def _state_sums(self, state: SlabState) -> Iterator[tuple[str, Sums]]:
        for name, part in state.parts().items():
            yield name, self.sums_of(part)

    def error(self, unit: int, what: str, where: str, hint: str = "") -> IntegrityError:
        return IntegrityError(
            f"engine.integrity: step {self.step}: {what} of {self.names[unit]} {where}: not the checksum that was taken"
            f" before, so bits have changed by themselves{hint}. Go on from the last save; if it happens again, test"
            " memory and device"
        )


def _place(memory: Tensor) -> tuple[int, int]:
    return memory.data_ptr(), memory.nbytes


def as_bytes(tensor: Tensor) -> Tensor:
    """A dense tensor's memory, 1-D."""
    return tensor.detach().reshape(-1).view(torch.uint8)
