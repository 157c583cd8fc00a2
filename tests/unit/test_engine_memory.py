"""What a step leaves behind in memory: nothing that it does not need later."""

import gc

from test_engine_random import tiny_llama
from test_engine_toys import Net, batches_of, make_batch, make_engine
from torch import Tensor

from megatrain.engine.executor import BACKWARD
from megatrain.engine.kept_graphs import GraphMeter


def meters() -> list[GraphMeter]:
    return [one for one in gc.get_objects() if isinstance(one, GraphMeter)]


def test_measuring_graphs_lets_go_of_them() -> None:
    """A meter that held tensors would be part of their graph, and that a cycle which no collector sees."""
    before = meters()  # of engines of other tests
    engine = make_engine(Net(), keep_graphs="auto")
    engine.train_step(batches_of(0, 2))
    gc.collect()
    assert [one for one in meters() if not any(one is other for other in before)] == []
    engine.close()


def test_the_heads_gradient_is_gone_when_backward_begins() -> None:
    """It has been added to the step's sum; a second one in each micro-batch would be the largest thing on a device."""
    engine = make_engine(tiny_llama())
    head = engine.model.lm_head.weight.shape  # type: ignore[union-attr]
    engine.train_step([make_batch(0)])
    found: list[int] = []
    enter = engine.executor.enter_phase

    def look(phase: int) -> None:
        if phase == BACKWARD:
            held = [o for o in gc.get_objects() if type(o) is Tensor]
            leaves = [tensor for tensor in held if tensor.is_leaf and tensor.shape == head]
            found.append(sum(leaf.grad is not None for leaf in leaves))
        enter(phase)

    engine.executor.enter_phase = look  # type: ignore[method-assign]
    engine.train_step([make_batch(0), make_batch(1)])
    assert found == [0, 0]
    engine.close()
