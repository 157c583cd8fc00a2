"""What a user does to parameters and gradients by hand, under a loop of their own: as in plain PyTorch, or refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine_toys import (
    WIDTH,
    Net,
    Output,
    assert_free_loop_like_plain,
    batches_of,
    make_batch,
    make_engine,
    plain_trainer,
)
from torch import Tensor, nn

import megatrain as mt
from megatrain.errors import IntegrityError

# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_loop", [True, False])
def test_writing_between_steps_without_a_flush(own_loop: bool) -> None:
    model = Net()
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model), plain_trainer(plain)
    for step in range(3):
        trainer.backward([make_batch(step)])
        if own_loop:
            model(**make_batch(step)).loss.backward()
            stats = engine.step()
        else:
            stats = engine.train_step([make_batch(step)])
        trainer.update(stats.grad_norm)
        with torch.no_grad():
            for parameter in (*plain.parameters(), *trainer.padded.values(), *model.parameters()):
                parameter.clamp_(-0.2, 0.2)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def evaluate(engine: mt.Engine) -> None:
    with torch.no_grad():
        engine.model(**make_batch(1))


@pytest.mark.parametrize(
    "notice",
    [
        lambda engine: engine.flush(),
        lambda engine: engine.model.state_dict(),
        lambda engine: engine.model(**make_batch(1)),
        evaluate,
        lambda engine: engine.train_step([make_batch(1)]),
        lambda engine: engine.step(),
    ],
    ids=["flush", "state_dict", "forward", "evaluation", "train_step", "step"],
)
def test_write_beside_an_update_that_nobody_waited_for_is_refused(notice: Callable[[mt.Engine], Any]) -> None:
    """On a streaming device updates run beside the caller: whether this one had ended by then is chance."""
    engine = make_engine(Net(), device="lagged")
    engine.train_step([make_batch(0)])
    for unit in engine.store.units:
        engine.updates.settle(unit)  # it has, here
    with torch.no_grad():
        engine.model.head.weight.clamp_(-0.01, 0.01)
    with pytest.raises(IntegrityError, match=r"head.weight .*flush"):
        notice(engine)
    engine.close()


def test_write_after_a_flush_on_a_streaming_device() -> None:
    engine = make_engine(Net(), device="lagged")
    engine.train_step([make_batch(0)])
    engine.flush()
    with torch.no_grad():
        engine.model.head.weight.zero_()
    engine.train_step([make_batch(1)], lr=0.0)
    assert not engine.model.state_dict()["head.weight"].any()


class OwnMethod(Net):
    """Trained through a method of its own, which reads a parameter of the model itself and one of a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def loss_by_method(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.position
        for block in self.blocks:
            x = block(x)
        return self.loss(x @ self.embed.weight.T, labels)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        return Output(self.loss_by_method(input_ids, labels))


@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_own_method_reads_finished_updates(device: str) -> None:
    assert_free_loop_like_plain(OwnMethod(), lambda m, b: m.loss_by_method(**b), steps=4, device=device)


def test_evaluation_by_an_own_method_reads_finished_updates() -> None:
    model = OwnMethod()
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model), plain_trainer(plain)
    trainer.backward(batches_of(0, 1))
    trainer.update(engine.train_step(batches_of(0, 1)).grad_norm)
    with torch.no_grad():
        assert torch.equal(model.loss_by_method(**make_batch(1)), plain.loss_by_method(**make_batch(1)))
