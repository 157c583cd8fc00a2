"""State files that nobody without the key can read: a safetensors file inside a sealed one (`trust/sealed_file.py`)."""

from pathlib import Path

import torch
from torch import Tensor

from megatrain import files
from megatrain.errors import IntegrityError
from megatrain.model.safetensors_header import parse_header
from megatrain.model.shards import DTYPE_NAMES
from megatrain.trust.sealed_file import SealedReader, SealedWriter

SUFFIX = ".sealed"
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class SealedNewFile:
    """As `files.NewFile`, written from the first byte to the last."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._file = files.NewFile(path.with_name(path.name + SUFFIX), files.PRIVATE)
        self._sealed_bytes = self._plain_bytes = 0
        self._writer = SealedWriter(self, key)

    def write(self, data: memoryview) -> None:
        """What the writer has sealed."""
        self._file.write_at(self._sealed_bytes, data)
        self._sealed_bytes += len(data)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        if offset != self._plain_bytes:
            raise ValueError(f"byte {offset} of a sealed file, which is at byte {self._plain_bytes}")
        self._plain_bytes += self._writer.write(data)

    def finish(self) -> None:
        try:
            self._writer.close()
        except BaseException:
            self._file.abandon()
            raise
        self._file.finish()

    def abandon(self) -> None:
        self._file.abandon()


class SealedTensors:
    """The tensors of a sealed safetensors file. Raises IntegrityError where it is damaged, or the key is another."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._path, self._key = path, key
        with self._open() as file:
            position = 0

            def read(length: int) -> bytes:
                nonlocal position
                position += length
                return bytes(file.read(position - length, length))

            try:
                self._tensors, self._begin = parse_header(read, file.plain_size)
            except (ValueError, RecursionError) as error:
                raise IntegrityError(f"{path} holds no whole safetensors file: {error}") from None

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        stored = self._tensors[name]
        if stored.dtype not in _DTYPES:
            raise IntegrityError(f"{self._path}: {name} is {stored.dtype}, which no checkpoint holds")
        tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype], device="cpu")
        with self._open() as file:
            file.read_into(self._begin + stored.begin, tensor.reshape(-1).view(torch.uint8).numpy())
        return tensor

    def _open(self) -> SealedReader:
        try:
            return SealedReader(self._path, self._key)
        except OSError as error:
            raise IntegrityError(f"{self._path} cannot be read: {error.strerror}") from error
