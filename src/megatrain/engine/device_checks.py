"""What is checked in a streaming device's memory: weights that have arrived, and units that stay there.

The device compares by itself, in the order of computation, and keeps the number of the first thing that was wrong. The
host learns it from a record that comes with each gradient, before that gradient can update anything; what is checked
after the last gradient of a pass is asked for at its end (`finish`). So no step waits for a check in its middle.
"""

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatrain.device.base import Event, StreamingDevice
from megatrain.engine.device_slots import UnitImage
from megatrain.errors import IntegrityError
from megatrain.memory.arena import PAGE_BYTES, allocate
from megatrain.memory.checksum import SUMS_BYTES, WORD_BYTES, added, device_sums, numbered
from megatrain.memory.checksum_book import ChecksumBook
from megatrain.memory.store import HostStore

RECORD_BYTES = 8 + SUMS_BYTES  # number of the first thing that was wrong, 0 for none; sums of a gradient
ARRIVED = "as they arrived in the device's memory"
RESIDENT = "in the device's memory"
Part = tuple[int, int]  # bytes of a slot: begin, end


class DeviceChecks:
    """`book`: the checksums that host memory must have."""

    def __init__(self, device: StreamingDevice, store: HostStore, book: ChecksumBook) -> None:
        self.book = book
        self._device = device
        self._store = store
        self._found = device.allocate(8, "checksums").view(torch.int64)
        self._found.zero_()
        self._subjects: list[tuple[int, str, str]] = []  # what numbers from 1 on stand for: unit, what of it, where
        self._images: dict[int, UnitImage] = {}  # by unit whose weights are fetched
        # by the same: host memory that is copied from (stray parameters, -1, have the last row)
        self._expected = self._host_memory(SUMS_BYTES * len(book.names) + SUMS_BYTES).view(-1, 2)
        self._records: deque[Tensor] = deque()  # host memory for records that is free
        self._make_records()
        self._last: Event | None = None  # the last check that no record tells of yet
        self._residents: dict[int, dict[str, Tensor]] = {}  # sums by unit and what of it, where they are

    # -- weights that arrive ----------------------------------------------------------------------------------

    def expect(self, unit: int, image: UnitImage) -> tuple[Tensor, list[Part]] | None:
        """Of a fetch that is about to be issued, when all updates of the unit are done: what is to be copied behind the
        weights, and which parts of the slot it is for; None where nothing is looked at."""
        parts, sums = [], []
        for offset, memory in image.pieces:
            region = self.book.region_of(memory)
            if region is not None and region.sums is not None and self.book.due(region.unit):
                parts.append((offset, offset + memory.nbytes))
                sums.append(numbered(region.sums, offset // WORD_BYTES))
        if not parts:
            return None
        self._images[unit] = image
        # no copy reads what an earlier fetch has put here, or it reads the same: in between there was an update, which
        # waits until nothing reads the host's weights any more
        expected = self._expected[unit]
        expected.copy_(torch.tensor(added(sums), dtype=torch.int64, device="cpu"))
        return expected, parts

    def arrived(self, unit: int, buffer: Tensor, parts: Sequence[Part], expected: Tensor) -> None:
        """Compare what has arrived in a slot. Given to the device once the copy is waited for and before the unit
        computes: the slot's release, after which it may be overwritten, comes later in the order of computation."""
        number = self._number(unit, "weights", ARRIVED)

        def run() -> None:
            self._compare(buffer_sums(buffer, parts), expected, number)

        self._last = self._device.compute(run, (), f"check weights of {self._name(unit)}")

    # -- units that stay in the device's memory ---------------------------------------------------------------

    def check_residents(self) -> None:
        """Compare what lies there when a pass begins: nothing of it was used in this step, or updated."""
        for unit in sorted(self.book.on_device):
            if self.book.due(unit):
                numbers = {what: self._number(unit, what, RESIDENT) for what in self._memory(unit)}
                run = partial(self._compare_resident, unit, numbers)
                self._last = self._device.compute(run, (), f"check {self._name(unit)}")

    def take_residents(self) -> None:
        """Sums that are missing of units that are looked at in this step."""
        for unit in sorted(self._store.on_device - self.book.on_device):
            if self.book.due(unit):
                self._take(unit)

    def updated(self, unit: int, step: int) -> None:
        """The update of a unit of a step was given to the device: from then on, other sums are right."""
        self.book.on_device.discard(unit)
        if self.book.due(unit, step + 1):
            self._take(unit)

    def _take(self, unit: int) -> None:
        self._device.compute(partial(self._sum_resident, unit), (), f"checksum of {self._name(unit)}")
        self.book.on_device.add(unit)

    def _sum_resident(self, unit: int) -> None:
        with torch.no_grad():
            self._residents[unit] = {what: device_sums(memory) for what, memory in self._memory(unit).items()}

    def _compare_resident(self, unit: int, numbers: dict[str, int]) -> None:
        for what, memory in self._memory(unit).items():
            self._compare(device_sums(memory), self._residents[unit][what], numbers[what])

    def _memory(self, unit: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for n, slab in enumerate(self._store.units[unit].slabs):
            more = f" {n}" if n else ""
            assert slab.state is not None
            parts = {"weights": slab.weight} | {f"state ({name})": part for name, part in slab.state.parts().items()}
            found |= {what + more: memory for what, memory in parts.items()}
        return found

    # -- gradients, and what is found -------------------------------------------------------------------------

    def seal(self, record: Tensor, staged: Tensor, parts: Sequence[Part]) -> None:
        """Write a packed gradient's record, behind it in the order of computation. `parts` of the staging buffer are
        summed; none: nothing but what was found goes with it."""
        with torch.no_grad():
            record[:1] = self._found
            if parts:
                record[1:] = buffer_sums(staged, parts)

    def recorded(self) -> None:
        """A record that is sealed from here on tells of all checks so far."""
        self._last = None

    def take_record(self) -> Tensor:
        """Host memory that a record can be copied to; `read` gives it back. As many are out as gradients are on their
        way to the host or wait there to be read."""
        if not self._records:
            self._make_records()
        return self._records.pop()

    def _make_records(self) -> None:
        count = PAGE_BYTES // RECORD_BYTES
        self._records.extend(self._host_memory(RECORD_BYTES * count).split(RECORD_BYTES // 8))

    def read(self, record: Tensor) -> tuple[int, int]:
        """The sums in a record that has come; raises IntegrityError where a check has found something."""
        number, plain, placed = record.tolist()
        self._records.append(record)
        if number:
            raise self._error(*self._subjects[number - 1])  # the first thing that was wrong
        return plain, placed

    def finish(self) -> None:
        """Raise IntegrityError where a check since the last record has found something. A gradient that was packed
        after the last check has told already, so that a step waits here only where weights came after it."""
        last, self._last = self._last, None
        if last is None:
            return
        record = self.take_record()
        copied = self._device.down.copy([(record[:1], self._found)], [("checks_made", last)], label="checks")
        self._device.host_wait("checks_made", copied.wait)
        self.read(record)

    def forget(self) -> None:
        """The pass was given up, and nothing is under way."""
        self._last = None
        self._found.zero_()

    # -- inside -----------------------------------------------------------------------------------------------

    def _compare(self, sums: Tensor, expected: Tensor, number: int) -> None:
        with torch.no_grad():
            is_first = (sums != expected).any() & (self._found == 0)
            self._found.masked_fill_(is_first, number)

    def _number(self, *subject: Any) -> int:
        if subject not in self._subjects:
            self._subjects.append(subject)
        return self._subjects.index(subject) + 1

    def _error(self, unit: int, what: str, where: str) -> IntegrityError:
        """Of weights that have arrived wrong, it is told whether they had left the host so."""
        regions = [self.book.region_of(memory) for _, memory in self._images[unit].pieces] if where == ARRIVED else []
        try:
            for region in regions:
                if region is not None:
                    self.book.check_region(region)
        except IntegrityError as error:
            return error
        return self.book.error(unit, what, where)

    def _name(self, unit: int) -> str:
        return self.book.names[unit]

    def _host_memory(self, n_bytes: int) -> Tensor:
        page = allocate(n_bytes)
        self._device.pin(page)
        return page[:n_bytes].view(torch.int64)


def buffer_sums(buffer: Tensor, parts: Sequence[Part]) -> Tensor:
    """Of parts of a buffer in a device's memory, each numbered as it lies in the buffer."""
    return torch.stack([device_sums(buffer[a:b], a // WORD_BYTES) for a, b in parts]).sum(0)


def merged(parts: Sequence[Part]) -> list[Part]:
    """Parts that follow each other without a gap become one."""
    found: list[Part] = []
    for begin, end in parts:
        if found and found[-1][1] == begin and end > begin:
            found[-1] = (found[-1][0], end)
        elif end > begin:
            found.append((begin, end))
    return found
