"""Complete gradients on their way from the device to the host: packed, copied, and only then read."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter

import torch
from torch import Tensor

from megatrain.device.base import Event, StreamingDevice
from megatrain.engine.device_checks import RECORD_BYTES, DeviceChecks, Part, merged
from megatrain.engine.host_thread import HostThread, Ticket
from megatrain.memory.checksum import WORD_BYTES, added
from megatrain.memory.checksum_book import HOST
from megatrain.memory.layout import ALIGNMENT_BYTES

STAGING_BUFFERS = 2  # one is packed while the other one leaves


@dataclass(slots=True)
class Staging:
    """Device memory in which one unit's gradient lies in the dtype that crosses the link. `record`: what goes with it
    where checksums are looked at (int64, 3)."""

    buffer: Tensor
    record: Tensor | None = None
    free: Event | None = None


class GradientStream:
    """Sends gradients to the host. `largest_bytes`: of one unit's gradient. `checks`: what the device has found in its
    memory goes with them, and their checksums; None: nobody looks."""

    def __init__(
        self, device: StreamingDevice, host: HostThread, largest_bytes: int, checks: DeviceChecks | None = None
    ) -> None:
        self._device = device
        self._host = host
        self._checks = checks
        n_bytes = largest_bytes
        self._staging = deque(Staging(device.allocate(n_bytes, "gradients that leave")) for _ in range(STAGING_BUFFERS))
        for staging in self._staging if checks is not None else ():
            staging.record = device.allocate(RECORD_BYTES, "checksums").view(torch.int64)
        self._tickets: deque[Ticket] = deque()

    def hold(self, n_bytes: int) -> None:
        """Sums of gradients on the device have grown by `n_bytes`."""
        self._device.hold(n_bytes)

    def send(self, unit: int, sums: list[Tensor], targets: list[Tensor], land: Callable[[], None], label: str) -> None:
        """Round each of `sums`, gradients of `unit`, to its target's dtype and copy it there; then the host thread
        calls `land`. Returns at once; `finish` waits and raises what went wrong."""
        staging = self._staging[0]
        self._staging.rotate(-1)
        places = _places(targets)
        views = [staging.buffer[a:b].view(t.dtype) for (a, b), t in zip(places, targets, strict=True)]
        held = sum(s.nbytes for s in sums)
        checked = self._checks is not None and self._checks.book.due(unit)

        def pack() -> None:
            with torch.no_grad():
                for view, value in zip(views, sums, strict=True):
                    view.copy_(value.reshape(-1))
            sums.clear()
            self._device.hold(-held)
            if self._checks is not None and staging.record is not None:
                # here, where what crosses the link lies packed; it leaves no earlier than the gradient itself
                self._checks.seal(staging.record, staging.buffer, merged(places) if checked else ())

        free = [("staging_free", staging.free)] if staging.free is not None else []
        packed = self._device.compute(pack, free, f"pack gradient of {label}")
        pairs = list(zip(targets, views, strict=True))
        record = None
        if self._checks is not None and staging.record is not None:
            self._checks.recorded()
            record = self._checks.take_record()
            pairs.append((record, staging.record))
        landed = self._device.down.copy(pairs, [("gradient_packed", packed)], label=label)
        staging.free = landed

        def arrive() -> None:
            waits = perf_counter()
            self._device.host_wait("gradient_landed", landed.wait)
            start = perf_counter()
            if record is not None:  # before anybody reads the gradient, or a unit is updated with it
                self._check(unit, record, targets if checked else [], places)
            land()
            if self._device.trace is not None:
                self._device.trace.add("waits of host", "gradient_landed", waits, start)
                self._device.trace.add("host", f"gradient of {label}", start, perf_counter())

        self._tickets.append(self._host.submit(arrive))

    def _check(self, unit: int, record: Tensor, targets: list[Tensor], places: list[Part]) -> None:
        """Raise IntegrityError where the device has found something, or a gradient is not what has left it."""
        assert self._checks is not None
        book, sums = self._checks.book, self._checks.read(record)
        landed = [book.sums_of(t, begin // WORD_BYTES) for t, (begin, _) in zip(targets, places, strict=False)]
        if landed and added(landed) != sums:
            raise book.error(unit, "gradient", f"as it landed {HOST}")

    def wait_for_all_but(self, count: int) -> None:
        """Return when at most `count` gradients are under way."""
        if len(self._tickets) <= count:
            return
        with self._device.waits.during("gradient_landed"):  # no computation is given to the device meanwhile
            while len(self._tickets) > count:
                self._tickets.popleft().wait()

    def finish(self) -> None:
        """Return when all have landed; raises the first error."""
        try:
            self.wait_for_all_but(0)
        finally:
            self.settle()  # after an error: nothing may still be written

    def settle(self) -> None:
        """Return when nothing is under way any more, whatever came of it."""
        while self._tickets:
            self._tickets.popleft().settle()
        for staging in self._staging:
            staging.free = None  # a copy from it that failed is no reason for the next gradient's to fail

    def close(self) -> None:
        """Give the device's memory back."""
        self.settle()
        self._staging.clear()


def largest_staging_bytes(counts_and_itemsizes: list[list[tuple[int, int]]]) -> int:
    """Of units given as (elements, bytes per element) of each parameter: what the largest needs, with every parameter
    on a cache line of its own."""
    return max((sum(_aligned(c * i) for c, i in unit) for unit in counts_and_itemsizes), default=0)


def _places(targets: list[Tensor]) -> list[Part]:
    """Where each lies in a staging buffer, in bytes."""
    starts = accumulate((_aligned(t.nbytes) for t in targets), initial=0)
    return [(start, start + target.nbytes) for start, target in zip(starts, targets, strict=False)]


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
