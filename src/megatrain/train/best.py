"""Which checkpoint of a run has the lowest loss on data.eval, by what the checkpoints themselves say."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain import files
from megatrain.checkpoint.description import read_description
from megatrain.checkpoint.folders import list_checkpoints, step_folder, step_of
from megatrain.errors import ConfigError, IntegrityError
from megatrain.train.run_folder import CHECKPOINTS

_POINTER = "best.txt"  # in `checkpoints`, for people and scripts: nothing here reads it


def told_losses(told: object) -> tuple[str, dict[int, float]]:
    """(what was measured, losses by step) in what a checkpoint says of evaluations; nothing where that is no such."""
    if not isinstance(told, Mapping) or not isinstance(told.get("losses"), Mapping):
        return "", {}
    pairs = [(step, loss) for step, loss in told["losses"].items() if step.isdigit() and isinstance(loss, (int, float))]
    return str(told.get("of")), {int(step): float(loss) for step, loss in pairs}


def evaluated_checkpoints(folder: Path, of: str | None = None) -> dict[int, float]:
    """Losses by step of the checkpoints in `folder` that are there. `of`: what has to have been measured; None: what
    the last one was measured on."""
    found: dict[int, float] = {}
    there = list_checkpoints(folder)
    for checkpoint in reversed(there):
        try:
            measured, losses = told_losses(read_description(checkpoint).run.get("evaluation"))
        except IntegrityError:
            continue
        of = of or measured
        if losses and measured == of:
            found = losses | found
    steps = {step_of(checkpoint) for checkpoint in there}
    return {step: loss for step, loss in found.items() if step in steps}


def lowest(losses: Mapping[int, float], count: int) -> list[int]:
    """The steps with the `count` lowest losses, the best first; of equal ones the earliest. NaN is none."""
    known = {step: loss for step, loss in losses.items() if not math.isnan(loss)}
    return sorted(known, key=lambda step: (known[step], step))[:count]


def best_checkpoint(run: str) -> tuple[Path, float]:
    """The checkpoint of the run in folder `run` that has the lowest loss, and that loss. Raises ConfigError."""
    folder = Path(os.path.expanduser(run)) / CHECKPOINTS
    losses = evaluated_checkpoints(folder)
    best = lowest(losses, 1)
    if not best:
        raise ConfigError(
            f"--best: {run!r} has no checkpoint that was evaluated; train with data.eval, eval.every and "
            "checkpoint.every, or leave --best out"
        )
    return step_folder(folder, best[0]), losses[best[0]]


def point_to(folder: Path, losses: Mapping[int, float]) -> None:
    """Write the best one's name beside the checkpoints in `folder`. Raises OSError."""
    pointer, best = folder / _POINTER, lowest(losses, 1)
    if not best:
        pointer.unlink(missing_ok=True)
        return
    temporary = folder / f".{_POINTER}.new"
    temporary.unlink(missing_ok=True)
    files.write_file(temporary, f"{step_folder(folder, best[0]).name}\n".encode(), files.PRIVATE)
    files.rename(temporary, pointer)


def keeps(losses: Mapping[int, float], step: int, loss: float | None, count: int) -> bool:
    """Whether a checkpoint with `loss` would be among the `count` best ones."""
    return loss is not None and step in lowest({**losses, step: loss}, count)


def evaluation_entry(standing: Mapping[str, Any], losses: Mapping[int, float]) -> dict[str, Any]:
    """What a checkpoint says: how evaluations stand, and the losses of the checkpoints that are there."""
    known = {str(step): loss for step, loss in sorted(losses.items()) if math.isfinite(loss)}
    return {**standing, "losses": known}
