"""Optimizer state on disk, piece by piece: read ahead of the updates, written behind them.

Some buffers, each as large as the largest piece, go round: one is updated, one is written, the others are read into.
Whoever updates takes a piece's state and gives it back; the order in which pieces will be taken is announced, and only
decides how early they are read.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from threading import Condition

from torch import Tensor

from megatrain.memory.arena import allocate
from megatrain.memory.pieces import Piece
from megatrain.memory.sealed_spill import SealedSpillFile
from megatrain.memory.spill_file import SpillFile, round_up
from megatrain.threads import KeptThread

BUFFERS = 6  # four pieces ahead of the update, which bridge those of units whose state is in memory


class SpilledStates:
    """`piece_bytes`: of state by piece; `file` has room for them, each in whole blocks. New states are zero.

    A piece is read, and written, with all of its blocks: what follows its state in the last one are the zeros that the
    file began with, and never what another piece left in the buffer.
    """

    def __init__(self, file: SpillFile | SealedSpillFile, piece_bytes: Mapping[Piece, int]) -> None:
        self._file = file
        self._places: dict[Piece, tuple[int, int]] = {}  # (offset, length)
        offset = 0
        for piece, n_bytes in piece_bytes.items():
            self._places[piece] = (offset, round_up(n_bytes))
            offset += round_up(n_bytes)
        self._units = {piece.unit for piece in piece_bytes}
        self._buffer_bytes = max((length for _, length in self._places.values()), default=0)
        self._changed = Condition()
        self._free = [allocate(self._buffer_bytes) for _ in range(BUFFERS)]
        self._read: dict[Piece, Tensor] = {}  # ahead, in this order
        self._reading: set[Piece] = set()
        self._taken: dict[Piece, Tensor] = {}
        self._writing: set[Piece] = set()
        self._expected: deque[Piece] = deque()
        self._error: BaseException | None = None
        self._reader, self._writer = KeptThread("megatrain-spill-reader"), KeptThread("megatrain-spill-writer")

    @property
    def buffers_bytes(self) -> int:
        """In host memory."""
        return BUFFERS * self._buffer_bytes

    def __contains__(self, unit: int) -> bool:
        return unit in self._units

    def expect(self, pieces: Iterable[Piece]) -> None:
        """`pieces`, those of them that are on disk, will be taken next, in this order; what was said before no longer
        holds."""
        with self._changed:
            self._expected = deque(piece for piece in pieces if piece in self._places)
            self._changed.notify_all()
        self._reader.start(self._read_ahead, self._note)

    def take(self, piece: Piece) -> Tensor:
        """The piece's state in memory (uint8, as long as it is), to be given back.

        One thread takes one piece at a time. Raises IntegrityError where a transfer, also an earlier one, has failed.
        """
        with self._changed:
            while True:
                self._raise()
                if piece in self._read:
                    self._taken[piece] = self._read.pop(piece)
                    return self._taken[piece][: self._places[piece][1]]
                if piece not in self._reading | self._writing:
                    if piece in self._expected:
                        self._expected.remove(piece)
                    if not self._free and self._read:  # read ahead for others: their turn comes again
                        self._free.append(self._read.popitem()[1])
                    if self._free:
                        break
                self._changed.wait()
            buffer = self._begin(piece)
        self._finish(piece, buffer)
        return self.take(piece)

    def give_back(self, piece: Piece, *, changed: bool = True) -> None:
        """What has `changed` goes to disk behind the caller's back."""
        with self._changed:
            buffer = self._taken.pop(piece)
            if not changed:
                self._free.append(buffer)
                self._changed.notify_all()
                return
            self._writing.add(piece)
        self._writer.start(partial(self._write, piece, buffer), self._note)

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

    def _read_ahead(self) -> None:
        """Until nothing is expected."""
        while (found := self._next_expected()) is not None:
            self._finish(*found)

    def _next_expected(self) -> tuple[Piece, Tensor] | None:
        """The next piece and the buffer to read it into, once there is one; None where nothing is expected."""
        with self._changed:
            while self._expected and self._error is None:
                piece = self._expected[0]
                if piece in self._read or piece in self._reading:
                    self._expected.popleft()
                elif self._free and piece not in self._writing and piece not in self._taken:
                    self._expected.popleft()
                    return piece, self._begin(piece)
                else:
                    self._changed.wait()
        return None

    def _write(self, piece: Piece, buffer: Tensor) -> None:
        offset, length = self._places[piece]
        self._file.write(offset, buffer[:length])
        with self._changed:
            self._writing.discard(piece)
            self._free.append(buffer)
            self._changed.notify_all()

    def _begin(self, piece: Piece) -> Tensor:
        self._reading.add(piece)
        return self._free.pop()

    def _finish(self, piece: Piece, buffer: Tensor) -> None:
        offset, length = self._places[piece]
        try:
            self._file.read(offset, buffer[:length])
        except BaseException as error:
            self._note(error)
            raise
        with self._changed:
            self._reading.discard(piece)
            self._read[piece] = buffer
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
