"""`megatrain verify`: a checkpoint, or all of a run's, against their manifests, each other and a signature."""

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from megatrain.errors import ConfigError, IntegrityError
from megatrain.sizes import format_bytes
from megatrain.trust.chain import follow_parents
from megatrain.trust.compare import Difference
from megatrain.trust.manifest import MANIFEST_NAME, Manifest, differences, read_manifest
from megatrain.trust.signing import SignatureCheck

_CHECKPOINT = re.compile(r"step-(\d+)")


def verify(folder: str, *, signature: str | None = None, public_key: str | None = None) -> bool:
    """Print what differs, line by line, and what was checked; returns whether all is as recorded.

    `folder`: a checkpoint, a run's folder or its `checkpoints`; with `public_key` any folder that is signed. Raises
    ConfigError where there is nothing to check it against.
    """
    started = time.monotonic()
    root = Path(os.path.abspath(os.path.expanduser(folder)))
    if signature is not None and public_key is None:
        raise ConfigError("--signature needs --public-key FILE, the key that it is checked with")
    # first, since what is missing is better said before a terabyte is read than after
    signed = SignatureCheck(folder, public_key, signature) if public_key is not None else None
    folders = find_checkpoints(root)
    if not folders and signed is None:
        raise ConfigError(
            f"{folder!r} holds no {MANIFEST_NAME} and no checkpoints; expected a checkpoint, a run's folder or its "
            "`checkpoints` (a signed folder needs --public-key FILE)"
        )
    report = _Report(root)
    for one in folders:
        report.add_checkpoint(one)
    report.check_chains(folders)
    if signed is not None:
        report.add_signature(signed, str(public_key))
    return report.finish(time.monotonic() - started)


def find_checkpoints(root: Path) -> list[Path]:
    """`root` itself where it has a manifest; else the checkpoints in it or in its `checkpoints`, by step."""
    if os.path.lexists(root / MANIFEST_NAME):
        return [root]
    inner = root / "checkpoints"
    return _steps(inner if inner.is_dir() else root)


def _steps(folder: Path) -> list[Path]:
    try:
        found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    except NotADirectoryError:
        raise ConfigError(f"{str(folder)!r} is no folder; expected a checkpoint or a run's folder") from None
    except OSError as error:
        raise ConfigError(f"cannot read folder {str(folder)!r}: {error.strerror}") from None
    return sorted(found, key=lambda path: (int(path.name.removeprefix("step-")), path.name))


class _Report:
    """Prints as it goes: a first difference is known long before the last file is read."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._manifests: dict[Path, Manifest] = {}
        self._differences = 0
        self._files = 0
        self._bytes = 0

    def add_checkpoint(self, folder: Path) -> None:
        try:
            manifest = read_manifest(folder)
        except (ConfigError, IntegrityError) as error:
            where = "" if folder == self._root else f"{folder.relative_to(self._root).as_posix()}/"
            self._say([Difference("manifest", f"{where}{MANIFEST_NAME}", "a manifest", f"none ({error})")])
            return
        self._manifests[folder] = manifest
        self._files += len(manifest.files)
        self._bytes += sum(record.bytes for record in manifest.files.values())
        self._say(self._below_root(folder, differences(folder, manifest)))

    def check_chains(self, folders: list[Path]) -> None:
        """Of each checkpoint the way to its parent; where the parent is not checked itself, on to the start."""
        links, lost = 0, []
        for folder, manifest in self._manifests.items():
            chain = follow_parents(folder, manifest, checked=folders)
            links += chain.links
            lost += [chain.lost] if chain.lost is not None else []
            self._say([chain.broken] if chain.broken is not None else [])
        for line in lost:
            print(f"note: {line}")
        if links:
            print(f"parents: {links} with the manifest that their child recorded")

    def add_signature(self, signed: SignatureCheck, public_key: str) -> None:
        found = signed.differences()
        self._say(found)
        if not found:
            print(f"signature: {signed.path} was made with the private key of {public_key} and covers every file")

    def finish(self, seconds: float) -> bool:
        count = self._differences
        result = f"{count} difference{'s' if count != 1 else ''}" if count else "all as recorded"
        checked = f"{self._files:,} files ({format_bytes(self._bytes)}) of {len(self._manifests)} manifests"
        print(f"{result}: checked {checked} in {seconds:.1f} s")
        return not count

    def _below_root(self, folder: Path, found: list[Difference]) -> Iterator[Difference]:
        for one in found:
            yield replace(one, name=(folder / one.name).relative_to(self._root).as_posix())

    def _say(self, found: Iterable[Difference]) -> None:
        for difference in found:
            print(difference)
            self._differences += 1
