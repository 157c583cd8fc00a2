"""Optimizer state of some units on disk: read ahead of their updates, written behind them.

Three buffers, each as large as the largest state, go round: one is read into, one is updated, one is written. Whoever
updates takes a unit's state and gives it back; the order in which units will be taken is announced, and only decides
how early they are read.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from threading import Condition

from torch import Tensor

from megatrain.memory.arena import allocate
from megatrain.memory.spill_file import SpillFile, round_up
from megatrain.threads import KeptThread

BUFFERS = 3


class SpilledStates:
    """`state_bytes` by unit; `file` has room for them all (`file_bytes`). New states are zero."""

    def __init__(self, file: SpillFile, state_bytes: Mapping[int, int]) -> None:
        self._file = file
        self._places: dict[int, tuple[int, int]] = {}  # (offset, length) by unit
        offset = 0
        for unit, n_bytes in state_bytes.items():
            self._places[unit] = (offset, round_up(n_bytes))
            offset += round_up(n_bytes)
        self._changed = Condition()
        self._free = [allocate(buffer_bytes(state_bytes)) for _ in range(BUFFERS)]
        self._read: dict[int, Tensor] = {}  # ahead, in this order
        self._reading: set[int] = set()
        self._taken: dict[int, Tensor] = {}
        self._writing: set[int] = set()
        self._expected: deque[int] = deque()
        self._error: BaseException | None = None
        self._reader, self._writer = KeptThread("megatrain-spill-reader"), KeptThread("megatrain-spill-writer")

    @property
    def buffers_bytes(self) -> int:
        """In host memory."""
        return BUFFERS * max((length for _, length in self._places.values()), default=0)

    def __contains__(self, unit: int) -> bool:
        return unit in self._places

    def expect(self, units: Iterable[int]) -> None:
        """`units` will be taken next, in this order; what was said before no longer holds."""
        units = [unit for unit in units if unit in self._places]
        with self._changed:
            self._expected = deque(units)
            self._changed.notify_all()
        for _ in units:
            self._reader.start(self._read_next, self._note)

    def take(self, unit: int) -> Tensor:
        """The unit's state in memory (uint8, as long as it is), to be changed and given back.

        One thread takes one unit at a time. Raises IntegrityError where a transfer, also an earlier one, has failed.
        """
        with self._changed:
            while True:
                self._raise()
                if unit in self._read:
                    self._taken[unit] = self._read.pop(unit)
                    return self._taken[unit][: self._places[unit][1]]
                if unit not in self._reading | self._writing:
                    if unit in self._expected:
                        self._expected.remove(unit)
                    if not self._free and self._read:  # read ahead for others: their turn comes again
                        self._free.append(self._read.popitem()[1])
                    if self._free:
                        break
                self._changed.wait()
            buffer = self._begin(unit)
        self._finish(unit, buffer)
        return self.take(unit)

    def give_back(self, unit: int) -> None:
        """Its state has changed, and goes to disk behind the caller's back."""
        with self._changed:
            buffer = self._taken.pop(unit)
            self._writing.add(unit)
        self._writer.start(partial(self._write, unit, buffer), self._note)

    def flush(self) -> None:
        """Return when everything given back is written. Raises IntegrityError where something could not be."""
        with self._changed:
            while self._writing and self._error is None:
                self._changed.wait()
            self._raise()

    def close(self) -> None:
        """After what is under way; what is on disk is gone with it."""
        with self._changed:
            self._expected.clear()
            self._changed.notify_all()
        self._reader.close()
        self._writer.close()
        self._file.close()

    # -- the two threads --------------------------------------------------------------------------------------

    def _read_next(self) -> None:
        with self._changed:
            while self._expected and self._error is None:
                unit = self._expected[0]
                known = unit in self._read or unit in self._reading
                if known or (self._free and unit not in self._writing and unit not in self._taken):
                    self._expected.popleft()
                    break
                self._changed.wait()
            else:
                return
            if known:
                return
            buffer = self._begin(unit)
        self._finish(unit, buffer)

    def _write(self, unit: int, buffer: Tensor) -> None:
        offset, length = self._places[unit]
        self._file.write(offset, buffer[:length])
        with self._changed:
            self._writing.discard(unit)
            self._free.append(buffer)
            self._changed.notify_all()

    def _begin(self, unit: int) -> Tensor:
        self._reading.add(unit)
        return self._free.pop()

    def _finish(self, unit: int, buffer: Tensor) -> None:
        offset, length = self._places[unit]
        try:
            self._file.read(offset, buffer[:length])
        except BaseException as error:
            self._note(error)
            raise
        with self._changed:
            self._reading.discard(unit)
            self._read[unit] = buffer
            self._changed.notify_all()

    def _note(self, error: BaseException | None) -> None:
        """A transfer has failed: everybody who waits is told, and nothing goes on."""
        if error is not None:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def buffer_bytes(state_bytes: Mapping[int, int]) -> int:
    """Of one of the buffers in host memory."""
    return max((round_up(n) for n in state_bytes.values()), default=0)


def file_bytes(state_bytes: Mapping[int, int]) -> int:
    return sum(round_up(n) for n in state_bytes.values())
