"""`megatrain verify`: a checkpoint, or all of a run's, against their manifests, each other, the run's ledger and a
signature."""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatrain.errors import ConfigError, IntegrityError
from megatrain.sizes import format_bytes
from megatrain.trust.chain import follow_parents
from megatrain.trust.compare import Difference
from megatrain.trust.hashing import FileRecord, hash_files
from megatrain.trust.ledger import LEDGER_NAME, History, Ledger, head_recorded, is_data, read_ledger
from megatrain.trust.manifest import MANIFEST_NAME, Manifest, differences, read_manifest
from megatrain.trust.recorded import Standing, checkpoint_differences, model_differences, standing
from megatrain.trust.signing import SignatureCheck

_NOTES = {
    Standing.UNENTERED: "the run was stopped before the ledger entered it; its own manifest alone vouches for it",
    Standing.TAKEN_BACK: "the run has gone on from an earlier checkpoint since",
}
_CHECKPOINT = re.compile(r"step-(\d+)")


def verify(folder: str, *, signature: str | None = None, public_key: str | None = None, data: bool = False) -> bool:
    """Print what differs, line by line, and what was checked; returns whether all is as recorded.

    `folder`: a checkpoint, a run's folder or its `checkpoints`; with `public_key` any folder that is signed. `data`:
    the files that were trained on, too; relative paths are from the current folder. Raises ConfigError where there is
    nothing to check it against.
    """
    started = time.monotonic()
    root = Path(os.path.abspath(os.path.expanduser(folder)))
    if signature is not None and public_key is None:
        raise ConfigError("--signature needs --public-key FILE, the key that it is checked with")
    # first, since what is missing is better said before a terabyte is read than after
    signed = SignatureCheck(folder, public_key, signature) if public_key is not None else None
    folders, ledger = find_checkpoints(root), root / LEDGER_NAME
    if not folders and signed is None and not os.path.lexists(ledger):
        raise ConfigError(
            f"{folder!r} holds no {MANIFEST_NAME} and no checkpoints; expected a checkpoint, a run's folder or its "
            "`checkpoints` (a signed folder needs --public-key FILE)"
        )
    report = _Report(root)
    for one in folders:
        report.add_checkpoint(one)
    report.check_chains(folders)
    if folders != [root]:
        report.check_ledger(ledger)
    if data:
        report.check_data()
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


def ledger_differences(
    path: Path, ledger: Ledger, history: History, manifests: Mapping[Path, Manifest]
) -> Iterator[Difference]:
    """Between the run's account, its checkpoints and its model."""
    for folder, manifest in manifests.items():
        yield from checkpoint_differences(ledger, history, folder, manifest)
    yield from model_differences(ledger.entries, path.with_name("model"))


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that was trained on, as a manifest has it."""

    path: Path
    content: FileRecord


def data_recorded(manifest: Manifest) -> list[DataFile]:
    """Raises ConfigError for a manifest, of another program, that has none."""
    listed = manifest.facts.get("data")
    if listed is None or not is_data(listed):
        raise ConfigError(f"--data: the {MANIFEST_NAME} of this checkpoint names no files that were trained on")
    return [DataFile(Path(f["path"]), FileRecord(bytes=f["bytes"], sha256=f["sha256"])) for f in listed]


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

    def check_ledger(self, path: Path) -> None:
        """Its chain, and that it and the checkpoints know each other. A run without one is none of this version's."""
        if not os.path.lexists(path):
            heads = [head for m in self._manifests.values() if (head := head_recorded(m.facts)) is not None]
            if heads and self._root.name != "checkpoints":
                newest = max(heads, key=lambda head: head.lines)
                expected = f"{newest.lines} lines, the last with sha256 {newest.sha256}"
                self._say([Difference("ledger", path.name, expected, "no file")])
            return
        try:
            ledger = read_ledger(path)
        except IntegrityError as error:
            self._say([Difference("ledger", path.name, "a chain of lines", str(error))])
            return
        history = History(ledger.entries)
        self._say(ledger_differences(path, ledger, history, self._manifests))
        for folder, manifest in self._manifests.items():
            if note := _NOTES.get(standing(ledger, history, folder, manifest)):
                print(f"note: {folder.name}: {note}")
        if ledger.torn_bytes:
            print(f"note: {path.name}: its last line was not written to its end, and is left out")
        last = ledger.entries[-1].sha256 if ledger.entries else "none"
        print(f"ledger: {len(ledger.entries):,} lines, the last with sha256 {last}")

    def check_data(self) -> None:
        """The files that training read, as any of the manifests has them; each is hashed once."""
        recorded = {(one.path, one.content) for manifest in self._manifests.values() for one in data_recorded(manifest)}
        found = hash_files({path for path, _ in recorded})
        for path, expected in sorted(recorded, key=str):
            self._files += 1
            record = found[path]
            if isinstance(record, OSError):
                self._say([Difference("missing", str(path), f"sha256 {expected.sha256}", f"none ({record.strerror})")])
            else:
                self._bytes += record.bytes
                if record != expected:
                    self._say(
                        [Difference("content", str(path), f"sha256 {expected.sha256}", f"sha256 {record.sha256}")]
                    )
        print(f"data: {len(recorded):,} files that were trained on")

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
