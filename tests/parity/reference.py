"""The same training step in plain PyTorch: what the engine's results are compared with, bit for bit.

Micro-batches run one after the other through the unpatched model, gradients accumulate in `.grad`, the loss is
normalised by the target tokens of all micro-batches, and torch's fused AdamW updates the weights. Of the engine only
three conventions are taken: the seed of a micro-batch's random stream, the norm from which the clipping coefficient
is computed, and that an auxiliary loss (a mean) counts by its micro-batch's share of the target tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.engine.engine import stream_seed

Batch = Mapping[str, Any]


class TiedWeights:
    """Parameters held in several places of `model`, given a parameter per place so that each place's gradient is seen.

    fp32 addition is not associative: autograd adds a micro-batch's contributions first, the engine adds place by
    place (the head's of all micro-batches, then the embedding's). `combine` adds in the engine's order.
    """

    def __init__(self, model: nn.Module) -> None:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for owner in model.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((owner, name))
        self.groups: list[list[nn.Parameter]] = []
        for where in places.values():
            if len(where) > 1:
                first = where[0][0]._parameters[where[0][1]]
                copies = [nn.Parameter(first.detach().clone()) for _ in where[1:]]
                for (owner, name), copy in zip(where[1:], copies, strict=True):
                    owner._parameters[name] = copy
                self.groups.append([first, *copies])
        self._collected: list[list[list[Tensor]]] = [[[] for _ in group] for group in self.groups]

    def collect(self) -> None:
        """After a micro-batch's backward: take the places' gradients."""
        for group, found in zip(self.groups, self._collected, strict=True):
            for parameter, gradients in zip(group, found, strict=True):
                if parameter.grad is not None:
                    gradients.append(parameter.grad)
                    parameter.grad = None

    def combine(self) -> None:
        """After the step's last backward: `.grad` of the first place is the sum, the other places have none."""
        for group, found in zip(self.groups, self._collected, strict=True):
            for gradients in reversed(found):
                for gradient in gradients:
                    group[0].grad = gradient if group[0].grad is None else group[0].grad + gradient
                gradients.clear()

    def spread(self) -> None:
        """After the update: all places hold the first one's value."""
        with torch.no_grad():
            for first, *copies in self.groups:
                for copy in copies:
                    copy.copy_(first)

    def copies(self) -> set[int]:
        return {id(p) for group in self.groups for p in group[1:]}


class PlainTrainer:
    """Plain PyTorch on `model`. `whole_loss`: the model's own mean loss times the share, where its head cannot be run
    apart from its base."""

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float, clip_norm: float | None, seed: int, whole_loss: bool
    ) -> None:
        self.model = model
        self.clip_norm = clip_norm
        self.seed = seed
        self.whole_loss = whole_loss
        self.tied = TiedWeights(model)
        copies = self.tied.copies()
        trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in copies]
        self.padded = {parameter: _padded(parameter) for parameter in trainable}
        groups = [
            {"params": [self.padded[p] for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [self.padded[p] for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True
        )
        self.step_count = 0

    def backward(self, batches: Sequence[Batch], shifted: bool = True) -> float:
        """Loss of the step; gradients are in `.grad` afterwards."""
        counts = [count_targets(batch["labels"], shifted) for batch in batches]
        total, loss = sum(counts), 0.0
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            torch.manual_seed(stream_seed(self.seed, self.step_count, number))
            if self.whole_loss:
                mean = self.model(**batch).loss
                loss += mean.item() * (count / total)
                mean.backward(torch.full_like(mean, count / total))
            else:
                loss += self._backward_split(batch, count, total)
            self.tied.collect()
        self.tied.combine()
        return loss

    def _backward_split(self, batch: Batch, count: int, total: int) -> float:
        """Cross entropy normalised over the global batch, and the auxiliary loss by the micro-batch's share."""
        own = self.model.loss_function
        found: list[Tensor] = []

        def globally_normalised(*args: Any, **kwargs: Any) -> Tensor:
            kwargs["num_items_in_batch"] = total
            found.append(own(*args, **kwargs))
            return torch.zeros((), dtype=torch.float32)

        self.model.loss_function = globally_normalised
        try:
            rest = self.model(**batch).loss
        finally:
            self.model.loss_function = own
        (cross_entropy,) = found
        losses, gradients, value = [cross_entropy], [torch.ones_like(cross_entropy)], cross_entropy.item()
        if rest.requires_grad:
            losses.append(rest)
            gradients.append(torch.full_like(rest, count / total))
            value += rest.item() * (count / total)
        torch.autograd.backward(losses, gradients)
        return value

    def update(self, norm: float) -> None:
        """Clip by the coefficient that follows from `norm`, and step."""
        limit = float("inf") if self.clip_norm is None else self.clip_norm
        coefficient = torch.tensor(min(1.0, limit / (norm + 1e-6)), dtype=torch.float32)
        for parameter, padded in self.padded.items():
            padded.grad = None if parameter.grad is None else _padded(parameter.grad * coefficient)
            parameter.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for parameter, padded in self.padded.items():
                parameter.copy_(padded[: parameter.numel()].view_as(parameter))
        self.tied.spread()
        self.step_count += 1


def _padded(tensor: Tensor) -> Tensor:
    """Flat, with zeros up to whole vectors. torch's fused AdamW rounds the last few elements of a tensor differently
    (a scalar loop, whose length depends on the CPU's vector width); the engine rounds all of them alike."""
    flat = tensor.detach().reshape(-1)
    return nn.functional.pad(flat, (0, -flat.numel() % 64)).clone()


def count_targets(labels: Tensor, shifted: bool = True) -> int:
    return int(((labels[..., 1:] if shifted and labels.ndim > 1 else labels) != -100).sum())


def plain_norm(model: nn.Module) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


def gradient_differences(plain: nn.Module, engine: Any) -> list[str]:
    """Parameters whose gradients differ between `plain.grad` and what `engine` keeps, with the largest difference."""
    kept = kept_gradients(engine)
    differences = []
    for name, parameter in plain.named_parameters():
        if name not in dict(engine.model.named_parameters()):
            continue  # a tied place, given a parameter of its own
        mine = kept.get(name)
        if (parameter.grad is None) != (mine is None):
            who = "engine has one, plain none" if parameter.grad is None else "plain has one, engine none"
            differences.append(f"{name}: {who}")
        elif mine is not None and not torch.equal(mine, parameter.grad):
            largest = (mine - parameter.grad).abs().max().item()
            relative = largest / max(parameter.grad.abs().max().item(), 1e-30)
            differences.append(f"{name}: {largest:.2e} ({relative:.1e} of the largest)")
    return differences


def kept_gradients(engine: Any) -> dict[str, Tensor]:
    """Gradients of the last `train_step` by parameter name, for an engine with global clipping."""
    return {
        entry.slot.name: entry.view(entry.slab.gradient)
        for entry in engine.store.slots.values()
        if entry.slot.index in engine.last_touched
    }


def weight_differences(plain: nn.Module, engine: Any) -> list[str]:
    engine.flush()
    mine = dict(engine.model.named_parameters())
    return [n for n, p in plain.named_parameters() if n in mine and not torch.equal(p, mine[n])]
