"""`megatrain audit`: steps of a run computed again from the recorded data, code and settings, and compared to the bit.

Nothing is written into the run's folder.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatrain.checkpoint.folders import list_checkpoints, step_of
from megatrain.config import Config, parse_config
from megatrain.engine.checkpoints import differing_weight
from megatrain.errors import ConfigError, IntegrityError
from megatrain.memory.arena import share_one_heap
from megatrain.train import build
from megatrain.train.determinism import determinism
from megatrain.train.entries import describe_engine, step_fields
from megatrain.train.method import loss_of, with_method
from megatrain.train.model_settings import Vocabulary, read_model_settings
from megatrain.train.reference import FACTS, score
from megatrain.train.resume import settings_that_changed
from megatrain.train.run_folder import CHECKPOINTS
from megatrain.trust.facts import run_facts
from megatrain.trust.ledger import LEDGER_NAME, Entry, History, read_ledger
from megatrain.trust.manifest import read_manifest
from megatrain.trust.verify import verify
from megatrain.yaml_file import parse_yaml

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine

_MEANINGS = {
    "batch_sha256": "the batch's sha256",
    "lr": "the learning rate",
    "loss": "the loss",
    "grad_norm": "the gradient's norm",
    "target_tokens": "the number of target tokens",
}


@dataclass(frozen=True)
class Leg:
    """Steps that one configuration of the run has computed, as far as they are computed again: after step `begin`, from
    `checkpoint` (None: from the start of the run), to `last`."""

    told: Entry
    config: Config
    checkpoint: Path | None
    begin: int
    last: int


@dataclass
class _Compared:
    steps: int = 0
    units: int = 0
    other_code: bool = False


def audit(run: str, *, steps: tuple[int, int] | None = None, device: str | None = None) -> bool:
    """Print what differs first, or that nothing does; returns which. `steps`: the first and the last; None: all that
    can be computed again. `device`: in place of the recorded one.

    Raises ConfigError where there is nothing to compare, IntegrityError for a ledger that was changed.
    """
    share_one_heap()  # before reading and measuring start threads
    folder = Path(os.path.abspath(os.path.expanduser(run)))
    if not folder.is_dir():
        raise ConfigError(f"{run!r} is no folder; expected a run's folder")
    history = History(read_ledger(folder / LEDGER_NAME).entries)
    first, last = _range_of(history, folder, steps)
    legs = plan_legs(history, folder, first, last)
    if not verify(str(folder)):
        return False
    compared = _Compared()
    for leg in legs:
        start = "its start" if leg.checkpoint is None else leg.checkpoint.name
        print(f"computing steps {leg.begin + 1} to {leg.last} again from {start}", file=sys.stderr, flush=True)
        with determinism(leg.config.train.deterministic):
            different = _replay(leg, history, folder, device, compared)
        if different is not None:
            print(different)
            return False
    whence = "data and settings" if compared.other_code else "data, code and settings"
    count = f"{compared.steps} steps, {compared.units} units compared"
    print(f"steps {first} to {last} come from the recorded {whence}: {count}")
    return True


# -- what to compute ------------------------------------------------------------------------------------------


def _range_of(history: History, folder: Path, steps: tuple[int, int] | None) -> tuple[int, int]:
    last = history.last_step
    if last == 0:
        raise ConfigError(f"{str(folder)!r} has recorded no steps")
    if steps is not None:
        if not 1 <= steps[0] <= steps[1] <= last:
            raise ConfigError(f"--steps: {steps[0]}:{steps[1]} is wrong; steps 1 to {last} were recorded")
        return steps
    if _from_start(history):
        return 1, last
    first = min((step for step in _checkpoints(history, folder) if step < last), default=None)
    if first is None:
        raise ConfigError(f"{str(folder)!r} has no checkpoint from which steps could be computed again")
    return first + 1, last


def _from_start(history: History) -> bool:
    return history.beginnings[0][1].kind == "start"


def _checkpoints(history: History, folder: Path) -> dict[int, Path]:
    """Those of the history that are still there, by step; a run in a new folder began with one of another."""
    found = {step: path for path in list_checkpoints(folder / CHECKPOINTS) if (step := step_of(path)) is not None}
    for step, told in history.beginnings:
        if told.kind == "resume" and step not in found and Path(told["checkpoint"]).is_dir():
            found[step] = Path(told["checkpoint"])
    return {step: path for step, path in found.items() if step in history.checkpoints}


def plan_legs(history: History, folder: Path, first: int, last: int) -> list[Leg]:
    """Raises ConfigError where there is nothing to begin one from."""
    there = _checkpoints(history, folder)
    legs: list[Leg] = []
    for base, end, told, config in _stretches(history):
        if end < first or base >= last:
            continue
        wanted = max(first - 1, base)
        if wanted == 0 and told.kind == "start":
            legs.append(Leg(told, config, None, 0, min(end, last)))
            continue
        begin = max((step for step in there if base <= step <= wanted), default=None)
        if begin is None:
            at = f"the first is {there[min(there)].name}" if there else "there is none"
            raise ConfigError(
                f"--steps: the checkpoint from which step {wanted + 1} could be computed again is not there any more;"
                f" {at}{', and step 1 can be begun with' if _from_start(history) else ''}"
            )
        legs.append(Leg(told, config, there[begin], begin, min(end, last)))
    gap = next(history.missing(legs[0].begin + 1, last), None)
    if gap is not None:
        raise ConfigError(f"--steps: step {gap} was not recorded")
    return legs


def _stretches(history: History) -> Iterator[tuple[int, int, Entry, Config]]:
    """(steps before it, its last step, what tells of it, its settings) of each stretch in which nothing changed."""
    ends = [*(step for step, _ in history.beginnings[1:]), history.last_step]
    stretches: list[tuple[int, int, Entry, Config]] = []
    for (base, told), end in zip(history.beginnings, ends, strict=True):
        config = _config_of(told)
        if stretches and _alike(stretches[-1][2], told) and not settings_that_changed(stretches[-1][3], config):
            first_base, _, first_told, _ = stretches[-1]
            stretches[-1] = (first_base, end, first_told, config)  # the later one may say more steps
        else:
            stretches.append((base, end, told, config))
    yield from stretches


def _alike(one: Entry, other: Entry) -> bool:
    data = [[file["sha256"] for file in told["facts"]["data"]] for told in (one, other)]
    decided = [
        {name: told["engine"][name] for name in ("deterministic", "kernels", "precision")} for told in (one, other)
    ]
    return data[0] == data[1] and decided[0] == decided[1]


def _config_of(told: Entry) -> Config:
    try:
        settings = parse_yaml(told["config"])
    except ValueError as error:
        raise IntegrityError(f"line {told.number} of the ledger: config is no YAML: {error}") from None
    if not isinstance(settings, dict):
        raise IntegrityError(f"line {told.number} of the ledger: config is no settings")
    try:
        return parse_config(settings)
    except ConfigError as error:
        raise ConfigError(f"the settings in line {told.number} of the ledger: {error}") from None


# -- computing it again ---------------------------------------------------------------------------------------


def _replay(leg: Leg, history: History, folder: Path, device: str | None, compared: _Compared) -> str | None:
    """What differs first."""
    if leg.checkpoint is not None:
        recorded, now = history.checkpoints[leg.begin]["manifest_sha256"], read_manifest(leg.checkpoint).sha256
        if now != recorded:
            return f"{leg.checkpoint.name}: its manifest has sha256 {now}, recorded was {recorded}"
    config = _for_replay(leg, device)
    corpora = build.find_corpora(config)
    config = with_method(config, corpora.train.kind)
    facts = run_facts(leg.told["config"], corpora.train.files, device="")
    if (different := _different_data(leg.told["facts"]["data"], facts["data"])) is not None:
        return different
    source = config if leg.checkpoint is None else build.from_model(config, str(leg.checkpoint / "model"))
    settings = read_model_settings(source)
    tokenizer = build.given_tokenizer(source)
    if tokenizer is None:
        tokenizer = build.trained_tokenizer(config, corpora)
    settings.fit(Vocabulary.of(tokenizer))
    data = build.build_data(config, corpora, tokenizer, settings.config)
    optimizer, planner = build.plan_training(source, settings, None)
    engine = build.build_engine(source, settings, optimizer, planner.plan(), leg.checkpoint)
    try:
        _say_differences(leg.told, facts, engine, compared)
        recorded = leg.told["facts"]
        reference = None
        if data.pairs is not None:
            key = "data.train"
            scored = score(engine, key, data.pairs, config.engine.micro_batch, leg.checkpoint, recorded)
            reference, name = scored.reference, FACTS[key]
            if (found := scored.facts[name]) != recorded.get(name):
                return f"reference log-probabilities: recorded was {recorded.get(name)}, computed again {found}"
        batches_of = build.batches_of(config, data, reference)
        return _compare(leg, config, data, batches_of, engine, history, folder, compared)
    finally:
        engine.close()


def _for_replay(leg: Leg, device: str | None) -> Config:
    """As it was, on the device that is wanted; what is not training is left out."""
    config = leg.config
    key_file = None if leg.checkpoint is None else config.checkpoint.key_file  # nothing else is sealed
    engine = dataclasses.replace(config.engine, precision=leg.told["engine"]["precision"])
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, eval=None),
        engine=engine if device is None else dataclasses.replace(engine, device=device),
        checkpoint=dataclasses.replace(config.checkpoint, every=None, at_end=False, key_file=key_file),
    )


def _different_data(recorded: list[dict[str, Any]], found: list[dict[str, Any]]) -> str | None:
    for was, now in zip(recorded, found, strict=False):
        if was["sha256"] != now["sha256"]:
            return f"data: {was['path']} had sha256 {was['sha256']}, {now['path']} has {now['sha256']}"
    if len(recorded) != len(found):
        return f"data: {len(recorded)} files were recorded, {len(found)} are there"
    return None


def _say_differences(told: Entry, facts: Mapping[str, Any], engine: "Engine", compared: _Compared) -> None:
    """What bits may depend on, and what is another than it was."""
    was, now = ({**given["libraries"], **_code(given)} for given in (told["facts"], facts))
    was |= {"cpu": told["facts"]["hardware"].get("cpu"), **told["engine"]}
    now |= {"cpu": facts["hardware"].get("cpu"), **describe_engine(engine)}
    changed = [f"{name} {was.get(name)} then, {now[name]} now" for name in now if was.get(name) != now[name]]
    compared.other_code |= _code(told["facts"]) != _code(facts)
    if changed:
        print(f"note: {'; '.join(changed)}: that bits are equal is then not promised")
    if engine.device.torch_device.type == "cuda" and not told["engine"]["deterministic"]:
        print("note: the run was on a GPU without train.deterministic: bits may differ between any two runs")


def _code(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"code": facts["code"].get("sha256")}


def _compare(
    leg: Leg,
    config: Config,
    data: build.Data,
    batches_of: Callable[[int], list[dict[str, Tensor]]],
    engine: "Engine",
    history: History,
    folder: Path,
    compared: _Compared,
) -> str | None:
    engine.model.train()
    learning_rate_of, loss = build.learning_rate_of(config, data), loss_of(config)
    there = {step_of(path): path for path in list_checkpoints(folder / CHECKPOINTS)}
    unentered = {step: path for step, path in there.items() if step not in history.checkpoints}
    begun = leg.told if leg.checkpoint is None else history.checkpoints[leg.begin]
    different = _different_units(leg.begin, begun, engine, compared)
    for step in range(leg.begin, leg.last):
        if different is not None:
            return different
        if step >= data.steps:
            return f"step {step + 1}: the recorded data and settings make {data.steps} steps"
        batches, lr = batches_of(step), learning_rate_of(step)
        found = step_fields(batches, lr, engine.train_step(batches, lr=lr, loss=loss))
        compared.steps += 1
        different = _different_step(history.steps[step + 1], found)
        if different is None and step + 1 in history.checkpoints:
            different = _different_units(step + 1, history.checkpoints[step + 1], engine, compared)
        elif different is None and step + 1 in unentered:
            different = _different_weights(step + 1, engine, unentered[step + 1])
    if different is None and history.end is not None and history.end["step"] == leg.last:
        different = _different_units(leg.last, history.end, engine, compared)
        different = different or _different_model(history.end, engine, folder)
    return different


def _different_step(recorded: Entry, found: Mapping[str, Any]) -> str | None:
    for name, meaning in _MEANINGS.items():
        if recorded[name] != found[name]:
            return f"step {recorded['step']}: {meaning} was {recorded[name]}, computed again it is {found[name]}"
    return None


def _different_units(step: int, recorded: Entry, engine: "Engine", compared: _Compared) -> str | None:
    units: Mapping[str, str] = recorded.fields.get("units", {})
    found = engine.unit_hashes() if units else {}
    for name in (*found, *sorted(units.keys() - found.keys())):
        if units.get(name) != found.get(name):
            was, now = units.get(name, "none"), found.get(name, "none")
            return f"step {step}: unit {name} had sha256 {was}, computed again it has {now}"
    compared.units += len(found)
    return None


def _different_weights(step: int, engine: "Engine", checkpoint: Path) -> str | None:
    """Of a checkpoint that the ledger has not entered, or has taken back."""
    name = differing_weight(engine, checkpoint / "model")
    return None if name is None else f"step {step}: {name} in {checkpoint.name} is not what the step gives"


def _different_model(end: Entry, engine: "Engine", folder: Path) -> str | None:
    """The files are those that were recorded, which `verify` has looked at; here, that they hold these weights."""
    if not end["files"]:
        return None
    name = differing_weight(engine, folder / "model")
    return None if name is None else f"model: {name} is not the weight that the last step gives"
