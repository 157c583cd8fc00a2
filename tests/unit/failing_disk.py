"""A disk that fails when it is told to: every call that a process makes into files below one folder is counted, and one
of them, or that one and all later ones that need room, goes wrong."""

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# what goes wrong -> the kinds of calls that it happens to; None: all
FAULTS: dict[str, frozenset[str] | None] = {
    "EIO": None,
    "ENOSPC": frozenset({"create", "mkdir", "rename", "write", "stream write", "fsync", "close"}),
    "a short write": frozenset({"write"}),
    "a write of nothing": frozenset({"write"}),
}
_NEED_ROOM = {"create", "mkdir", "write", "stream write", "fsync"}


class FailingDisk:
    """Files below `folder`, whoever opens them. Call `arm` before, and `disarm` after what is to fail."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder = os.path.abspath(folder)
        self._lock = threading.Lock()
        self._known: set[int] = set()  # descriptors of files below the folder
        self._number, self._fault = -1, ""
        self.calls: list[str] = []  # kinds of those since `arm`
        self.struck: str | None = None  # the kind of call that went wrong
        self._real_pwrite = os.pwrite
        for name in ("mkdir", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, self._of_path(name, getattr(os, name)))
        patch.setattr(os, "open", self._open(os.open))
        patch.setattr(os, "close", self._close(os.close))
        patch.setattr(os, "fsync", self._fsync(os.fsync))
        patch.setattr(os, "pwrite", self._pwrite)
        for module in (builtins, io):
            patch.setattr(module, "open", self._open_file(open))

    def arm(self, number: int, fault: str) -> None:
        """The call of that number, from 0, meets `fault`."""
        self._number, self._fault, self.calls, self.struck = number, fault, [], None

    def disarm(self) -> None:
        self._number = -1

    def strike(self, kind: str, where: object) -> None:
        """One call more. Raises OSError where it is its turn."""
        if self._is_struck(kind) and self._fault in ("EIO", "ENOSPC"):
            code = getattr(errno, self._fault)
            raise OSError(code, os.strerror(code), str(where))

    def _is_struck(self, kind: str) -> bool:
        with self._lock:
            number = len(self.calls)
            self.calls.append(kind)
            if self._number < 0:
                return False
            kinds = FAULTS[self._fault]
            if number == self._number and (kinds is None or kind in kinds):
                self.struck = kind
                return True
            return self.struck is not None and self._fault == "ENOSPC" and kind in _NEED_ROOM  # a full disk stays so

    def _is_here(self, path: object, dir_fd: int | None = None) -> bool:
        if isinstance(path, int):
            return path in self._known
        if dir_fd is not None:
            return dir_fd in self._known
        return isinstance(path, str | Path) and os.path.abspath(path).startswith(self._folder)

    def _of_path(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **named: Any) -> Any:
            # a folder that is there already is refused anyway, which libraries count on
            known = kind == "mkdir" and os.path.isdir(path)
            if not known and self._is_here(path, named.get("dir_fd")):
                self.strike(kind, path)
            return real(path, *rest, **named)

        return call

    def _fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            if descriptor in self._known:  # nothing really has to be on disk here, and that takes long
                self.strike("fsync", descriptor)
            else:
                real(descriptor)

        return call

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            here = self._is_here(path, named.get("dir_fd"))
            if here:
                self.strike("create" if flags & os.O_CREAT else "open", path)
            descriptor = real(path, flags, *rest, **named)
            if here:
                self._known.add(descriptor)
            return descriptor

        return call

    def _close(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            here = descriptor in self._known
            self._known.discard(descriptor)
            real(descriptor)  # Linux has closed it, whatever it says then
            if here:
                self.strike("close", descriptor)

        return call

    def _pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor in self._known and self._is_struck("write"):
            if self._fault == "a write of nothing":
                return 0
            if self._fault == "a short write":
                return self._real_pwrite(descriptor, data[: max(1, len(data) // 2)], offset)
            code = getattr(errno, self._fault)
            raise OSError(code, os.strerror(code))
        return self._real_pwrite(descriptor, data, offset)

    def _open_file(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Python's own files: those of libraries, and those that are read."""

        def call(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if not self._is_here(file):
                return real(file, mode, *rest, **named)
            if isinstance(file, int):
                self._known.discard(file)  # the stream closes it
            else:
                self.strike("open" if mode.startswith("r") else "create", file)
            return _Stream(real(file, mode, *rest, **named), self)

        return call


class _Stream:
    """A file whose reading, writing and closing may fail."""

    def __init__(self, stream: Any, disk: FailingDisk) -> None:
        self._stream, self._disk = stream, disk

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stream, name)
        kind = {"write": "stream write", "read": "read", "readinto": "read", "close": "close"}.get(name)
        if kind is None:
            return found

        def call(*given: Any) -> Any:
            if kind == "close":
                found()
            self._disk.strike(kind, self._stream.name)
            return found(*given)

        return call

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
