"""What mixes tokens going back has to see the gradient of the whole sequence, as what mixes them going forward does."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine_toys import Net, make_batch, make_engine
from test_sequence_chunks import PART, TOKENS, Residual, Wide
from torch import Tensor, nn


class _ToUnitNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient / gradient.norm()


class OwnBackward(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_ToUnitNorm.apply(x))  # type: ignore[no-untyped-call]


class TensorHook(Wide):
    def forward(self, x: Tensor) -> Tensor:
        wide = self.up(x)
        if wide.requires_grad:
            wide.register_hook(lambda gradient: gradient / gradient.norm())
        return self.down(torch.nn.functional.silu(wide))


class BackwardPreHook(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.down.register_full_backward_pre_hook(lambda module, given: (given[0] / given[0].norm(),))


class BySequences(Wide):
    """Several sequences share something; one has nothing to share."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=(0, 1), keepdim=True) if x.shape[0] > 1 else x)


@pytest.mark.parametrize("inner", [OwnBackward, TensorHook, BackwardPreHook, BySequences])
def test_what_mixes_tokens_only_going_back_or_only_in_batches_runs_whole(inner: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Net(lambda: Residual(inner))
    results = []
    for each, setting in ((copy.deepcopy(model), None), (model, PART)):
        with make_engine(each, sequence_chunk_tokens=setting, clip_norm=None) as engine:
            stats = [engine.train_step([make_batch(step, length=TOKENS)]) for step in range(4)]
            results.append([s.loss for s in stats])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


class Settings:
    def __init__(self) -> None:
        self.mixes = False


class ByItsSettings(Wide):
    """What it reads is in an object, a mapping or a list that stays the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.options, self.steps = Settings(), {"mixes": False}, [torch.nn.functional.silu]

    def forward(self, x: Tensor) -> Tensor:
        mixes = self.settings.mixes or self.options["mixes"] or self.steps[0] is not torch.nn.functional.silu
        return super().forward(x - x.mean(dim=1, keepdim=True) if mixes else x)


@pytest.mark.parametrize("where", ["settings", "options", "steps"])
def test_what_is_switched_between_steps_is_judged_anew(where: str) -> None:
    torch.manual_seed(0)
    model = Net(lambda: Residual(ByItsSettings))
    results = []
    for each, setting in ((copy.deepcopy(model), None), (model, PART)):
        with make_engine(each, sequence_chunk_tokens=setting, clip_norm=None) as engine:
            losses = []
            for step in range(4):
                if step == 2:
                    for module in (m for m in each.modules() if isinstance(m, ByItsSettings)):
                        module.settings.mixes |= where == "settings"
                        module.options["mixes"] |= where == "options"
                        module.steps[0] = torch.sin if where == "steps" else module.steps[0]
                losses.append(engine.train_step([make_batch(step, length=TOKENS)]).loss)
            results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-6)
