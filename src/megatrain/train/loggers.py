"""Programs that show a run while it trains, told what metrics.jsonl holds: TensorBoard, Weights & Biases.

Another one is a class with the three methods of `RunLogger`, in `_LOGGERS`. Their packages are imported when they are
wanted, and none of them can end a run.
"""

import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from megatrain.config import Config, to_yaml
from megatrain.errors import ConfigError
from megatrain.model.loading import one_line
from megatrain.private_files import make_private_folder, private
from megatrain.train.held_out import Measured
from megatrain.train.undisturbed import RandomNumbers
from megatrain.yaml_file import parse_yaml

_log = logging.getLogger(__name__)


class RunLogger(Protocol):
    """Is told of each line of metrics.jsonl, in the order of steps, and may raise whatever it likes."""

    def step(self, line: Mapping[str, Any]) -> None: ...
    def evaluation(self, measured: Measured) -> None: ...
    def close(self) -> None: ...


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError where the package of one is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"train.log_to: {name} is not installed; pip install 'megatrain[{name}]'")


class Loggers:
    """Those of `names`, for the run in `folder`, which goes on after `first_step`. One that fails is said and told
    nothing more: training, which may have taken days, is worth more than its curves."""

    def __init__(self, names: Sequence[str], folder: Path, config: Config, first_step: int) -> None:
        self._open: dict[str, RunLogger] = {}
        random = RandomNumbers(torch.device("cpu"))  # a library may draw a name
        for name in names:
            try:
                self._open[name] = _LOGGERS[name](folder, config, first_step)
            except Exception as error:
                _say_failed(name, error)
        random.restore()

    def step(self, line: Mapping[str, Any]) -> None:
        self._tell(lambda logger: logger.step(line))

    def evaluation(self, measured: Measured) -> None:
        self._tell(lambda logger: logger.evaluation(measured))

    def close(self) -> None:
        self._tell(lambda logger: logger.close())

    def _tell(self, what: Callable[[RunLogger], None]) -> None:
        for name, logger in list(self._open.items()):
            try:
                what(logger)
            except Exception as error:
                del self._open[name]
                _say_failed(name, error)


def _say_failed(name: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {one_line(error)}"
    _log.warning("train.log_to: %s fails (%s); it is told nothing more, and training goes on", name, reason)


def scalars(prefix: str, fields: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by `prefix/name`, those of several sets by `prefix/set/name`; what is none is left out."""
    found: dict[str, float] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= scalars(f"{prefix}/{name}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            found[f"{prefix}/{name}"] = float(value)
    return found


class TensorBoard:
    """Writes `tensorboard/` in the run's folder. Of a run that goes on, what later steps had written is not shown."""

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make_private_folder(folder / "tensorboard")
        writer: Any = SummaryWriter  # it has no types
        self._writer = writer(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._writer.add_text("config", _as_code(to_yaml(config)), first_step)

    def step(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars("train", line).items():
            self._writer.add_scalar(name, value, line["step"])

    def evaluation(self, measured: Measured) -> None:
        for name, value in scalars("eval", measured.fields()).items():
            self._writer.add_scalar(name, value, measured.step)
        for number, sample in enumerate(measured.samples):
            self._writer.add_text(f"samples/{number}", _as_code(f"{sample.prompt}[...]{sample.text}"), measured.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _as_code(text: str) -> str:
    """Text is shown as Markdown: nothing of it is to be taken for that."""
    return "\n".join(f"    {line}" for line in text.splitlines())


class WeightsAndBiases:
    """Through its own library, whose settings count (WANDB_MODE, WANDB_PROJECT, WANDB_NAME, ...). The run's name there
    is in `wandb/run-id`, so that a run that goes on continues its curves; it leaves out steps that are there."""

    def __init__(self, folder: Path, config: Config, first_step: int) -> None:
        import wandb

        make_private_folder(folder / "wandb")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megatrain"),
            name=os.environ.get("WANDB_NAME", folder.absolute().name),
            dir=str(folder),
            id=_run_id(folder / "wandb" / "run-id"),
            resume="allow",
            config=parse_yaml(to_yaml(config)),
            # of the machine it is told what its library always tells, and no code
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )

    def step(self, line: Mapping[str, Any]) -> None:
        self._run.log(scalars("train", line), step=line["step"])

    def evaluation(self, measured: Measured) -> None:
        self._run.log(scalars("eval", measured.fields()), step=measured.step)
        if measured.samples:
            rows = [[sample.prompt, sample.text] for sample in measured.samples]
            self._run.log({"samples": self._wandb.Table(columns=["prompt", "text"], data=rows)}, step=measured.step)

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path) -> str:
    try:
        found = path.read_text(encoding="ascii").strip()
        if found.isalnum():
            return found
    except (OSError, UnicodeDecodeError):
        pass
    made = secrets.token_hex(8)
    with open(path, "w", encoding="ascii", opener=private) as stream:
        stream.write(f"{made}\n")
    return made


_LOGGERS: dict[str, Callable[[Path, Config, int], RunLogger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
