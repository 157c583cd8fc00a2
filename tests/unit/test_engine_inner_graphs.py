"""Blocks that differentiate, checkpoint or script a part of themselves."""

import gc
from functools import partial
from typing import Any

import pytest
import torch
from test_engine_toys import WIDTH, Block, Net, assert_trains_like_plain, make_batch, make_engine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatrain.engine.kept_graphs import GraphMeter
from megatrain.errors import UnsupportedModelError

# -- torch.autograd.grad inside a forward ----------------------------------------------------------------------------


class Force(Block):
    """Adds the gradient of an energy of its input, as force fields do."""

    def forward(self, x: Tensor) -> Tensor:
        place = x.detach().requires_grad_()
        energy = self.down(torch.tanh(self.up(place))).pow(2).sum()
        (force,) = torch.autograd.grad(energy, place, create_graph=True)
        return super().forward(x) - 0.1 * force


class Guided(Block):
    """Moves along a gradient that is itself not differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        place = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.up(place).pow(3).sum(), place)
        return super().forward(x + 0.01 * slope)


@pytest.mark.parametrize("settings", [{}, {"keep_graphs": "off"}, {"keep_graphs": 2}], ids=repr)
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("block", [Force, Guided])
def test_a_block_may_differentiate_inside_its_forward(block: Any, micro_batches: int, settings: Any) -> None:
    assert_trains_like_plain(Net(block), micro_batches=micro_batches, **settings)


def test_a_block_may_differentiate_where_weights_stream() -> None:
    assert_trains_like_plain(Net(Force), micro_batches=2, device="lagged")


class Penalised(Block):
    penalised = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.penalised:
            return y
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope.pow(2).sum()


def test_a_block_that_begins_to_differentiate_later_is_refused_once() -> None:
    model = Net(Penalised)
    engine = make_engine(model, keep_graphs="off")
    engine.train_step([make_batch(0)])
    for block in model.blocks:
        block.penalised = True
    for number in range(2):
        with pytest.raises(UnsupportedModelError, match=rf"unit blocks\.{number}: .*run the step again"):
            engine.train_step([make_batch(0)])
    assert not engine.train_step([make_batch(0)]).skipped


class CallsBackward(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.up(x.detach()).sum().backward()
        return super().forward(x)


@pytest.mark.parametrize("keep", ["off", 2])
def test_backward_inside_a_forward_is_refused_by_name(keep: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"unit blocks\.0: it calls backward\(\) in its forward"):
        make_engine(Net(CallsBackward), keep_graphs=keep).train_step([make_batch(0)])


class KeepsItsGraph(Block):
    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = (kept,)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.kept[0].append(y)
        return y


def test_differentiating_a_tensor_that_a_block_kept_names_the_block() -> None:
    kept: list[Any] = []
    model = Net(lambda: KeepsItsGraph(kept))
    make_engine(model, keep_graphs="off")
    model(**make_batch(0))
    with pytest.raises(UnsupportedModelError, match=r"unit blocks\.1: .*differentiated past it"):
        kept[1].sum().backward()


def test_tensors_that_the_first_step_measured_are_let_go() -> None:
    """Graph, hook and measured tensors held one another, which no garbage collector sees."""
    before = {id(found) for found in gc.get_objects() if isinstance(found, GraphMeter)}
    engine = make_engine(Net())
    engine.train_step([make_batch(0)])
    gc.collect()
    assert not [found for found in gc.get_objects() if isinstance(found, GraphMeter) and id(found) not in before]


# -- torch.utils.checkpoint inside a block ---------------------------------------------------------------------------


class Checkpointed(Block):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__(dropout=0.2)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("device", ["cpu", "lagged"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_checkpoint_inside_a_block_is_exact(micro_batches: int, device: str) -> None:
    model = Net(partial(Checkpointed, use_reentrant=False))
    assert_trains_like_plain(model, micro_batches=micro_batches, device=device)


@pytest.mark.parametrize("keep", ["off", 2])
def test_a_reentrant_checkpoint_is_refused_by_name(keep: Any) -> None:
    engine = make_engine(Net(partial(Checkpointed, use_reentrant=True)), keep_graphs=keep)
    with pytest.raises(UnsupportedModelError, match=r"unit blocks\.1: .*use_reentrant=True.*use_reentrant=False"):
        engine.train_step([make_batch(0)])


# -- torch.jit -------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class WithScript(Block):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = torch.jit.script(part)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.part(x))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: torch.jit.script(Plain()), r"blocks\.0"),
        (lambda: WithScript(Plain()), r"blocks\.0\.part"),
        (lambda: WithScript(nn.SiLU()), r"blocks\.0\.part"),
    ],
)
def test_scripted_modules_are_refused_by_name(make: Any, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"^{name}: it is made by torch\.jit\.script"):
        make_engine(Net(make))


class Shift(nn.Module):
    """Saves nothing for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Shifted(Block):
    def __init__(self) -> None:
        super().__init__()
        self.first = Shift()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


@pytest.mark.parametrize("keep_graphs", ["off", 2])
@pytest.mark.parametrize("inner", ["up", "first"])
def test_an_activation_that_a_hook_captured_names_the_block(inner: str, keep_graphs: Any) -> None:
    """Its gradient would not reach the weights; where the graph is kept, the block's own backward finds it used up."""
    model = Net(Shifted)
    engine = make_engine(model, keep_graphs=keep_graphs)
    engine.train_step([make_batch(0)])
    captured: list[Tensor] = []
    getattr(model.blocks[1], inner).register_forward_hook(lambda _m, _i, out: captured.append(out))
    loss = model(**make_batch(0)).loss + captured[0].sum()
    with pytest.raises(UnsupportedModelError, match=r"unit blocks\.1: .*differentiated past it"):
        loss.backward()
