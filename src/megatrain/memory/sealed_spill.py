"""The spill file with its content sealed: what reaches the disk can be read by nobody, also from its blocks afterwards.

The cipher, and with it the key, comes from outside and lives in memory alone, as the file does not outlive the process.
So do number and tag of each stretch: on the disk, sealed bytes take the room and the alignment of plain ones, and
neither an earlier content put back in its place nor that of another place passes for what was written last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from megatrain.errors import IntegrityError
from megatrain.memory.arena import allocate
from megatrain.memory.spill_file import SpillFile

STRETCH_BYTES = 1 << 20  # sealed, and transferred, in one go; whole blocks


class Cipher(Protocol):
    """Seals, and tells what it has sealed from anything else. `sealed` is `tag_bytes` longer than `plain`; the number
    that `seal` returns never comes twice."""

    @property
    def tag_bytes(self) -> int: ...

    def seal(self, plain: memoryview, sealed: memoryview) -> int: ...

    def unseal(self, number: int, sealed: memoryview, plain: memoryview) -> bool: ...


class SealedSpillFile:
    """`file` by way of `cipher`, on the terms of `SpillFile`. What is read begins and ends where it was written; what
    never was written is zero. Threads that use it at once each take a buffer of a stretch."""

    def __init__(self, file: SpillFile, cipher: Cipher) -> None:
        self._file, self._cipher = file, cipher
        self._seals: dict[int, tuple[int, bytes]] = {}  # by offset: number and tag
        self._buffers: list[Tensor] = []  # of sealed bytes, that nobody uses now

    def read(self, offset: int, target: Tensor) -> None:
        """Raises IntegrityError when the disk fails or holds anything but what was written."""
        for start in range(0, len(target), STRETCH_BYTES):
            self._read_stretch(offset + start, target[start : start + STRETCH_BYTES])

    def write(self, offset: int, source: Tensor) -> None:
        for start in range(0, len(source), STRETCH_BYTES):
            self._write_stretch(offset + start, source[start : start + STRETCH_BYTES])

    def close(self) -> None:
        self._file.close()

    def _read_stretch(self, offset: int, plain: Tensor) -> None:
        if offset not in self._seals:
            plain.zero_()
            return
        number, tag = self._seals[offset]
        with self._buffer(len(plain)) as sealed:
            self._file.read(offset, sealed[: len(plain)])
            view = _view(sealed)
            view[len(plain) :] = tag
            if not self._cipher.unseal(number, view, _view(plain)):
                raise IntegrityError(
                    f"engine.nvme: what {self._file.folder} gives back at byte {offset:,} is not what was written"
                    " there; training cannot go on, the last saved state is not touched"
                )

    def _write_stretch(self, offset: int, plain: Tensor) -> None:
        with self._buffer(len(plain)) as sealed:
            view = _view(sealed)
            number = self._cipher.seal(_view(plain), view)
            self._seals[offset] = number, bytes(view[len(plain) :])
            self._file.write(offset, sealed[: len(plain)])

    @contextmanager
    def _buffer(self, plain_bytes: int) -> Iterator[Tensor]:
        """For sealed bytes and their tag; its beginning is aligned as the disk wants it."""
        try:
            buffer = self._buffers.pop()
        except IndexError:  # another thread has it
            buffer = allocate(STRETCH_BYTES + self._cipher.tag_bytes)
        try:
            yield buffer[: plain_bytes + self._cipher.tag_bytes]
        finally:
            self._buffers.append(buffer)


def _view(tensor: Tensor) -> memoryview:
    return memoryview(tensor.numpy())  # type: ignore[arg-type]
