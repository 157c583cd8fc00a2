"""Keys from files, the library that may be missing, and a cipher of which no nonce comes twice."""

import os
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

from megatrain.errors import ConfigError
from megatrain.trust import encryption
from megatrain.trust.encryption import ALGORITHMS, KEY_BYTES, ProcessCipher, preferred_algorithm, read_key

KEY = bytes(range(100, 132))


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


# -- key files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\r\n"])
@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_in_either_form(tmp_path: Path, content: bytes, mode: int) -> None:
    assert read_key(key_file(tmp_path, content, mode)) == KEY


def test_a_key_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    key_file(tmp_path, KEY)
    assert read_key("~/key") == KEY


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o601])
def test_a_key_that_others_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    message = rf"^checkpoint.key_file: '.*key' is open to others \(mode {mode:04o}\); .*chmod 600"
    with pytest.raises(ConfigError, match=message):
        read_key(key_file(tmp_path, KEY, mode))


@pytest.mark.parametrize(
    "content", [b"", KEY[:-1], KEY + b"\n", KEY.hex().encode()[:-1], b"g" * 64, KEY.hex().encode() + b"\n \n", KEY * 99]
)
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^some.key: '.*key' holds no key; it must be 32 random bytes or 64 hex"):
        read_key(key_file(tmp_path, content), "some.key")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint.key_file: cannot read '.*none': No such file"):
        read_key(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"cannot read 'a\\x00b': no such name"):
        read_key("a\0b")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="is no plain file"):  # and does not wait for who writes to it
        read_key(tmp_path / "pipe")


# -- the library ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("installed", "said"), [(None, "not installed"), ("46.0.7", "46.0.7")])
def test_a_library_that_is_missing_or_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None, said: str
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    message = rf"^checkpoint.key_file: .* library 47 or newer, which is {said}; pip install 'megatrain\[encryption\]'$"
    with pytest.raises(ConfigError, match=message):
        read_key(key_file(tmp_path, KEY))


def test_the_algorithm_follows_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tmp_path / "cpuinfo"
    monkeypatch.setattr(encryption, "_CPU_FACTS", facts)
    assert preferred_algorithm() == "AES-256-GCM"  # of a system that does not tell
    for text, expected in [
        ("processor : 0\nflags\t\t: fpu sse4_2 aes xsave\n", "AES-256-GCM"),
        ("Features\t: fp asimd aes pmull\n", "AES-256-GCM"),
        ("flags\t\t: fpu vaes_not sse\n", "ChaCha20-Poly1305"),
        ("model name : aes\nFeatures\t: fp asimd\n", "ChaCha20-Poly1305"),
    ]:
        facts.write_text(text)
        assert preferred_algorithm() == expected, text


# -- the cipher of a process ------------------------------------------------------------------------------------------


def sealed_by(cipher: ProcessCipher, plain: bytes) -> tuple[int, bytearray]:
    sealed = bytearray(len(plain) + cipher.tag_bytes)
    return cipher.seal(memoryview(plain), memoryview(sealed)), sealed


def opens(cipher: ProcessCipher, number: int, sealed: bytes | bytearray) -> bytes | None:
    plain = bytearray(len(sealed) - cipher.tag_bytes)
    return bytes(plain) if cipher.unseal(number, memoryview(sealed), memoryview(plain)) else None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_was_sealed_opens_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    monkeypatch.setattr(encryption, "preferred_algorithm", lambda: algorithm)
    cipher, other = ProcessCipher(), ProcessCipher()
    number, sealed = sealed_by(cipher, KEY)
    assert opens(cipher, number, sealed) == KEY
    assert opens(cipher, number + 1, sealed) is None
    assert opens(other, sealed_by(other, KEY)[0], sealed) is None
    for place in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[place] ^= 1
        assert opens(cipher, number, damaged) is None


def test_no_number_comes_twice_and_equal_bytes_look_different() -> None:
    cipher = ProcessCipher()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: sealed_by(cipher, bytes(KEY_BYTES)), range(2000)))
    assert len({number for number, _ in found}) == len({bytes(sealed) for _, sealed in found}) == 2000
