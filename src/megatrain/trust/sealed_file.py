"""A sealed file: nobody without the key can read it, or change, shorten, extend or mix it up without notice.

    magic 8 | version 1 | algorithm 1 | zero 2 | chunk bytes 4 | salt 32 | key check 16
    chunk 0 and its tag | chunk 1 and its tag | ... | last chunk and its tag

The first line is the header, 64 bytes; integers are little-endian. Chunks are of the size in the header, but for the
last, which may be shorter and is empty in an empty file alone. Key and check of the file are derived from the user's
key by HKDF with SHA-256, the salt as its salt and the 16 bytes before it as its purpose: two files never share a key,
and a header that was changed gives another. The nonce of a chunk is its number, 11 bytes with the highest first, and a
byte that is 1 for the last (the STREAM construction): a chunk opens in its own place of its own file only, and no other
chunk can be the end. Any part can be read without the rest.
"""

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from megatrain.errors import IntegrityError
from megatrain.trust.encryption import ALGORITHMS, KEY_BYTES, TAG_BYTES, aead, derive, preferred_algorithm, unsealed

MAGIC = b"MTSEALED"
VERSION = 1
CHUNK_BYTES = 4 << 20
HEADER_BYTES = 64

_START = struct.Struct("<8sBBHI")
_SALT_BYTES, _CHECK_BYTES = 32, 16


class Sink(Protocol):
    """What a file opened for writing in binary offers, buffered or not."""

    def write(self, data: memoryview, /) -> int | None: ...


def sealed_bytes(plain_bytes: int) -> int:
    """The length of the sealed file for so many bytes."""
    return HEADER_BYTES + plain_bytes + TAG_BYTES * max(1, -(-plain_bytes // CHUNK_BYTES))


class SealedWriter:
    """Seals what is written, in order, into `sink`, which stays open. Holds two chunks in memory.

    The file is whole when `close` has returned; one that ends earlier is noticed by who reads it. Leaving a `with`
    block by an error does not close.
    """

    def __init__(self, sink: Sink, key: bytes) -> None:
        self._sink = sink
        start = _START.pack(MAGIC, VERSION, ALGORITHMS.index(preferred_algorithm()) + 1, 0, CHUNK_BYTES)
        salt = os.urandom(_SALT_BYTES)
        self._cipher, check = _cipher_and_check(key, start, salt)
        self._plain = memoryview(bytearray(CHUNK_BYTES))
        self._sealed = memoryview(bytearray(CHUNK_BYTES + TAG_BYTES))
        self._filled = self._chunks = 0
        self._closed = False
        self._write_all(memoryview(start + salt + check))

    def write(self, data: Any) -> int:
        """Take all of `data`, anything with a contiguous buffer; returns its length in bytes."""
        if self._closed:
            raise ValueError("write to a sealed file that was closed")
        view = memoryview(data)
        if not view.nbytes:
            return 0
        view = view.cast("B")
        done = 0
        while done < len(view):
            if self._filled == CHUNK_BYTES:  # more follows: it is not the last
                self._seal(last=False)
            part = view[done : done + CHUNK_BYTES - self._filled]
            self._plain[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            done += len(part)
        return len(view)

    def close(self) -> None:
        """Seal the end."""
        if not self._closed:
            self._seal(last=True)
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _seal(self, *, last: bool) -> None:
        sealed = self._sealed[: self._filled + TAG_BYTES]
        self._cipher.encrypt_into(_nonce(self._chunks, last), self._plain[: self._filled], None, sealed)
        self._chunks += 1
        self._filled = 0
        self._write_all(sealed)

    def _write_all(self, view: memoryview) -> None:
        """A file without a buffer may take less than it is given."""
        while len(view):
            count = self._sink.write(view)
            view = view[len(view) if count is None else count :]


class SealedReader:
    """Reads any part of a sealed file; what it gives out is what was written. For one thread at a time.

    Raises IntegrityError, one line that names the file, where the key is another one or bytes are damaged, missing or
    too many. A file that was cut off or extended is refused at once: its end is looked at first.
    """

    def __init__(self, path: str | Path, key: bytes) -> None:
        self._path = Path(path)
        self._stream = self._path.open("rb", buffering=0)
        try:
            self._file_bytes = os.fstat(self._stream.fileno()).st_size
            self._chunk_bytes, self._cipher = self._open_header(key)
            self._sealed = memoryview(bytearray(min(self._chunk_bytes + TAG_BYTES, self._file_bytes)))
            self._held: tuple[int, memoryview] | None = None  # the last chunk of which a part was read
            self._last, self.plain_size = self._measure()
            """`plain_size`: bytes that were written."""
            self._chunk(self._last)
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, length: int) -> bytearray:
        """Bytes [offset, offset + length) of what was written. Raises ValueError beyond its end."""
        target = bytearray(length)
        self.read_into(offset, target)
        return target

    def read_into(self, offset: int, target: Any) -> None:
        """Fill `target`, anything with a contiguous buffer, from `offset` on. Whole chunks go there directly."""
        view = memoryview(target)
        if not 0 <= offset <= offset + view.nbytes <= self.plain_size:
            raise ValueError(f"[{offset}, {offset + view.nbytes}) of {self.plain_size} bytes in {self._path}")
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while len(view):
            number, start = divmod(offset, self._chunk_bytes)
            length = min(self._plain_bytes(number) - start, len(view))
            if length == self._plain_bytes(number):
                self._unseal(number, view[:length])
            else:
                view[:length] = self._chunk(number)[start : start + length]
            offset, view = offset + length, view[length:]

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the header and the end ---------------------------------------------------------------------------------

    def _open_header(self, key: bytes) -> tuple[int, Any]:
        """(bytes of a chunk, cipher). Nothing of the header is used before the key has shown that it is as written."""
        header = memoryview(bytearray(min(HEADER_BYTES, self._file_bytes)))
        self._read_at(0, header)
        if len(header) < HEADER_BYTES or bytes(header[: len(MAGIC)]) != MAGIC:
            raise IntegrityError(f"{self._path} is no sealed file, or its beginning is damaged")
        start, salt = bytes(header[: _START.size]), bytes(header[_START.size : _START.size + _SALT_BYTES])
        _, version, algorithm, _, chunk_bytes = _START.unpack(start)
        if version != VERSION or not 1 <= algorithm <= len(ALGORITHMS):
            raise IntegrityError(
                f"{self._path} is sealed in form {version}.{algorithm}, which this version of megatrain does not know,"
                " or its header is damaged"
            )
        cipher, check = _cipher_and_check(key, start, salt)
        if check != bytes(header[-_CHECK_BYTES:]):
            raise IntegrityError(f"{self._path} was sealed with another key, or its header is damaged")
        return chunk_bytes, cipher

    def _measure(self) -> tuple[int, int]:
        """(number of the last chunk, plain bytes), from the length of the file."""
        body = self._file_bytes - HEADER_BYTES
        count = max(1, -(-body // (self._chunk_bytes + TAG_BYTES)))
        plain = body - count * TAG_BYTES
        if plain < (count - 1) * self._chunk_bytes:  # no room for a tag at its end
            raise self._damaged_end()
        return count - 1, plain

    def _damaged_end(self) -> IntegrityError:
        return IntegrityError(f"{self._path} is cut off, extended, or damaged at its end")

    # -- chunks -------------------------------------------------------------------------------------------------

    def _plain_bytes(self, number: int) -> int:
        return self._chunk_bytes if number < self._last else self.plain_size - number * self._chunk_bytes

    def _chunk(self, number: int) -> memoryview:
        """The chunk in memory: neighbours in it are unsealed once."""
        if self._held is None or self._held[0] != number:
            plain = memoryview(bytearray(self._plain_bytes(number)))
            self._unseal(number, plain)
            self._held = (number, plain)
        return self._held[1]

    def _unseal(self, number: int, plain: memoryview) -> None:
        start = HEADER_BYTES + number * (self._chunk_bytes + TAG_BYTES)
        sealed = self._sealed[: len(plain) + TAG_BYTES]
        self._read_at(start, sealed)
        if unsealed(self._cipher, _nonce(number, number == self._last), sealed, plain):
            return
        if number == self._last:
            raise self._damaged_end()
        raise IntegrityError(f"{self._path} is damaged between bytes {start:,} and {start + len(sealed):,}")

    def _read_at(self, offset: int, target: memoryview) -> None:
        """Raises IntegrityError where the disk fails, or the file has become shorter."""
        done = 0
        try:
            self._stream.seek(offset)
            while done < len(target):
                count = self._stream.readinto(target[done:])
                if not count:
                    raise OSError(0, "it has become shorter")
                done += count
        except OSError as error:
            raise IntegrityError(f"{self._path}: reading at byte {offset + done:,} failed: {error.strerror}") from error


def _cipher_and_check(key: bytes, start: bytes, salt: bytes) -> tuple[Any, bytes]:
    """The cipher of one file, and what in its header shows that a key is the right one."""
    algorithm = ALGORITHMS[_START.unpack(start)[2] - 1]
    derived = derive(key, KEY_BYTES + _CHECK_BYTES, salt=salt, purpose=start)
    return aead(algorithm, derived[:KEY_BYTES]), derived[KEY_BYTES:]


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
