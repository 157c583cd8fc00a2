"""The checkpoints of a run: `checkpoints/step-000100`, in the order of their numbers.

A folder with that name is complete: it got the name when all of it was on disk, and loses it before any of it is
removed.
"""

import contextlib
import re
import shutil
from pathlib import Path

from megatrain import files
from megatrain.checkpoint import description

_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = re.compile(r"\.step-\d{6,}\.(saving-.*|removed)")


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int | None:
    """The number in a checkpoint's name; None for other names."""
    match = _NAME.fullmatch(checkpoint.name)
    return None if match is None else int(match.group(1))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete ones, the oldest first."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            step = step_of(path)
            if step is not None and (path / description.FILE).is_file():
                found.append((step, path))
    return [path for _, path in sorted(found)]


def remove(checkpoint: Path) -> None:
    """From here on it is none, whatever happens while it is removed."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    files.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def retain(folder: Path, keep: int | None) -> None:
    """Remove all but the last `keep`, which is at least one; None: none is removed."""
    if keep is not None:
        for checkpoint in list_checkpoints(folder)[: -max(1, keep)]:
            remove(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """What saves and removals left behind that were killed. Only for the run that has the folder to itself."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in list(folder.iterdir()):
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


def remove_after(folder: Path, step: int) -> None:
    """Those of later steps: a run that goes on from `step` will write its own."""
    for checkpoint in list_checkpoints(folder):
        if (step_of(checkpoint) or 0) > step:
            remove(checkpoint)
