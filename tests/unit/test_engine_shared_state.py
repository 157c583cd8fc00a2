"""What the model leaves on its units' modules for them to find: recomputation finds it, micro-batches do not mix."""

import copy
from typing import Any

import pytest
import torch
from test_engine_toys import (
    Block,
    Net,
    Output,
    assert_trains_like_plain,
    batches_of,
    make_batch,
    make_engine,
    plain_trainer,
)
from torch import Tensor

from megatrain.errors import UnsupportedModelError


class Told(Block):
    """A block that reads what the model has set on it."""

    scale: Any = 1.0
    mode: str = "plain"

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * self.scale
        return y * 0.5 if self.mode == "half" else y


class Telling(Net):
    """Sets `what` on every block at the start of each forward."""

    def __init__(self, what: str, values: Any) -> None:
        super().__init__(Told)
        self.what, self.values = what, values
        for block in self.blocks:
            setattr(block, what, getattr(block, what))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        for block in self.blocks:
            setattr(block, self.what, self.values(input_ids))
        return super().forward(input_ids, labels)


def by_length(input_ids: Tensor) -> float:
    return input_ids.shape[1] / 5


def half_where_long(input_ids: Tensor) -> str:
    return "half" if input_ids.shape[1] > 6 else "plain"


def mask(input_ids: Tensor) -> Tensor:
    return (input_ids % 3 > 0).unsqueeze(-1).float()


TOLD = [("scale", by_length), ("mode", half_where_long), ("scale", mask)]


@pytest.mark.parametrize(("what", "values"), TOLD, ids=["number", "text", "tensor"])
def test_recomputation_finds_what_the_forward_found(what: str, values: Any) -> None:
    """Two forwards with different settings, then both backwards: the first recomputes under the second's setting."""
    model = Telling(what, values)
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model, clip_norm=None), plain_trainer(plain, clip_norm=None)
    short, long = make_batch(1, length=5), make_batch(2, rows=2, length=9)
    for net in (plain, engine.model):
        losses = [net(**batch).loss for batch in (short, long)]
        losses[0].backward()
        losses[1].backward()
    engine.step()
    trainer.update(1.0)
    engine.flush()
    for (name, expected), found in zip(plain.named_parameters(), engine.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(("what", "values"), TOLD, ids=["number", "text", "tensor"])
def test_one_micro_batch_a_step_trains_like_plain(what: str, values: Any) -> None:
    assert_trains_like_plain(Telling(what, values), micro_batches=1)


@pytest.mark.parametrize(("what", "values"), TOLD, ids=["number", "text", "tensor"])
def test_micro_batches_that_would_read_one_anothers_are_refused(what: str, values: Any) -> None:
    engine = make_engine(Telling(what, values))
    with pytest.raises(UnsupportedModelError, match=rf"the model sets Told\.{what} while it runs"):
        engine.train_step(batches_of(0, 3))
    engine.close()


def test_the_same_setting_for_all_is_not_refused() -> None:
    assert_trains_like_plain(Telling("scale", lambda _ids: 0.5), micro_batches=3)


def test_evaluation_mode_between_forward_and_backward_is_not_recomputed_in() -> None:
    model = Net(dropout=0.3)
    plain = copy.deepcopy(model)
    engine = make_engine(model, clip_norm=None)
    batch = make_batch(0)
    for net in (plain, engine.model):
        torch.manual_seed(5)
        loss = net(**batch).loss
        net.eval()
        loss.backward()
        assert not any(module.training for module in net.modules()), "eval() was undone"
        net.train()
    norm = float(engine.clip_grad_norm_(1e9))
    expected = sum(float((p.grad.double() ** 2).sum()) for p in plain.parameters()) ** 0.5
    assert abs(norm - expected) <= 1e-6 * expected


def test_a_units_own_tensors_are_not_kept_from_call_to_call() -> None:
    """A tensor that a unit assigns holds its call's graph; the record of what the next call found must not hold it."""

    class Remembers(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.last = y.mean()
            return y

    class Nets(Net):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return Output(super().forward(input_ids, labels).loss + sum(b.last for b in self.blocks))

    engine = assert_trains_like_plain(Nets(Remembers), micro_batches=1)
    kept = [value for block in engine._blocks for value in block.attributes._kept.values()]
    assert not any(isinstance(value, Tensor) for value in kept)
