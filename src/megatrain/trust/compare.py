"""What a folder holds against what was recorded of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatrain.trust.hashing import Content, FileRecord, hash_files

Kind = Literal["missing", "extra", "size", "content", "unreadable", "manifest", "parent", "signature", "ledger"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One line of a report."""

    kind: Kind
    name: str
    """Of the file, relative to the folder."""
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{shown(self.name)}: expected {self.expected}, found {self.found}"


def compare(
    folder: Path, content: Content, expected: Mapping[str, FileRecord], *, threads: int | None = None
) -> list[Difference]:
    """Differences by name. Only files whose size is right are hashed."""
    found, hashed = [], []
    for name, recorded in expected.items():
        size = content.files.get(name)
        if size == recorded.bytes:
            hashed.append(name)
        elif size is not None:
            found.append(Difference("size", name, f"{recorded.bytes} bytes", f"{size} bytes"))
        elif name in content.refused:
            found.append(Difference("unreadable", name, f"sha256 {recorded.sha256}", content.refused[name]))
        else:
            found.append(Difference("missing", name, f"sha256 {recorded.sha256}", "no file"))
    there = content.refused | {name: f"{size} bytes" for name, size in content.files.items()}
    found += [Difference("extra", name, "no file", there[name]) for name in there.keys() - expected]
    records = hash_files((folder / name for name in hashed), threads=threads)
    for name in hashed:
        record = records[folder / name]
        if isinstance(record, OSError):
            found.append(
                Difference("unreadable", name, f"sha256 {expected[name].sha256}", f"unreadable ({record.strerror})")
            )
        elif record != expected[name]:
            found.append(Difference("content", name, f"sha256 {expected[name].sha256}", f"sha256 {record.sha256}"))
    return sorted(found, key=lambda difference: difference.name)


def shown(name: str) -> str:
    """A file's name as one line can show it, whatever is in it."""
    return name if name.isprintable() else ascii(name)
