"""What systems share that train a transformers model in a loop of PyTorch's own."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from harness.models import Model, random_model
from torch import Tensor, nn

from rivals.interface import EPS, LEARNING_RATE, WEIGHT_DECAY, Batches, Settings

ADAMW = {"lr": LEARNING_RATE, "eps": EPS}


def contract_model(model: Model, settings: Settings, *, masters: bool = False) -> Any:
    """In the precision of computation, or in fp32 with the same numbers (`masters`); blocks checkpointed, no cache."""
    made: Any = random_model(model, settings.dtype)
    if masters:
        made = made.float()
    made.config.use_cache = False
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.kernels == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=made)
    return made


def kernels_missing(settings: Settings) -> str | None:
    if settings.kernels == "liger" and find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for vectors."""
    every = list(parameters)
    return [
        {"params": [p for p in every if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]


def count_target_tokens(batches: Batches) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def add_up_gradients(
    model: Callable[..., Any],
    batches: Batches,
    device: torch.device,
    backward: Callable[[Tensor], object] = Tensor.backward,
    after: Callable[[], None] = lambda: None,
) -> float:
    """The loss; each micro-batch is followed by `backward` and `after`."""
    total, losses = count_target_tokens(batches), []
    for batch in batches:
        inputs = {name: value.to(device) for name, value in batch.items()}
        loss = model(**inputs, num_items_in_batch=torch.tensor(total, device=device)).loss
        backward(loss)
        losses.append(loss.detach())
        after()
    return sum(loss.item() for loss in losses)
