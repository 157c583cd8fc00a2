"""Tokens in files: written as they come, mapped into memory when done, and known again by what they were made from.

An entry of the cache is a folder, private to its user: plain .npy arrays and `facts.json`, which says how long they are
and what they hash to. It appears under its name at once and whole; one that is not as it was written is made anew.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from megatrain.data.folder_claim import claim_folder, release_folder
from megatrain.errors import ConfigError
from megatrain.files import make_folders, remove_tree, rename
from megatrain.private_files import make_private_folder, private

_FACTS = "facts.json"
_UNFINISHED = ".unfinished-"
_HEADER_BYTES = 128  # numpy pads the header of an array with one dimension to this
_HASHED_BYTES = 1 << 24  # at a time

Arrays = dict[str, NDArray[Any]]


class GrowingArray:
    """An array with one dimension that grows at its end: in memory, or in a .npy file where there is a path."""

    def __init__(self, dtype: Any, path: Path | None) -> None:
        self.dtype = np.dtype(dtype)
        self.path = path
        self._length = 0
        self._parts: list[NDArray[Any]] = []
        self._file = None if path is None else open(path, "wb", opener=private)  # noqa: SIM115 (`finish` closes it)
        if self._file is not None:
            self._file.write(bytes(_HEADER_BYTES))

    def append(self, values: NDArray[Any]) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        self._length += len(values)
        if self._file is None:
            self._parts.append(values)
        else:
            self._file.write(values.data)

    def finish(self) -> NDArray[Any]:
        """The whole array; of a file, mapped."""
        if self._file is None:
            return np.concatenate([np.zeros(0, self.dtype), *self._parts])
        header = BytesIO()
        shape = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self._length,)}
        npy.write_array_header_1_0(header, shape)
        assert header.tell() == _HEADER_BYTES
        self._file.seek(0)
        self._file.write(header.getvalue())
        self.close()
        return _mapped(self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _mapped(path: Path | None) -> NDArray[Any]:
    found: NDArray[Any] = np.load(str(path), mmap_mode="r", allow_pickle=False)
    return found


class TokenCache:
    """Entries in `folder`; None: nothing is kept, and arrays are in memory."""

    def __init__(self, folder: Path | None, key: str = "data.cache") -> None:
        self.folder, self.key = folder, key

    def get(self, name: str, fill: Callable[["Entry"], dict[str, Any]]) -> tuple[Arrays, dict[str, Any]]:
        """An entry's arrays and facts; if it is not there, `fill` makes its arrays and returns the facts."""
        found = self.read(name)
        if found is not None:
            return found
        with self.writing(name) as entry:
            facts = fill(entry)
            return entry.finish(facts), facts

    def read(self, name: str) -> tuple[Arrays, dict[str, Any]] | None:
        """An entry's arrays and facts, if it is there and as it was written."""
        if self.folder is None:
            return None
        entry = self.folder / name
        try:
            facts = json.loads((entry / _FACTS).read_bytes())
            arrays = {one: _mapped(entry / f"{one}.npy") for one in facts["arrays"]}
            if all(_described(arrays[one], entry / f"{one}.npy") == facts["arrays"][one] for one in arrays):
                return arrays, facts["facts"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
            pass  # not there, or not whole
        return None

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator["Entry"]:
        """An entry to fill, which `finish` puts in its place. Raises ConfigError where the folder cannot be written."""
        if self.folder is None:
            yield Entry(None, None)
            return
        try:
            make_folders(self.folder.parent)
            make_private_folder(self.folder)
            unfinished, claim = _begun(self.folder)
        except OSError as error:
            raise self._error(error) from None
        try:
            yield Entry(unfinished, self.folder / name)
        except OSError as error:
            raise self._error(error) from None
        finally:
            remove_tree(unfinished)
            release_folder(claim)

    def _error(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.key}: cannot write in {str(self.folder)!r}: {error.strerror or error}")


def _begun(folder: Path) -> tuple[Path, int | None]:
    """A folder for an entry that is being written, and the claim on it, without which it would be anybody's. Those that
    nobody writes any more are removed: what wrote them was killed."""
    cache = claim_folder(folder, wait=True)  # between making a folder and claiming it nobody may come
    try:
        for left in folder.glob(f"{_UNFINISHED}*"):
            if cache is not None and (claim := claim_folder(left)) is not None:
                remove_tree(left)
                release_folder(claim)
        unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
        return unfinished, claim_folder(unfinished)
    finally:
        release_folder(cache)


class Entry:
    """An entry of the cache that is being written."""

    def __init__(self, folder: Path | None, target: Path | None) -> None:
        self._folder, self._target = folder, target
        self._growing: dict[str, GrowingArray] = {}

    def array(self, name: str, dtype: Any) -> GrowingArray:
        """A new array of the entry."""
        path = None if self._folder is None else self._folder / f"{name}.npy"
        self._growing[name] = GrowingArray(dtype, path)
        return self._growing[name]

    def finish(self, facts: Mapping[str, Any]) -> Arrays:
        """All arrays; on disk, whole and under the entry's name, where there is one."""
        arrays = {name: growing.finish() for name, growing in self._growing.items()}
        if self._folder is None or self._target is None:
            return arrays
        described = {name: _described(array, self._folder / f"{name}.npy") for name, array in arrays.items()}
        with open(self._folder / _FACTS, "w", encoding="utf-8", opener=private) as stream:
            json.dump({"arrays": described, "facts": dict(facts)}, stream)
        remove_tree(self._target)  # one that was not as it was written
        with contextlib.suppress(FileExistsError, OSError):
            rename(self._folder, self._target)
            return {name: _mapped(self._target / f"{name}.npy") for name in arrays}
        return arrays  # somebody else was faster; what is mapped stays readable


def _described(array: NDArray[Any], path: Path) -> list[Any]:
    return [str(array.dtype), list(array.shape), _sha256(path)]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(_HASHED_BYTES):
            digest.update(data)
    return digest.hexdigest()


def hash_of(files: tuple[Path, ...], *, facts: Any, key: str) -> str:
    """The name of what is made of files' contents and of `facts` (what JSON can write)."""
    try:
        contents = [_sha256(path) for path in files]
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {error.filename!r}: {error.strerror}") from None
    text = json.dumps([contents, facts], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def cache_folder(setting: str) -> Path | None:
    """What `data.cache` names: a folder; 'auto' is the user's own; None for 'off'."""
    if setting == "off":
        return None
    if setting != "auto":
        return Path(os.path.expanduser(setting)).resolve()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(home)) / "megatrain" / "tokens"
