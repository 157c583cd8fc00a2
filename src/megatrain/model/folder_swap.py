"""One folder for another: written under another name beside its target, flushed to disk, then put in its place.

At any moment the target is the whole old folder or the whole new one.
"""

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatrain import files
from megatrain.errors import ConfigError

# files of an earlier save that must not outlive it; everything else in the folder is kept
_REPLACED = re.compile(
    r"(generation_)?config\.json|model.*\.safetensors|.*\.safetensors\.index\.json"
    r"|pytorch_model.*\.bin(\.index\.json)?"
)
# renameat2's numbers, from linux/fs.h and fcntl.h
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_target(target: Path) -> None:
    """Raise ConfigError for a target that is no folder, or that holds files but no model: it would be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"cannot save to {target}: it is a file; give a folder")
    entries = [entry.name for entry in target.iterdir()]
    model_files = ("config.json", ".safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    if entries and not any(name.endswith(model_files) for name in entries):
        raise ConfigError(f"cannot save to {target}: it holds files but no model; give an empty or a new folder")


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place, on disk, when the block ends without error.

    Files of the old folder that are no part of a model come along. After an error the old folder stands.
    """
    made = files.make_folders(target.parent)
    remove_leftovers(target)
    temporary = temporary_for(target)
    try:
        files.make_folder(temporary)
        yield temporary
        if target.exists():
            _carry_over(target, temporary)
        files.sync_tree(temporary)
        _put_in_place(temporary, target)
    except BaseException:
        files.remove_tree(temporary)
        files.remove_empty(made)
        raise


def temporary_for(target: Path) -> Path:
    """Where this process writes what will be `target`: beside it, under a name that says whose it is."""
    return target.with_name(f".{target.name}.saving-{socket.gethostname()}-{os.getpid()}")


def is_leftover(name: str, target: str) -> bool:
    """Whether a save to a folder called `target` writes, or has left behind, what is called `name`."""
    return re.fullmatch(rf"\.{re.escape(target)}\.saving-.*", name) is not None


def remove_leftovers(target: Path) -> None:
    """Remove what saves to `target` left behind whose process on this machine was killed, or was this one."""
    prefix = f".{target.name}.saving-{socket.gethostname()}-"
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix)
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            files.remove_tree(path)


def _carry_over(old: Path, new: Path) -> None:
    """Give `new` the files of `old` that are no part of a model, without copying bytes."""
    for entry in old.iterdir():
        if _REPLACED.fullmatch(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(entry, new / entry.name)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Make `temporary` be `target`, on disk; only then is what was there before removed. After an error both are what
    they were."""
    old = None
    with contextlib.ExitStack() as undo:
        if target.exists():
            if _exchange(temporary, target):
                old = temporary
                undo.callback(_exchange, temporary, target)
            else:
                # the file system cannot swap two names at once: for an instant, `target` is missing and `old` is it
                old = temporary.with_name(temporary.name + ".old")
                files.rename(target, old)
                undo.callback(files.rename, old, target)
        if old is not temporary:
            files.rename(temporary, target)
            undo.callback(files.rename, target, temporary)
        files.sync_folder(target.parent)
        undo.pop_all()
    if old is not None:
        files.remove_tree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders' names in one atomic step. False where the system or file system has no such step."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    if rename(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))
