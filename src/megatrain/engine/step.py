"""One optimizer step, top to bottom."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatrain.engine.batches import Batch
from megatrain.engine.executor import BACKWARD, HEAD, backward
from megatrain.engine.targets import count_targets
from megatrain.errors import ConfigError
from megatrain.memory.limits import peak_resident_bytes
from megatrain.model.block import DirectLeaves
from megatrain.model.head import IGNORED
from megatrain.model.loss_terms import InseparableLossError
from megatrain.model.root import on_device
from megatrain.model.side_effects import RandomState

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine

LossParts = list[tuple[Tensor, float]]  # (scalar, factor) of what adds up to a micro-batch's loss


@dataclass(frozen=True, slots=True)
class StepStats:
    """What a step did. `loss` is the mean over the target tokens of all micro-batches (None where the caller ran the
    forward), `grad_norm` the L2 norm before clipping, `weight_passes` how often all weights were fetched. Computation
    stood still for the host's updates for `optimizer_exposed_seconds`, for copies of weights (that wait included) for
    `weights_exposed_seconds`, for saved inputs that leave or return for `inputs_exposed_seconds`, and for gradients on
    their way to the host, the last of which nothing hides, for `gradients_exposed_seconds`."""

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


def train_step(engine: "Engine", batches: Sequence[Batch], lr: float | None) -> StepStats:
    """Run all micro-batches forward and backward, then decide the update; see `Engine.train_step`."""
    clock = StepClock(engine)
    targets = [count_targets(batch["labels"], engine.shifts_labels) for batch in batches]
    if sum(targets) == 0:
        raise ConfigError(f"labels: none of the {len(batches)} micro-batches has a target token (all are {IGNORED})")
    work = [(n, batch, count) for n, (batch, count) in enumerate(zip(batches, targets, strict=True)) if count]

    engine.begin_step(lr)
    engine.warn_of_whole_logits()
    try:
        losses = _attempt(engine, work, sum(targets))
    except InseparableLossError as found:  # seen before the first backward of a base: no weight has changed
        engine.head.give_up(str(found))
        engine.warn_of_whole_logits()
        losses = _attempt(engine, work, sum(targets))
    engine.kept_graphs.finish_measuring(engine.free_compute_bytes())
    norm = engine.gradients.norm()
    skipped = not engine.decide_update(norm)
    return clock.stats(sum(_value(parts) for parts in losses), norm, sum(targets), skipped)


def _attempt(engine: "Engine", work: Sequence[tuple[int, Batch, int]], total: int) -> list[LossParts]:
    """Run the micro-batches (number, batch, its targets) forward and backward; after an error the engine is as before,
    but for buffers that the forward has updated and units that were updated at once (see `Engine.abort_step`)."""
    engine.watch_attributes()
    engine.choose_heap(max(batch["labels"].shape[-1] for _, batch, _ in work))
    elements = sum(batch["labels"].numel() for _, batch, _ in work)
    engine.choose_kept_graphs(elements)
    run = _run_chunked if engine.head.reason is None else _run_whole
    bodies: list[Callable[[], LossParts]] = [
        partial(run, engine, number, batch, count, total) for number, batch, count in work
    ]
    random = RandomState(engine.device.torch_device)
    engine.executor.begin_step(elements)
    try:
        return _forward_and_backward(engine, bodies)
    except BaseException as error:
        engine.abort_step(error)
        raise
    finally:
        random.restore()


def _forward_and_backward(engine: "Engine", bodies: list[Callable[[], LossParts]]) -> list[LossParts]:
    """Losses of the micro-batches; afterwards all gradients of the step are complete."""
    engine.gradients.begin(keep=engine.keeps_gradients)
    engine.gradients.hold(len(bodies) if engine.head.reason is None else 0)
    with torch.enable_grad():
        losses = engine.executor.hand_over.run(bodies)
    engine.gradients.finish()
    return losses


def _run_chunked(engine: "Engine", number: int, batch: Batch, count: int, total: int) -> LossParts:
    """One micro-batch: base forward, head and loss with immediate backward chunk by chunk, base backward."""
    engine.seed_micro_batch(number)
    labels_on_host, batch = batch["labels"].cpu(), on_device(batch, engine.device.torch_device)
    hidden, template, auxiliary_loss = engine.head.run_base(batch)

    engine.executor.enter_phase(HEAD)
    losses, hidden_gradient = _run_head(engine, hidden.detach(), labels_on_host, template, batch, total)
    engine.gradients.release_hold()

    engine.executor.enter_phase(BACKWARD)
    ends: list[Tensor] = [_end_of_base(hidden, hidden_gradient)] if hidden.requires_grad else []
    gradients: list[Tensor | None] = [None] if hidden.requires_grad else []
    if auxiliary_loss is not None:  # a mean over the micro-batch: it counts by the micro-batch's share of targets
        share = count / total
        losses.append((auxiliary_loss.detach(), share))
        ends.append(auxiliary_loss)
        gradients.append(torch.full_like(auxiliary_loss, share))
    del hidden, template, auxiliary_loss, hidden_gradient
    if ends:
        backward(ends, gradients)
    return losses


def _run_head(
    engine: "Engine", hidden: Tensor, labels_on_host: Tensor, template: Any, batch: Batch, total: int
) -> tuple[LossParts, Tensor]:
    """(losses, gradient of the hidden states). In a function of its own, whose names are gone when the base is
    differentiated: the last chunk is a view of all hidden states."""
    losses: LossParts = []
    hidden_gradient = torch.zeros_like(hidden)
    for part, labels, where in engine.head.chunks(hidden, labels_on_host):
        with engine.weights.holding(engine.head.logits_bytes(labels.numel())):
            leaf = part.detach().requires_grad_()
            with engine.executor.direct() as weights:
                chunk_loss = engine.head.chunk_loss(leaf, labels, template, batch, total)
            with engine.device.computing():
                backward([chunk_loss], [None])
            losses.append((chunk_loss.detach(), 1.0))
            if leaf.grad is not None:
                hidden_gradient.view(-1, hidden.shape[-1])[where] = leaf.grad.view(-1, hidden.shape[-1])
            _take_weight_gradients(engine, weights)
            del chunk_loss, leaf, weights
    return losses, hidden_gradient


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


def _take_weight_gradients(engine: "Engine", weights: DirectLeaves) -> None:
    """In a function of its own: a name left over in the caller's would keep the last gradient through all of backward,
    in every micro-batch."""
    for slot, weight in weights.leaves.items():
        if weight.grad is not None:
            engine.gradients.add(slot, weight.grad)


def _run_whole(engine: "Engine", number: int, batch: Batch, count: int, total: int) -> LossParts:
    """One micro-batch through the model's own loss, a mean that counts by the micro-batch's share of targets."""
    engine.seed_micro_batch(number)
    loss = loss_of(engine.model(**batch))
    share = count / total
    engine.executor.enter_phase(BACKWARD)
    if loss.requires_grad:  # else all that this micro-batch reaches is frozen
        backward([loss], [torch.full_like(loss, share)])
    return [(loss.detach(), share)]


def _value(parts: LossParts) -> float:
    """Read when the step's gradients are on the host: a device is not waited for before."""
    value = 0.0
    for loss, factor in parts:
        value += loss.item() * factor
    return value


def loss_of(result: Any) -> Tensor:
    """The loss in what a model returned: an attribute or key `loss`, the first of a tuple, or the result itself."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple):
        return loss_of(result[0])
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(f"the model returned {type(result).__name__} without a loss; pass labels in every batch")
    return loss


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

    def stats(self, loss: float | None, norm: float, targets: int, skipped: bool) -> StepStats:
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
        )
