"""What a run measures on data.eval while it trains: when, what is kept of it, and when training has had enough."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from megatrain.config import EvalConfig
from megatrain.train.evaluate import EvalSet, Evaluation, evaluate
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.samples import Sample, Sampler
from megatrain.train.undisturbed import undisturbed

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine


@dataclass(frozen=True)
class Standing:
    """How evaluations stand, as a checkpoint holds it, so that a run that goes on from it counts as it would have.

    of:      sha256 of what is measured: with losses of other texts nothing is compared.
    step:    of the last evaluation, -1 before the first; `results`: what it found, by set.
    best:    the lowest loss, as eval.min_delta has it (None: none yet); `without`: evaluations since that one.
    """

    of: str
    step: int = -1
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    best: float | None = None
    without: int = 0

    @property
    def loss(self) -> float:
        """Of the first set, which decides what is best."""
        loss = next(iter(self.results.values()), {}).get("loss")
        return math.nan if loss is None else float(loss)

    def after(self, step: int, results: Mapping[str, Evaluation], min_delta: float) -> "Standing":
        """Once more has been measured."""
        now = replace(self, step=step, results={name: _kept(evaluation) for name, evaluation in results.items()})
        if math.isfinite(now.loss) and (self.best is None or now.loss < self.best - min_delta):
            return replace(now, best=now.loss, without=0)
        return replace(now, without=self.without + 1)

    def evaluations(self) -> dict[str, Evaluation]:
        return {
            name: Evaluation(**(dict(fields) | ({"loss": math.nan} if fields["loss"] is None else {})))
            for name, fields in self.results.items()
        }

    @staticmethod
    def read(of: str, told: object) -> "Standing":
        """From a checkpoint; one that begins where that says nothing of the same text."""
        if not isinstance(told, Mapping) or told.get("of") != of:
            return Standing(of)
        try:
            standing = Standing(of, **{name: told[name] for name in ("step", "results", "best", "without")})
            standing.evaluations()
            float(standing.loss), float(standing.best or 0), int(standing.without), int(standing.step)
        except (KeyError, TypeError, ValueError, AttributeError):
            return Standing(of)
        return standing


def _kept(evaluation: Evaluation) -> dict[str, Any]:
    """What is the same however long it took, and JSON."""
    loss = evaluation.loss if math.isfinite(evaluation.loss) else None
    kept: dict[str, Any] = {
        "loss": loss,
        "target_tokens": evaluation.target_tokens,
        "utf8_bytes": evaluation.utf8_bytes,
    }
    if evaluation.pairs is not None:
        kept |= {"pairs": evaluation.pairs, "values": dict(evaluation.values)}
    return kept


@dataclass(frozen=True)
class Measured:
    """One evaluation after `step` steps: what came of each set, what the model wrote, how long all of it took.
    `without`: evaluations in a row that were no improvement; `enough`: training ends for it."""

    step: int
    results: Mapping[str, Evaluation]
    samples: list[Sample]
    seconds: float
    without: int
    enough: bool

    def fields(self) -> dict[str, Any]:
        """As metrics.jsonl holds them: of one set, or of several by their names."""
        each = {name: _fields(evaluation) for name, evaluation in self.results.items()}
        return next(iter(each.values())) if len(each) == 1 else each

    def line(self) -> dict[str, Any]:
        told = {"seconds": self.seconds, "without_improvement": self.without}
        return {"step": self.step, "eval": self.fields(), **told} | ({"enough": True} if self.enough else {})


def _fields(evaluation: Evaluation) -> dict[str, Any]:
    if evaluation.pairs is not None:
        return {"loss": evaluation.loss, "pairs": evaluation.pairs, **evaluation.values}
    return {
        "loss": evaluation.loss,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
        "target_tokens": evaluation.target_tokens,
    }


class HeldOut:
    """Measures `sets` by name, the first of which decides what is best, and lets `sampler` write.

    `first_step` and `told`: where the run begins, and what the checkpoint there says of evaluations. `tell` is called
    with each evaluation.
    """

    def __init__(
        self,
        settings: EvalConfig,
        engine: "Engine",
        sets: Mapping[str, EvalSet],
        *,
        sampler: Sampler | None = None,
        first_step: int = 0,
        told: object = None,
        stop: StopOnInterrupt,
        tell: Callable[[Measured], None] = lambda measured: None,
    ) -> None:
        self._settings, self._engine, self._sets = settings, engine, dict(sets)
        self._sampler, self._first_step, self._stop, self.tell = sampler, first_step, stop, tell
        self.losses: dict[int, float] = {}  # by step, of what was measured here
        self.standing = Standing.read(" ".join(one.sha256 for one in self._sets.values()), told)

    # -- what the loop calls ----------------------------------------------------------------------------------

    @property
    def enough(self) -> bool:
        """Whether eval.patience is at its end."""
        return self._settings.patience is not None and self.standing.without >= self._settings.patience

    def before_training(self) -> None:
        """Measure what the run begins with, if that is wanted, or what the one before it did not get to."""
        at_start = self._settings.at_start and self._first_step == 0
        if at_start or (self._first_step > 0 and self._due(self._first_step)):
            self._measure(self._first_step)

    def after_step(self, done: int, *, last: bool) -> None:
        """`done` steps are; `last`: of all."""
        if self._due(done) or (last and self._settings.every is not None):
            self._measure(done)

    # -- what checkpoints ask ---------------------------------------------------------------------------------

    @property
    def has_sets(self) -> bool:
        return bool(self._sets)

    @property
    def measures_during_training(self) -> bool:
        return self._settings.every is not None and bool(self._sets)

    def loss_at(self, step: int) -> float | None:
        """What was measured just after that step."""
        return self.standing.loss if self.standing.step == step and self._sets else None

    # -- measuring --------------------------------------------------------------------------------------------

    def at_end(self, done: int) -> dict[str, Evaluation]:
        """Of the model as training has left it; empty where there is nothing to measure, or Ctrl-C ends it."""
        if not self._stop.requested:
            self._measure(done)
        return self.standing.evaluations() if self.standing.step == done else {}

    def _due(self, step: int) -> bool:
        return self._settings.every is not None and step % self._settings.every == 0

    def _measure(self, step: int) -> None:
        if not self._sets or self.standing.step == step:  # nothing has changed since
            return
        started = time.perf_counter()
        engine = self._engine
        with undisturbed(engine.model, engine.device.torch_device):
            results: dict[str, Evaluation] = {}
            for name, one in self._sets.items():
                found = evaluate(engine, one, self._stop)
                if found is None:
                    return
                results[name] = found
            samples = self._sampler.write(self._stop) if self._sampler is not None else []
        self.standing = self.standing.after(step, results, self._settings.min_delta)
        self.losses[step] = self.standing.loss
        seconds = time.perf_counter() - started
        self.tell(Measured(step, results, samples, seconds, self.standing.without, self.enough))
