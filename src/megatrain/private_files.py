"""Files that are their owner's alone, whatever the umask says and whatever they were before."""

import contextlib
import os
import stat
from pathlib import Path

_FILE_MODE, _FOLDER_MODE = 0o600, 0o700


def private(path: str, flags: int) -> int:
    """Opens a file as `opener` of `open`: `open(path, "w", opener=private)`."""
    descriptor = os.open(path, flags, _FILE_MODE)
    try:
        _close_to_others(descriptor, _FILE_MODE)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def make_private_folder(folder: Path) -> None:
    """Make `folder`, where it is missing, and let nobody else into it. Folders above it must exist."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(_FOLDER_MODE)
    _close_to_others(folder, _FOLDER_MODE)


def _close_to_others(file: int | Path, mode: int) -> None:
    """Of a file that was there before, or under a umask that takes away the owner's own rights."""
    if os.name == "posix" and stat.S_IMODE(os.stat(file).st_mode) != mode:
        with contextlib.suppress(PermissionError):  # a file system without modes, where the mount decides
            os.chmod(file, mode)
