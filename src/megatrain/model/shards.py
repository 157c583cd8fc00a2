"""safetensors files: where every byte of them goes, and writing them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatrain import files
from megatrain.model.weight_files import INDEX_NAME

# the names that the format gives to dtypes
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: 8 bytes of length, a JSON header, then the weights without gaps."""

    file: str
    header: bytes
    """The file's first bytes: length and description of its weights."""
    offsets: dict[str, int]
    """Where each weight begins, in bytes from the start of the file."""


def plan_shards(
    shapes: Mapping[str, torch.Tensor], max_bytes: int, stem: str = "model", *, aligned: bool = True
) -> list[Shard]:
    """Cut the weights, in order, into files of at most `max_bytes` of weights; only a single weight may exceed that.

    `shapes`: name -> a tensor of its shape and dtype, without memory. There is one file even for no weights. `stem`:
    what the files' names begin with. `aligned`: each lies at a multiple of its own size, for readers that map the
    file; else in the order of `shapes`, for files that are written from the first byte to the last.
    """
    parts: list[list[str]] = [[]]
    filled = 0
    for name, tensor in shapes.items():
        if parts[-1] and filled + tensor.nbytes > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += tensor.nbytes
    if len(parts) == 1:
        return [_lay_out(f"{stem}.safetensors", shapes, aligned)]
    return [
        _lay_out(
            f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors", {name: shapes[name] for name in names}, aligned
        )
        for number, names in enumerate(parts, start=1)
    ]


def _lay_out(file: str, shapes: Mapping[str, torch.Tensor], aligned: bool) -> Shard:
    """Aligned, wider dtypes come first."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, tensor in sorted(shapes.items(), key=lambda item: -item[1].dtype.itemsize if aligned else 0):
        starts[name], end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    return Shard(file, text, {name: len(text) + start for name, start in starts.items()})


class WritableFile(Protocol):
    """As `files.NewFile`."""

    def write_at(self, offset: int, data: bytes | memoryview) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...


NewFile = Callable[[Path], WritableFile]


class ShardWriter:
    """Writes weights, in whatever order, to where they were planned; a file is on disk once it has all of its own."""

    def __init__(self, shards: list[Shard], folder: Path, new_file: NewFile = files.NewFile) -> None:
        self._shard_of = {name: shard for shard in shards for name in shard.offsets}
        self._missing = {shard.file: len(shard.offsets) for shard in shards}
        self._folder, self._new_file = folder, new_file
        self._open: dict[str, WritableFile] = {}
        for shard in shards:
            if not shard.offsets:  # a file even for no weights
                self._begin(shard).finish()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor`: on the CPU, of the planned dtype and number of elements."""
        shard = self._shard_of[name]
        if shard.file not in self._open:
            self._open[shard.file] = self._begin(shard)
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._open[shard.file].write_at(shard.offsets[name], data)
        self._missing[shard.file] -= 1
        if not self._missing[shard.file]:
            self._open.pop(shard.file).finish()

    def _begin(self, shard: Shard) -> "WritableFile":
        file = self._new_file(self._folder / shard.file)
        try:
            file.write_at(0, shard.header)
        except BaseException:
            file.abandon()
            raise
        return file

    def close(self) -> None:
        """Raises RuntimeError where weights that were planned have not come."""
        unfinished = list(self._open)
        self.abandon()
        if unfinished or any(self._missing.values()):
            raise RuntimeError(f"not all weights were written: {', '.join(unfinished)}")

    def abandon(self) -> None:
        """Close what is open, as it is."""
        for file in self._open.values():
            file.abandon()
        self._open.clear()


def write_index(shards: list[Shard], shapes: dict[str, torch.Tensor], folder: Path) -> None:
    """The map from weight to file, where there are several files."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in shapes.values()),
            "total_size": sum(tensor.nbytes for tensor in shapes.values()),
        },
        "weight_map": dict(sorted((name, shard.file) for shard in shards for name in shard.offsets)),
    }
    files.write_file(folder / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())
