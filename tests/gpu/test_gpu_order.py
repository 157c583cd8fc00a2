"""Order of copies and computation on a GPU: late streams change nothing, a wait left out does; hidden waits are
errors; an exception leaves all as it was."""

import threading
import time
from typing import Any

import pytest
import torch
from on_gpu import DRY, WHERE, make_device, needs_cuda, slow_device
from reference import placed
from test_engine_random import tiny_llama
from test_engine_toys import Net, batches_of, make_batch, make_engine
from test_lagged import Skipping, same, slow_updates, train
from test_lagged_failures import Failing, assert_an_exception_changes_nothing

from megatrain.device.base import WAITS
from megatrain.device.cuda import CudaStream
from megatrain.engine import step as step_module
from megatrain.engine.weight_stream import WeightStream

# what the host reads of units in the device's memory goes through the stream that has computed it
ORDERED_BY_THE_STREAM = ("squares_summed", "state_updated")


@pytest.fixture
def inputs_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: True)


@pytest.fixture(scope="module")
def expected() -> Any:
    """What comes out where nothing is late, by settings; taken when first asked for."""
    known: dict[str, Any] = {}

    def take(**settings: Any) -> Any:
        if str(settings) not in known:
            known[str(settings)] = train(Net(count=5, dropout=0.1), make_device(), **settings)
        return known[str(settings)]

    return take


@pytest.mark.usefixtures("inputs_leave")
@pytest.mark.parametrize("slow", ["up", "down", "compute"])
@pytest.mark.parametrize(
    "settings", [{"micro_batches": 1}, {"micro_batches": 3, "slots": 1}, {"clip_scope": "unit"}], ids=str
)
def test_late_streams_change_nothing(settings: dict[str, Any], slow: str, expected: Any) -> None:
    assert same(train(Net(count=5, dropout=0.1), slow_device(slow), **settings), expected(**settings))


@pytest.mark.usefixtures("inputs_leave")
@pytest.mark.parametrize("name", [name for name in WAITS if name not in ("weights_read", *ORDERED_BY_THE_STREAM)])
def test_without_a_wait_training_is_wrong(name: str, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow streams are slow enough to show it."""
    if name == "update":
        slow_updates(monkeypatch)
    late = {
        "update": "",
        "weights_arrived": "up",
        "slot_free": "compute",
        "gradient_packed": "compute",
        "inputs_restored": "up",
        "computed": "compute",
    }

    def run(without: list[str]) -> Any:
        return train(Net(count=5, dropout=0.1), slow_device(late.get(name, "down"), without))

    assert same(run([]), expected())
    for _ in range(3):
        try:
            found = run([name])
        except Exception:
            return
        if not same(found, expected()):
            return
    pytest.fail(f"nothing went wrong without the wait {name!r}: {WAITS[name]}")


@pytest.mark.filterwarnings("ignore:.*was called out of the order")
@pytest.mark.parametrize("slow", ["up", "compute"])
def test_another_order_each_step_is_still_right(slow: str) -> None:
    assert same(train(Skipping(), slow_device(slow), steps=6), train(Skipping(), make_device(), steps=6))


def _losses_of_late_evaluations(device: Any) -> list[float]:
    """Nobody has waited for the evaluation when the step updates the weights that it is still fetching."""
    model, seen = Net(count=5), []
    engine = make_engine(model, device=device)
    for step in range(3):
        model(**make_batch(step)).loss.backward()
        with torch.no_grad():
            late = model(**make_batch(50)).loss
        engine.step()
        engine.flush()
        seen.append(float(late))
    engine.close()
    return seen


@needs_cuda  # on the host an evaluation is over when it returns
def test_host_writes_wait_for_an_evaluation_that_still_reads() -> None:
    expected = _losses_of_late_evaluations(make_device())
    assert _losses_of_late_evaluations(slow_device("up")) == expected
    assert any(_losses_of_late_evaluations(slow_device("up", ["weights_read"])) != expected for _ in range(3))


@needs_cuda
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_under_a_stream_of_the_callers(micro_batches: int, expected: Any) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = train(Net(count=5, dropout=0.1), slow_device("compute"), micro_batches=micro_batches)
    assert same(found, expected(micro_batches=micro_batches))


@needs_cuda
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_on_the_second_gpu(micro_batches: int, expected: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    found = train(Net(count=5, dropout=0.1), "cuda:1", micro_batches=micro_batches)
    weights = found.pop(), expected(micro_batches=micro_batches)[-1]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert found == expected(micro_batches=micro_batches)[:-1]


# -- hidden waits -----------------------------------------------------------------------------------------------------


def _no_hidden_waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From here on a step's forward and backward may not make the host wait for the device; counts them."""
    own, counted = step_module._forward_and_backward, []

    def watched(engine: Any, bodies: Any) -> Any:
        counted.append(len(bodies))
        if not DRY:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return own(engine, bodies)
        finally:
            if not DRY:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(step_module, "_forward_and_backward", watched)
    return counted


@pytest.mark.parametrize("clip_scope", ["global", "unit"])
@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("make", [lambda: Net(count=5, dropout=0.1), tiny_llama], ids=["written", "llama"])
def test_a_step_has_no_hidden_waits(make: Any, leave: bool, clip_scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: leave)
    engine = make_engine(make(), device=make_device(), clip_scope=clip_scope)
    batches = [make_batch(n, rows=1 + n) for n in range(3)]
    batches = [{k: v % 61 if k == "input_ids" else v.clamp(max=60) for k, v in b.items()} for b in batches]
    for _ in range(4):  # in the first ones the model is learnt, which may wait
        engine.train_step(batches)
    counted = _no_hidden_waits(monkeypatch)
    for _ in range(2):
        engine.train_step(batches)
    assert counted == [3, 3]
    engine.close()


@needs_cuda
def test_a_hidden_wait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looking(Net):
        def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = super().hidden(input_ids)
            assert float(x.detach().abs().max()) < 1e6
            return x

    engine = make_engine(Looking(), device=make_device())
    engine.train_step(batches_of(0, 1))
    _no_hidden_waits(monkeypatch)
    with pytest.raises(RuntimeError, match="synchronizing"):
        engine.train_step(batches_of(1, 1))
    engine.close()


@needs_cuda
def test_the_host_does_not_wait_for_computation() -> None:
    """With computation made slow, the host is through with forward and backward long before it."""
    engine = make_engine(Net(count=5), device=slow_device("compute", cycles=20_000_000), keep_graphs="off")
    launched: list[float] = []
    own = engine.gradients.finish
    for step in range(3):
        began = time.perf_counter()
        engine.gradients.finish = lambda began=began: (launched.append(time.perf_counter() - began), own())  # type: ignore[method-assign]
        engine.train_step(batches_of(step, 1))
        whole = time.perf_counter() - began
    assert launched[-1] < 0.5 * whole
    engine.close()


@needs_cuda
@pytest.mark.parametrize("clip_scope", ["global", "unit"])
def test_every_copy_is_from_or_to_page_locked_memory(
    clip_scope: str, inputs_leave: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to pageable memory makes the host wait until it is done, and no debug mode tells."""
    pageable: list[str] = []
    own = CudaStream.copy

    def watched(self: CudaStream, pairs: Any, after: Any, *, computed: bool = False, label: str = "") -> Any:
        hosts = [tensor for pair in pairs for tensor in pair if not tensor.is_cuda]
        pageable.extend(f"{self._track} {label}" for tensor in hosts if tensor.numel() and not tensor.is_pinned())
        return own(self, pairs, after, computed=computed, label=label)

    monkeypatch.setattr(CudaStream, "copy", watched)
    engine = make_engine(Net(count=4), device=make_device(), clip_scope=clip_scope)
    for step in range(3):
        engine.train_step(batches_of(step, 2))
    for batch in batches_of(3, 2):  # a caller's own loop: further gradients come to the host, too
        engine.model(**batch).loss.backward()
    engine.step()
    assert sorted(set(pageable)) == []
    engine.close()


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", ["", "up", "down"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_an_exception_changes_nothing_and_training_goes_on(where: str, micro_batches: int, slow: str) -> None:
    model, untroubled = Failing(count=4), Net(count=4)
    engine = make_engine(model, device=slow_device(slow) if slow else make_device())
    other = make_engine(untroubled, device=make_device())
    assert_an_exception_changes_nothing(engine, model, other, untroubled, where, micro_batches)


def test_engines_leave_no_threads() -> None:
    before = set(threading.enumerate())
    engine = make_engine(Net(), device=make_device())
    engine.train_step(placed(batches_of(0, 2), WHERE))
    engine.close()
    assert [t.name for t in set(threading.enumerate()) - before if t.is_alive()] == []
