"""One optimizer step, top to bottom."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatrain.engine.batches import Batch
from megatrain.engine.executor import BACKWARD, HEAD, backward
from megatrain.engine.head_sweep import Losses, differentiate_head
from megatrain.engine.outputs import loss_of
from megatrain.engine.targets import count_targets
from megatrain.engine.token_loss import count_units, run_head_under, run_whole_under, split_batch
from megatrain.errors import ConfigError
from megatrain.losses import TokenLoss
from megatrain.memory.limits import peak_resident_bytes
from megatrain.model.head import IGNORED
from megatrain.model.log_probabilities import LossFunctions
from megatrain.model.loss_terms import InseparableLossError
from megatrain.model.root import on_device
from megatrain.model.side_effects import RandomState

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class StepStats:
    """What a step did. `loss` is the mean over the target tokens of all micro-batches (None where the caller ran the
    forward), `grad_norm` the L2 norm before clipping, `weight_passes` how often all weights were fetched. Computation
    stood still for the host's updates for `optimizer_exposed_seconds`, for copies of weights (that wait included) for
    `weights_exposed_seconds`, for saved inputs that leave or return for `inputs_exposed_seconds`, and for gradients on
    their way to the host, the last of which nothing hides, for `gradients_exposed_seconds`. Under a loss of the
    caller's, `loss` and `loss_values` (what it reports, by name) are means over its units."""

    loss: float | None
    grad_norm: float
    target_tokens: int
    seconds: float
    skipped: bool
    weight_passes: float
    h2d_bytes: int
    d2h_bytes: int
    device_peak_bytes: int
    optimizer_exposed_seconds: float
    weights_exposed_seconds: float
    inputs_exposed_seconds: float
    gradients_exposed_seconds: float
    host_peak_bytes: int
    loss_values: dict[str, float] = field(default_factory=dict)


def train_step(
    engine: "Engine", batches: Sequence[Batch], lr: float | None, loss: TokenLoss | None = None
) -> StepStats:
    """Run all micro-batches forward and backward, then decide the update; see `Engine.train_step`."""
    clock = StepClock(engine)
    targets = [count_targets(batch["labels"], engine.shifts_labels) for batch in batches]
    if sum(targets) == 0:
        raise ConfigError(f"labels: none of the {len(batches)} micro-batches has a target token (all are {IGNORED})")
    counts: Sequence[float] = targets if loss is None else count_units(loss, batches)
    work = [(n, batch, count) for n, (batch, count) in enumerate(zip(batches, counts, strict=True)) if count]

    engine.begin_step(lr)
    engine.warn_of_whole_logits()
    try:
        losses = _attempt(engine, work, sum(counts), loss)
    except InseparableLossError as found:  # seen before the first backward of a base: no weight has changed
        engine.head.give_up(str(found))
        engine.warn_of_whole_logits()
        losses = _attempt(engine, work, sum(counts), loss)
    engine.kept_graphs.finish_measuring(engine.free_compute_bytes())
    norm = engine.gradients.norm()
    skipped = not engine.decide_update(norm)
    return clock.stats(_loss(losses), norm, sum(targets), skipped, _reported(losses, sum(counts)))


def _attempt(
    engine: "Engine", work: Sequence[tuple[int, Batch, float]], total: float, loss: TokenLoss | None
) -> list[Losses]:
    """Run the micro-batches (number, batch, what it counts) forward and backward; after an error the engine is as
    before, but for buffers that the forward has updated and units that were updated at once (see
    `Engine.abort_step`)."""
    engine.watch_attributes()
    engine.choose_heap(max(batch["labels"].shape[-1] for _, batch, _ in work))
    elements = sum(batch["labels"].numel() for _, batch, _ in work)
    engine.choose_kept_graphs(elements)
    random = RandomState(engine.device.torch_device)
    with ExitStack() as stack:
        run: Callable[..., Losses] = partial(_run_chunked, loss=loss)
        if engine.head.reason is not None:
            functions = stack.enter_context(LossFunctions(engine.model)) if loss is not None else None
            run = partial(_run_whole, loss=loss, functions=functions)
        bodies = [partial(run, engine, number, batch, count, total) for number, batch, count in work]
        engine.executor.begin_step(elements)
        try:
            return _forward_and_backward(engine, bodies)
        except BaseException as error:
            engine.abort_step(error)
            raise
        finally:
            random.restore()


def _forward_and_backward(engine: "Engine", bodies: Sequence[Callable[[], Losses]]) -> list[Losses]:
    """Losses of the micro-batches; afterwards all gradients of the step are complete."""
    engine.gradients.begin(keep=engine.keeps_gradients)
    engine.gradients.hold(len(bodies) if engine.head.reason is None else 0)
    with torch.enable_grad():
        losses = engine.executor.hand_over.run(bodies)
    engine.gradients.finish()
    return losses


def _run_chunked(
    engine: "Engine", number: int, batch: Batch, count: float, total: float, loss: TokenLoss | None
) -> Losses:
    """One micro-batch: base forward, head and loss with immediate backward chunk by chunk, base backward."""
    engine.seed_micro_batch(number)
    batch, own = (batch, {}) if loss is None else split_batch(loss, batch)
    labels_on_host, batch = batch["labels"].cpu(), on_device(batch, engine.device.torch_device)
    hidden, template, auxiliary_loss = engine.head.run_base(batch)

    engine.executor.enter_phase(HEAD)
    head = partial(run_head_under, loss) if loss is not None else _run_head
    losses, hidden_gradient = head(engine, hidden.detach(), labels_on_host, template, batch, own, total)
    engine.gradients.release_hold()

    engine.executor.enter_phase(BACKWARD)
    ends: list[Tensor] = [_end_of_base(hidden, hidden_gradient)] if hidden.requires_grad else []
    gradients: list[Tensor | None] = [None] if hidden.requires_grad else []
    if auxiliary_loss is not None:  # a mean over the micro-batch: it counts by the micro-batch's share
        share = count / total
        losses.parts.append((auxiliary_loss.detach(), share))
        ends.append(auxiliary_loss)
        gradients.append(torch.full_like(auxiliary_loss, share))
    del hidden, template, auxiliary_loss, hidden_gradient
    if ends:
        backward(ends, gradients)
    return losses


def _run_head(
    engine: "Engine", hidden: Tensor, labels_on_host: Tensor, template: Any, batch: Batch, _own: Batch, total: float
) -> tuple[Losses, Tensor]:
    """(losses, gradient of the hidden states), of the model's own loss."""
    losses = Losses([])

    def end_of(part: Tensor, labels: Tensor, _where: slice) -> tuple[Tensor, None]:
        chunk_loss = engine.head.chunk_loss(part, labels, template, batch, int(total))
        losses.parts.append((chunk_loss.detach(), 1.0))
        return chunk_loss, None

    return losses, differentiate_head(engine, hidden, labels_on_host, end_of)


class _EndOfBase(torch.autograd.Function):
    """Inputs: hidden states, and a list with their gradient. The output says nothing; its backward gives the gradient
    away. Passed to torch.autograd.backward, hidden states and gradient would both be held until the whole is over."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None


def _end_of_base(hidden: Tensor, gradient: Tensor) -> Tensor:
    end: Tensor = _EndOfBase.apply(hidden, [gradient])
    return end


def _run_whole(
    engine: "Engine",
    number: int,
    batch: Batch,
    count: float,
    total: float,
    loss: TokenLoss | None,
    functions: LossFunctions | None,
) -> Losses:
    """One micro-batch with whole logits: through the model's own loss, or with `loss` in its place. Either is a mean
    that counts by the micro-batch's share."""
    engine.seed_micro_batch(number)
    reported: dict[str, Tensor] = {}
    if loss is None or functions is None:
        mean = loss_of(engine.model(**batch))
    else:
        mean, reported = run_whole_under(loss, functions, engine, batch, count)
    share = count / total
    engine.executor.enter_phase(BACKWARD)
    if mean.requires_grad:  # else all that this micro-batch reaches is frozen
        backward([mean], [torch.full_like(mean, share)])
    return Losses([(mean.detach(), share)], reported)


def _loss(losses: list[Losses]) -> float:
    """Read when the step's gradients are on the host: a device is not waited for before."""
    return sum(_value(one.parts) for one in losses)


def _value(parts: list[tuple[Tensor, float]]) -> float:
    value = 0.0
    for loss, factor in parts:
        value += loss.item() * factor
    return value


def _reported(losses: list[Losses], total: float) -> dict[str, float]:
    """Means over all units, by name."""
    names = dict.fromkeys(name for one in losses for name in one.reported)
    return {name: sum(one.reported[name].item() for one in losses if name in one.reported) / total for name in names}


class StepClock:
    """Time and counters from the start of a step to its end."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._started = time.perf_counter()
        self._before = self._counters()

    def _counters(self) -> tuple[int, int, int, float]:
        engine = self._engine
        return (
            engine.weights.fetched_bytes,
            engine.device.h2d_bytes,
            engine.device.d2h_bytes,
            engine.exposed_seconds,
        )

    def stats(
        self, loss: float | None, norm: float, targets: int, skipped: bool, values: dict[str, float] | None = None
    ) -> StepStats:
        fetched, up, down, exposed = (n - b for n, b in zip(self._counters(), self._before, strict=True))
        waits = self._engine.weights.waited_seconds()

        def waited(*names: str) -> float:
            return sum(waits.get(name, 0.0) for name in names)

        return StepStats(
            loss=loss,
            grad_norm=norm,
            target_tokens=targets,
            seconds=time.perf_counter() - self._started,
            skipped=skipped,
            weight_passes=fetched / max(1, sum(self._engine.weights.unit_bytes.values())),
            h2d_bytes=int(up),
            d2h_bytes=int(down),
            device_peak_bytes=self._engine.device.peak_bytes(),
            optimizer_exposed_seconds=exposed,
            weights_exposed_seconds=waited("weights_arrived", "weights_read"),
            inputs_exposed_seconds=waited("inputs_restored", "inputs_saved"),
            gradients_exposed_seconds=waited("staging_free", "gradient_landed"),
            host_peak_bytes=peak_resident_bytes(),
            loss_values=values or {},
        )
