"""What a safetensors file says that it holds: read from its first bytes, and held to every rule of the format.

The file may come from anybody. A header is read only where its length is plausible, and what is handed on is whole:
known dtypes, shapes that are sizes, and data that follows on from one tensor to the next up to the end of the file.
"""

import json
import math
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError
from megatrain.regular_file import open_regular

MAX_HEADER_BYTES = 32 << 20
"""A quarter of a million tensors in one file. The format allows 100 MB, which could take gigabytes to parse."""

_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 64
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file; its bytes are those from `begin` up to `end`, counted from where the header ends."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of safetensors file `file` by name. Reads no weight.

    Raises ConfigError, which names the file, what is wrong with it and what would be right.
    """
    try:
        with open_regular(file) as stream:
            tensors, _ = parse_header(stream.read, os.fstat(stream.fileno()).st_size)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{file} is not a whole safetensors file: its header is nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from None
    return tensors


def parse_header(read: Callable[[int], bytes], file_bytes: int) -> tuple[dict[str, StoredTensor], int]:
    """The tensors by name, and where the header ends, of a file that `read` gives from its beginning on. Raises
    ValueError, which says what is wrong, or RecursionError."""
    length = _header_bytes(read(_LENGTH_BYTES), file_bytes)
    tensors = _tensors(read(length))
    _check_places(tensors, file_bytes - _LENGTH_BYTES - length, file_bytes)
    return tensors, _LENGTH_BYTES + length


def _header_bytes(first: bytes, file_bytes: int) -> int:
    """The header's length, which the file begins with, where it can be true."""
    if len(first) < _LENGTH_BYTES:
        raise ValueError(f"it has {file_bytes} bytes; expected a header's length in the first {_LENGTH_BYTES}")
    length = int.from_bytes(first, "little")
    if length > file_bytes - _LENGTH_BYTES:
        raise ValueError(f"its header would take {length} bytes; {file_bytes - _LENGTH_BYTES} follow")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header would take {length} bytes; expected at most {MAX_HEADER_BYTES}")
    return length


def _tensors(header: bytes) -> dict[str, StoredTensor]:
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is not JSON: {error.msg} at byte {error.pos}") from None
    if not isinstance(content, dict):
        raise ValueError(f"its header is {reprlib.repr(content)}; expected a mapping of tensors")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"__metadata__ is {reprlib.repr(metadata)}; expected a mapping of texts")
    return {name: _tensor(name, entry) for name, entry in content.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{reprlib.repr(name)} is described twice in its header")
        found[name] = value
    return found


def _tensor(name: str, entry: Any) -> StoredTensor:
    where = f"tensor {reprlib.repr(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} is {reprlib.repr(entry)}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise ValueError(f"{where} has dtype {reprlib.repr(dtype)}; expected one of {', '.join(_DTYPE_BITS)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(
            f"{where} has shape {reprlib.repr(shape)}; expected at most {_MAX_DIMENSIONS} whole numbers below 2**63"
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has data_offsets {reprlib.repr(offsets)}; expected [begin, end]")
    bits = math.prod(shape) * _DTYPE_BITS[dtype]  # Python's integers do not overflow
    if bits != 8 * (offsets[1] - offsets[0]):
        right = f"{reprlib.repr(bits)} bits" if bits % 8 else reprlib.repr(bits // 8)
        raise ValueError(
            f"{where} has {offsets[1] - offsets[0]} bytes; expected {right} for {dtype} of shape {reprlib.repr(shape)}"
        )
    return StoredTensor(dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of whole numbers that a signed 64-bit integer holds; true and 2.0 are none."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _check_places(tensors: dict[str, StoredTensor], data_bytes: int, file_bytes: int) -> None:
    """Raise ValueError where tensors overlap, leave bytes out between them, or do not end where the file does."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != end:
            what = "overlaps the tensor before it" if tensor.begin < end else "leaves out bytes before it"
            raise ValueError(f"tensor {reprlib.repr(name)} begins at {tensor.begin} and {what}; expected {end}")
        end = tensor.end
    if end != data_bytes:
        raise ValueError(f"{file_bytes} bytes where its header describes {file_bytes - data_bytes + end}")
