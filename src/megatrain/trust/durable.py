"""Small files that are there whole or not at all, whenever the machine stops."""

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path


def partial_name(name: str) -> str:
    """What the file `name` is called while it is written."""
    return f".{name}.partial"


def write_durably(path: Path, data: bytes, before: Callable[[Path], object] = lambda _: None) -> None:
    """Put `data` at `path`, in place of what was there, whose permissions it gets, and flush it to disk. `before` is
    called with the file that is about to take the place. Raises OSError."""
    temporary = path.with_name(partial_name(path.name))
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as stream:
            if path.exists():
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        before(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a disk that fails here has said so already
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
