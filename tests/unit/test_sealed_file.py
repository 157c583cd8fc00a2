"""Sealed files: what was written is read, any part of it; whatever else happens to one is noticed."""

import io
import json
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from megatrain.errors import IntegrityError
from megatrain.trust import sealed_file
from megatrain.trust.encryption import ALGORITHMS, TAG_BYTES
from megatrain.trust.sealed_file import HEADER_BYTES, SealedReader, SealedWriter, sealed_bytes

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
CHUNK = 64


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed_file, "CHUNK_BYTES", CHUNK)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sealed")


def seal(path: Path, *parts: Any, key: bytes = KEY) -> Path:
    with path.open("wb") as sink, SealedWriter(sink, key) as writer:
        for part in parts:
            assert writer.write(part) == memoryview(part).nbytes
    return path


def opened(path: Path, key: bytes = KEY) -> bytes:
    with SealedReader(path, key) as reader:
        return bytes(reader.read(0, reader.plain_size))


def content(n_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(n_bytes)


# -- what is written is read ------------------------------------------------------------------------------------------


@given(
    parts=st.lists(st.binary(max_size=3 * CHUNK), max_size=5),
    cuts=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), max_size=6),
    algorithm=st.sampled_from(ALGORITHMS),
)
@settings(max_examples=150, deadline=None)
def test_any_part_of_what_was_written_in_any_parts(
    folder: Path, parts: list[bytes], cuts: list[tuple[int, int]], algorithm: str
) -> None:
    plain = b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed_file, "preferred_algorithm", lambda: algorithm)
        path = seal(folder / "any", *parts)
    assert path.stat().st_size == sealed_bytes(len(plain))
    with SealedReader(path, KEY) as reader:
        assert reader.plain_size == len(plain)
        assert reader.read(0, len(plain)) == plain
        for offset, length in cuts:
            if offset + length <= len(plain):
                assert reader.read(offset, length) == plain[offset : offset + length]
            else:
                with pytest.raises(ValueError, match=f"of {len(plain)} bytes in "):
                    reader.read(offset, length)


@pytest.mark.parametrize("n_bytes", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 3])
def test_where_chunks_end(folder: Path, n_bytes: int) -> None:
    plain = content(n_bytes)
    path = seal(folder / "edges", plain)
    assert opened(path) == plain
    assert path.stat().st_size == sealed_bytes(n_bytes)


def test_memory_of_any_kind_is_taken_and_filled(folder: Path) -> None:
    numbers = torch.arange(100, dtype=torch.float32).view(4, 25)
    path = seal(folder / "tensor", numbers.numpy(), bytearray(b"and"), memoryview(b"so on"), torch.empty(0, 3).numpy())
    back = torch.zeros(4, 25)
    with SealedReader(path, KEY) as reader:
        reader.read_into(0, back.numpy())
        assert torch.equal(back, numbers) and reader.read(400, 8) == b"andso on"
        reader.read_into(408, bytearray())


def test_a_sink_that_takes_a_little_at_a_time(folder: Path) -> None:
    class Slow(io.BytesIO):
        def write(self, data: Any, /) -> int:
            return super().write(bytes(data[:7]))

    sink, plain = Slow(), content(300)
    with SealedWriter(sink, KEY) as writer:
        writer.write(plain)
    (folder / "slow").write_bytes(sink.getvalue())
    assert opened(folder / "slow") == plain


def test_tensors_are_read_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A safetensors file inside: its header, then one tensor, without decrypting the others."""
    tensors = {name: torch.randn(40, 16) for name in "abcd"}
    path = seal(folder / "safetensors", save(tensors))
    used: list[bytes] = []
    real = sealed_file.unsealed
    monkeypatch.setattr(sealed_file, "unsealed", lambda *given: used.append(given[1]) or real(*given))
    with SealedReader(path, KEY) as reader:
        header_bytes = int.from_bytes(reader.read(0, 8), "little")
        header = json.loads(reader.read(8, header_bytes))
        start, end = header["c"]["data_offsets"]
        found = torch.empty(40, 16)
        reader.read_into(8 + header_bytes + start, found.numpy())
    assert torch.equal(found, tensors["c"]) and end - start == found.nbytes
    assert len(used) < 2 + header_bytes // CHUNK + found.nbytes // CHUNK + 4  # of 160 and more
    assert len(used) == len(set(used))  # none twice
    assert torch.equal(load(opened(path))["d"], tensors["d"])


def test_the_form_of_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the module says it is, read without its help: files of this version must stay readable."""
    monkeypatch.setattr(sealed_file, "preferred_algorithm", lambda: "AES-256-GCM")
    plain = content(2 * CHUNK + 5)
    raw = seal(folder / "form", plain).read_bytes()
    assert raw[:16] == b"MTSEALED\x01\x01\x00\x00" + CHUNK.to_bytes(4, "little")
    derived = HKDF(SHA256(), 48, salt=raw[16:48], info=raw[:16]).derive(KEY)
    assert raw[48:64] == derived[32:]
    cipher, found, body = AESGCM(derived[:32]), b"", raw[64:]
    for number, last in enumerate((0, 0, 1)):
        chunk, body = body[: CHUNK + 16], body[CHUNK + 16 :]
        found += cipher.decrypt(number.to_bytes(11, "big") + bytes([last]), chunk, None)
    assert found == plain and not body


def test_nothing_of_the_content_shows_and_no_two_files_are_alike(folder: Path) -> None:
    plain = content(10 * CHUNK)
    one, other = (seal(folder / name, plain).read_bytes() for name in ("one", "other"))
    assert all(plain[i : i + 8] not in one for i in range(len(plain) - 8))
    assert one[16:48] != other[16:48]
    alike = sum(a == b for a, b in zip(one[HEADER_BYTES:], other[HEADER_BYTES:], strict=True))
    assert alike < len(plain) / 20  # by chance one in 256


# -- what is noticed --------------------------------------------------------------------------------------------------


def assert_refused(path: Path, raw: bytes | bytearray, message: str | None = None, key: bytes = KEY) -> None:
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=message) as caught:
        opened(path, key)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def chunks(raw: bytes) -> list[bytes]:
    return [raw[i : i + CHUNK + TAG_BYTES] for i in range(HEADER_BYTES, len(raw), CHUNK + TAG_BYTES)]


@pytest.fixture
def raw(tmp_path: Path) -> bytes:
    return seal(tmp_path / "whole", content(3 * CHUNK + 20)).read_bytes()


def test_every_bit_counts(tmp_path: Path, raw: bytes) -> None:
    for place in range(len(raw)):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        assert_refused(tmp_path / "damaged", damaged)


def test_what_is_said(tmp_path: Path, raw: bytes) -> None:
    def damaged(place: int) -> bytearray:
        changed = bytearray(raw)
        changed[place] ^= 1
        return changed

    path = tmp_path / "damaged"
    assert_refused(path, damaged(3), "is no sealed file, or its beginning is damaged")
    assert_refused(path, damaged(8), "is sealed in form 0.1, which this version of megatrain does not know")
    assert_refused(path, damaged(20), "was sealed with another key, or its header is damaged")
    assert_refused(path, raw, "was sealed with another key", key=OTHER_KEY)
    assert_refused(path, damaged(HEADER_BYTES + 100), "is damaged between bytes 144 and 224")
    assert_refused(path, damaged(len(raw) - 1), "is cut off, extended, or damaged at its end")


def test_a_file_that_was_cut_off_or_extended_does_not_open(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "cut"
    for changed in (*(raw[:n] for n in range(len(raw))), *(raw + content(n) for n in range(1, 2 * CHUNK))):
        path.write_bytes(changed)
        with pytest.raises(IntegrityError, match=str(path)):
            SealedReader(path, KEY)


def test_chunks_that_were_moved_or_left_out(tmp_path: Path, raw: bytes) -> None:
    header, (a, b, c, d) = raw[:HEADER_BYTES], chunks(raw)
    for order in ([b, a, c, d], [a, c, b, d], [a, b, d], [a, b, c], [a, a, c, d], [a, b, c, c, d], [d], [a, b, d, d]):
        assert_refused(tmp_path / "moved", header + b"".join(order))


def test_chunks_of_another_file_under_the_same_key(tmp_path: Path, raw: bytes) -> None:
    other = seal(tmp_path / "other", content(3 * CHUNK + 20)).read_bytes()  # of the same content, even
    mine, theirs = chunks(raw), chunks(other)
    for number in range(4):
        mixed = [*mine[:number], theirs[number], *mine[number + 1 :]]
        assert_refused(tmp_path / "mixed", raw[:HEADER_BYTES] + b"".join(mixed))
    assert_refused(tmp_path / "mixed", other[:HEADER_BYTES] + b"".join(mine))


def test_a_file_that_was_never_finished(tmp_path: Path) -> None:
    """A writer that was not closed, or left by an error, made no whole file: also where a chunk ends."""
    for n_bytes in (0, 10, CHUNK, 2 * CHUNK):
        path = tmp_path / "unfinished"
        with suppress(KeyError), path.open("wb") as sink, SealedWriter(sink, KEY) as writer:
            writer.write(content(n_bytes))
            raise KeyError
        with pytest.raises(IntegrityError):
            opened(path)
    with path.open("wb") as sink:
        writer = SealedWriter(sink, KEY)
        writer.close()
        writer.close()
        with pytest.raises(ValueError, match="closed"):
            writer.write(b"more")
    assert opened(path) == b""


@pytest.mark.parametrize("n_bytes", [0, 1, 63, 64, 65, 80, 500])
def test_files_that_never_were_sealed(tmp_path: Path, n_bytes: int) -> None:
    assert_refused(tmp_path / "plain", content(n_bytes), "is no sealed file")
    hostile = b"MTSEALED\x01\x01\x00\x00\xff\xff\xff\xff" + content(n_bytes)  # chunks of 4 GiB
    assert_refused(tmp_path / "plain", hostile)


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    path = seal(tmp_path / "shrinking", content(5 * CHUNK))
    with SealedReader(path, KEY) as reader:
        os.truncate(path, HEADER_BYTES + CHUNK)
        with pytest.raises(IntegrityError, match=r"reading at byte 128 failed: it has become shorter"):
            reader.read(0, 10)
    with pytest.raises(FileNotFoundError):
        SealedReader(tmp_path / "missing", KEY)
