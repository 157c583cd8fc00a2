"""Signatures of whole folders with elliptic-curve keys, in the OpenSSF model-signing format.

The library `model-signing` signs and verifies; other programs that know the format can check what is signed here.
"""

import base64
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from megatrain.errors import ConfigError
from megatrain.trust.compare import Difference, compare, shown
from megatrain.trust.durable import write_durably
from megatrain.trust.hashing import Content, FileRecord, list_content, read_regular
from megatrain.trust.manifest import MANIFEST_NAME, SIGNATURE_NAME, require_unchanged

_MOST_BYTES = 256 << 20  # of a signature, which names every file
_BUNDLE = "application/vnd.dev.sigstore.bundle"
_KEY = "an elliptic-curve key (P-256, P-384 or P-521) in a PEM file"


def sign(folder: str, private_key: str, signature: str | None = None) -> Path:
    """Sign every file of `folder`; returns the signature's path, by default `model.sig` in the folder.

    Raises ConfigError for keys, folders and paths that cannot be used, and IntegrityError where the folder has a
    manifest and is not as that records it: what is damaged is not signed.
    """
    root, key = _folder(folder), Path(os.path.expanduser(private_key))
    target = _signature_path(root, signature)
    if os.path.lexists(target) and not _is_signature(target):
        raise ConfigError(f"--signature: {str(target)!r} exists and is no signature; give another path")
    if key.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"--private-key: {private_key!r} lies in the folder to be signed; keep it elsewhere")
    hashing_config, signer, _ = _library()
    with _naming("--private-key", private_key):
        signer.use_elliptic_key_signer(private_key=key)
    content = list_content(root)
    for name, reason in _unsignable(root, content):
        raise ConfigError(f"{folder!r}: {shown(name)} is {reason}; a signature covers regular files alone")
    if not content.files:
        raise ConfigError(f"{folder!r} holds no files; expected a model's folder or a checkpoint")
    if MANIFEST_NAME in content.files:
        require_unchanged(root)
    with tempfile.TemporaryDirectory() as place:  # the library writes in place: a crash would leave half a signature
        made = Path(place, SIGNATURE_NAME)
        signer.set_hashing_config(hashing_config).sign(root, made)
        try:
            write_durably(target, made.read_bytes())
        except OSError as error:
            raise ConfigError(f"--signature: cannot write {str(target)!r}: {error.strerror}") from None
    return target


class SignatureCheck:
    """Whether a folder is, file by file, what the holder of a key has signed.

    Raises ConfigError where there is no signature, or the public key cannot be used.
    """

    def __init__(self, folder: str, public_key: str, signature: str | None = None) -> None:
        self._folder = _folder(folder)
        self.path = _signature_path(self._folder, signature)
        self._public_key = public_key
        try:
            self._text = read_regular(self.path, _MOST_BYTES)
        except FileNotFoundError:
            raise ConfigError(f"there is no signature {str(self.path)!r}; megatrain sign writes one") from None
        except OSError as error:
            raise ConfigError(f"signature {str(self.path)!r} cannot be read: {error.strerror}") from None
        hashing_config, _, self._verifier = _library()
        with _naming("--public-key", public_key):
            self._verifier.use_elliptic_key_verifier(public_key=Path(os.path.expanduser(public_key)))
        self._verifier.set_hashing_config(hashing_config)

    def differences(self) -> list[Difference]:
        """Empty where the signature is genuine and every file, no more and no less, is as it was signed."""
        content = list_content(self._folder)
        if wrong := _unsignable(self._folder, content):
            return [Difference("signature", name, "a regular file", reason) for name, reason in wrong]
        try:
            self._verifier.verify(self._folder, self.path)
        except Exception as error:  # a signature may hold anything, and the library raises what comes of it
            return self._explain(error, content)
        return []

    def _explain(self, error: Exception, content: Content) -> list[Difference]:
        """What is said of a folder that the library has refused with `error`."""
        name = str(self.path)
        if isinstance(error, OSError):
            return [Difference("unreadable", str(error.filename), "a file", f"unreadable ({error.strerror})")]
        if type(error).__name__ == "InvalidSignature" or str(error).startswith("Key mismatch"):
            expected = f"a signature with the private key of {self._public_key}"
            return [Difference("signature", name, expected, "one with another key, or one that was changed")]
        if not str(error).startswith("Signature mismatch"):
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            return [Difference("signature", name, "a signature", f"what is none ({reason})")]
        # genuine, and the folder differs
        try:
            return self._changed_files(content) or [Difference("signature", name, "the files signed", str(error))]
        except (ValueError, KeyError, TypeError):  # files were signed in parts, or hashed by something else
            return [Difference("signature", name, "SHA-256 of whole files", "another way to hash, which is not known")]

    def _changed_files(self, content: Content) -> list[Difference]:
        """The files that differ from what a genuine signature says of them."""
        predicate = json.loads(base64.b64decode(json.loads(self._text)["dsseEnvelope"]["payload"]))["predicate"]
        if predicate["serialization"]["method"] != "files" or predicate["serialization"]["hash_type"] != "sha256":
            raise ValueError("not SHA-256 of whole files")
        ignored = [SIGNATURE_NAME, *predicate["serialization"].get("ignore_paths", ())]
        files = {
            name: size
            for name, size in content.files.items()
            if not any(PurePosixPath(name).is_relative_to(path) for path in ignored)
        }
        # a signature has no sizes: those that are there are right
        signed = {one["name"]: FileRecord(files.get(one["name"], 0), one["digest"]) for one in predicate["resources"]}
        found = compare(self._folder, Content(files, content.refused), signed)
        return [replace(one, expected=f"{one.expected} (by the signature)") for one in found]


def _library() -> tuple[Any, Any, Any]:
    """Of model-signing: (how to hash, what signs, what verifies)."""
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise ConfigError(
            f"signatures need the package model-signing ({error}); install it with: pip install 'megatrain[sign]'"
        ) from None
    # the library would leave out .git and the like: files that anybody could then add
    config = hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME], ignore_git_paths=False)
    return config, signing.Config(), verifying.Config()


@contextlib.contextmanager
def _naming(option: str, path: str) -> Iterator[None]:
    """ConfigError naming `option` for a key file that the library cannot use, whatever it raises."""
    kind = option.removeprefix("--").replace("-", " ")
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path!r}: {error.strerror}") from None
    except Exception as error:  # ValueError, TypeError, AttributeError and cryptography's own
        password = ", without a password" if isinstance(error, TypeError) else ""
        raise ConfigError(f"{option}: {path!r} is no {kind} that can be used; expected {_KEY}{password}") from None


def _folder(folder: str) -> Path:
    root = Path(os.path.abspath(os.path.expanduser(folder)))
    if not os.path.isdir(root):
        raise ConfigError(f"{folder!r} is no folder; expected a checkpoint, a run's folder or a model's")
    return root


def _signature_path(root: Path, given: str | None) -> Path:
    """Raises ConfigError for one in the folder under another name: its manifest would call it a file too many."""
    path = Path(os.path.abspath(os.path.expanduser(given))) if given is not None else root / SIGNATURE_NAME
    if path != root / SIGNATURE_NAME and path.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"--signature: {given!r} lies in the folder; there its name is {SIGNATURE_NAME}")
    return path


def _is_signature(path: Path) -> bool:
    try:
        bundle = json.loads(read_regular(path, _MOST_BYTES))
        return bool(str(bundle["mediaType"]).startswith(_BUNDLE))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _unsignable(root: Path, content: Content) -> list[tuple[str, str]]:
    """(name, what it is) of what the format does not sign."""
    links = {name: "a link" for name in content.files if (root / name).is_symlink()}
    return sorted((content.refused | links).items())
