"""Files of data, opened by their names: what gzip compressed is read as what it was before."""

import contextlib
import glob
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from megatrain.errors import ConfigError

_GZIP = ".gz"
# fmt: off
_NOT_READ = frozenset({
    ".zst", ".zstd", ".bz2", ".xz", ".lzma", ".lz4", ".br", ".snappy", ".zip", ".tar", ".tgz", ".7z", ".rar",
})
# fmt: on


def suffix_of(path: Path) -> str:
    """What a file is by its name, without .gz: '.jsonl' of a.jsonl.gz."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() if last == _GZIP else last


def refuse_other_compression(path: Path, key: str) -> None:
    """Raise ConfigError for a file that is compressed in a way that is not read."""
    if path.suffix.lower() in _NOT_READ:
        raise ConfigError(
            f"{key}: {str(path)!r} is compressed ({path.suffix}), which is not read; unpack it, or compress it with "
            "gzip (.gz)"
        )


def open_data(path: Path) -> BinaryIO:
    """The file's contents, unpacked."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == _GZIP else path.open("rb")


@contextlib.contextmanager
def reading(path: Path, key: str) -> Iterator[None]:
    """What goes wrong while `path` is read, as a ConfigError of one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {str(path)!r}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{key}: cannot read {str(path)!r}: it is damaged: {error}") from None


def matching(pattern: str, key: str) -> list[Path] | None:
    """The files that a pattern such as data/*.jsonl names, sorted; None for what is no pattern, or is a path itself."""
    path = os.path.expanduser(pattern)
    if not glob.has_magic(path) or os.path.lexists(path):
        return None
    found = sorted(Path(one) for one in glob.glob(path, recursive=True) if os.path.isfile(one))
    if not found:
        raise ConfigError(f"{key}: no file matches {pattern!r}")
    return found
