"""Reading the small files of /proc and /sys. What is missing, unreadable or not as expected is None: unknown."""

import re
from pathlib import Path


def read_text(path: Path) -> str | None:
    """The file's text without white space and zero bytes at its ends."""
    try:
        return path.read_bytes().decode(errors="replace").strip("\0 \t\n")
    except (OSError, ValueError):
        return None


def read_number(path: Path) -> int | None:
    text = read_text(path) or ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def read_chosen(path: Path) -> str | None:
    """Of a file such as `always [madvise] never`, the word in brackets."""
    found = re.search(r"\[([^]]+)\]", read_text(path) or "")
    return found[1] if found else None


def list_folder(folder: Path, pattern: str = ".*") -> list[Path]:
    """Entries whose whole name matches, node2 before node10; none where the folder cannot be read."""
    try:
        found = [path for path in folder.iterdir() if re.fullmatch(pattern, path.name)]
    except OSError:
        return []
    return sorted(found, key=lambda path: [int(part) if part.isdigit() else part for part in _parts(path.name)])


def count_in_list(text: str | None) -> int | None:
    """How many numbers `0-3,8` names; the kernel writes sets of processors so."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text or ""):
        return None
    ranges = [[int(end) for end in part.split("-")] for part in (text or "").split(",")]
    return sum(part[-1] - part[0] + 1 for part in ranges)


def _parts(name: str) -> list[str]:
    """Text and digits in turn, text first, so that two names compare part by part."""
    return re.split(r"(\d+)", name)
