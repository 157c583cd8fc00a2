"""What a user does to parameters and gradients by hand, under a loop of their own: as in plain PyTorch, or refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import gradient_differences, plain_norm, weight_differences
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


# -- gradients ---------------------------------------------------------------------------------------------------------


class Positions(Net):
    """A parameter that belongs to no unit: autograd itself adds to its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.position
        for block in self.blocks:
            x = block(x)
        return x


def clip_by_torch(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)


def zero_a_submodule(model: nn.Module) -> None:
    model.blocks[1].zero_grad()


def zero_in_place(model: nn.Module) -> None:
    model.blocks[1].zero_grad(set_to_none=False)


def take_away(model: nn.Module) -> None:
    for parameter in model.blocks.parameters():
        parameter.grad = None


def set_by_hand(model: nn.Module) -> None:
    model.embed.weight.grad = torch.ones_like(model.embed.weight)


def write_into(model: nn.Module) -> None:
    model.embed.weight.grad.mul_(0.5)
    model.position.grad.neg_()
    model.blocks[0].up.weight.grad[0] += model.blocks[0].up.weight.grad[1]
    model.blocks[0].up.bias.grad.data.fill_(0.25)


BY_HAND = [clip_by_torch, zero_a_submodule, zero_in_place, take_away, set_by_hand, write_into]


@pytest.mark.parametrize("device", ["cpu", "lagged"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("act", BY_HAND)
def test_gradients_by_hand(act: Callable[[nn.Module], None], calls: int, device: str) -> None:
    """As in plain PyTorch: what is in `.grad` when `step` is called is what counts."""
    model = Positions()
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model, clip_norm=None, device=device), plain_trainer(plain, clip_norm=None)
    for step in range(3):
        for call in range(calls):
            plain(**make_batch(10 * step + call)).loss.backward()
            model(**make_batch(10 * step + call)).loss.backward()
        act(plain)
        act(model)
        stats = engine.step()
        assert stats.grad_norm == pytest.approx(plain_norm(plain), rel=1e-5)
        assert gradient_differences(plain, engine) == [], f"step {step}"
        trainer.update(stats.grad_norm)
        assert all(p.grad is None for p in model.parameters())
    assert weight_differences(plain, engine) == []


def test_clipping_by_torch_where_a_unit_and_the_model_read_one_parameter() -> None:
    model = OwnMethod()
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model, clip_norm=None), plain_trainer(plain, clip_norm=None)
    for step in range(3):
        for one in (plain, model):
            one(**make_batch(step)).loss.backward()
            clip_by_torch(one)
        trainer.update(engine.step().grad_norm)
    assert weight_differences(plain, engine) == []


def test_gradients_can_be_looked_at() -> None:
    model = Net()
    plain = copy.deepcopy(model)
    engine = make_engine(model)
    for call in range(2):
        for one in (plain, model):
            one(**make_batch(call)).loss.backward()
        for (name, mine), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert mine.grad is not None and theirs.grad is not None
            assert torch.equal(mine.grad, theirs.grad), name
            assert mine.grad.shape == theirs.grad.shape and mine.grad.norm() == theirs.grad.norm()
    engine.optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_gradients_taken_away_or_set_between_backward_calls(device: str) -> None:
    model = Positions()
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model, device=device), plain_trainer(plain)
    for one in (plain, model):
        one(**make_batch(0)).loss.backward()
        one.blocks[1].zero_grad()
        one.position.grad = None
        one.head.weight.grad = torch.ones_like(one.head.weight)
        one(**make_batch(1)).loss.backward()
        one.blocks[0].up.weight.grad = None
        one.position.grad = torch.ones_like(one.position)
        one(**make_batch(2)).loss.backward()
    stats = engine.step()
    assert gradient_differences(plain, engine) == []
    trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []


def test_gradients_from_before_the_take_over_are_dropped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    model(**make_batch(0)).loss.backward()
    engine = make_engine(model)
    assert "embed.weight and" in caplog.text and "dropped" in caplog.text
    assert engine.step().grad_norm == 0.0


def test_gradient_set_by_hand_without_a_backward() -> None:
    model = Net()
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model), plain_trainer(plain)
    for one in (plain, model):
        one.head.weight.grad = torch.ones_like(one.head.weight)
    trainer.update(engine.step().grad_norm)
    assert weight_differences(plain, engine) == []
    assert engine.store.slots[0].steps == 0


def test_hook_after_accumulation_is_refused() -> None:
    engine = make_engine(Net())
    engine.model.head.weight.register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(IntegrityError, match=r"head.weight .*hook"):
        engine.train_step([make_batch(0)])
