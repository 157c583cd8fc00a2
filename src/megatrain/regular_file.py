"""Files of strangers: only what is a regular file is opened, and no more of it is read than was asked for."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """`path`, links followed, opened for reading. Raises ValueError where it is no regular file (to open a pipe would
    wait for ever, to open some devices does something), and OSError."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"it is {_KINDS.get(kind, 'no file')}; expected a regular file")
    return path.open("rb")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """All bytes of a regular file. Raises ValueError where there are more than `most_bytes`, and as `open_regular`."""
    with open_regular(path) as stream:
        data = stream.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes; expected at most that")
    return data
