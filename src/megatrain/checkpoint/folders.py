"""The checkpoints of a run: `checkpoints/step-000100`, in the order of their numbers.

A folder with that name is complete: it got the name when all of it was on disk, and loses it before any of it is
removed.
"""

import re
from collections.abc import Collection
from pathlib import Path

from megatrain import files
from megatrain.checkpoint import description

_NAME = re.compile(r"step-(\d{6,})")
_REMOVED = re.compile(r"\.step-\d{6,}\.removed")
_UNFINISHED = re.compile(rf"\.step-\d{{6,}}\.saving-.*|{_REMOVED.pattern}")


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int | None:
    """The number in a checkpoint's name; None for other names."""
    match = _NAME.fullmatch(checkpoint.name)
    return None if match is None else int(match.group(1))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete ones, the oldest first."""
    return [path for path in _by_step(folder) if (path / description.FILE).is_file()]


def _by_step(folder: Path) -> list[Path]:
    """All that have a checkpoint's name."""
    found = [(step_of(path), path) for path in _inside(folder)]
    return [path for step, path in sorted((step, path) for step, path in found if step is not None)]


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove(checkpoint: Path) -> None:
    """From here on it is none, whatever happens while it is removed. Raises OSError where it still is one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    files.remove_tree(hidden)
    files.rename_durably(checkpoint, hidden)
    files.remove_tree(hidden)


def retain(folder: Path, keep: int | None, also: Collection[int] = ()) -> None:
    """Remove all but the last `keep`, which is at least one, and those of the steps `also`; None: none is removed.
    Raises OSError where one that had to go is still there."""
    _remove_named(folder, _REMOVED)  # what could not be removed before may go now
    if keep is not None:
        for checkpoint in list_checkpoints(folder)[: -max(1, keep)]:
            if step_of(checkpoint) not in also:
                remove(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """What saves and removals left behind that were killed. Only for the run that has the folder to itself."""
    _remove_named(folder, _UNFINISHED)


def _remove_named(folder: Path, names: re.Pattern[str]) -> None:
    for path in _inside(folder):
        if names.fullmatch(path.name):
            files.remove_tree(path)


def later_than(folder: Path, step: int) -> list[Path]:
    """Those of later steps, damaged ones too: a run that goes on from `step` will write its own under their names."""
    return [checkpoint for checkpoint in _by_step(folder) if (step_of(checkpoint) or 0) > step]
