"""The manifest of a folder: size and SHA-256 of each file, what they came from, and the manifest before it.

`manifest.json` is canonical JSON, so one content has one text, and with it one hash: what the next manifest records of
this one. docs/integrity.md shows one.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatrain.errors import ConfigError, IntegrityError
from megatrain.trust.compare import Difference, compare, shown
from megatrain.trust.durable import write_durably
from megatrain.trust.hashing import Content, FileRecord, hash_files, list_content, read_regular

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "model.sig"
FORMAT = 1

_MOST_BYTES = 256 << 20  # of a manifest: some million files
_NAMED_DIFFERENCES = 3  # in the one line of an error
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Parent:
    """The checkpoint that a run went on from."""

    folder: str
    """Its folder's name, beside the child's."""
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    files: dict[str, FileRecord]
    """By name relative to the folder, with `/` between parts."""
    facts: dict[str, Any]
    """What the files came from, as whoever wrote them knew it: step, data, code, libraries, machine."""
    parent: Parent | None
    """None at the start of a chain."""
    sha256: str
    """Of the manifest file itself."""


def write_manifest(
    folder: Path,
    facts: Mapping[str, Any],
    parent: Parent | None = None,
    *,
    known: Mapping[str, FileRecord] | None = None,
    threads: int | None = None,
    write: Callable[[Path, bytes], None] = write_durably,
) -> str:
    """Record all files of `folder` in its `manifest.json`; returns the manifest's SHA-256.

    `facts` is anything that JSON can hold. `known`: files that were hashed while they were written; they are not read
    again, but they have to be there with these sizes. `write(path, data)` writes the file, durably. Raises
    IntegrityError where the folder holds links that leave it, special files or names that no manifest may hold,
    and OSError where a file cannot be read.
    """
    content = list_recorded(folder)
    for name, reason in sorted(content.refused.items()):
        raise IntegrityError(f"{folder}: {shown(name)} is {reason}; a manifest records regular files")
    for name in content.files:
        if (wrong := _wrong_name(name)) is not None:
            raise IntegrityError(f"{folder}: file name {shown(name)} {wrong}; a manifest cannot record it")
    files = dict(known or {})
    for name, record in files.items():
        if content.files.get(name) != record.bytes:
            there = f"{content.files[name]} bytes are" if name in content.files else "no file is"
            raise IntegrityError(f"{folder}: {record.bytes} bytes were written to {shown(name)} and {there} there")
    text = _encode(files | _hash(folder, content.files.keys() - files.keys(), threads), facts, parent)
    write(folder / MANIFEST_NAME, text)
    return hashlib.sha256(text).hexdigest()


def _hash(folder: Path, names: set[str], threads: int | None) -> dict[str, FileRecord]:
    records = hash_files((folder / name for name in names), threads=threads)
    found = {}
    for name in names:
        record = records[folder / name]
        if isinstance(record, OSError):
            raise record
        found[name] = record
    return found


def list_recorded(folder: Path) -> Content:
    """What a manifest of `folder` records: all but itself and signatures, which come later."""
    content = list_content(folder)
    kept = {name: size for name, size in content.files.items() if _is_recorded(name)}
    return Content(kept, content.refused)


def _is_recorded(name: str) -> bool:
    return name != MANIFEST_NAME and name.rpartition("/")[2] != SIGNATURE_NAME


# -- reading --------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """Raises ConfigError where there is no manifest, IntegrityError where it is none that `write_manifest` writes."""
    path = folder / MANIFEST_NAME
    if not os.path.isdir(folder):
        raise ConfigError(f"{str(folder)!r} is no folder; expected a checkpoint's folder")
    try:
        text = read_regular(path, _MOST_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{str(folder)!r} holds no {MANIFEST_NAME}; expected a checkpoint's folder") from None
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return _decode(text)
    except (ValueError, RecursionError) as error:  # JSON's own errors are ValueErrors
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise IntegrityError(f"{path} is damaged: {what}") from None


def parent_of(folder: Path) -> Parent:
    """How the manifest that comes after the one of `folder` names it. Raises as `read_manifest`."""
    return Parent(Path(os.path.abspath(folder)).name, read_manifest(folder).sha256)


def _encode(files: Mapping[str, FileRecord], facts: Mapping[str, Any], parent: Parent | None) -> bytes:
    data = {
        "format": FORMAT,
        "files": {name: asdict(record) for name, record in files.items()},
        "facts": dict(facts),
        "parent": None if parent is None else asdict(parent),
    }
    # read once: keys that are numbers are text from here on, and sort as such
    return _canonical(json.loads(json.dumps(data, allow_nan=False)))


def _canonical(data: object) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def _decode(text: bytes) -> Manifest:
    """Raises ValueError or RecursionError."""
    data = json.loads(text.decode("ascii"))
    if isinstance(data, dict) and type(data.get("format")) is int and data["format"] != FORMAT:
        raise ValueError(f"format {data['format']} is unknown to this version of MegaTrain, which writes {FORMAT}")
    _require_keys(data, {"format", "files", "facts", "parent"}, "the manifest")
    if type(data["format"]) is not int:
        raise ValueError(f"format is no whole number; expected {FORMAT}")
    if not isinstance(data["files"], dict) or not isinstance(data["facts"], dict):
        raise ValueError("files and facts have to be objects")
    manifest = Manifest(
        files={name: _record(name, value) for name, value in data["files"].items()},
        facts=data["facts"],
        parent=None if data["parent"] is None else _parent(data["parent"]),
        sha256=hashlib.sha256(text).hexdigest(),
    )
    if _canonical(data) != text:
        raise ValueError("it is not the one text of its content (a key twice, another order, other spaces)")
    return manifest


def _record(name: str, value: object) -> FileRecord:
    wrong = _wrong_name(name) or (None if _is_recorded(name) else "is none that a manifest records")
    if wrong is not None:
        raise ValueError(f"file name {shown(name)} {wrong}")
    fields = _require_keys(value, {"bytes", "sha256"}, f"the record of {shown(name)}")
    if type(fields["bytes"]) is not int or fields["bytes"] < 0:
        raise ValueError(f"bytes of {shown(name)} is no size")
    return FileRecord(fields["bytes"], _sha256(fields["sha256"], f"sha256 of {shown(name)}"))


def _parent(value: object) -> Parent:
    fields = _require_keys(value, {"folder", "manifest_sha256"}, "parent")
    name = fields["folder"]
    if not isinstance(name, str) or "/" in name or _wrong_name(name) is not None:
        raise ValueError(f"parent.folder is {shown(str(name))}; expected the name of a folder")
    return Parent(name, _sha256(fields["manifest_sha256"], "parent.manifest_sha256"))


def _require_keys(value: object, keys: set[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != keys:
        raise ValueError(f"{what} is not an object of {', '.join(sorted(keys))}")
    return value


def _sha256(value: object, what: str) -> str:
    if not isinstance(value, str) or _SHA256.fullmatch(value) is None:
        raise ValueError(f"{what} is not 64 hexadecimal digits")
    return value


def _wrong_name(name: str) -> str | None:
    """Why `name` is not the one name of a file below a folder, on any system; None where it is."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "leaves the folder"
    if name != str(path) or name == ".":
        return "is not in its shortest form"
    if "\\" in name or ":" in name or not name.isprintable():  # separators and drives of Windows, ends of lines
        return "has characters that mean something else elsewhere"
    return None


# -- comparing ------------------------------------------------------------------------------------------------


def differences(folder: Path, manifest: Manifest, *, threads: int | None = None) -> list[Difference]:
    """Every file of `folder` that is not as `manifest` records it, by name; sizes are looked at before any hash."""
    return compare(folder, list_recorded(folder), manifest.files, threads=threads)


def require_unchanged(folder: Path, *, threads: int | None = None) -> Manifest:
    """The manifest of `folder`, whose files are all as it records them.

    Raises IntegrityError that names the first differences, and as `read_manifest`.
    """
    manifest = read_manifest(folder)
    found = differences(folder, manifest, threads=threads)
    if found:
        named = "; ".join(map(str, found[:_NAMED_DIFFERENCES]))
        more = f"; and {len(found) - _NAMED_DIFFERENCES} more" if len(found) > _NAMED_DIFFERENCES else ""
        raise IntegrityError(f"{folder} is not as its {MANIFEST_NAME} records it: {named}{more}")
    return manifest
