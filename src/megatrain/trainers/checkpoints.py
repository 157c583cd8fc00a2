"""The exact training state inside a trainer's own checkpoint folders.

checkpoint-N/                what a trainer writes, and a plain transformers folder: the weights are links into
checkpoint-N/megatrain/      the engine's own checkpoint, `model/` and `state/`, from which training goes on
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain import files
from megatrain.checkpoint.description import read_description
from megatrain.engine.checkpoints import describe
from megatrain.engine.engine import Engine
from megatrain.trainers import scheduler_state

EXACT = "megatrain"
SCHEDULER = "lr_scheduler"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def exact_state(checkpoint: str | os.PathLike[str]) -> Path | None:
    """Of a trainer's checkpoint, the engine's own; None where there is none."""
    folder = Path(checkpoint) / EXACT
    return folder if folder.is_dir() else None


def check_saving(engine: Engine, scheduler: Mapping[str, Any]) -> None:
    """Raise ConfigError where a state like this one could not be saved later."""
    describe(engine, {SCHEDULER: scheduler_state.to_json(scheduler)}).to_bytes()


def save_exact(
    engine: Engine, checkpoint: str | os.PathLike[str], tokenizer: Any, scheduler: Mapping[str, Any]
) -> None:
    """Write the whole training state into `checkpoint`, in place of one that is there. `scheduler`: the state of the
    learning rate's. Raises ConfigError where that cannot be saved."""
    target = Path(checkpoint)
    state = scheduler_state.to_json(scheduler)
    if (target / EXACT).exists():
        files.remove_tree(target / EXACT)
    engine.save(target / EXACT, tokenizer=tokenizer, run={SCHEDULER: state})
    _move_in(target / EXACT / "model", target, keep=True)


def load_exact(engine: Engine, exact: Path, scheduler: Any) -> None:
    """Take on the training state in a folder that `exact_state` has found, and let `scheduler` (None: there is none)
    do so too. Raises ConfigError, with nothing changed, where that is of another kind."""
    if scheduler is not None:
        run = read_description(exact).run
        state = scheduler_state.from_json(run.get(SCHEDULER), scheduler.state_dict())
    engine.load(exact)
    if scheduler is not None:
        scheduler.load_state_dict(state)


def save_plain(engine: Engine, folder: str | os.PathLike[str], tokenizer: Any) -> None:
    """Write a transformers folder into `folder`, which may hold checkpoints and logs."""
    target = Path(folder)
    files.make_folders(target)
    made = target / f".{EXACT}.saving"
    files.remove_tree(made)
    try:
        engine.save_pretrained(made, tokenizer=tokenizer)
        _move_in(made, target, keep=False)
    finally:
        files.remove_tree(made)


def _move_in(source: Path, target: Path, *, keep: bool) -> None:
    """The files of a model's folder become those of `target`. `keep`: they stay in `source` too, as links."""
    new = {path.name for path in source.iterdir()}
    for pattern in _WEIGHTS:
        for old in target.glob(pattern):
            if old.name not in new:  # of a save with another number of shards
                old.unlink()
    for path in sorted(source.iterdir()):
        place = target / path.name
        if path.is_dir():
            shutil.copytree(path, place, dirs_exist_ok=True)
        elif keep:
            place.unlink(missing_ok=True)
            _link_or_copy(path, place)
        else:
            os.replace(path, place)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no links
        shutil.copy2(source, target)
