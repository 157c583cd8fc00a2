"""Writing to disk so that what was written is there: the calls that every save goes through.

They are few and in one place, so that tests can let each of them fail in turn. A write that takes only a part is
carried on; what the system refuses is raised as it comes (OSError), for callers to say in their own words.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

_MOST_BYTES = 1 << 30  # per system call; Linux ends one after 2 GiB
PRIVATE, SHARED = 0o600, 0o666  # a shared file follows the umask


class NewFile:
    """A file that does not exist yet, written at any offset. `finish` or `abandon` ends it."""

    def __init__(self, path: Path, mode: int = SHARED) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        view, done = memoryview(data).cast("B"), 0
        while done < len(view):
            count = os.pwrite(self._descriptor, view[done : done + _MOST_BYTES], offset + done)
            if count <= 0:
                raise OSError(errno.EIO, "the disk took no more", str(self.path))
            done += count

    def finish(self) -> None:
        """All of it is on disk when this returns."""
        descriptor, self._descriptor = self._descriptor, -1
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def abandon(self) -> None:
        """Let it be as it is, which is nobody's concern any more."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.abandon()


def write_file(path: Path, data: bytes, mode: int = SHARED) -> None:
    """A new file with `data` in it, on disk."""
    file = NewFile(path, mode)
    try:
        file.write_at(0, data)
    except BaseException:
        file.abandon()
        raise
    file.finish()


def make_folder(path: Path, mode: int = 0o777) -> None:
    """A new folder; private ones have the mode 0o700."""
    os.mkdir(path, mode)


def make_folders(folder: Path) -> list[Path]:
    """Make `folder` and what is missing above it, on disk; returns the folders made, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    made: list[Path] = []
    try:
        for one in reversed(missing):
            with contextlib.suppress(FileExistsError):  # somebody else was faster
                make_folder(one)
                made.insert(0, one)
            sync_folder(one.parent)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(folder))
    except BaseException:
        remove_empty(made)
        raise
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of `folders`, innermost first, that are still empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def remove_tree(folder: Path) -> None:
    """What of it can be removed. Never raises OSError, as shutil's own may all the same."""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder, ignore_errors=True)


def rename(source: Path, target: Path) -> None:
    """Under its new name at once; `sync_folder` puts the name on disk."""
    os.rename(source, target)


def rename_durably(source: Path, target: Path) -> None:
    """Under its new name, on disk; after an error it has the old one."""
    rename(source, target)
    try:
        sync_folder(target.parent)
    except OSError:
        rename(target, source)
        raise


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """The names in a folder are on disk when this returns, where the system can flush those."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL):
            raise


def sync_tree(folder: Path) -> None:
    """Every file and folder below `folder`."""
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        sync_folder(Path(parent))


def _raise(error: OSError) -> None:
    """What cannot be listed cannot be flushed."""
    raise error
