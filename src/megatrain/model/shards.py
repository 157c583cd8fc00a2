"""safetensors files: where every byte of them goes, and writing them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megatrain.model.weight_files import INDEX_NAME, WEIGHTS_NAME

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


def plan_shards(shapes: dict[str, torch.Tensor], max_bytes: int) -> list[Shard]:
    """Cut the weights, in order, into files of at most `max_bytes` of weights; only a single weight may exceed that.

    `shapes`: name -> a tensor of its shape and dtype, without memory. There is one file even for no weights.
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
        return [_lay_out(WEIGHTS_NAME, shapes)]
    return [
        _lay_out(f"model-{number:05d}-of-{len(parts):05d}.safetensors", {name: shapes[name] for name in names})
        for number, names in enumerate(parts, start=1)
    ]


def _lay_out(file: str, shapes: dict[str, torch.Tensor]) -> Shard:
    """Wider dtypes come first, so that every weight is aligned to its own size; readers map the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, tensor in sorted(shapes.items(), key=lambda item: -item[1].dtype.itemsize):
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


def write_shards(shards: list[Shard], weights: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write the files and flush them to disk.

    `weights`: (name, CPU tensor) in the order in which the shards were planned; each is let go before the next.
    """
    for shard in shards:
        with (folder / shard.file).open("xb") as stream:
            stream.write(shard.header)
            for name, tensor in islice(weights, len(shard.offsets)):
                stream.seek(shard.offsets[name])
                stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del tensor  # before the next is read
            stream.flush()
            os.fsync(stream.fileno())


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
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
