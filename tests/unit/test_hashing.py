"""Hashing many files: the right sums, whatever the sizes, and nothing but regular files below the folder."""

import hashlib
import os
import threading
from pathlib import Path

import pytest
from saved_folders import FILES, fill

from megatrain.trust import hashing
from megatrain.trust.hashing import FileRecord, hash_file, hash_files, list_content, read_regular


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * 4096])
def test_a_file_of_any_size_around_what_is_read_at_a_time(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_READ_BYTES", 4096)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert hash_file(tmp_path / "file") == FileRecord(size, hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("threads", [1, 3, None])
def test_many_files_and_the_error_of_one_that_is_missing(threads: int | None, tmp_path: Path) -> None:
    fill(tmp_path, FILES)
    missing = tmp_path / "missing"
    records = hash_files([*(tmp_path / name for name in FILES), missing], threads=threads)
    assert isinstance(records.pop(missing), FileNotFoundError)
    assert records == {
        tmp_path / name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()
    }


def test_the_largest_file_comes_first_and_files_are_read_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"a": 10, "b": 3000, "c": 200, "d": 0}
    fill(tmp_path, {name: bytes(size) for name, size in sizes.items()})
    begun: list[str] = []
    two_at_once = threading.Barrier(2)

    def noting(path: Path, stop: threading.Event | None = None) -> FileRecord:
        begun.append(path.name)
        if path.name in "bc":
            two_at_once.wait(timeout=30)
        return FileRecord(0, "")

    monkeypatch.setattr(hashing, "hash_file", noting)
    hash_files([tmp_path / name for name in sizes], threads=2)
    assert set(begun[:2]) == {"b", "c"} and set(begun[2:]) == {"a", "d"}


def test_an_interruption_ends_the_other_threads_before_the_end_of_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_READ_BYTES", 1)
    fill(tmp_path, {"large": bytes(1 << 20), "small": bytes(5)})
    stopped: list[str] = []
    begun = threading.Event()
    whole = hashing.hash_file

    def interrupted(path: Path, stop: threading.Event | None = None) -> FileRecord:
        if path.name == "small":
            assert begun.wait(timeout=30)
            raise KeyboardInterrupt
        begun.set()
        try:
            return whole(path, stop)
        except InterruptedError:
            stopped.append(path.name)
            raise

    monkeypatch.setattr(hashing, "hash_file", interrupted)
    monkeypatch.setattr(hashing, "_bytes_or_zero", lambda path: path.name == "small")  # its result is asked for first
    with pytest.raises(KeyboardInterrupt):
        hash_files([tmp_path / "large", tmp_path / "small"], threads=2)
    assert stopped == ["large"]


def test_content_names_what_is_no_file_of_the_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", FILES)
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "inner").symlink_to("model/config.json")
    (folder / "model" / "outside").symlink_to("../../secret")
    (folder / "nothing").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "twice").symlink_to("model")
    os.mkfifo(folder / "pipe")
    content = list_content(folder)
    assert content.files == {name: len(data) for name, data in FILES.items()} | {
        "inner": len(FILES["model/config.json"])
    }
    assert content.refused == {
        "model/outside": "a link that leaves the folder",
        "nothing": "a link to nothing (No such file or directory)",
        "loop": "a link to nothing (Too many levels of symbolic links)",
        "twice": "a link to a folder",
        "pipe": "no regular file",
    }


def test_a_pipe_is_refused_without_waiting_for_who_writes_to_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        hash_file(tmp_path / "pipe")


def test_a_small_file_is_neither_a_link_nor_large(tmp_path: Path) -> None:
    fill(tmp_path, {"file": b"12345"})
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(tmp_path / "file", 4)
    with pytest.raises(OSError, match="it is a link"):
        read_regular(tmp_path / "link", 5)
