"""Training on the device against plain PyTorch on it, with deterministic kernels."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from gpu_parts.bench import Bench
from harness.models import Model, batch_of, random_model, shape_of
from torch import Tensor, nn

from megatrain.engine.engine import Engine
from megatrain.optim.adamw import AdamW

CHECK_BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}  # of a gradient, relative to its largest element, and of the loss
_WEIGHT_BOUND = 1e-5


def run_check(bench: Bench) -> None:
    """Loss, gradients and updates of three steps against plain PyTorch on the same device.

    With tied weights a step has one micro-batch: of several, the engine adds gradients up in another order. In bf16
    autograd adds the two places of a tied weight in bf16, the engine in fp32, so those bits differ.
    """
    shape = shape_of(2, 32, 64, 4, 2, 8, 64) if bench.tiny else shape_of(4, 256, 512, 4, 2, 64, 1024)
    table = bench.table("Check against plain PyTorch", "", "loss", "gradient", "weight", "bound", "bits equal")
    with deterministic():
        for precision, bound in CHECK_BOUNDS.items():
            for tied in (False, True):
                differences, equal = _compare(bench, Model("llama", shape, tied), precision)
                ok = differences["loss"] <= bound and differences["gradient"] <= bound
                ok = ok and differences["weight"] <= _WEIGHT_BOUND
                name = f"{precision}{', tied' if tied else ''}"
                shown = [f"{differences[k]:.1e}" for k in ("loss", "gradient", "weight")]
                table.add_row(name, *shown, f"{bound:.0e}", "yes" if equal else "no")
                metrics = {k: (v, "relative") for k, v in differences.items()}
                bench.record("check", name, **metrics, bits_equal=(float(equal), "1: yes"))
                bench.failed |= not ok
    bench.console.print(table)
    if bench.failed:
        bench.say("The check failed: nothing else is run.")


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _compare(bench: Bench, kind: Model, precision: str) -> tuple[dict[str, float], bool]:
    """({loss, gradient, weight: largest relative difference}, whether loss and gradients have the same bits)."""
    mine = random_model(kind, torch.float32)
    plain = deepcopy(mine).to(bench.torch_device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if dtype is torch.bfloat16:
        plain = _in_bf16(plain)
    masters = {name: nn.Parameter(value.detach().clone()) for name, value in mine.named_parameters()}
    decayed = [p for p in masters.values() if p.ndim >= 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": [p for p in masters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    differences, equal = dict.fromkeys(("loss", "gradient", "weight"), 0.0), True
    device = bench.make_device(precision)
    settings: dict[str, Any] = {"clip_norm": 1.0, "threads": 1, "kernels": "torch"}
    with Engine(mine, AdamW(lr=1e-3, weight_decay=0.1), device, precision, **settings) as engine:
        weights = dict(plain.named_parameters())
        for step in range(3):
            for slot in engine.partition.slots:
                weights[slot.name].data.copy_(slot.parameter)
            every = (3,) if kind.tied else (1, 3, 2)
            batches = [batch_of(kind.shape.vocabulary, rows, 24 + 8 * rows, 10 * step + rows) for rows in every]
            with device.computing():  # on the host as device, products in bf16 as the engine computes them
                loss, gradients = _plain_step(plain, batches)
            stats = engine.train_step(batches)
            equal &= stats.loss == loss
            differences["loss"] = max(differences["loss"], abs(float(stats.loss or 0) - loss) / loss)
            scale = min(1.0, 1.0 / (stats.grad_norm + 1e-6))
            for entry in engine.store.slots.values():
                expected = gradients[entry.slot.name].to(dtype)
                assert entry.slab.gradient is not None
                found = entry.view(entry.slab.gradient)
                equal &= torch.equal(found, expected)
                differences["gradient"] = max(differences["gradient"], _relative(found, expected))
                masters[entry.slot.name].grad = found.float() * scale
            optimizer.step()
            engine.flush()
            for slot in engine.partition.slots:
                exact = engine.store.read_master(slot.index)
                differences["weight"] = max(differences["weight"], _relative(exact, masters[slot.name]))
    return differences, equal


def _in_bf16(model: nn.Module) -> nn.Module:
    """As the engine does: parameters rounded, tables that are not saved in the precision they were computed in."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.detach().float() - expected.detach().float()).abs().max()
    return float(difference / expected.detach().float().abs().max().clamp(min=1e-12))


def _plain_step(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients in fp32 on the host): the mean over all targets, one micro-batch after the other."""
    device = next(model.parameters()).device
    total = sum(batch["labels"][:, 1:].numel() for batch in batches)
    loss = 0.0
    sums: dict[str, Tensor] = {}
    for batch in batches:
        part = model(**{k: v.to(device) for k, v in batch.items()}, num_items_in_batch=total).loss
        part.backward()
        loss += part.item()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad.float(), None
                sums[name] = gradient if name not in sums else sums[name] + gradient
    return loss, {name: value.cpu() for name, value in sums.items()}
