"""A loss of the caller's, of the log-probabilities of target tokens, without the logits of a whole batch.

The head runs twice, chunk by chunk: a first sweep finds the log-probability of each target; the loss, differentiated
by itself, says how much each of them counts; the second sweep makes the logits again and goes backward with that.
Where the head cannot run by itself, the model's own forward gets the loss in the place of its loss function.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatrain.engine.batches import Batch
from megatrain.engine.executor import backward
from megatrain.engine.head_sweep import Losses, differentiate_head
from megatrain.engine.outputs import logits_of, loss_of
from megatrain.engine.targets import target_mask
from megatrain.errors import ConfigError, UnsupportedModelError
from megatrain.losses import TokenLoss
from megatrain.model.head import shift_labels
from megatrain.model.log_probabilities import LossFunctions, label_log_probabilities
from megatrain.model.loss_terms import InseparableLossError
from megatrain.model.root import moved_arguments, on_device
from megatrain.model.side_effects import RandomState

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine

Reported = dict[str, Tensor]  # sums over a micro-batch's units, by name


def count_units(loss: TokenLoss, batches: Sequence[Batch]) -> list[float]:
    """Of each micro-batch. Raises ConfigError where one lacks what the loss needs, or they are no numbers, or all 0."""
    for number, batch in enumerate(batches):
        missing = [name for name in loss.inputs if name not in batch]
        if missing:
            raise ConfigError(f"batches[{number}] has no {missing[0]}, which {type(loss).__name__} needs")
    units = [loss.units(batch) for batch in batches]
    wrong = next((n for n, count in enumerate(units) if not 0 <= count < float("inf")), None)
    if wrong is not None:
        raise ConfigError(f"loss: units of batches[{wrong}] are {units[wrong]!r}; they must be a number from 0 on")
    if not any(units):
        raise ConfigError(f"loss: none of the {len(batches)} micro-batches has a unit that the loss is a mean over")
    return units


def split_batch(loss: TokenLoss, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the model is given, what is the loss's alone)."""
    own = {name: batch[name] for name in loss.inputs}
    return {name: value for name, value in batch.items() if name not in own}, own


def run_head_under(
    loss: TokenLoss,
    engine: "Engine",
    hidden: Tensor,
    labels_on_host: Tensor,
    template: Any,
    batch: Batch,
    own: Batch,
    total: float,
) -> tuple[Losses, Tensor]:
    """(losses, gradient of the hidden states)."""
    random = RandomState(engine.device.torch_device)
    found = score_hidden(engine, hidden, labels_on_host, template, batch)
    entries = {**batch, **moved_arguments(own, hidden.device)}
    leaf = at_labels(found, shifted=True).requires_grad_()
    sums, reported = evaluate_loss(loss, leaf, target_mask(entries["labels"], shifted=True), entries)
    value = sums / total
    backward([value], [None])
    if leaf.grad is None:
        raise _no_gradient(loss)
    weights = torch.nn.functional.pad(leaf.grad[..., 1:], (0, 1)).view(-1)  # back to where the logits are

    random.restore()  # dropout before the head draws the numbers of the first sweep

    def end_of(part: Tensor, labels: Tensor, where: slice) -> tuple[Tensor, Tensor]:
        again = engine.head.chunk_log_probabilities(part, labels, template, batch)
        return again, weights[where].view(again.shape)

    hidden_gradient = differentiate_head(engine, hidden, labels_on_host, end_of)
    return Losses([(value.detach(), 1.0)], reported), hidden_gradient


def score_hidden(engine: "Engine", hidden: Tensor, labels_on_host: Tensor, template: Any, batch: Batch) -> Tensor:
    """Log-probabilities fp32 [batch, tokens], each at the place of the logits that give it."""
    found = torch.zeros(labels_on_host.shape, dtype=torch.float32, device=hidden.device)
    for part, labels, where in engine.head.chunks(hidden, labels_on_host):
        with engine.weights.holding(engine.head.logits_bytes(labels.numel())), engine.executor.direct():
            # with gradients, where they are on: what PyTorch folds depends on it, and so do last bits
            leaf = part.detach().requires_grad_()
            scores = engine.head.chunk_log_probabilities(leaf, labels, template, batch).detach()
            found.view(-1)[where] = scores.view(-1)
            del leaf, scores
    return found


def at_labels(found: Tensor, *, shifted: bool) -> Tensor:
    """What is at the place of the logits, at the place of the labels."""
    return torch.nn.functional.pad(found[..., :-1], (1, 0)) if shifted else found


def evaluate_loss(loss: TokenLoss, found: Tensor, targets: Tensor, entries: Batch) -> tuple[Tensor, Reported]:
    """Raises ConfigError where the loss is not as it must be."""
    result = loss(found, targets, entries)
    name = type(loss).__name__
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise ConfigError(f"loss: {name} returned {type(result).__name__}; it must return (sum, what it reports)")
    sums, reported = result
    if not isinstance(sums, Tensor) or sums.ndim:
        shape = list(sums.shape) if isinstance(sums, Tensor) else type(sums).__name__
        raise ConfigError(f"loss: {name} returned {shape} as its sum; it must be a tensor of one number")
    if not sums.requires_grad:
        raise _no_gradient(loss)
    return sums, {key: torch.as_tensor(value).detach() for key, value in reported.items()}


def _no_gradient(loss: TokenLoss) -> ConfigError:
    return ConfigError(f"loss: the sum that {type(loss).__name__} returned has no gradient by the log-probabilities")


def run_whole_under(
    loss: TokenLoss, functions: LossFunctions, engine: "Engine", batch: Batch, units: float
) -> tuple[Tensor, Reported]:
    """(the micro-batch's loss, with what the model adds to it; what the loss reports), with whole logits."""
    given, own = split_batch(loss, batch)
    results: list[tuple[Tensor, Reported]] = []

    def of_logits(logits: Tensor) -> Tensor:
        entries = moved_arguments({**given, **own}, logits.device)
        scores = whole_log_probabilities(engine, logits, entries["labels"])
        targets = target_mask(entries["labels"], shifted=engine.shifts_labels)
        sums, reported = evaluate_loss(loss, scores, targets, entries)
        results.append((sums / units, reported))
        return results[-1][0]

    with functions.replaced(of_logits):
        output = engine.model(**given)
    if not results:  # the model has a loss of its own, which is left aside
        return of_logits(logits_of(output)), results[0][1]
    if len(results) > 1:
        raise UnsupportedModelError(
            f"{type(engine.model).__name__} calls its loss_function {len(results)} times; a loss of one's own has to"
            " take its place exactly once"
        )
    return loss_of(output), results[0][1]


def whole_log_probabilities(engine: "Engine", logits: Tensor, labels: Tensor) -> Tensor:
    """At the places of `labels`. Raises ConfigError where the logits are of other places."""
    shifted = engine.shifts_labels and labels.ndim > 1
    if logits.shape[:-1] != labels.shape:
        raise ConfigError(f"the model gives {list(logits.shape)} logits for labels of shape {list(labels.shape)}")
    found = label_log_probabilities(logits, shift_labels(labels) if shifted else labels)
    return at_labels(found, shifted=shifted)


def log_probabilities(engine: "Engine", batch: Batch) -> Tensor:
    """See `Engine.log_probabilities`."""
    with torch.no_grad():
        if engine.head.reason is None:
            try:
                with engine.executor.evaluation():
                    return _chunked_log_probabilities(engine, batch)
            except InseparableLossError:  # of this batch; whether training gives chunks up is its own business
                pass
        with engine.executor.evaluation():
            with engine.attachment.root.caches_off():
                logits = logits_of(engine.model(**batch))
            return whole_log_probabilities(engine, logits, batch["labels"].to(logits.device))


def _chunked_log_probabilities(engine: "Engine", batch: Batch) -> Tensor:
    labels_on_host, batch = batch["labels"].cpu(), on_device(batch, engine.device.torch_device)
    hidden, template = engine.head.hidden_states(batch)
    found = score_hidden(engine, hidden, labels_on_host, template, batch)
    return at_labels(found, shifted=True)
