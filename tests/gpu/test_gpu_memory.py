"""Memory on both sides: the cap holds, models larger than it train, host memory is page-locked and given back."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import test_engine_toys as toys
import torch
from on_gpu import DRY, MIB, WHERE, make_device, needs_cuda
from reference import placed
from test_engine_toys import Net, batches_of, make_batch, make_engine
from test_lagged import same
from torch import Tensor

from megatrain.errors import CapacityError, IntegrityError
from megatrain.memory.arena import allocate
from megatrain.schedule.build import build_schedule
from megatrain.schedule.operations import Sizes


def train_within(
    cap: int | None, count: int, batches: list[dict[str, Tensor]], steps: int = 3
) -> tuple[list[Any], list[Any]]:
    """(loss and norm of each step and the final weights, the steps' stats), in `cap` bytes of device memory."""
    model = Net(count=count)
    engine = make_engine(model, device=make_device(cap), keep_graphs="off", threads=2)
    if not DRY:
        torch.cuda.reset_peak_memory_stats()
    stats = [engine.train_step(batches) for _ in range(steps)]
    if cap is not None:
        held = max(s.device_peak_bytes for s in stats) if DRY else torch.cuda.max_memory_reserved()
        assert held <= cap
    seen = [(s.loss, s.grad_norm) for s in stats]
    engine.flush()
    seen.append({name: value.clone() for name, value in model.state_dict().items()})
    engine.close()
    del engine, model
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()
    return seen, stats


def test_a_model_several_times_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """840 MB of weights in 256 MiB."""
    monkeypatch.setattr(toys, "WIDTH", 64 if DRY else 512)
    count, cap = (60, MIB // 2) if DRY else (200, 256 * MIB)
    assert sum(p.nbytes for p in Net(count=count).parameters()) > 2.5 * cap
    within, _ = train_within(cap, count, batches_of(0, 2))
    without, _ = train_within(None, count, batches_of(0, 2))
    assert same(within, without)


def test_inputs_leave_where_memory_is_short_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 blocks of 8192 tokens keep 1 GB of inputs; the device has half of that."""
    monkeypatch.setattr(toys, "WIDTH", 64 if DRY else 512)
    count, length, cap = (20, 64, 2 * MIB) if DRY else (60, 1024, 512 * MIB)
    batch = make_batch(1, rows=8, length=length)
    gradients = sum(p.nbytes for p in Net(count=count).parameters())
    inputs = count * 8 * length * toys.WIDTH * 4
    within, tight = train_within(cap, count, [batch])
    without, roomy = train_within(None, count, [batch])
    assert same(within, without)
    assert tight[-1].d2h_bytes - gradients > inputs // 2
    assert roomy[-1].d2h_bytes == gradients


@pytest.mark.parametrize("inputs_leave", [False, True])
def test_bytes_are_the_schedules(inputs_leave: bool) -> None:
    engine = make_engine(Net(count=6), device=make_device(), keep_graphs="off")
    weights = engine.weights
    weights._inputs_must_leave = lambda kind, elements: inputs_leave
    for _ in range(2):
        stats = engine.train_step(batches_of(0, 1))
    schedule = weights.schedule_of("step")
    gradients = {unit.index: sum(slot.parameter.nbytes for slot in unit.slots) for unit in engine.partition.units}
    sizes = Sizes(weights.unit_bytes, gradients, dict(weights.inputs.bytes_by_unit), inputs_leave)
    planned = build_schedule(schedule.visits, sizes, schedule.classes)
    assert (stats.h2d_bytes, stats.d2h_bytes) == (planned.h2d_bytes, planned.d2h_bytes)
    engine.close()


def test_too_little_memory_for_one_unit_is_refused_with_the_bytes_missing() -> None:
    with pytest.raises(CapacityError, match=r"engine\.device_memory is 500 .*missing"):
        make_engine(Net(), device="lagged" if DRY else "cuda", device_memory=500)


@needs_cuda
def test_a_refused_engine_leaves_the_memory_to_others() -> None:
    with pytest.raises(CapacityError):
        make_engine(Net(), device="cuda", device_memory=500)
    gc.collect()
    engine = make_engine(Net(), device="cuda")
    assert engine.train_step(batches_of(0, 1)).loss is not None
    engine.close()


@needs_cuda
def test_memory_that_runs_out_in_a_step_leaves_weights_and_engine_as_they_were() -> None:
    model, untroubled = Net(count=4), Net(count=4)
    engine = make_engine(model, device=make_device(256 * MIB), keep_graphs="off")
    first = engine.train_step(batches_of(0, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((torch.OutOfMemoryError, CapacityError)):
        engine.train_step([make_batch(1, rows=64, length=16384)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    second = engine.train_step(batches_of(1, 1))
    engine.close()
    other = make_engine(untroubled, device=make_device(), keep_graphs="off")
    for step, stats in enumerate((first, second)):
        assert other.train_step(batches_of(step, 1)).loss == stats.loss
    other.close()


@needs_cuda
def test_closing_gives_device_memory_and_its_cap_back() -> None:
    before = torch.cuda.memory_allocated()
    engine = make_engine(Net(), device=make_device(256 * MIB))
    engine.train_step(batches_of(0, 2))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(512 * MIB, dtype=torch.uint8, device=WHERE)
    engine.close()
    torch.empty(512 * MIB, dtype=torch.uint8, device=WHERE)
    del engine
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() <= before


@needs_cuda
def test_device_memory_does_not_grow_from_step_to_step() -> None:
    engine = make_engine(Net(count=5, dropout=0.1), device=make_device())
    held = []
    for _ in range(8):
        engine.train_step(batches_of(0, 3))
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[3]
    engine.close()


# -- host memory ------------------------------------------------------------------------------------------------------


def pinned(engine: Any) -> list[bool]:
    """Of weights and kept gradients."""
    memory = [engine.store.unit_memory(unit) for unit in engine.store.units]
    memory += [slab.gradient for state in engine.store.units.values() for slab in state.slabs]
    return [tensor.is_pinned() for tensor in memory if tensor is not None and tensor.numel()]


@needs_cuda
def test_weights_and_gradients_are_page_locked_until_the_end() -> None:
    engine = make_engine(Net(count=3), device=make_device())
    assert len(pinned(engine)) == 2 * 5 and all(pinned(engine))
    engine.train_step(batches_of(0, 2))
    assert all(pinned(engine))
    engine.close()
    assert not any(pinned(engine))
    again = make_engine(engine.model, device=make_device())
    assert all(pinned(again))
    again.close()


@needs_cuda
def test_an_engine_that_is_dropped_gives_page_locked_memory_back() -> None:
    """Else a new mapping at the same address would be copied from pages that are gone."""
    for seed in range(6):
        model = Net(count=3, seed=seed)
        engine = make_engine(model, device=make_device())
        plain = Net(count=3, seed=seed).to(WHERE)
        stats = engine.train_step([make_batch(0)])
        assert stats.loss == plain(**placed([make_batch(0)], WHERE)[0]).loss.item()
        del engine, model, plain
        gc.collect()


@needs_cuda
def test_memory_that_cannot_be_page_locked_is_an_error_that_leaves_cuda_usable() -> None:
    device, buffer = make_device(), allocate(4096)
    device.pin(buffer)
    assert buffer.is_pinned()
    with pytest.raises(IntegrityError, match="page-locked already"):
        device.pin(buffer)
    assert float(torch.ones(3, device=WHERE).sum()) == 3.0
    device.close()
    assert not buffer.is_pinned()


@needs_cuda
def test_fork_after_training_does_not_disturb_it() -> None:
    """A child gets no pages that the device copies to and from; the parent's stay its own."""
    engine, other = (make_engine(Net(count=3), device=make_device()) for _ in range(2))
    losses = []
    for step in range(3):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        losses.append(engine.train_step(batches_of(step, 1)).loss)
    assert losses == [other.train_step(batches_of(step, 1)).loss for step in range(3)]
    engine.close()
    other.close()


# -- the timeline -----------------------------------------------------------------------------------------------------


def test_a_trace_of_steps(tmp_path: Path) -> None:
    engine = make_engine(Net(count=5), device=make_device())
    for step in range(2):
        engine.train_step(batches_of(step, 2))
    engine.start_trace()
    stats = engine.train_step(batches_of(2, 2))
    engine.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [(names[e["tid"]], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events if e["ph"] == "X"]
    assert {"compute", "up", "down", "host"} <= {track for track, _, _ in spans}
    assert max(end for _, _, end in spans) <= stats.seconds + 1.0
    assert 0 <= stats.weights_exposed_seconds <= stats.seconds
    engine.close()
