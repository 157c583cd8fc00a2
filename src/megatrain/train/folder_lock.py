"""A run's claim on its folder, which ends with the process, however that ends."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megatrain.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows has none: there, two runs that start at the same time are not told from each other
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """Held on a file of the folder that the run writes anyway, so that nothing else is left behind."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def take(self, file: Path) -> None:
        """Claim the folder of `file`, which is made where it is missing. Raises ConfigError where another run has, or
        where the file cannot be written."""
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"output: cannot write to {str(file)!r}: {error.strerror}") from None
        if fcntl is None:
            os.close(descriptor)
            return
        self._descriptor = descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks
            taken = False
        else:  # or the run that had it failed just now, and has removed the file
            taken = not file.exists() or not os.path.samestat(os.fstat(descriptor), file.stat())
        if taken:
            self.release()
            raise ConfigError(f"output: another run is writing to {str(file.parent)!r}; give another folder")

    @contextlib.contextmanager
    def moving(self) -> Iterator[Callable[[Path], None]]:
        """Gives what claims the folder by a file that is about to take the place of the one that it was claimed by,
        which is let go at the end: until then nobody who still sees that one gets it."""
        old = self._descriptor

        def claim(file: Path) -> None:
            if old is None:
                return
            self._descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

        try:
            yield claim
        finally:
            if old is not None and self._descriptor != old:
                os.close(old)

    def release(self) -> None:
        """Let other runs have the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
