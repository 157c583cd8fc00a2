"""A run's claim on its folder, which ends with the process, however that ends."""

import os
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

    def release(self) -> None:
        """Let other runs have the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
