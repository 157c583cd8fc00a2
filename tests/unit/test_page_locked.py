"""What copies touch on the host is page-locked, is planned, and is unlocked before it is dropped."""

from typing import Any

import pytest
import torch
from test_engine_toys import Net, batches_of, make_batch, make_engine
from test_lagged import lagged, same

from megatrain.device.cuda import CudaDevice
from megatrain.device.lagged import LaggedDevice, LaggedStream
from megatrain.engine import saved_inputs
from megatrain.engine.weight_stream import WeightStream
from megatrain.errors import CapacityError
from megatrain.memory.limits import HostLimits
from megatrain.schedule.operations import Kind

SETTINGS = [
    {"precision": precision, **clipping}
    for precision in ("fp32", "bf16")
    for clipping in ({}, {"clip_scope": "unit"}, {"clip_norm": None})
]


def backward_calls(engine: Any, step: int, count: int) -> None:
    for batch in batches_of(step, count):
        engine.model(**batch).loss.backward()


@pytest.mark.filterwarnings("ignore:.*was called out of the order")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_copy_is_from_or_to_page_locked_memory(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With training steps and a caller's own loop, with one and several backward calls, in turns."""
    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: True)
    device = LaggedDevice(settings["precision"])
    inputs, pageable, copies = set(), [], 0
    own_memory, own_copy = LaggedDevice.host_memory, LaggedStream.copy

    def host_memory(self: LaggedDevice, like: torch.Tensor) -> torch.Tensor:
        memory = own_memory(self, like)
        inputs.add(memory.data_ptr())
        return memory

    def copy(self: LaggedStream, pairs: Any, after: Any, *, computed: bool = False, label: str = "") -> Any:
        nonlocal copies
        for target, source in pairs:
            host = source if self is device.up else target
            start, end = host.data_ptr(), host.data_ptr() + host.nbytes
            locked = any(a <= start and end <= a + b.nbytes for a, b in device.pinned.items())
            copies += 1
            if host.nbytes and not locked and start not in inputs:
                pageable.append(f"{label}: {tuple(host.shape)}")
        return own_copy(self, pairs, after, computed=computed, label=label)

    monkeypatch.setattr(LaggedDevice, "host_memory", host_memory)
    monkeypatch.setattr(LaggedStream, "copy", copy)
    engine = make_engine(Net(count=3), device=device, **settings)
    for step, backwards in enumerate((0, 1, 3, 2, 0, 1)):
        if backwards:
            backward_calls(engine, step, backwards)
            engine.step()
        else:
            engine.train_step(batches_of(step, 2))
        assert sorted(set(pageable)) == [], f"step {step}"
        held = [engine.store.unit_memory(unit) for unit in engine.store.units]
        slabs = [slab for unit in engine.store.units.values() for slab in unit.slabs]
        held += [m for slab in slabs for m in (slab.gradient, slab.accumulated) if m is not None]
        held += engine.gradients._memory._arriving
        assert {m.data_ptr() for m in held} == set(device.pinned), f"step {step}: dropped, and locked still"
    assert copies > 50 and inputs
    engine.close()
    assert device.pinned_bytes == 0


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_plan_knows_what_is_page_locked(settings: Any) -> None:
    engine = make_engine(Net(count=3), device=LaggedDevice(settings["precision"]), **settings)
    engine.train_step(batches_of(0, 2))
    plan = engine.plan
    assert engine.device.pinned_bytes == plan.page_locked_bytes - plan.transient.get("arriving gradients", 0)
    assert plan.lines()[-1].startswith("page-locked")
    backward_calls(engine, 1, 2)
    if engine.keeps_gradients and settings["precision"] == "fp32":
        assert engine.device.pinned_bytes == plan.page_locked_bytes
    engine.close()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_several_backward_calls_add_up_as_on_the_host(settings: Any) -> None:
    def loop(device: Any) -> list[Any]:
        model = Net(count=3)
        engine = make_engine(model, device=device, **settings)
        seen: list[Any] = []
        for step in range(4):
            backward_calls(engine, step, 3 if step < 3 else 1)
            seen.append(engine.step().grad_norm)
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        engine.close()
        return seen

    assert same(loop(LaggedDevice(settings["precision"])), loop("cpu"))


def test_locking_twice_is_noticed() -> None:
    device, memory = lagged(), torch.zeros(3)
    device.pin(memory)
    with pytest.raises(AssertionError):
        device.pin(memory)
    device.unpin(memory)
    assert device.pinned_bytes == 0


def test_inputs_that_the_host_has_no_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And counted where it has; a step that is refused changes nothing."""
    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: True)
    engine = make_engine(Net(count=6), device=lagged(), keep_graphs="off")
    batch = make_batch(0, rows=2, length=6)
    for _ in range(2):
        engine.train_step([batch])
    needed = engine.memory_report()["saved inputs"]
    left = [op.n_bytes for op in engine.weights.schedule_of("step").operations if op.kind is Kind.SAVE]
    assert needed == sum(left) > 0
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    monkeypatch.setattr(saved_inputs, "host_memory_limits", lambda: HostLimits(1 << 40, needed - 1))
    with pytest.raises(CapacityError, match=r"inputs of units .*: 1 B missing"):
        engine.train_step([batch])
    assert all(torch.equal(value, before[name]) for name, value in engine.model.state_dict().items())
    monkeypatch.setattr(saved_inputs, "host_memory_limits", lambda: HostLimits(1 << 40, needed))
    assert engine.train_step([batch]).loss is not None
    monkeypatch.setattr(LaggedDevice, "host_memory_bytes", CudaDevice.host_memory_bytes)
    with pytest.raises(CapacityError, match="inputs of units"):
        engine.train_step([batch])
    monkeypatch.setattr(LaggedDevice, "pools_host_memory", True)
    engine.weights.inputs.host_bytes = 4 * needed  # as if the pass before had needed so much
    assert engine.train_step([batch]).loss is not None
    engine.close()
