"""Engine and plain PyTorch side by side on one model: where they differ, step by step."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
from reference import (
    PlainTrainer,
    UnitInputs,
    gradient_differences,
    largest_relative_difference,
    placed,
    plain_norm,
    weight_differences,
)
from torch import nn

import megatrain as mt

LENGTHS = (12, 17, 9)  # of the three micro-batches; the second has padded rows
SEED = 7
HYPER = {"lr": 1e-3, "weight_decay": 0.1}

Batches = list[dict[str, Any]]


@dataclass
class Comparison:
    """Differences found; empty lists mean equal to the last bit. After the first step with one, nothing more is run.

    `relative`: the largest difference of a gradient in that step (see `largest_relative_difference`).
    """

    name: str
    parameters: int = 0
    units: int = 0
    head: str = "chunked"
    caches_off: bool = False  # the engine had to run the model without its caches
    differences: list[str] = field(default_factory=list)
    relative: float = 0.0
    several_readers: dict[str, int] = field(default_factory=dict)  # see UnitInputs
    several_calls: dict[str, int] = field(default_factory=dict)
    read_outside: list[str] = field(default_factory=list)  # parameters of units, read without calling their unit

    @property
    def equal(self) -> bool:
        return not self.differences

    @property
    def only_gradients(self) -> bool:
        """Whether loss and buffers are equal (norm and weights follow from gradients)."""
        return all(re.match(r"step \d+: (norm|gradient|weight) ", d) for d in self.differences)

    def __str__(self) -> str:
        shown = [f"  {d}" for d in self.differences[:20]]
        if len(self.differences) > 20:
            shown.append(f"  ... and {len(self.differences) - 20} more")
        where = f"{self.name}: {len(self.differences)} differences (head: {self.head}, {self.units} units)"
        return "\n".join([where, *shown])


def compare(
    model_type: str,
    *,
    steps: int,
    micro_batches: int | Sequence[int],
    dropout: bool = True,
    **options: Any,
) -> Comparison:
    """Train a model of the zoo both ways, with masked labels; options as for `compare_models`.

    micro_batches: how many of LENGTHS, or which.
    """
    chosen = range(micro_batches) if isinstance(micro_batches, int) else micro_batches
    plain = zoo.build(model_type, dropout=dropout)

    def batches(step: int) -> Batches:
        return [
            zoo.make_batch(plain, model_type, seed=100 * step + n, length=LENGTHS[n], padded=n == 1) for n in chosen
        ]

    return compare_models(
        plain, zoo.build(model_type, dropout=dropout), batches, steps=steps, name=model_type, **options
    )


def compare_models(
    plain: nn.Module,
    mine: nn.Module,
    batches: Callable[[int], Batches],
    *,
    steps: int,
    name: str = "",
    clip_norm: float | None = 0.5,
    threads: int = 1,
    keep_graphs: str | int = "off",
    fenced: bool = False,
    use_cache: bool | None = None,
    device: Any = "cpu",
    kernels: str = "torch",
    sequence_chunk_tokens: int | str | None = "auto",
    freeze: Sequence[str] = (),
) -> Comparison:
    """Train two equal models for `steps`, `plain` in plain PyTorch and `mine` by the engine, with weight decay.

    threads:     of the optimizer's kernels.
    keep_graphs: the engine's setting; "off" recomputes every unit, a large number none.
    fenced:      plain adds up what one call of a unit contributes before it adds different calls (`UnitInputs`).
    use_cache:   sets the plain model's configuration; None leaves it at its default.
    device, kernels, sequence_chunk_tokens: the engine's.
    freeze:      the engine's; parameters of the plain model that a pattern finds require no gradient.
    """
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(not any(re.search(pattern, name) for pattern in freeze))
    with quiet():
        engine = mt.Engine(
            mine,
            mt.AdamW(**HYPER),
            device=device,
            precision="fp32",
            clip_norm=clip_norm,
            seed=SEED,
            threads=threads,
            keep_graphs=keep_graphs,
            kernels=kernels,
            sequence_chunk_tokens=sequence_chunk_tokens,
            freeze=freeze,
        )
    try:
        return _compare(plain, engine, batches, steps, name, clip_norm, fenced, use_cache)
    finally:
        engine.close()


def _compare(
    plain: nn.Module,
    engine: Any,
    batches: Callable[[int], Batches],
    steps: int,
    name: str,
    clip_norm: float | None,
    fenced: bool,
    use_cache: bool | None,
) -> Comparison:
    found = Comparison(name, sum(p.numel() for p in plain.parameters()), len(engine.partition.units))
    if engine.head.reason is not None:
        found.head = f"whole ({engine.head.reason})"
    if use_cache is not None:
        for module in plain.modules():
            _set_use_cache(getattr(module, "config", None), use_cache)
    first = batches(0)
    # one micro-batch needs no help with tied weights: autograd's order is the engine's
    trainer = PlainTrainer(
        plain,
        **HYPER,
        clip_norm=clip_norm,
        seed=SEED,
        whole_loss=engine.head.reason is not None,
        untie=len(first) > 1,
    )
    where = engine.device.torch_device
    plain.to(where)
    outside = _watch_leaves(engine)
    watch = UnitInputs(plain, [unit.name for unit in engine.partition.units], fenced=fenced)
    for step in range(steps):
        given = first if step == 0 else batches(step)
        theirs = placed([copy.deepcopy(b) for b in given], where)
        loss = trainer.backward(theirs, engine.shifts_labels, each=watch.end_micro_batch)
        stats = engine.train_step(given)
        found.differences += _differences(f"step {step}", plain, engine, trainer, loss, stats)
        if engine.keeps_gradients:
            found.relative = largest_relative_difference(plain, engine)
        trainer.update(stats.grad_norm)
        found.differences += [f"step {step}: weight {n}" for n in weight_differences(plain, engine)]
        found.differences += [
            f"step {step}: buffer {n}"
            for (n, a), (_, b) in zip(plain.named_buffers(), engine.model.named_buffers(), strict=True)
            if not torch.equal(a, b)
        ]
        if not found.equal:
            break
    found.caches_off = engine.attachment.root._caches_off
    found.several_readers, found.several_calls = watch.several_readers, watch.several_calls
    found.read_outside = sorted(outside)
    return found


def _watch_leaves(engine: Any) -> set[str]:
    """Names of parameters homed in a unit whose gradient autograd brings directly, filled during steps."""
    found: set[str] = set()
    own = engine.gradients.add_from_leaf

    def add(slot: int, gradient: torch.Tensor) -> None:
        if engine.store.slots[slot].unit >= 0:
            found.add(engine.store.slots[slot].slot.name)
        own(slot, gradient)

    engine.gradients.add_from_leaf = add
    return found


def _differences(
    where: str, plain: nn.Module, engine: Any, trainer: PlainTrainer, loss: float, stats: Any
) -> Iterator[str]:
    norm = plain_norm(plain)
    if stats.loss != loss:
        yield f"{where}: loss {stats.loss!r}, plain {loss!r}"
    if abs(stats.grad_norm - norm) > 1e-12 * norm:
        yield f"{where}: norm {stats.grad_norm}, plain {norm}"
    if not engine.keeps_gradients:
        return  # they were used as they came; the weights show them
    for difference in gradient_differences(plain, engine):
        yield f"{where}: gradient of {difference}"


def _set_use_cache(config: Any, value: bool) -> None:
    if config is not None and "use_cache" in config.__dict__:
        config.use_cache = value


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
