"""Going on from a checkpoint: which one, and whether the settings still say the same."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.checkpoint.description import FILE as DESCRIPTION
from megatrain.checkpoint.description import Description, read_description
from megatrain.checkpoint.folders import list_checkpoints, step_of
from megatrain.checkpoint.save import MODEL
from megatrain.config import Config
from megatrain.config import load_config as load_settings
from megatrain.errors import ConfigError, IntegrityError
from megatrain.train.run_folder import CHECKPOINTS
from megatrain.trust.fact_kinds import wrong_fact
from megatrain.trust.facts import library_versions
from megatrain.trust.manifest import MANIFEST_NAME, Manifest, read_manifest, require_unchanged
from megatrain.trust.recorded import require_recorded

_log = logging.getLogger(__name__)

# what changes no bit of what is trained; keys of `data` and `train` beside these do
_FREE = {
    *("output", "data.eval", "data.workers", "data.cache", "train.log_every", "train.log_to"),
    *("engine.threads", "engine.device_memory", "engine.host_memory", "engine.nvme", "engine.nvme_encryption"),
    *("engine.slots", "engine.keep_graphs", "engine.integrity"),
}
_FREE_SECTIONS = ("checkpoint.", "eval.")
_LENGTHS = {"train.steps", "train.epochs", "train.tokens"}


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from, checked: its folder, what it says of the training, its manifest."""

    folder: Path
    told: Description
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.told.step

    @property
    def model(self) -> str:
        return str(self.folder / MODEL)


def find_checkpoint(resume: str | None, output: Path, *, verify: bool) -> Resumed | None:
    """What `--resume` means: the last checkpoint of `output` that is as it was written ('auto'; None where there is
    none yet), or the one that the path names. Raises ConfigError."""
    if resume is None:
        return None
    if resume == "auto":
        return _last_good(list_checkpoints(output / CHECKPOINTS), verify=verify)
    path = Path(os.path.expanduser(resume))
    if (path / CHECKPOINTS).is_dir():
        found = _last_good(list_checkpoints(path / CHECKPOINTS), verify=verify)
        if found is None:
            raise ConfigError(f"--resume: {resume!r} has no checkpoints; give a run with some, or one of them")
        return found
    try:
        return _read(path, verify=verify)
    except IntegrityError as error:
        raise ConfigError(f"--resume: {error}") from None


def _last_good(checkpoints: list[Path], *, verify: bool) -> Resumed | None:
    """The last that can be relied on. Raises ConfigError where there are some, and none of them can."""
    error: IntegrityError | ConfigError | None = None
    for folder in reversed(checkpoints):
        try:
            return _read(folder, verify=verify, as_last=True)
        except (IntegrityError, ConfigError) as found:  # the latter: it has no manifest
            error = error or found
            _log.warning("--resume: %s; going on from the checkpoint before, if there is one", found)
    if error is not None:
        raise ConfigError(f"--resume: no checkpoint is as it was written: {error}")
    return None


def _read(folder: Path, *, verify: bool, as_last: bool = False) -> Resumed:
    manifest = (require_unchanged if verify else read_manifest)(folder)
    if verify:
        require_recorded(folder, manifest, as_last=as_last)
    told = read_description(folder)
    _check_agreement(folder, told, manifest.facts)
    return Resumed(folder, told, manifest)


def _check_agreement(folder: Path, told: Description, facts: Mapping[str, Any]) -> None:
    """Raise IntegrityError where the manifest, the description and the folder's name do not speak of one step."""
    if (wrong := wrong_fact(facts)) is not None:
        raise IntegrityError(f"{folder / MANIFEST_NAME} is damaged: {wrong}")
    where = f"{folder / DESCRIPTION} is damaged"
    for step, of in ((step_of(folder), "the folder's name"), (facts.get("step"), MANIFEST_NAME)):
        if step is not None and step != told.step:
            raise IntegrityError(f"{where}: step is {told.step}; expected {step}, as {of} says")
    for name, updates in told.steps.items():
        if updates > told.step:  # a run has begun without any
            raise IntegrityError(f"{where}: steps of {name!r:.60} is {updates}; expected at most step, {told.step}")


def check_settings(resumed: Resumed, config: Config, *, force: bool) -> None:
    """Raise ConfigError, naming the keys, where the run would not go on as it would have; say what is only bounded."""
    try:
        before = load_settings(resumed.folder / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"--resume: {resumed.folder / 'config.yaml'}: {error}") from None
    changed = settings_that_changed(before, config)
    if "engine.micro_batch" in changed:
        _log.warning(
            "--resume: engine.micro_batch is %s and was %s: the data are the same, losses only within rounding (and "
            "dropout, where the model has any, draws other numbers)",
            *reversed(changed.pop("engine.micro_batch")),
        )
    if changed and not force:
        listed = "; ".join(f"{key} is {now!r}, was {was!r}" for key, (was, now) in sorted(changed.items()))
        raise ConfigError(
            f"--resume: {listed}. The run would not go on as it began; give --force to go on all the same"
        )
    _warn_of_versions(resumed.manifest.facts)


def check_data(resumed: Resumed, facts: Mapping[str, Any], *, force: bool) -> None:
    """Raise ConfigError where the training data are not those that the checkpoint was trained on."""
    was, now = ([file["sha256"] for file in given.get("data", ())] for given in (resumed.manifest.facts, facts))
    if not was and not force:
        path = resumed.folder / MANIFEST_NAME
        raise ConfigError(
            f"--resume: {path} has no facts.data, so that nobody can say whether data.train is the same; give --force"
            " to go on all the same"
        )
    if was != now and not force:
        changed = [f["path"] for f, before in zip(facts["data"], was, strict=False) if f["sha256"] != before]
        which = changed[0] if changed else f"{len(now)} files, {len(was)} before"
        raise ConfigError(f"--resume: data.train has changed ({which}); give --force to go on all the same")


def settings_that_changed(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """(was, is) by key of what makes a difference."""
    return dict(_changes(before, now))


def _changes(before: Config, now: Config) -> Iterator[tuple[str, tuple[Any, Any]]]:
    # of streamed rows a run reads as many as its steps need: with another length it would shuffle others
    streamed = any(isinstance(source, dict) and source.get("streaming") for source in now.data.train or ())
    constant = now.schedule.name == before.schedule.name == "constant"
    free = _FREE | (_LENGTHS if constant and not streamed else set())
    one, other = map(_settings, (before, now))
    if "auto" in (one["train.method"], other["train.method"]):
        free = free | {"train.method"}  # what the data say, which are compared by themselves
    for key in one.keys() | other.keys():
        if one.get(key) != other.get(key) and key not in free and not key.startswith(_FREE_SECTIONS):
            yield key, (one.get(key), other.get(key))


def _settings(config: Config) -> dict[str, Any]:
    """By key. Tokens per step as they come out: where they are null, they follow from the micro-batch."""
    return dict(_flat(dataclasses.asdict(config))) | {"train.tokens_per_step": config.tokens_per_step}


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, values in settings.items():
        if isinstance(values, dict):
            yield from ((f"{section}.{name}", value) for name, value in values.items())
        else:
            yield section, values


def _warn_of_versions(facts: Mapping[str, Any]) -> None:
    was, now = facts.get("libraries") or {}, library_versions()
    different = [f"{n} {was[n]} then, {now.get(n)} now" for n in was if was[n] != now.get(n)]
    if different:
        _log.warning("--resume: %s: bits may differ from those of a run that was not interrupted", ", ".join(different))


def cut_lines(path: Path, step: int, *, evaluated: bool = False) -> None:
    """Lines of later steps go, and a last line that was not written to its end: the run will write them again. So do
    evaluations after `step` itself, unless the checkpoint knows of them (`evaluated`)."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = b"".join(line for line in lines if line.endswith(b"\n") and _stays(line, step, evaluated))
    with path.open("r+b") as stream:
        stream.write(kept)
        stream.truncate()


def _stays(line: bytes, step: int, evaluated: bool) -> bool:
    try:
        content = json.loads(line)
        of_step = float(content["step"])
    except (ValueError, KeyError, TypeError):
        return False
    between_steps = "eval" in content or "prompt" in content
    return of_step < step or (of_step == step and (evaluated or not between_steps))
