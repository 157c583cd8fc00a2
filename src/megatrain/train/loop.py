"""The training loop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatrain.errors import MegaTrainError
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.metrics import MetricsFile, StepStats, metrics_line
from megatrain.train.progress import Progress


class TrainingEngine(Protocol):
    """The part of the engine that the loop uses."""

    def train_step(self, batches: Sequence[dict[str, Tensor]], lr: float | None = None) -> StepStats: ...


@dataclass(frozen=True)
class LoopResult:
    """`steps` done, those `skipped` because of their gradient, and whether Ctrl-C ended the run early."""

    steps: int
    interrupted: bool
    last_loss: float | None
    skipped: int


def train(
    engine: TrainingEngine,
    *,
    batches_of: Callable[[int], list[dict[str, Tensor]]],
    learning_rate_of: Callable[[int], float],
    total_steps: int,
    metrics: MetricsFile,
    progress: Progress,
    stop: StopOnInterrupt,
    log_every: int = 1,
) -> LoopResult:
    """Train from step 0 until `total_steps` are done or `stop` is requested.

    `batches_of` and `learning_rate_of` take the number of the step, from 0. Raises MegaTrainError where the first
    loss is not finite: no later step would change that.
    """
    done, skipped, loss = 0, 0, None
    with progress:
        while done < total_steps and not stop.requested:
            batches = batches_of(done)
            lr = learning_rate_of(done)
            stats = engine.train_step(batches, lr=lr)
            done, skipped, loss = done + 1, skipped + stats.skipped, stats.loss
            if done == 1 and loss is not None and not math.isfinite(loss):
                raise MegaTrainError(f"the loss of the first step is {loss}: a setting or weight of the model is wrong")

            line = metrics_line(done, lr, stats)
            if done % log_every == 0 or done == total_steps or stop.requested:
                metrics.write(line)
            progress.update(line)
    return LoopResult(steps=done, interrupted=done < total_steps, last_loss=loss, skipped=skipped)
