"""train.method: what is learnt from the rows of data.train, and by which loss."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from megatrain.config import Config, check_tokens_per_step
from megatrain.errors import ConfigError
from megatrain.train.metrics import StepStats

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine
    from megatrain.losses import TokenLoss

_METHODS = {"text": "pretrain", "chat": "sft", "preference": "dpo"}


def with_method(config: Config, kind: str) -> Config:
    """`config` with the method that `auto` means for data.train of this kind (text, chat or preference). Raises
    ConfigError where the one that is set cannot learn from it."""
    fitting = _METHODS[kind]
    if config.train.method not in ("auto", fitting):
        raise ConfigError(
            f"train.method: {config.train.method} is wrong for data.train, whose rows are of kind {kind}; expected "
            f"{fitting} or auto"
        )
    chosen = dataclasses.replace(config, train=dataclasses.replace(config.train, method=fitting))
    check_tokens_per_step(chosen)
    return chosen


def loss_of(config: Config) -> "TokenLoss | None":
    """None: the model's own, of each target token."""
    from megatrain.losses import DPO

    train = config.train
    if train.method != "dpo":
        return None
    return DPO(train.dpo_beta, train.dpo_label_smoothing, train.dpo_loss)


class UnderLoss:
    """The engine as a run sees it, whose steps are taken under `loss`."""

    def __init__(self, engine: "Engine", loss: "TokenLoss | None") -> None:
        self._engine, self._loss = engine, loss
        self.device = engine.device

    def train_step(self, batches: Sequence[dict[str, Tensor]], lr: float | None = None) -> StepStats:
        return self._engine.train_step(batches, lr=lr, loss=self._loss)

    def start_trace(self) -> None:
        self._engine.start_trace()

    def write_trace(self, path: Path) -> None:
        self._engine.write_trace(path)
