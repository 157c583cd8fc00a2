"""What a folder holds, and SHA-256 of many of its files at once."""

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

_READ_BYTES = 4 << 20  # held by each thread; so much at a time leaves Python's lock free nearly always


@dataclass(frozen=True, slots=True)
class FileRecord:
    bytes: int
    sha256: str
    """64 lower-case hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class Content:
    """What lies below a folder. Names are relative to it, with `/` between parts."""

    files: dict[str, int]
    """Size in bytes of each regular file, by name."""
    refused: dict[str, str]
    """Of everything that is neither a regular file nor a folder of such: what it is, by name."""


def list_content(folder: Path) -> Content:
    """All files below `folder`. Links that stay below it are taken for the file they lead to."""
    content = Content({}, {})
    root, waiting = folder.resolve(), [""]
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(folder / inside) as found:
                entries = list(found)
        except OSError as error:
            content.refused[inside or "."] = f"a folder that cannot be read ({error.strerror})"
            continue
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_dir(follow_symlinks=False):
                waiting.append(name)
                continue
            size = _size_or_reason(entry, root)
            if isinstance(size, int):
                content.files[name] = size
            else:
                content.refused[name] = size
    return content


def _size_or_reason(entry: os.DirEntry[str], root: Path) -> int | str:
    """Bytes of a regular file, or what stands there in its place."""
    try:
        found = entry.stat()
    except OSError as error:
        return f"a link to nothing ({error.strerror})" if entry.is_symlink() else f"unreadable ({error.strerror})"
    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
        return "a link that leaves the folder"
    if not stat.S_ISREG(found.st_mode):
        return "a link to a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
    return found.st_size


def hash_files(paths: Iterable[Path], *, threads: int | None = None) -> dict[Path, FileRecord | OSError]:
    """Size and SHA-256 of each file; in its place the error, where it cannot be read.

    `threads`: files that are read at the same time; None is one for each core. The largest come first: what takes
    longest is then not what all others have long been done with. One file is one thread's work, since SHA-256 has no
    parts; each thread holds a few MiB of it.
    """
    largest_first = sorted(set(paths), key=_bytes_or_zero, reverse=True)
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, min(threads or usable_cores(), len(largest_first))), "hash") as pool:
        try:
            return dict(zip(largest_first, pool.map(partial(_record_or_error, stop), largest_first), strict=True))
        except BaseException:  # Ctrl-C does not wait until a terabyte is read
            stop.set()
            raise


def hash_file(path: Path, stop: threading.Event | None = None) -> FileRecord:
    """Raises OSError where `path` is no regular file or cannot be read, and when `stop` is set meanwhile."""
    digest, count = hashlib.sha256(), 0
    with open(open_regular(path), "rb", buffering=0) as stream:
        room = min(_READ_BYTES, os.fstat(stream.fileno()).st_size + 1)  # one more: a file that has grown is noticed
        buffer = memoryview(bytearray(room))
        while read := stream.readinto(buffer):
            if stop is not None and stop.is_set():
                raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR), str(path))
            digest.update(buffer[:read])
            count += read
    return FileRecord(count, digest.hexdigest())


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The whole of a small file. Raises OSError where it is a link, no regular file, or larger."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))
    with open(open_regular(path), "rb") as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes} bytes", str(path))
    return data


def open_regular(path: Path) -> int:
    """A descriptor. Without waiting: a named pipe that nobody writes to would keep the reader for ever."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def _record_or_error(stop: threading.Event, path: Path) -> FileRecord | OSError:
    try:
        return hash_file(path, stop)
    except OSError as error:
        return error


def _bytes_or_zero(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
