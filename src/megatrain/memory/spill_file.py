"""A file on a local disk for state that host memory has no room for: private, nameless, read and written directly.

The file is unlinked before anything is written, so nothing of it outlives the process, however that ends; it is open
to its owner alone. All of its blocks are reserved at the start: a disk that is too small says so before training, not
in the middle of it. Transfers bypass the page cache (O_DIRECT) where the file system can: cached pages would take the
memory that was to be saved.
"""

import errno
import os
import tempfile
from pathlib import Path

from torch import Tensor

from megatrain.errors import CapacityError, ConfigError, IntegrityError
from megatrain.sizes import format_bytes

BLOCK_BYTES = 4096  # what direct transfers are aligned to: address, offset and length
_MOST_BYTES = 1 << 30  # per system call; Linux ends one after 2 GiB


class SpillFile:
    """`n_bytes` of disk below `folder`. Raises ConfigError for a folder that cannot be used, CapacityError for one
    without room; both name `engine.nvme`."""

    def __init__(self, folder: Path, n_bytes: int) -> None:
        self.folder = folder
        self.n_bytes = round_up(n_bytes)
        self._descriptor = _nameless(folder)
        try:
            _reserve(self._descriptor, folder, self.n_bytes)
            self.direct = _direct(self._descriptor)
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, target: Tensor) -> None:
        """Fill `target` (uint8, 1-D). Its address, length and `offset` are multiples of BLOCK_BYTES.

        Raises IntegrityError when the disk fails or gives less than was written.
        """
        self._transfer(os.preadv, "reading", offset, target)

    def write(self, offset: int, source: Tensor) -> None:
        """Write `source`, on the same terms. The file keeps its length."""
        self._transfer(os.pwritev, "writing", offset, source)

    def _transfer(self, call: object, what: str, offset: int, memory: Tensor) -> None:
        view, done = memoryview(memory.numpy()), 0  # type: ignore[arg-type]
        if offset < 0 or offset + len(view) > self.n_bytes:
            raise ValueError(f"{what} [{offset}, {offset + len(view)}) of a file of {self.n_bytes} bytes")
        while done < len(view):
            part = view[done : done + _MOST_BYTES]
            try:
                count = call(self._descriptor, [part], offset + done)  # type: ignore[operator]
            except OSError as error:
                raise self._failed(what, offset + done, error.strerror or str(error)) from error
            if count <= 0:
                raise self._failed(what, offset + done, "the disk took no more" if what == "writing" else "end of file")
            done += count

    def _failed(self, what: str, offset: int, why: str) -> IntegrityError:
        return IntegrityError(
            f"engine.nvme: {what} optimizer state in {self.folder} failed at byte {offset:,}: {why}; training cannot"
            " go on, the last saved state is not touched"
        )

    def close(self) -> None:
        """Give the disk's blocks back."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


def round_up(n_bytes: int) -> int:
    """To whole blocks."""
    return -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _nameless(folder: Path) -> int:
    """A new file below `folder` without a name, readable and writable by its owner alone."""
    if not folder.is_dir():
        raise ConfigError(f"engine.nvme is {str(folder)!r}; it must be a folder that exists, on a local disk")
    try:
        if hasattr(os, "O_TMPFILE"):
            try:
                return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                    raise
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".megatrain-")
        os.unlink(name)
        return descriptor
    except OSError as error:
        raise ConfigError(
            f"engine.nvme is {str(folder)!r}, where no file can be made: {error.strerror}; give a folder that you may"
            " write to"
        ) from None


def _reserve(descriptor: int, folder: Path, n_bytes: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    try:
        if n_bytes > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if n_bytes:
            os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConfigError(f"engine.nvme: {folder} cannot hold {format_bytes(n_bytes)}: {error.strerror}") from None
        missing = n_bytes - free
        short = f"{format_bytes(missing)} missing: " if missing > 0 else ""
        raise CapacityError(
            f"engine.nvme: {short}optimizer state needs {format_bytes(n_bytes)} in {folder}, which has"
            f" {format_bytes(free)} free ({error.strerror})"
        ) from None


def _direct(descriptor: int) -> bool:
    """Switch to transfers past the page cache; whether the file system can (tmpfs cannot)."""
    if not hasattr(os, "O_DIRECT"):
        return False
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return False
    return True
