"""What goes wrong on a streaming device, and what is left afterwards: weights, memory, threads, an engine to use."""

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
import torch
from test_engine_by_hand import Positions
from test_engine_random import tiny_llama
from test_engine_toys import (
    Net,
    batches_of,
    make_batch,
    make_engine,
)
from test_lagged import lagged
from torch import Tensor, nn

import megatrain as mt
from megatrain.device import lagged as lagged_device
from megatrain.device.lagged import LaggedEvent
from megatrain.engine.gradients import GradientBook
from megatrain.engine.updates import SlabUpdate
from megatrain.engine.weight_stream import WeightStream
from megatrain.errors import CapacityError
from megatrain.model.head import ChunkedHead


class Failing(Net):
    """Raises in the forward or the backward of a block when told to."""

    fail: str = ""

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1 and self.fail == "forward":
                raise RuntimeError("somebody's bug")
            if number == 1 and self.fail == "backward":
                x.register_hook(_raise)
        return x


def _raise(*_given: Any) -> None:
    raise RuntimeError("somebody's bug")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_an_exception_changes_nothing_and_training_goes_on(where: str, micro_batches: int) -> None:
    model, plain = Failing(count=4), Net(count=4)
    assert_an_exception_changes_nothing(
        make_engine(model, device=lagged()), model, make_engine(plain), plain, where, micro_batches
    )


def assert_an_exception_changes_nothing(
    engine: mt.Engine, model: Failing, other: mt.Engine, untroubled: Net, where: str, micro_batches: int
) -> None:
    """Two steps of both engines, an error in the third of `engine`, and two more of both, with the same results."""
    for step in range(2):
        for one in (engine, other):
            one.train_step(batches_of(step, micro_batches))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.fail = where
    with pytest.raises(RuntimeError, match="somebody's bug"):
        engine.train_step(batches_of(2, micro_batches))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.fail = ""
    for step in range(2, 4):
        batches = batches_of(step, micro_batches)
        assert engine.train_step(batches).loss == other.train_step(batches).loss
    assert all(torch.equal(value, untroubled.state_dict()[name]) for name, value in model.state_dict().items())
    engine.close()
    other.close()


@pytest.mark.parametrize("device", ["cpu", "lagged"])
@pytest.mark.parametrize("settings", [{"clip_scope": "unit"}, {"clip_norm": None}], ids=str)
def test_an_exception_where_units_are_updated_at_once_says_which_had_been(
    settings: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, gate = Failing(count=5), LaggedEvent()
    engine = make_engine(model, device=device, **settings)
    engine.train_step(batches_of(0, 1))
    engine.flush()
    before = copy.deepcopy(model.state_dict())
    model.fail = "backward"
    if device == "lagged":  # the last gradient before the error arrives after it
        own, give_up = engine.device.down.copy, GradientBook.give_up

        def copy_late(pairs: Any, after: Any, **options: Any) -> Any:
            late = [("gradient_packed", gate)] if options["label"] == "blocks.2" else []
            return own(pairs, [*after, *late], **options)

        monkeypatch.setattr(engine.device.down, "copy", copy_late)
        monkeypatch.setattr(GradientBook, "give_up", lambda book: give_up(book) or gate.set())

    with pytest.raises(RuntimeError, match="somebody's bug") as raised:
        engine.train_step(batches_of(1, 1))
    (note,) = raised.value.__notes__
    listed = note.partition("half done: ")[2].partition(" had been")[0].split(", ")
    changed = {
        name.rpartition(".norm.")[0] for name, v in model.state_dict().items() if not torch.equal(v, before[name])
    }
    assert "step 1 is half done" in note and set(listed) - {"head"} == changed - {""}
    assert "blocks.4" in listed and ("blocks.2" in listed) == (device == "cpu")
    monkeypatch.undo()
    model.fail = ""
    engine.train_step(batches_of(2, 1))
    model.fail = "forward"
    with pytest.raises(RuntimeError, match="somebody's bug") as raised:
        engine.train_step(batches_of(3, 1))
    assert not hasattr(raised.value, "__notes__"), "nothing of that step was updated"
    engine.close()


@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_an_update_that_fails_is_said_for_good_and_the_engine_can_be_closed(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own, before = Net(count=4), SlabUpdate.run, threads_of_ours()
    engine = make_engine(model, device=device)
    engine.train_step(batches_of(0, 1))
    engine.flush()
    monkeypatch.setattr(SlabUpdate, "run", _raise)
    with suppress(mt.IntegrityError):  # on the host as device; else the host thread updates beside what comes next
        engine.train_step(batches_of(1, 1))
    with pytest.raises(mt.IntegrityError, match=r"update of embed failed \(RuntimeError: somebody's bug\).*last save"):
        engine.flush()
    monkeypatch.setattr(SlabUpdate, "run", own)
    for attempt in (lambda: engine.train_step(batches_of(2, 1)), engine.flush, model.state_dict, engine.close):
        with pytest.raises(mt.IntegrityError, match="update of embed failed"):
            attempt()
    engine.close()
    assert threads_of_ours() <= before
    assert not getattr(engine.device, "pinned", {})
    with make_engine(model, device=device) as again:
        assert again.train_step(batches_of(2, 1)).loss is not None


def threads_of_ours() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "megatrain" in thread.name}


@pytest.mark.parametrize("at", [1, 2, 4, 6, 9, 11])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_copy_that_fails_in_a_callers_own_loop_can_be_tried_again(
    at: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = Net(count=5), Net(count=5)
    engine, host = make_engine(model, device=lagged(), slots=slots, keep_graphs="off"), make_engine(plain)
    calls = count(1)
    own = engine.device.up.copy
    for step in range(4):
        if step == 2:

            def copy_or_fail(*given: Any, **options: Any) -> Any:
                return _raise() if next(calls) == at else own(*given, **options)

            monkeypatch.setattr(engine.device.up, "copy", copy_or_fail)
            with pytest.raises(RuntimeError, match="somebody's bug"):
                model(**make_batch(step)).loss.backward()
            model.zero_grad()
        for e in (engine, host):
            e.model(**make_batch(step)).loss.backward()
        assert engine.step().grad_norm == host.step().grad_norm
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    engine.close()
    host.close()


@pytest.mark.parametrize("own_loop", [False, True])
@pytest.mark.parametrize("at", range(1, 20, 3))
def test_an_error_on_a_copy_thread_is_raised_in_the_step(
    at: int, own_loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = Net(count=5), Net(count=5)
    engine, host = make_engine(model, device=lagged()), make_engine(plain)

    def step(e: mt.Engine, number: int) -> float:
        if not own_loop:
            return e.train_step(batches_of(number, 1)).grad_norm
        e.model(**make_batch(number)).loss.backward()
        return e.step().grad_norm

    for number in range(2):
        assert step(engine, number) == step(host, number)
    engine.flush()
    before, calls, own = copy.deepcopy(model.state_dict()), count(1), lagged_device._copy
    with monkeypatch.context() as patch:
        patch.setattr(lagged_device, "_copy", lambda pairs: _raise() if next(calls) == at else own(pairs))
        with pytest.raises(RuntimeError, match="somebody's bug"):
            step(engine, 2)
    model.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for number in range(3, 5):
        assert step(engine, number) == step(host, number)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    engine.close()
    host.close()


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """What all tests before have left is not gone through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("fail", ["forward", "backward", "no backward"])
def test_forwards_that_failed_in_a_callers_own_loop_hold_no_memory(
    fail: str, leave: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: leave)
    model, plain = Failing(count=6), Net(count=6)
    engine, host = make_engine(model, device=lagged(), keep_graphs="off"), make_engine(plain)
    for step in range(2):
        for e in (engine, host):
            e.model(**make_batch(step, length=16)).loss.backward()
        peak = (engine.step(), host.step())[0].device_peak_bytes
    for e in (engine, host):  # one that stays, and counts
        e.model(**make_batch(2, length=16)).loss.backward()
    engine.device.memory_bytes = peak + 2000
    on_host = engine.weights.inputs.host_bytes
    model.fail = fail
    for _ in range(30):
        with suppress(RuntimeError):
            result = [model(**make_batch(3, length=16)).loss]
            if fail == "backward":
                result.pop().backward()
        result = []
        gc.collect()
    model.fail = ""
    for e in (engine, host):
        e.model(**make_batch(4, length=16)).loss.backward()
    assert engine.weights.inputs.host_bytes <= 2 * on_host
    if fail != "backward":  # of which some gradients had come
        assert engine.step().grad_norm == host.step().grad_norm
    engine.close()
    host.close()


@pytest.mark.parametrize("call", ["step", "clip_grad_norm_"])
@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_after_a_step_of_a_callers_own_loop_that_failed_no_gradient_is_left(
    call: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(Positions(), device=device)
    batch = make_batch(0)
    engine.model(**batch).loss.backward()
    engine.step()
    engine.model(**batch).loss.backward()
    before = copy.deepcopy(engine.model.state_dict())
    name = "square_sum" if device == "lagged" else "copy_with_square_sum"
    with monkeypatch.context() as patch:  # of a parameter that the model reads outside a unit: complete in step()
        patch.setattr(f"megatrain.engine.gradients.{name}", _raise)
        with pytest.raises(RuntimeError, match="somebody's bug"):
            getattr(engine, call)(*((0.5,) if call != "step" else ()))
    assert engine.step().grad_norm == 0.0
    assert all(torch.equal(value, before[n]) for n, value in engine.model.state_dict().items())
    engine.model(**batch).loss.backward()
    assert engine.step().grad_norm > 0
    engine.close()


def test_a_wait_before_an_update_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, host = make_engine(Net(count=3), device=lagged()), make_engine(Net(count=3))
    before = copy.deepcopy(engine.model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(engine.weights, "before_update", _raise)
        with pytest.raises(RuntimeError, match="somebody's bug"):
            engine.train_step(batches_of(0, 1))
    assert all(torch.equal(value, before[n]) for n, value in engine.model.state_dict().items())
    assert engine.train_step(batches_of(0, 1)).loss == host.train_step(batches_of(0, 1)).loss
    assert engine.train_step(batches_of(1, 1)).loss == host.train_step(batches_of(1, 1)).loss
    engine.close()
    host.close()


def test_too_little_memory_for_one_unit_is_refused_with_the_bytes_missing() -> None:
    with pytest.raises(CapacityError, match=r"engine\.device_memory is 500 .*missing"):
        make_engine(Net(), device=lagged(memory_bytes=500))


def test_memory_that_runs_out_in_a_step_leaves_weights_and_engine_as_they_were() -> None:
    model = Net(count=4)
    engine = make_engine(model, device=lagged(), keep_graphs="off")
    first = engine.train_step(batches_of(0, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine.device.memory_bytes = first.device_peak_bytes - 100
    with pytest.raises(CapacityError, match="missing"):
        engine.train_step(batches_of(1, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    engine.device.memory_bytes = None
    host = make_engine(Net(count=4), keep_graphs="off")
    assert host.train_step(batches_of(0, 1)).loss == first.loss
    assert engine.train_step(batches_of(1, 1)).loss == host.train_step(batches_of(1, 1)).loss
    engine.close()
    host.close()


@pytest.mark.parametrize("error", [CapacityError("2 B missing"), torch.OutOfMemoryError("2 B missing")], ids=repr)
def test_memory_that_runs_out_while_the_head_is_tried_out_is_no_reason_for_whole_logits(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: ChunkedHead) -> str:
        raise error

    monkeypatch.setattr(ChunkedHead, "_compare_losses", fail)
    with pytest.raises(type(error), match="2 B missing"):
        make_engine(tiny_llama(), device=lagged())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "lagged"])
@pytest.mark.parametrize(
    "stage",
    [
        "engine.engine.compile_kernels",
        "engine.engine.GradientStream",
        "engine.attachment.guard",
        "model.head.ChunkedHead._compare_losses",
        "engine.attachment.labels_are_shifted",
    ],
)
def test_an_engine_that_cannot_be_made_leaves_the_model_as_it_was(
    stage: str, device: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu" and "Stream" in stage:
        pytest.skip("the host has none")
    model = tiny_llama() if "head" in stage else Net(count=3)
    model.other = nn.Linear(2, 2, bias=False)
    model.other.register_buffer("scale", torch.tensor(1 / 3))
    before, attributes = copy.deepcopy(model.state_dict()), attributes_of(model)
    threads = threads_of_ours()
    with monkeypatch.context() as patch:
        patch.setattr(f"megatrain.{stage}", out_of_memory)
        with pytest.raises(CapacityError, match="2 B missing"):
            make_engine(model, device=device, precision=precision)
    assert attributes_of(model) == attributes and threads_of_ours() <= threads
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    make_engine(model, device=device, precision=precision).close()


def out_of_memory(*_given: Any, **_options: Any) -> Any:
    raise CapacityError("2 B missing")


def attributes_of(model: nn.Module) -> list[Any]:
    """What modules and parameters have of their own, but for values of parameters and buffers."""
    hooks = [(len(p._backward_hooks or ()), len(p._post_accumulate_grad_hooks or ())) for p in model.parameters()]
    modules = [
        (type(m), set(m.__dict__), len(m._state_dict_pre_hooks), len(m._load_state_dict_pre_hooks))
        for m in model.modules()
    ]
    return [hooks, modules]


def test_a_closed_engine_holds_no_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: True)
    device, allocated = lagged(), []
    own = device.allocate

    def allocate(n_bytes: int, what: str) -> Tensor:
        memory = own(n_bytes, what)
        allocated.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(device, "allocate", allocate)
    engine = make_engine(Net(count=4), device=device)
    engine.train_step(batches_of(0, 2))
    engine.model(**make_batch(0)).loss.backward()
    engine.close()
    assert len(allocated) >= 4 and [ref() for ref in allocated if ref() is not None] == []
    assert engine.memory_report()["weights"] > 0
