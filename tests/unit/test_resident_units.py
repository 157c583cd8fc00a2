"""Units that lie in the device's memory for good: the same training, nothing of them on the link or on the host."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from some_of import some_of
from test_engine_random import tiny_llama
from test_engine_toys import Net, batches_of, make_batch, make_engine
from torch import nn

import megatrain as mt
from megatrain.device.base import WAITS
from megatrain.device.lagged import LaggedDevice
from megatrain.errors import CapacityError, ConfigError, IntegrityError, NonFiniteGradientError
from megatrain.memory.placement import movable_units

CLIPS = {"global": {}, "unit": {"clip_scope": "unit"}, "none": {"clip_norm": None}, "tight": {"clip_norm": 0.01}}


def trained(steps: int = 3, model: nn.Module | None = None, micro_batches: int = 2, **settings: Any) -> Any:
    """(losses, norms, weights and masters, optimizer state) after some steps."""
    model = Net(count=4, dropout=0.1) if model is None else model
    precision = settings.setdefault("precision", "fp32")
    settings.setdefault("device", LaggedDevice(precision))
    engine = make_engine(model, **settings)
    stats = [engine.train_step(batches_of(step, micro_batches)) for step in range(steps)]
    state = {n: {k: v.clone() for k, v in s.items()} for n, s in engine.optimizer_state().items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    masters = {f"master {slot}": engine.store.read_master(slot) for slot in engine.store.slots}
    engine.close()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    return [s.loss for s in stats], [s.grad_norm for s in stats], weights | masters, state


def assert_same(one: Any, other: Any) -> None:
    """The norm alone is a sum in another order, in fp64; what it scales gradients by has 24 bits of it."""
    assert one[0] == other[0]
    assert one[1] == pytest.approx(other[1], rel=1e-13)
    assert all(torch.equal(one[2][name], value) for name, value in other[2].items())
    assert one[3].keys() == other[3].keys()
    for number, state in one[3].items():
        assert all(torch.equal(state[name], value) for name, value in other[3][number].items())


@pytest.mark.parametrize(
    ("resident", "clip", "precision", "moments"), some_of(3, (2, 6), CLIPS, ("fp32", "bf16"), ("fp32", "int8"))
)
def test_the_same_training(resident: int, clip: str, precision: str, moments: str) -> None:
    settings = {"precision": precision, "optimizer": mt.AdamW(lr=1e-2, moments=moments), **CLIPS[clip]}
    assert_same(trained(**settings, resident_units=resident), trained(**settings))


@pytest.mark.parametrize("slow", ["", "up", "down", "compute"])
@pytest.mark.parametrize("keep_graphs", ["auto", "off", 3])
def test_the_same_training_at_any_pace(slow: str, keep_graphs: Any) -> None:
    device = LaggedDevice("fp32", slow=slow, seed=7, longest_delay_seconds=0.004)
    found = trained(device=device, resident_units=3, keep_graphs=keep_graphs, slots=1)
    assert_same(found, trained(device="cpu"))


def test_a_transformers_model_with_tied_weights() -> None:
    """Its embedding is read by the head, too, and so is passed over."""
    model = tiny_llama(tie_word_embeddings=True)
    other = copy.deepcopy(model)
    engine = make_engine(copy.deepcopy(model), device=LaggedDevice("fp32"), resident_units=1)
    assert [engine.partition.units[u].name for u in engine.store.on_device] == ["model.layers.0"]
    engine.close()
    assert_same(trained(model=model, resident_units=2), trained(model=other, device="cpu"))


def test_nothing_of_them_crosses_the_link_or_stays_on_the_host() -> None:
    engine = make_engine(Net(count=4), device=LaggedDevice("fp32"), resident_units=6)
    assert engine.store.on_device == {u.index for u in engine.partition.units}
    held = engine.memory_report()
    assert not any(held.values()), held
    assert engine.plan.total_bytes == 0
    for step in range(3):
        stats = engine.train_step(batches_of(step, 1))
    assert stats.h2d_bytes == stats.d2h_bytes == 0
    engine.close()


def test_the_plans_bytes_are_what_the_device_holds() -> None:
    alone = make_engine(Net(count=4), device=LaggedDevice("bf16"), precision="bf16", keep_graphs="off")
    some = make_engine(Net(count=4), device=LaggedDevice("bf16"), precision="bf16", keep_graphs="off", resident_units=3)
    for engine in (alone, some):
        engine.device.start_step()
    fixed = [engine.device.peak_bytes() for engine in (alone, some)]
    planned = sum(some.plan.resident.values())
    parameters = sum(
        p.numel() for u in some.store.on_device for p in (s.parameter for s in some.partition.units[u].slots)
    )
    assert 14 * parameters <= planned <= 15 * parameters + 14 * 4096
    assert planned <= fixed[1] <= fixed[0] + planned
    assert some.plan.total_bytes < alone.plan.total_bytes - 12 * parameters
    for engine in (alone, some):
        engine.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_own_loop(precision: str) -> None:
    """Several backward calls between two steps, gradients that are looked at, changed and taken away."""

    def run(resident: int) -> Any:
        model = Net(count=3)
        engine = make_engine(
            model, device=LaggedDevice(precision), precision=precision, resident_units=resident, clip_norm=None
        )
        seen = []
        for step in range(4):
            for number in range(1 + step):
                engine.model(**make_batch(10 * step + number)).loss.backward()
            seen.append(model.blocks[0].up.weight.grad.clone())
            if step == 1:
                model.blocks[0].down.weight.grad.mul_(0.5)
                model.blocks[1].down.weight.grad = None
                model.embed.weight.grad = torch.ones_like(model.embed.weight)
            if step == 2:
                seen.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).float())
            if step == 3:
                engine.optimizer.zero_grad()
                engine.model(**make_batch(99)).loss.backward()
            engine.step()
        engine.flush()
        seen += [value.clone() for value in model.state_dict().values()]
        engine.close()
        return seen

    for found, expected in zip(run(4), run(0), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_writes_between_steps_become_masters(precision: str) -> None:
    """Through torch's version counter, past it, and by load_state_dict."""

    def run(resident: int) -> Any:
        model = Net(count=3)
        engine = make_engine(model, device=LaggedDevice(precision), precision=precision, resident_units=resident)
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        for step in range(4):
            engine.train_step(batches_of(step, 1))
            engine.flush()
            with torch.no_grad():
                if step == 0:
                    model.blocks[0].up.weight.mul_(0.5)
                elif step == 1:
                    model.blocks[0].up.weight.data.zero_()
                elif step == 2:
                    model.load_state_dict(saved)
        masters = [engine.store.read_master(slot) for slot in engine.store.slots]
        engine.close()
        return masters

    for found, expected in zip(run(3), run(0), strict=True):
        assert torch.equal(found, expected)


def test_a_write_before_the_update_was_waited_for_is_refused() -> None:
    model = Net(count=3)
    engine = make_engine(model, device=LaggedDevice("fp32"), resident_units=5)
    engine.train_step(batches_of(0, 1))
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(0.5)
    with pytest.raises(IntegrityError, match=r"blocks\.0\.up\.weight"):
        engine.train_step(batches_of(1, 1))
    engine.close()


def test_state_is_saved_and_loaded() -> None:
    """Optimizer state goes from an engine with residents to one without, and back."""
    settings: dict[str, Any] = {"precision": "bf16"}
    straight = trained(steps=6, **settings, model=Net(count=4))

    def half(model: nn.Module, state: Any, masters: Any, resident: int, first: int) -> Any:
        engine = make_engine(model, device=LaggedDevice("bf16"), resident_units=resident, **settings)
        if state is not None:
            for slot, master in masters.items():
                engine.store.write_master(slot, master)
            engine.load_optimizer_state(state)
            engine.step_count = first
        for step in range(first, first + 3):
            engine.train_step(batches_of(step, 2))
        state = {n: {k: v.clone() for k, v in s.items()} for n, s in engine.optimizer_state().items()}
        masters = {slot: engine.store.read_master(slot) for slot in engine.store.slots}
        engine.close()
        return state, masters

    for residents in ((3, 0), (0, 3)):
        state, masters = half(Net(count=4), None, None, residents[0], 0)
        state, masters = half(Net(count=4), state, masters, residents[1], 3)
        for slot, master in masters.items():
            assert torch.equal(master, straight[2][f"master {slot}"])
        for number, expected in straight[3].items():
            assert all(torch.equal(state[number][name], value) for name, value in expected.items())


def test_saved_weights_are_the_masters(tmp_path: Path) -> None:
    model = tiny_llama()
    engine = make_engine(model, device=LaggedDevice("bf16"), precision="bf16", resident_units=2)
    engine.train_step([{"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}])
    engine.save_pretrained(tmp_path, dtype="fp32")
    loaded = mt.Engine.from_pretrained(str(tmp_path), device="lagged", precision="fp32", resident_units=1)
    assert len(loaded.store.on_device) == 1
    for slot in engine.store.slots:
        assert torch.equal(loaded.store.read_master(slot), engine.store.read_master(slot))
    for one in (engine, loaded):
        one.close()


@pytest.mark.parametrize("clip", [{}, {"clip_scope": "unit"}])
def test_a_gradient_that_is_not_finite_changes_nothing_there(clip: dict[str, Any]) -> None:
    model = Net(count=3)
    engine = make_engine(model, device=LaggedDevice("fp32"), resident_units=5, **clip)
    engine.train_step(batches_of(0, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.blocks[1].up.register_forward_hook(lambda _m, _i, output: output * float("nan"))
    if clip:
        with pytest.raises(NonFiniteGradientError):
            engine.train_step(batches_of(1, 1))
    else:
        assert engine.train_step(batches_of(1, 1)).skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    engine.close()


@pytest.mark.parametrize("name", ["squares_summed", "state_updated"])
def test_a_wait_left_out_is_noticed(name: str) -> None:
    assert name in WAITS

    def run(without: list[str]) -> Any:
        # only the queue is slow: what the host reads without waiting is not there yet
        device = LaggedDevice("fp32", longest_delay_seconds=0.004, slow="compute", without=without)
        return trained(device=device, resident_units=5, clip_norm=0.01, model=Net(count=3))

    expected = run([])
    with pytest.raises(AssertionError):
        assert_same(run([name]), expected)


def test_by_name() -> None:
    found = trained(resident_units=["blocks.2", "embed"])
    assert_same(found, trained(device="cpu"))
    with make_engine(Net(count=4), device=LaggedDevice("fp32"), resident_units=["blocks.2", "embed"]) as engine:
        assert {engine.partition.units[u].name for u in engine.store.on_device} == {"blocks.2", "embed"}


def test_what_can_move() -> None:
    reads = {0: {0}, 1: {1}, 2: {2, 1}, 3: {3}, 4: {0, 4}, 5: {5}}
    assert movable_units(reads) == [3, 5]


def test_bad_settings_are_refused() -> None:
    model = Net(count=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for value in (-1, 1.5, "all", True, [1]):
        with pytest.raises(ConfigError, match=r"engine\.resident_units is"):
            make_engine(model, device=LaggedDevice("fp32"), resident_units=value)
    with pytest.raises(ConfigError, match=r"engine\.resident_units is 2; it must be 0 on cpu"):
        make_engine(model, device="cpu", resident_units=2)
    with pytest.raises(ConfigError, match=r"'blocks\.7' is no unit that can stay; these can: embed, blocks\.0"):
        make_engine(model, device=LaggedDevice("fp32"), resident_units=["blocks.7"])
    with pytest.raises(CapacityError, match="missing"):
        make_engine(model, device=LaggedDevice("fp32", 10_000), resident_units=3)
    engine = make_engine(Net(count=3), device=LaggedDevice("bf16"), precision="bf16", resident_units=2)
    memory = sum(engine.plan.resident.values()) + 100  # slots and staging no longer fit beside them
    engine.close()
    with pytest.raises(CapacityError, match="missing"):
        make_engine(model, device=LaggedDevice("bf16", memory), precision="bf16", resident_units=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
