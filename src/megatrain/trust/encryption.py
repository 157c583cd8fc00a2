"""Keys and ciphers for what is sealed at rest, from the `cryptography` library, imported where somebody asks for them.

A cipher here seals: what it gives out cannot be read, and cannot be changed without notice, by anyone without the key.
AES-256-GCM where the processor has instructions for AES, else ChaCha20-Poly1305, which is fast without them.
"""

import os
import re
import stat
from collections.abc import Callable
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
ALGORITHMS = ("AES-256-GCM", "ChaCha20-Poly1305")
LEAST_LIBRARY = 47  # the first that encrypts into memory it is given

_CPU_FACTS = Path("/proc/cpuinfo")


def require_library(setting: str) -> None:
    """Raise ConfigError where `setting` asks for encryption and the library for it is missing, or too old."""
    try:
        version = metadata.version("cryptography")
    except metadata.PackageNotFoundError:
        version = "not installed"
    if not version[0].isdigit() or int(version.split(".")[0]) < LEAST_LIBRARY:
        raise ConfigError(
            f"{setting}: encryption needs the cryptography library {LEAST_LIBRARY} or newer, which is {version}; pip"
            " install 'megatrain[encryption]'"
        )


def read_key(path: str | os.PathLike[str], setting: str = "checkpoint.key_file") -> bytes:
    """The key that file `path` holds: 32 random bytes, or 64 hexadecimal digits of them (a line's end may follow).

    Raises ConfigError naming `setting` for a file that is missing, that others can read, or that holds anything else.
    """
    require_library(setting)
    file = os.path.expanduser(path)
    try:
        content = _read_private(file, setting)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no path at all, such as one with a NUL in it
        reason = error.strerror if isinstance(error, OSError) else "no such name"
        raise ConfigError(f"{setting}: cannot read {file!r}: {reason}; give a file that holds a key") from None
    if len(content) == KEY_BYTES:
        return content
    digits = content.rstrip(b"\r\n")
    if re.fullmatch(rb"[0-9a-fA-F]{%d}" % (2 * KEY_BYTES), digits):
        return bytes.fromhex(digits.decode())
    raise ConfigError(
        f"{setting}: {file!r} holds no key; it must be {KEY_BYTES} random bytes or {2 * KEY_BYTES} hexadecimal digits"
        f" (`head -c {KEY_BYTES} /dev/urandom > FILE; chmod 600 FILE`)"
    )


def _read_private(file: str, setting: str) -> bytes:
    """What the file begins with, more than a key of any form."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer would not open
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{setting}: {file!r} is no plain file; give a file that holds a key")
        if os.name == "posix" and status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise ConfigError(
                f"{setting}: {file!r} is open to others (mode {mode:04o}); it must be yours alone: chmod 600 it, and"
                " take a new key if others may have read it"
            )
        return stream.read(4 * KEY_BYTES)


def preferred_algorithm() -> str:
    """The one of ALGORITHMS that this processor is faster at."""
    return ALGORITHMS[0 if _has_aes_instructions() else 1]


def _has_aes_instructions() -> bool:
    """Taken for given where the system does not tell: all processors for servers and desktops have them."""
    try:
        text = _CPU_FACTS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return re.search(r"^(flags|Features)\s*:.*\baes\b", text, re.MULTILINE) is not None


def aead(algorithm: str, key: bytes) -> Any:
    """A cipher of the library with `encrypt_into` and `decrypt_into` (nonce, data, associated data, buffer)."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

    kinds: dict[str, Callable[[bytes], Any]] = dict(zip(ALGORITHMS, (AESGCM, ChaCha20Poly1305), strict=True))
    return kinds[algorithm](key)


def derive(key: bytes, n_bytes: int, *, salt: bytes, purpose: bytes) -> bytes:
    """Bytes for one `purpose`, by HKDF with SHA-256: they tell nothing of `key`, nor of those for another purpose."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    derived: bytes = HKDF(SHA256(), n_bytes, salt, purpose).derive(key)
    return derived


def unsealed(cipher: Any, nonce: bytes, sealed: memoryview, plain: memoryview) -> bool:
    """Decrypt into `plain`; False, with whatever lies there then, where `sealed` was not sealed with this nonce."""
    from cryptography.exceptions import InvalidTag

    try:
        cipher.decrypt_into(nonce, sealed, None, plain)
    except InvalidTag:
        return False
    return True


class ProcessCipher:
    """Seals what only this process will read again: its key is random, is nowhere but here, and goes with it.

    Each sealing has a number of its own, which is its nonce: none comes twice under the key.
    """

    tag_bytes = TAG_BYTES

    def __init__(self) -> None:
        self._cipher = aead(preferred_algorithm(), os.urandom(KEY_BYTES))
        self._numbers = count()  # one step of it is one operation: threads never get the same number

    def seal(self, plain: memoryview, sealed: memoryview) -> int:
        """Fill `sealed`, which is `tag_bytes` longer than `plain`; returns the number to unseal it by."""
        number = next(self._numbers)
        self._cipher.encrypt_into(_nonce(number), plain, None, sealed)
        return number

    def unseal(self, number: int, sealed: memoryview, plain: memoryview) -> bool:
        """Whether `sealed` is what was sealed under `number`; if so, `plain` is what it was made from."""
        return unsealed(self._cipher, _nonce(number), sealed, plain)


def _nonce(number: int) -> bytes:
    return number.to_bytes(NONCE_BYTES, "big")
