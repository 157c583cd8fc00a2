"""The training loop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatrain.errors import MegaTrainError
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.metrics import StepStats, metrics_line
from megatrain.train.progress import Progress

_MOST_SKIPPED = 10  # steps in a row; what leads to so many does not pass


class TrainingEngine(Protocol):
    """The part of the engine that the loop uses."""

    def train_step(self, batches: Sequence[dict[str, Tensor]], lr: float | None = None) -> StepStats: ...


class Evaluations(Protocol):
    """What is measured between steps."""

    @property
    def enough(self) -> bool:
        """Whether training ends before its last step, for what was measured."""

    def before_training(self) -> None: ...
    def after_step(self, done: int, *, last: bool) -> None: ...


class NoEvaluations:
    """Nothing is."""

    enough = False

    def before_training(self) -> None:
        pass

    def after_step(self, done: int, *, last: bool) -> None:
        pass


class Lines(Protocol):
    """Takes what metrics.jsonl holds, line by line."""

    def write(self, line: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class LoopResult:
    """`steps` done, those `skipped` because of their gradient, and whether Ctrl-C ended the run early. A run that
    evaluations have ended is a whole one."""

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
    metrics: Lines,
    progress: Progress,
    stop: StopOnInterrupt,
    log_every: int = 1,
    first_step: int = 0,
    evaluations: Evaluations | None = None,
    after_step: Callable[[int, bool], None] = lambda done, last: None,
    record: Callable[[int, Sequence[dict[str, Tensor]], float, StepStats], None] = lambda done, batches, lr, stats: (
        None
    ),
) -> LoopResult:
    """Train from `first_step` until `total_steps` are done, `evaluations` are enough or `stop` is requested.

    `record` is told of each step: its number from 1, what it was given, what came of it. `after_step` is called when
    the step has been evaluated, with the steps done and whether that was the last one. `batches_of` and
    `learning_rate_of` take the number of the step, from 0. Raises MegaTrainError where the first loss is not finite,
    since no later step would change that, and where the gradient of many steps in a row, or of all of the run, is not.
    """
    done, skipped, in_a_row, loss = first_step, 0, 0, None
    unwritten: dict[str, Any] | None = None
    measured = evaluations or NoEvaluations()
    with progress:
        measured.before_training()
        while done < total_steps and not stop.requested and not measured.enough:
            batches = batches_of(done)
            lr = learning_rate_of(done)
            stats = engine.train_step(batches, lr=lr)
            done, skipped, loss = done + 1, skipped + stats.skipped, stats.loss
            in_a_row = in_a_row + 1 if stats.skipped else 0
            if done == 1 and loss is not None and not math.isfinite(loss):
                raise MegaTrainError(f"the loss of the first step is {loss}: a setting or weight of the model is wrong")

            record(done, batches, lr, stats)
            unwritten = line = metrics_line(done, lr, stats)
            hopeless = in_a_row >= _MOST_SKIPPED or (done == total_steps and skipped == done - first_step)
            if done % log_every == 0 or done == total_steps or stop.requested or hopeless:
                metrics.write(line)
                unwritten = None
            progress.update(line)
            if hopeless:
                raise MegaTrainError(
                    f"step {done}: no finite gradient in {in_a_row} steps in a row; they changed nothing, the run ends "
                    "here and no model is saved. Try a lower learning rate"
                )
            if not stop.requested:
                measured.after_step(done, last=done == total_steps)
            after_step(done, done == total_steps or stop.requested or measured.enough)
    if unwritten is not None:  # nobody knew that this step would be the last one
        metrics.write(unwritten)
    ended_early = done < total_steps and not measured.enough
    return LoopResult(steps=done, interrupted=ended_early, last_loss=loss, skipped=skipped)
