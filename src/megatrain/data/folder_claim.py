"""Claims on folders themselves, which end with the process, however that ends, and leave nothing behind."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


def claim_folder(folder: Path, *, wait: bool = False) -> int | None:
    """What `release_folder` takes; None where another process has it, or nobody can tell: the folder is gone, or the
    system or the file system has no locks. `wait`: for those that have it."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def release_folder(claim: int | None) -> None:
    """Let others have it."""
    if claim is not None:
        os.close(claim)
