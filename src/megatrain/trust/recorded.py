"""Whether a run's ledger knows what lies in the run's folder: its checkpoints, and the model that it has left."""

import os
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from pathlib import Path

from megatrain.errors import IntegrityError
from megatrain.trust.compare import Difference, compare
from megatrain.trust.hashing import hash_files, list_content
from megatrain.trust.ledger import LEDGER_NAME, Entry, History, Ledger, head_recorded, read_ledger
from megatrain.trust.manifest import MANIFEST_NAME, SIGNATURE_NAME, Manifest, read_manifest

_CHECKPOINTS, _MODEL = "checkpoints", "model"


def step_in_name(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


class Standing(Enum):
    """What the ledger has of a checkpoint."""

    ENTERED = auto()
    UNENTERED = auto()  # written in the run's last stretch, which was stopped before it entered it
    TAKEN_BACK = auto()  # entered, before the run went on from an earlier one
    NONE = auto()


def standing(ledger: Ledger, history: History, folder: Path, manifest: Manifest) -> Standing:
    step = step_in_name(folder)
    if step in history.checkpoints:
        return Standing.ENTERED
    entered = (entry for entry in ledger.entries if entry.kind == "checkpoint" and entry["step"] == step)
    if any(entry["manifest_sha256"] == manifest.sha256 for entry in entered):
        return Standing.TAKEN_BACK
    head = head_recorded(manifest.facts)
    begun = history.beginnings[-1][1].number if history.beginnings else 0
    newest = history.end is None and step > max(history.checkpoints, default=0)
    return Standing.UNENTERED if newest and head is not None and head.lines >= begun else Standing.NONE


def checkpoint_differences(ledger: Ledger, history: History, folder: Path, manifest: Manifest) -> Iterator[Difference]:
    """Between a checkpoint of the run and the run's account of it."""
    step, name = step_in_name(folder), f"{folder.name}/{MANIFEST_NAME}"
    told, stands = manifest.facts.get("step", step), standing(ledger, history, folder, manifest)
    if told != step:
        yield Difference("ledger", name, f"step {step}", f"step {told}")
    if stands is Standing.NONE:
        yield Difference("ledger", folder.name, "a checkpoint that the ledger has entered", "none of that step")
    if stands is Standing.ENTERED and manifest.sha256 != history.checkpoints[step]["manifest_sha256"]:
        expected = f"sha256 {history.checkpoints[step]['manifest_sha256']} (by the ledger)"
        yield Difference("ledger", name, expected, f"sha256 {manifest.sha256}")
    went_on = stands is Standing.ENTERED and history.checkpoints[step].kind == "resume"  # perhaps another run's
    head = None if went_on else head_recorded(manifest.facts)
    there = ledger.entries[head.lines - 1].sha256 if head and 0 < head.lines <= len(ledger.entries) else "none"
    if head is not None and there != head.sha256:
        line = f"line {head.lines} with sha256 {head.sha256} (by {name})"
        yield Difference("ledger", LEDGER_NAME, line, f"sha256 {there}")


def model_differences(entries: list[Entry], model: Path) -> Iterator[Difference]:
    """Between the run's `model` and what the ledger says of it where the run last ended; it may go on since then."""
    end = next((entry for entry in reversed(entries) if entry.kind == "end"), None)
    expected: Mapping[str, str] = end["files"] if end is not None else {}
    if not model.is_dir() and (end is None or end is not entries[-1]):
        return  # the run goes on, and leaves another one
    if not expected and model.is_dir():
        yield Difference("ledger", _MODEL, "an `end` of the run in the ledger that names its files", "none")
    records = hash_files(model / name for name in expected)
    for name, sha256 in sorted(expected.items()):
        record = records[model / name]
        found = f"unreadable ({record.strerror})" if isinstance(record, OSError) else f"sha256 {record.sha256}"
        if found != f"sha256 {sha256}":
            yield Difference("ledger", f"{_MODEL}/{name}", f"sha256 {sha256} (by the ledger)", found)


def require_recorded(checkpoint: Path, manifest: Manifest, *, as_last: bool) -> None:
    """Raise IntegrityError where `checkpoint` lies among those of a run whose ledger knows of another one; `as_last`:
    also where the run has gone on from an earlier one since."""
    path = checkpoint.parent.parent / LEDGER_NAME
    if checkpoint.parent.name != _CHECKPOINTS or not os.path.lexists(path):
        return
    ledger = read_ledger(path)
    history = History(ledger.entries)
    found = next(checkpoint_differences(ledger, history, checkpoint, manifest), None)
    if found is not None:
        raise IntegrityError(f"{checkpoint}: {found}")
    if as_last and standing(ledger, history, checkpoint, manifest) is Standing.TAKEN_BACK:
        raise IntegrityError(f"{checkpoint}: the run has gone on from an earlier checkpoint since")


def require_recorded_model(model: Path) -> None:
    """Raise IntegrityError where the transformers folder `model` is a checkpoint's or a run's, and not as it was
    written. Nothing is known of other folders."""
    above = model.parent
    if model.name != _MODEL:
        return
    if os.path.lexists(above / MANIFEST_NAME):
        recorded = read_manifest(above).files  # of which the training state, several times as large, is not read
        names = {name: name.removeprefix(f"{_MODEL}/") for name in recorded if name.startswith(f"{_MODEL}/")}
        content = list_content(model)
        content.files.pop(SIGNATURE_NAME, None)
        found = next(iter(compare(model, content, {names[name]: recorded[name] for name in names})), None)
    elif os.path.lexists(above / LEDGER_NAME):
        found = next(model_differences(read_ledger(above / LEDGER_NAME).entries, model), None)
    else:
        return
    if found is not None:
        raise IntegrityError(f"{model}: {found}; --no-verify takes it as it is")
