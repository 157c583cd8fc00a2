"""Manifests: one text for one content, every change of a file named, nothing hostile believed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from saved_folders import FILES, fill, make_checkpoint

from megatrain.errors import ConfigError, IntegrityError, MegaTrainError
from megatrain.trust import manifest as module
from megatrain.trust.durable import write_durably
from megatrain.trust.hashing import FileRecord
from megatrain.trust.manifest import (
    Parent,
    differences,
    parent_of,
    read_manifest,
    require_unchanged,
    write_manifest,
)

HASH = "ab" * 32


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- writing --------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    fill(tmp_path, FILES)
    parent = Parent("step-000050", HASH)
    facts = {"step": 100, "lr": 1e-5, "data": [{"path": "ä.txt", "bytes": 3}], "by number": {10: "b", 9: "a"}}
    digest = write_manifest(tmp_path, facts, parent)
    text = (tmp_path / "manifest.json").read_bytes()
    manifest = read_manifest(tmp_path)
    assert manifest.sha256 == digest == sha256(text)
    assert manifest.parent == parent
    assert manifest.facts == {**facts, "by number": {"10": "b", "9": "a"}}
    assert manifest.files == {name: FileRecord(len(data), sha256(data)) for name, data in FILES.items()}
    assert text.endswith(b"}\n") and text.isascii()
    assert require_unchanged(tmp_path) == manifest


def test_its_bytes_are_these(tmp_path: Path) -> None:
    fill(tmp_path, {"a": b"", "b/c": b"x"})
    write_manifest(tmp_path, {"step": 1})
    assert (tmp_path / "manifest.json").read_text() == (
        '{\n  "facts": {\n    "step": 1\n  },\n  "files": {\n'
        f'    "a": {{\n      "bytes": 0,\n      "sha256": "{sha256(b"")}"\n    }},\n'
        f'    "b/c": {{\n      "bytes": 1,\n      "sha256": "{sha256(b"x")}"\n    }}\n'
        '  },\n  "format": 1,\n  "parent": null\n}\n'
    )


def test_one_content_has_one_text(tmp_path: Path) -> None:
    one = fill(tmp_path / "one", FILES)
    other = fill(tmp_path / "other", dict(reversed(FILES.items())))
    assert write_manifest(one, {"a": 1, "b": 2}, threads=1) == write_manifest(other, {"b": 2, "a": 1}, threads=4)


def test_files_that_were_hashed_while_they_were_written_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, FILES)
    known = {name: FileRecord(len(data), sha256(data)) for name, data in FILES.items()}
    del known["training.json"]
    read: list[Path] = []
    hash_files = module.hash_files

    def noting(paths: Any, threads: int | None = None) -> Any:
        read.extend(paths := list(paths))
        return hash_files(paths, threads=threads)

    monkeypatch.setattr(module, "hash_files", noting)
    write_manifest(tmp_path, {}, known=known)
    assert read == [tmp_path / "training.json"]
    monkeypatch.undo()
    assert differences(tmp_path, read_manifest(tmp_path)) == []


@pytest.mark.parametrize(("size", "there"), [(8999, "9000 bytes are there"), (None, "no file is there")])
def test_a_known_file_that_is_not_there_as_it_was_written_is_an_error(
    size: int | None, there: str, tmp_path: Path
) -> None:
    """A short write that nobody noticed."""
    fill(tmp_path, FILES)
    name = "state/moments.safetensors" if size is not None else "state/gone.safetensors"
    with pytest.raises(IntegrityError, match=f"{name} and {there}"):
        write_manifest(tmp_path, {}, known={name: FileRecord(size or 1, HASH)})
    assert not (tmp_path / "manifest.json").exists()


def test_the_callers_writer_writes_it(tmp_path: Path) -> None:
    fill(tmp_path, FILES)
    written: dict[Path, bytes] = {}
    digest = write_manifest(tmp_path, {}, write=written.__setitem__)
    assert not (tmp_path / "manifest.json").exists()
    assert list(written) == [tmp_path / "manifest.json"] and sha256(written[tmp_path / "manifest.json"]) == digest


def test_a_full_disk_leaves_the_manifest_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path)
    before = read_manifest(tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(tmp_path, {"step": 2})
    assert require_unchanged(tmp_path) == before


def test_what_is_put_in_the_temporary_files_place_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / ".manifest.json.partial").symlink_to("victim")
    write_durably(tmp_path / "manifest.json", b"data")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert (tmp_path / "manifest.json").read_bytes() == b"data"
    assert not os.path.lexists(tmp_path / ".manifest.json.partial")


def test_only_regular_files_with_plain_names_are_recorded(tmp_path: Path) -> None:
    fill(tmp_path, FILES)
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(IntegrityError, match="link is a link that leaves the folder"):
        write_manifest(tmp_path, {})
    (tmp_path / "link").unlink()
    for name in ("a\nb", "a\\b", "c:d", os.fsdecode(b"\xff")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(IntegrityError, match="has characters that mean something else elsewhere") as caught:
            write_manifest(tmp_path, {})
        assert str(caught.value).isprintable()
        (tmp_path / name).unlink()


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_manifest(tmp_path, {"loss": value})


def test_signatures_come_later_and_are_not_recorded(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    fill(tmp_path, {"model.sig": b"{}", "model/model.sig": b"{}"})
    require_unchanged(tmp_path)
    write_manifest(tmp_path, {})
    assert set(read_manifest(tmp_path).files) == set(FILES)


def test_a_checkpoint_is_named_by_its_folder_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "step-000100")
    monkeypatch.chdir(folder)
    assert parent_of(Path()) == parent_of(folder) == Parent("step-000100", read_manifest(folder).sha256)


# -- files that changed ---------------------------------------------------------------------------------------


def flip(path: Path, at: int = 1000) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


WEIGHTS = "model/model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "byte flip": (lambda f: flip(f / WEIGHTS), "content", WEIGHTS, "found sha256 "),
    "truncation": (lambda f: os.truncate(f / WEIGHTS, 100), "size", WEIGHTS, "expected 5120 bytes, found 100 bytes"),
    "empty": (lambda f: os.truncate(f / WEIGHTS, 0), "size", WEIGHTS, "expected 5120 bytes, found 0 bytes"),
    "growth": (lambda f: os.truncate(f / WEIGHTS, 5121), "size", WEIGHTS, "expected 5120 bytes, found 5121 bytes"),
    "extra file": (
        lambda f: (f / "model/pytorch_model.bin").write_bytes(b"evil"),
        "extra",
        "model/pytorch_model.bin",
        "expected no file, found 4 bytes",
    ),
    "extra link": (
        lambda f: (f / "x").symlink_to("/etc"),
        "extra",
        "x",
        "expected no file, found a link that leaves the folder",
    ),
    "missing file": (lambda f: (f / WEIGHTS).unlink(), "missing", WEIGHTS, "found no file"),
    "a link in its place": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("/etc/hostname")),
        "unreadable",
        WEIGHTS,
        "found a link that leaves the folder",
    ),
    "a pipe in its place": (
        lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)),
        "unreadable",
        WEIGHTS,
        "found no regular file",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_named(name: str, tmp_path: Path) -> None:
    damage, kind, file, text = DAMAGE[name]
    make_checkpoint(tmp_path)
    damage(tmp_path)
    (found,) = differences(tmp_path, read_manifest(tmp_path))
    assert (found.kind, found.name) == (kind, file)
    assert text in str(found)
    with pytest.raises(IntegrityError) as caught:
        require_unchanged(tmp_path)
    assert str(caught.value) == f"{tmp_path} is not as its manifest.json records it: {found}"


def test_a_file_that_cannot_be_read_is_a_difference_and_no_end_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path)
    flip(tmp_path / "training.json", 1)
    from megatrain.trust import hashing

    whole = hashing.hash_file

    def failing(path: Path, *more: Any) -> FileRecord:
        if path.name == "model.safetensors":
            raise OSError(5, "Input/output error", str(path))
        return whole(path, *more)

    monkeypatch.setattr(hashing, "hash_file", failing)
    unreadable, changed = differences(tmp_path, read_manifest(tmp_path))
    assert (unreadable.kind, unreadable.found) == ("unreadable", "unreadable (Input/output error)")
    assert (changed.kind, changed.name) == ("content", "training.json")


def test_only_files_of_the_right_size_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path)
    os.truncate(tmp_path / WEIGHTS, 100)
    read: list[str] = []
    from megatrain.trust import hashing

    whole = hashing.hash_file
    monkeypatch.setattr(hashing, "hash_file", lambda path, *more: read.append(path.name) or whole(path, *more))
    differences(tmp_path, read_manifest(tmp_path))
    assert sorted(read) == ["config.json", "moments.safetensors", "training.json"]


def test_the_error_names_the_first_three_and_counts_the_rest(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    for name in FILES:
        (tmp_path / name).unlink()
    with pytest.raises(IntegrityError, match=r"config\.json.*; model/model.*; state/moments.*; and 1 more$"):
        require_unchanged(tmp_path)


# -- manifests that are not ours ------------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the manifest as it would be written, with a change in it."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def with_name(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["files"].update({name: {"bytes": 1, "sha256": HASH}})


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "up": (with_name("../x"), "file name ../x leaves the folder"),
    "up inside": (with_name("model/../../x"), "leaves the folder"),
    "absolute": (with_name("/etc/passwd"), "file name /etc/passwd leaves the folder"),
    "two slashes": (with_name("model//config.json"), "is not in its shortest form"),
    "dot": (with_name("./training.json"), "is not in its shortest form"),
    "slash at the end": (with_name("model/"), "is not in its shortest form"),
    "the folder": (with_name("."), "is not in its shortest form"),
    "no name": (with_name(""), "is not in its shortest form"),
    "Windows": (with_name("..\\x"), "has characters that mean"),
    "drive": (with_name("C:x"), "has characters that mean"),
    "zero": (with_name("a\0b"), r"file name 'a\x00b' has characters that mean"),
    "two lines": (with_name("a\nb"), r"file name 'a\nb' has characters that mean"),
    "itself": (with_name("manifest.json"), "is none that a manifest records"),
    "a signature": (with_name("model.sig"), "is none that a manifest records"),
    "no files": (lambda d: d.pop("files"), "the manifest is not an object of facts, files, format, parent"),
    "another key": (lambda d: d.update(more=1), "the manifest is not an object of"),
    "files as a list": (lambda d: d.update(files=[]), "files and facts have to be objects"),
    "facts as text": (lambda d: d.update(facts="x"), "files and facts have to be objects"),
    "record as text": (lambda d: d["files"].update(x="y"), "the record of x is not an object of bytes, sha256"),
    "record with more": (
        lambda d: d["files"]["training.json"].update(mode=7),
        "the record of training.json is not an object of bytes, sha256",
    ),
    "negative": (lambda d: d["files"]["training.json"].update(bytes=-1), "bytes of training.json is no size"),
    "true": (lambda d: d["files"]["training.json"].update(bytes=True), "bytes of training.json is no size"),
    "fraction": (lambda d: d["files"]["training.json"].update(bytes=1.0), "bytes of training.json is no size"),
    "short hash": (lambda d: d["files"]["training.json"].update(sha256="ab"), "is not 64 hexadecimal digits"),
    "capitals": (lambda d: d["files"]["training.json"].update(sha256=HASH.upper()), "is not 64 hexadecimal digits"),
    "hash and a line end": (
        lambda d: d["files"]["training.json"].update(sha256=HASH + "\n"),
        "is not 64 hexadecimal digits",
    ),
    "newer": (lambda d: d.update(format=2), "format 2 is unknown to this version of MegaTrain, which writes 1"),
    "format true": (lambda d: d.update(format=True), "format is no whole number; expected 1"),
    "parent as text": (lambda d: d.update(parent="x"), "parent is not an object of folder, manifest_sha256"),
    "parent elsewhere": (
        lambda d: d.update(parent={"folder": "../x", "manifest_sha256": HASH}),
        "parent.folder is ../x; expected the name of a folder",
    ),
    "parent below": (
        lambda d: d.update(parent={"folder": "a/b", "manifest_sha256": HASH}),
        "parent.folder is a/b; expected the name of a folder",
    ),
    "parent is up": (
        lambda d: d.update(parent={"folder": "..", "manifest_sha256": HASH}),
        "parent.folder is ..; expected the name of a folder",
    ),
    "parent as a number": (
        lambda d: d.update(parent={"folder": 1, "manifest_sha256": HASH}),
        "parent.folder is 1; expected the name of a folder",
    ),
    "parent without a hash": (
        lambda d: d.update(parent={"folder": "a", "manifest_sha256": None}),
        "parent.manifest_sha256 is not 64 hexadecimal digits",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_manifest_that_says_the_impossible_is_damaged(name: str, tmp_path: Path) -> None:
    change, message = EDITS[name]
    make_checkpoint(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(IntegrityError) as caught:
        require_unchanged(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/manifest.json is damaged: ") and message in text
    assert text.isprintable()


def test_an_edited_hash_is_found_in_the_file_and_in_the_child(tmp_path: Path) -> None:
    """Whoever changes a file and its record changes the manifest's own hash, which the next manifest has."""
    folder = make_checkpoint(tmp_path / "a")
    before = parent_of(folder)
    edited(folder, lambda data: data["files"][WEIGHTS].update(sha256=HASH))
    (found,) = differences(folder, read_manifest(folder))
    assert (found.kind, found.expected) == ("content", f"sha256 {HASH}")
    assert parent_of(folder) != before


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (lambda text: text.replace(b"  ", b"\t"), "it is not the one text of its content"),
        (lambda text: text[:-1], "it is not the one text of its content"),
        (lambda text: text + b"\n", "it is not the one text of its content"),
        (lambda text: text.replace(b'"format"', b'"facts": {},\n  "format"'), "it is not the one text of its content"),
        (lambda text: text.replace(b"100", b"1e2"), "it is not the one text of its content"),
        (lambda text: text.replace(b"100", b"NaN"), "not JSON compliant"),
        (lambda text: text.replace(b"100", b"9" * 5000), "integer string conversion"),
        (lambda text: text.replace(b"100", b'"\xc3\xa4"'), "ascii"),
        (lambda text: text.replace(b"100", b"[" * 100_000), "it is nested too deeply"),
        (lambda text: text[:50], "Expecting"),
        (lambda text: b"", "Expecting value"),
        (lambda text: b"[]\n", "the manifest is not an object of"),
        (lambda text: b"\x80\x04K\x01.", "ascii"),
    ],
)
def test_another_text_is_damaged(rewrite: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_bytes(rewrite(path.read_bytes()))
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged: ") as caught:
        read_manifest(tmp_path)
    assert message in str(caught.value) and len(str(caught.value)) < 400


def test_a_manifest_is_a_file_of_the_folder_and_not_endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "a")
    other = tmp_path / "b"
    other.mkdir()
    with pytest.raises(ConfigError, match=r"holds no manifest\.json"):
        read_manifest(other)
    with pytest.raises(ConfigError, match="is no folder"):
        read_manifest(tmp_path / "c")
    (other / "manifest.json").symlink_to(folder / "manifest.json")
    with pytest.raises(IntegrityError, match=r"manifest\.json cannot be read: it is a link"):
        read_manifest(other)
    (other / "manifest.json").unlink()
    os.mkfifo(other / "manifest.json")
    with pytest.raises(IntegrityError, match=r"manifest\.json cannot be read: it is no regular file"):
        read_manifest(other)
    monkeypatch.setattr(module, "_MOST_BYTES", 100)
    with pytest.raises(IntegrityError, match="it is larger than 100 bytes"):
        read_manifest(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    text=st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {"format": st.just(1) | JSON, "files": JSON, "facts": st.just({}), "parent": st.none() | JSON}
    ).map(lambda value: (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
)
def test_whatever_stands_there_ends_in_one_line_or_in_a_manifest(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with contextlib.suppress(MegaTrainError):
        assert read_manifest(tmp_path).sha256 == sha256(text)
