"""The same training step in plain PyTorch: what the engine's results are compared with, bit for bit.

Micro-batches run one after the other through the unpatched model, gradients accumulate in `.grad`, the loss is
normalised by the target tokens of all micro-batches, and torch's fused AdamW updates the weights. Of the engine only
three conventions are taken: the seed of a micro-batch's random stream, the norm from which the clipping coefficient
is computed, and that an auxiliary loss (a mean) counts by its micro-batch's share of the target tokens.

A model may be moved to another device once it has its trainer: masters and moments stay on the host.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from megatrain.engine.random_streams import stream_seed

Batch = Mapping[str, Any]


def placed(batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    """`batches` on `device`."""
    moved: list[Batch] = tree_map_only(Tensor, lambda tensor: tensor.to(device), list(batches))
    return moved


class TiedWeights:
    """Parameters held in several places of `model`, given a parameter per place so that each place's gradient is
    seen.

    fp32 addition is not associative: autograd adds a micro-batch's contributions first, the engine adds place by
    place (the head's of all micro-batches, then the embedding's). `combine` adds in the engine's order: the place
    that was called last comes first.
    """

    def __init__(self, model: nn.Module) -> None:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for owner in model.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((owner, name))
        self.groups: list[list[nn.Parameter]] = []
        self._called: dict[int, int] = {}  # by id of parameter: when its owner was called first
        for where in places.values():
            if len(where) > 1:
                first = where[0][0]._parameters[where[0][1]]
                copies = [nn.Parameter(first.detach().clone(), first.requires_grad) for _ in where[1:]]
                for (owner, name), copy in zip(where[1:], copies, strict=True):
                    owner._parameters[name] = copy
                for (owner, _), parameter in zip(where, [first, *copies], strict=True):
                    owner.register_forward_pre_hook(self._note_call(parameter))
                self.groups.append([first, *copies])
        self._collected: list[list[list[Tensor]]] = [[[] for _ in group] for group in self.groups]

    def _note_call(self, parameter: nn.Parameter) -> Callable[..., None]:
        def note(*_: Any) -> None:
            self._called.setdefault(id(parameter), len(self._called))

        return note

    def collect(self) -> None:
        """After a micro-batch's backward: take the places' gradients."""
        for group, found in zip(self.groups, self._collected, strict=True):
            for parameter, gradients in zip(group, found, strict=True):
                if parameter.grad is not None:
                    gradients.append(parameter.grad)
                    parameter.grad = None

    def combine(self) -> None:
        """After the step's last backward: `.grad` of the first place is the sum, the other places have none."""
        for first, gradients in self.ordered():
            for gradient in gradients:
                first.grad = gradient if first.grad is None else first.grad + gradient
            gradients.clear()

    def ordered(self) -> Iterator[tuple[nn.Parameter, list[Tensor]]]:
        """(first place of the group, gradients of one of its places), the place that was called last first."""
        for group, found in zip(self.groups, self._collected, strict=True):
            pairs = zip(group, found, strict=True)
            for _, gradients in sorted(pairs, key=lambda pair: self._called.get(id(pair[0]), -1), reverse=True):
                yield group[0], gradients

    def spread(self) -> None:
        """After the update: all places hold the first one's value."""
        with torch.no_grad():
            for first, *copies in self.groups:
                for copy in copies:
                    copy.copy_(first)

    def copies(self) -> set[int]:
        return {id(p) for group in self.groups for p in group[1:]}


class UnitInputs:
    """Watches which tensors enter the modules `units` of a plain model, by name.

    With `fenced`, each call reads its tensors through a node of its own, so that autograd adds up what one call
    contributes to a tensor's gradient before it adds different calls together. That is the order in which an engine
    adds that runs every call as one node, and all that a fence changes.
    """

    def __init__(self, model: nn.Module, units: Sequence[str], *, fenced: bool = False) -> None:
        self.fenced = fenced
        self.several_calls: dict[str, int] = {}  # unit that is called several times in a micro-batch: how often
        self.several_readers: dict[str, int] = {}  # unit whose result several read, fenced only: how many
        self._calls: Counter[str] = Counter()
        self._makers: dict[int, str] = {}  # by tensor: the unit that returned it
        self._read_gradients: dict[int, list[Tensor]] = {}  # by tensor: one per call that read it
        self._alive: list[Tensor] = []  # so that ids stay theirs
        for name in units:
            module = model.get_submodule(name)
            module.forward = functools.wraps(module.forward)(functools.partial(self._run, name, module.forward))

    def end_micro_batch(self) -> None:
        """Forget the tensors."""
        for name, count in self._calls.items():
            if count > 1:
                self.several_calls[name] = max(self.several_calls.get(name, 0), count)
        self._calls, self._makers, self._read_gradients, self._alive = Counter(), {}, {}, []

    def _run(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._calls[name] += 1
        fences: dict[int, tuple[Tensor, Tensor]] = {}
        if self.fenced:
            args, kwargs = _map((args, kwargs), lambda t: self._fence(t, fences))
        back = {id(fence): tensor for fence, tensor in fences.values()}
        result = forward(*args, **kwargs)
        result = _map(result, lambda t: back.get(id(t), t))  # what is passed through is what came in
        _map(result, lambda t: self._made(name, t))
        return result

    def _fence(self, tensor: Tensor, fences: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        if id(tensor) not in fences:
            fence = tensor.view_as(tensor)
            fences[id(tensor)] = (fence, tensor)
            self._alive.append(tensor)
            if id(tensor) not in self._read_gradients:
                self._read_gradients[id(tensor)] = []
                tensor.register_hook(functools.partial(self._note_gradient, id(tensor)))
            fence.register_hook(self._read_gradients[id(tensor)].append)
        return fences[id(tensor)][0]

    def _note_gradient(self, tensor: int, whole: Tensor) -> None:
        parts = self._read_gradients[tensor]
        readers = len(parts)
        if readers == 1 and not torch.equal(parts[0], whole):
            readers = 2  # the model itself reads it too, outside of any unit
        if readers > 1:
            maker = self._makers.get(tensor, "the model itself")
            self.several_readers[maker] = max(self.several_readers.get(maker, 0), readers)

    def _made(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            self._alive.append(tensor)
            self._makers.setdefault(id(tensor), name)
        return tensor


def _map(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`tree` with `function` applied to the tensors in tuples, lists and models' outputs; other mappings stay as
    they are, because modules may write into them."""
    if isinstance(tree, Tensor):
        return function(tree)
    if type(tree) in (tuple, list):
        return type(tree)(_map(value, function) for value in tree)
    if type(tree) is dict:
        return {key: _map(value, function) if not isinstance(value, dict) else value for key, value in tree.items()}
    return tree


class PlainTrainer:
    """Plain PyTorch on `model`. `whole_loss`: the model's own mean loss times the share, where its head cannot be run
    apart from its base. `untie`: add up the gradients of tied weights place by place, for several micro-batches."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        clip_norm: float | None,
        seed: int,
        whole_loss: bool,
        untie: bool = True,
    ) -> None:
        self.model = model
        self.clip_norm = clip_norm
        self.seed = seed
        self.whole_loss = whole_loss
        self.tied = TiedWeights(model if untie else nn.Module())
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

    def backward(
        self, batches: Sequence[Batch], shifted: bool = True, each: Callable[[], None] = lambda: None
    ) -> float:
        """Loss of the step; gradients are in `.grad` afterwards. `each` is called after every micro-batch."""
        counts = [count_targets(batch["labels"], shifted) for batch in batches]
        total, loss = sum(counts), 0.0
        for number, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            torch.manual_seed(stream_seed(self.seed, self.step_count, number))
            if self.whole_loss:
                mean = self.model(**batch)["loss"]
                loss += mean.item() * (count / total)
                if mean.requires_grad:
                    mean.backward(torch.full_like(mean, count / total))
            else:
                loss += self._backward_split(batch, count, total)
            self.tied.collect()
            each()
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
        if cross_entropy.requires_grad:  # else all that this micro-batch reaches is frozen
            torch.autograd.backward(losses, gradients)
        return value

    def update(self, norm: float) -> None:
        """Clip by the coefficient that follows from `norm`, and step."""
        limit = float("inf") if self.clip_norm is None else self.clip_norm
        coefficient = torch.tensor(min(1.0, limit / (norm + 1e-6)), dtype=torch.float32)
        for parameter, padded in self.padded.items():
            gradient = None if parameter.grad is None else parameter.grad.float().to(padded.device)
            padded.grad = None if gradient is None else _padded(gradient * coefficient)
            parameter.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for parameter, padded in self.padded.items():
                value = padded[: parameter.numel()].view_as(parameter)
                parameter.copy_(value if parameter.dtype == torch.float32 else round_half_away(value))
        self.tied.spread()
        self.step_count += 1


class MasterTrainer(PlainTrainer):
    """Plain PyTorch on `model`, whose fp32 weights become masters of the bf16 weights that it then computes with.

    A parameter's gradients, bf16 as autograd makes them, are summed over micro-batches in fp32 and rounded once;
    AdamW updates the master, and the weight is the master rounded to bf16, halves away from zero. `keeps_fp32` names
    the parameters that stay in fp32.
    """

    def __init__(self, model: nn.Module, *, keeps_fp32: Callable[[str], bool], **settings: Any) -> None:
        super().__init__(model, **settings)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            if not keeps_fp32(name):
                parameter.data = round_half_away(parameter.data)
        for module in model.modules():  # tables that are not saved keep their precision
            for name, buffer in module._buffers.items():
                saved = name not in module._non_persistent_buffers_set
                if buffer is not None and saved and buffer.dtype == torch.float32:
                    module._buffers[name] = buffer.to(torch.bfloat16)
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._untied, self.tied = self.tied, self  # type: ignore[assignment]

    @property
    def masters(self) -> dict[str, Tensor]:
        """By parameter name, fp32."""
        return {self._names[p]: padded[: p.numel()].view_as(p) for p, padded in self.padded.items()}

    def collect(self) -> None:
        self._untied.collect()
        for parameter in self.padded:
            if parameter.grad is not None:
                self._sums[parameter] = _plus(self._sums.get(parameter), parameter.grad)
                parameter.grad = None

    def combine(self) -> None:
        for first, gradients in self._untied.ordered():
            for gradient in gradients:
                self._sums[first] = _plus(self._sums.get(first), gradient)
            gradients.clear()
        for parameter, total in self._sums.items():
            parameter.grad = total.to(parameter.dtype)
        self._sums = {}

    def spread(self) -> None:
        self._untied.spread()


def _plus(total: Tensor | None, gradient: Tensor) -> Tensor:
    return gradient.float() if total is None else total + gradient.float()


def round_half_away(tensor: Tensor) -> Tensor:
    """fp32 to bf16, halves away from zero (torch's own cast rounds halves to even)."""
    bits = tensor.detach().contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    upper = ((bits + 0x8000) >> 16) & 0xFFFF
    return upper.to(torch.uint16).view(torch.bfloat16)


def _padded(tensor: Tensor) -> Tensor:
    """Flat, with zeros up to whole vectors. torch's fused AdamW rounds the last few elements of a tensor differently
    (a scalar loop, whose length depends on the CPU's vector width); the engine rounds all of them alike."""
    flat = tensor.detach().reshape(-1)
    return nn.functional.pad(flat, (0, -flat.numel() % 64)).clone()


def count_targets(labels: Tensor, shifted: bool = True) -> int:
    return int(((labels[..., 1:] if shifted and labels.ndim > 1 else labels) != -100).sum())


def plain_norm(model: nn.Module) -> float:
    """In fp64: torch's own norm of a million fp32 numbers is off by 1e-6 and more."""
    squares = [float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None]
    return math.sqrt(math.fsum(squares))


def gradient_differences(plain: nn.Module, engine: Any) -> list[str]:
    """Parameters whose gradients differ between `plain.grad` and what `engine` keeps, with the largest difference."""
    kept = kept_gradients(engine)
    differences = []
    for name, parameter in plain.named_parameters():
        if name not in dict(engine.model.named_parameters()):
            continue  # a tied place, given a parameter of its own
        mine, theirs = kept.get(name), None if parameter.grad is None else parameter.grad.cpu()
        if (theirs is None) != (mine is None):
            who = "engine has one, plain none" if theirs is None else "plain has one, engine none"
            differences.append(f"{name}: {who}")
        elif mine is not None and theirs is not None and not torch.equal(mine, theirs):
            largest = (mine - theirs).abs().max().item()
            relative = largest / max(theirs.abs().max().item(), 1e-30)
            differences.append(f"{name}: {largest:.2e} ({relative:.1e} of the largest)")
    return differences


def largest_relative_difference(plain: nn.Module, engine: Any) -> float:
    """The largest difference of a gradient element, relative to the largest element of its parameter's gradient.

    A gradient that is zero but for rounding (a key's bias under softmax) has no scale of its own, so a tenth of the
    model's largest gradient element is the smallest scale.
    """
    kept = kept_gradients(engine)
    pairs = [(p.grad.cpu(), kept[n]) for n, p in plain.named_parameters() if n in kept and p.grad is not None]
    floor = 0.1 * max((float(grad.abs().max()) for grad, _ in pairs if grad.numel()), default=0.0)
    ratios = [float((a - b).abs().max()) / max(float(a.abs().max()), floor, 1e-30) for a, b in pairs if a.numel()]
    return max(ratios, default=0.0)


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
    return [n for n, p in plain.named_parameters() if n in mine and not torch.equal(p.cpu(), mine[n])]
