"""What the model leaves on its units' modules for them to find: recomputation finds it, micro-batches do not mix."""

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_toys import (
    WIDTH,
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

from megatrain.engine.setup import move_buffers
from megatrain.errors import UnsupportedModelError
from megatrain.model.block import UnitCall


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
    kept = [value for block in engine.attachment.blocks for value in block.attributes._kept.values()]
    assert not any(isinstance(value, Tensor) for value in kept)


# -- what cannot be repeated is noticed, whatever it is ---------------------------------------------------


class InPlace(Block):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        self.factor.mul_(1.1)
        return super().forward(x) * self.factor


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.seen = [0.0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.seen[-1] + 0.1)
        return super().forward(x) * (1 + self.seen[-1])


class OwnGenerator(Block):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(x.shape, generator=self.generator)


class NumpyNoise(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(np.random.default_rng().random())


@pytest.mark.parametrize("block", [InPlace, Counting, OwnGenerator, NumpyNoise])
def test_a_unit_that_cannot_be_repeated_is_refused_by_name(block: Any) -> None:
    engine = make_engine(Net(block), keep_graphs="off")
    with pytest.raises(UnsupportedModelError, match=r"unit blocks\.1: .*(another result|puts tensors)"):
        engine.train_step([make_batch(0)])
    engine.close()


class SideBySide(Net):
    """Blocks that all read the embedding: when one of them is refused, autograd has the others still to do."""

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return sum(block(x) for block in self.blocks)  # type: ignore[return-value]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_refused_step_leaves_nothing_of_its_graph_behind(micro_batches: int) -> None:
    """Neither held by this thread nor by those of the micro-batches, which could not free it while Python ends."""
    engine = make_engine(SideBySide(OwnGenerator, count=3), keep_graphs="off")
    with pytest.raises(UnsupportedModelError, match="another result"):
        engine.train_step(batches_of(0, micro_batches))
    gc.collect()
    assert not [
        found for found in gc.get_objects() if isinstance(found, UnitCall) and found.block.host is engine.executor
    ]


class WithBuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class TellingBuffers(Telling):
    def __init__(self, values: Any) -> None:
        Net.__init__(self, WithBuffer)
        self.what, self.values = "scale", values


def none_or_mask(input_ids: Tensor) -> Any:
    return mask(input_ids) if input_ids.shape[1] > 6 else None


class TupleOrNothing(Told):
    def forward(self, x: Tensor) -> Tensor:
        factor = self.scale[0] if isinstance(self.scale, tuple) else 1.0 if self.scale is None else self.scale
        return Block.forward(self, x) * factor


@pytest.mark.parametrize("kind", ["buffer", "none", "tuple"])
def test_other_kinds_of_settings_are_found_again_too(kind: str) -> None:
    if kind == "buffer":
        model: Net = TellingBuffers(mask)
    else:
        values = none_or_mask if kind == "none" else (lambda ids: (mask(ids),))
        model = Telling("scale", values)
        for block in model.blocks:
            block.__class__ = TupleOrNothing
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model, clip_norm=None), plain_trainer(plain, clip_norm=None)
    for net in (plain, engine.model):
        losses = [net(**batch).loss for batch in (make_batch(1, length=5), make_batch(2, length=9))]
        for loss in losses:
            loss.backward()
    engine.step()
    trainer.update(1.0)
    engine.flush()
    for expected, found in zip(plain.parameters(), engine.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


class UsersCache:
    """Looks like a cache and is none of transformers'."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []


class Caching(Block):
    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        cache.states.append(x.detach())
        return super().forward(x) + len(cache.states)


class Calls(Block):
    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        return super().forward(x) * cache(x)


class Summing:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> float:
        self.calls += 1
        return 1.0 / self.calls


@pytest.mark.parametrize(("block", "make"), [(Caching, UsersCache), (Calls, Summing)])
def test_objects_with_a_state_are_refused_as_arguments(block: Any, make: Any) -> None:
    class Passing(Net):
        def hidden(self, input_ids: Tensor) -> Tensor:
            x, shared = self.embed(input_ids), make()
            for one in self.blocks:
                x = one(x, cache=shared)
            return x

    with pytest.raises(UnsupportedModelError, match=rf"unit blocks\.0: argument .*{make.__name__}"):
        make_engine(Passing(block)).train_step([make_batch(0)])


class Recurrent(Block):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = torch.nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rnn(super().forward(x))[0]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_recurrent_layers_of_torch_train(micro_batches: int) -> None:
    assert_trains_like_plain(Net(Recurrent), micro_batches=micro_batches)


class Consuming(Block):
    """Uses up what the model leaves for it."""

    def forward(self, x: Tensor) -> Tensor:
        left = self.left
        del self.left
        return super().forward(x) * (left[0] if isinstance(left, list) else left)


class Leaving(Net):
    def __init__(self, make: Any) -> None:
        super().__init__(Consuming)
        self.make = make

    def hidden(self, input_ids: Tensor) -> Tensor:
        for block in self.blocks:
            block.left = self.make(input_ids)
        return super().hidden(input_ids)


@pytest.mark.parametrize("make", [lambda ids: 0.5, lambda ids: mask(ids)], ids=["number", "tensor"])
def test_an_attribute_that_the_block_deletes_is_found_by_recomputation(make: Any) -> None:
    model = Leaving(make)
    assert_trains_like_plain(model, keep_graphs="off")
    assert not any(hasattr(block, "left") for block in model.blocks)


def test_a_list_that_the_block_deletes_is_refused_by_name() -> None:
    engine = make_engine(Leaving(lambda ids: [0.5]), keep_graphs="off")
    with pytest.raises(UnsupportedModelError, match=r"unit blocks\.0: its forward deletes the attribute left"):
        engine.train_step([make_batch(0)])


class ForgettingABuffer(WithBuffer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        del self.scale
        return y


def test_a_buffer_that_the_block_deletes_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"unit blocks\.0: its forward removed the buffer scale"):
        make_engine(Net(ForgettingABuffer)).train_step([make_batch(0)])


def test_a_buffer_that_modules_share_stays_one_when_it_is_cast_or_moved() -> None:
    model = Net(count=3)
    shared, own = torch.ones(4), torch.zeros(4)
    for block in model.blocks:
        block.register_buffer("shared", shared)
    model.blocks[0].register_buffer("own", own)
    engine = make_engine(model, precision="bf16")
    assert model.blocks[0].shared.dtype == torch.bfloat16
    for device in ("cpu", "meta"):
        move_buffers(model, torch.device(device))
        assert model.blocks[0].shared is model.blocks[1].shared is model.blocks[2].shared
        assert model.blocks[0].own is not model.blocks[0].shared and model.blocks[0].own.device.type == device
    engine.close()
