"""The lagged device: late copies, little memory, and the same bits as the host; and what each wait is for."""

import copy
import random
import threading
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_random import tiny_llama
from test_engine_toys import (
    WIDTH,
    Block,
    Net,
    Output,
    assert_trains_like_plain,
    batches_of,
    make_batch,
    make_engine,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatrain.device.base import WAITS
from megatrain.device.cpu import CpuDevice
from megatrain.device.lagged import LaggedDevice
from megatrain.engine.setup import head_chunk_tokens
from megatrain.engine.updates import PendingUpdates, SlabUpdate
from megatrain.engine.weight_stream import WeightStream
from megatrain.errors import CapacityError, ConfigError, UnsupportedModelError
from megatrain.model.hidden import HiddenParameter
from megatrain.schedule.build import build_schedule
from megatrain.schedule.check import ScheduleError, check_schedule
from megatrain.schedule.operations import Kind, Schedule, Sizes
from megatrain.sizes import parse_bytes


def lagged(**options: Any) -> LaggedDevice:
    return LaggedDevice("fp32", **options)


def train(model: nn.Module, device: Any, steps: int = 4, micro_batches: int = 2, **settings: Any) -> list[Any]:
    """(loss, norm) of each step, and the final weights."""
    engine = make_engine(model, device=device, **settings)
    seen: list[Any] = []
    for step in range(steps):
        stats = engine.train_step(batches_of(step, micro_batches))
        seen.append((stats.loss, stats.grad_norm))
    seen.append({name: value.clone() for name, value in model.state_dict().items()})
    engine.close()
    return seen


def same(one: list[Any], other: list[Any]) -> bool:
    weights, others = one[-1], other[-1]
    return one[:-1] == other[:-1] and all(torch.equal(weights[name], others[name]) for name in weights)


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_graphs", ["auto", "off", 3])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_trains_like_plain(micro_batches: int, slots: int, keep_graphs: Any) -> None:
    assert_trains_like_plain(
        Net(count=4, dropout=0.1),
        micro_batches=micro_batches,
        device=lagged(),
        slots=slots,
        keep_graphs=keep_graphs,
    )


@pytest.mark.parametrize(
    "settings",
    [{"clip_scope": "unit"}, {"clip_norm": None}, {"precision": "bf16"}, {"precision": "bf16", "clip_scope": "unit"}],
    ids=str,
)
def test_same_as_the_host_in_every_mode(settings: dict[str, Any]) -> None:
    device = LaggedDevice(settings.get("precision", "fp32"))
    assert same(train(Net(count=4), device, **settings), train(Net(count=4), "cpu", **settings))


def test_by_name() -> None:
    engine = make_engine(Net(), device="lagged", device_memory=100_000)
    assert engine.device.name == "lagged"
    assert engine.train_step(batches_of(0, 1)).h2d_bytes > 0
    engine.close()


@pytest.mark.parametrize("seed", range(20))
def test_any_interleaving(seed: int) -> None:
    host = train(Net(count=5), "cpu", micro_batches=1 + seed % 3)
    late = train(Net(count=5), lagged(seed=seed, longest_delay_seconds=0.003), micro_batches=1 + seed % 3)
    assert same(late, host)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(200))
def test_any_of_many_interleavings(seed: int) -> None:
    draw = random.Random(seed)
    settings = {
        "micro_batches": draw.randint(1, 4),
        "slots": draw.randint(1, 4),
        "keep_graphs": draw.choice(["off", "auto", 2]),
        "clip_scope": draw.choice(["global", "unit"]),
    }
    memory, slow = draw.choice([None, 12_000]), draw.choice(["", "up", "down", "compute"])
    print(f"\nseed {seed}: {settings}, memory {memory}, slow {slow!r}")
    count = draw.randint(2, 7)
    host = train(Net(count=count, dropout=0.1), "cpu", **settings)
    device = lagged(seed=seed, memory_bytes=memory, slow=slow, longest_delay_seconds=0.003)
    assert same(train(Net(count=count, dropout=0.1), device, **settings), host)


def test_a_model_twenty_times_the_memory() -> None:
    count = 150
    state = sum(p.nbytes for p in Net(count=count).parameters())
    cap = state // 20
    host = train(Net(count=count), "cpu", steps=2, keep_graphs="off")
    assert same(train(Net(count=count), lagged(memory_bytes=cap), steps=2, keep_graphs="off"), host)


# -- what the schedule says -------------------------------------------------------------------------------------------


def test_no_pass_follows_a_schedule_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_a_release(*given: Any, **options: Any) -> Schedule:
        schedule = build_schedule(*given, **options)
        first = next(n for n, op in enumerate(schedule.operations) if op.kind is Kind.RELEASE)
        return replace(schedule, operations=(*schedule.operations[:first], *schedule.operations[first + 1 :]))

    monkeypatch.setattr("megatrain.engine.weight_stream.build_schedule", without_a_release)
    engine = make_engine(Net(count=6), device=lagged(), keep_graphs="off")
    engine.train_step(batches_of(0, 1))
    with pytest.raises(ScheduleError, match=r"operation \d+ .* still holds unit"):
        engine.train_step(batches_of(0, 1))
    engine.close()


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("inputs_leave", [False, True])
def test_bytes_and_peak_are_the_schedules(slots: int, inputs_leave: bool) -> None:
    engine = make_engine(Net(count=6), device=lagged(), slots=slots, keep_graphs="off")
    weights = engine.weights
    weights._inputs_must_leave = lambda kind, elements: inputs_leave
    engine.train_step(batches_of(0, 1))
    stats = engine.train_step(batches_of(0, 1))
    schedule = weights.schedule_of("step")
    gradients = {unit.index: sum(slot.parameter.nbytes for slot in unit.slots) for unit in engine.partition.units}
    inputs = dict(weights.inputs.bytes_by_unit)
    sizes = Sizes(weights.unit_bytes, gradients, inputs, inputs_leave, gradient_sums=gradients)
    expected = build_schedule(schedule.visits, sizes, schedule.classes)
    staging_bytes = 2 * max(
        sum(-(-slot.parameter.nbytes // 64) * 64 for slot in unit.slots) for unit in engine.partition.units
    )
    assert stats.device_peak_bytes == check_schedule(expected, sizes) + staging_bytes
    assert stats.h2d_bytes == expected.h2d_bytes
    assert stats.d2h_bytes == expected.d2h_bytes
    assert stats.weight_passes == expected.total_bytes(Kind.FETCH) / sum(weights.unit_bytes.values())
    assert (expected.total_bytes(Kind.SAVE) > 0) == inputs_leave
    engine.close()


def test_parameters_in_a_slot_are_aligned_for_a_gpu() -> None:
    """All but the smallest, those that another unit holds as well."""
    model = Net(Wide, count=2)
    model.blocks[1].norm, model.head.weight = model.blocks[0].norm, model.embed.weight
    engine = make_engine(model, device=lagged())
    for image in engine.weights._images.values():
        starts = [(offset, dtype.itemsize * shape.numel()) for _, offset, dtype, shape in image.parameters]
        assert [offset % (256 if n_bytes >= 256 else 64) for offset, n_bytes in starts] == [0] * len(starts)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(sorted(starts)))
    engine.close()


def test_two_weight_passes_however_many_micro_batches() -> None:
    engine = make_engine(Net(count=6), device=lagged(), slots=2, keep_graphs="off")
    passes = []
    for step in range(3):
        passes.append(engine.train_step(batches_of(step, 1 + step)).weight_passes)
    assert passes[0] < 2
    assert passes[1] == passes[2] < 2
    engine.close()


class Normed(Net):
    """All but the blocks is small: embedding, a norm, and the head."""

    def __init__(self) -> None:
        super().__init__(Wide, count=4)
        self.norm = nn.LayerNorm(WIDTH)

    def hidden(self, input_ids: Tensor) -> Tensor:
        return self.norm(super().hidden(input_ids))


class Wide(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 1024), nn.Linear(1024, WIDTH)


@pytest.mark.parametrize("clip_scope", ["global", "unit"])
def test_small_units_are_copied_ahead_of_large_ones(clip_scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And updated before them, so that no copy waits for all updates."""
    device, copied, updated = lagged(), [], []
    own_copy, own_update = device.up.copy, PendingUpdates._carry_out
    with monkeypatch.context() as watched:
        watched.setattr(device.up, "copy", lambda *a, **k: copied.append(k["label"]) or own_copy(*a, **k))
        watched.setattr(
            PendingUpdates, "_carry_out", lambda s, u, *rest: updated.append(s._names[u]) or own_update(s, u, *rest)
        )
        torch.manual_seed(0)
        engine = make_engine(Normed(), device=device, clip_scope=clip_scope)
        for step in range(4):
            copied.clear()
            updated.clear()
            engine.train_step(batches_of(step, 2))
            engine.flush()
            if step:
                assert copied[:3] == ["embed", "norm", "head"]
                assert set(copied[3:]) == {f"blocks.{n}" for n in range(4)}
            assert clip_scope == "unit" or updated[:3] == ["embed", "head", "norm"]
        engine.close()
    found = {name: value.clone() for name, value in engine.model.state_dict().items()}
    torch.manual_seed(0)
    host = make_engine(Normed(), clip_scope=clip_scope)
    for step in range(4):
        host.train_step(batches_of(step, 2))
    assert all(torch.equal(value, found[name]) for name, value in host.model.state_dict().items())


# -- the head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [4, 64])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_chunks_of_the_head_give_the_bits_of_the_host(micro_batches: int, tokens: int) -> None:
    settings = {"micro_batches": micro_batches, "head_chunk_tokens": tokens}
    assert same(train(tiny_llama(), lagged(), **settings), train(tiny_llama(), "cpu", **settings))


def test_chunks_of_the_head_fit_into_little_memory() -> None:
    """And what is chosen is more than the least where there is room."""
    batches, chosen = [make_batch(0, rows=4, length=64)], []
    for cap in (150_000, 1_000_000):
        engine = make_engine(tiny_llama(), device=lagged(memory_bytes=cap), keep_graphs="off")
        chosen.append(engine.head.chunk_tokens)
        assert max(engine.train_step(batches).device_peak_bytes for _ in range(3)) <= cap
        engine.close()
    assert chosen[0] == 64 < chosen[1]
    engine = make_engine(tiny_llama(), device=lagged(memory_bytes=150_000), head_chunk_tokens=256)
    with pytest.raises(CapacityError, match="missing"):
        engine.train_step(batches)
    engine.close()


@pytest.mark.parametrize(
    ("memory", "vocabulary", "expected"),
    [("80GiB", 128_256, 5184), ("24GiB", 128_256, 4096), ("8GiB", 128_256, 2048), ("1GiB", 128_256, 256)],
)
def test_tokens_of_a_chunk_by_the_memory_of_the_device(memory: str, vocabulary: int, expected: int) -> None:
    device = lagged(memory_bytes=parse_bytes(memory))
    device.hold(device.memory_bytes // 64)
    found = head_chunk_tokens(None, device, 16 * vocabulary, vocabulary)
    assert found % 64 == 0 and found == pytest.approx(expected, rel=0.05)
    assert head_chunk_tokens(100, device, 16 * vocabulary, vocabulary) == 100
    assert head_chunk_tokens(None, CpuDevice(), 16 * vocabulary, vocabulary) == 64


class OuterCheckpoint(Net):
    """Calls its blocks under torch's own checkpointing."""

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("keep_graphs", ["auto", "off", 2])
@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_blocks_under_checkpoint_train_like_plain(device: str, keep_graphs: Any) -> None:
    """What a graph saves is then counted, and has to be the same when it is run again."""
    assert_trains_like_plain(OuterCheckpoint(count=3), steps=4, device=device, keep_graphs=keep_graphs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_parameters_without_elements(device: str, precision: str) -> None:
    losses = []
    for empty in (False, True):
        model = Net(count=3)
        if empty:
            model.blocks[0].nothing = nn.Parameter(torch.zeros(0, 4))
            model.nothing = nn.Parameter(torch.zeros(0))
        with make_engine(model, device=device, precision=precision) as engine:
            losses.append([engine.train_step(batches_of(step, 1)).loss for step in range(3)])
    assert losses[0] == losses[1]


def test_a_second_backward_through_a_graph_is_refused_where_its_inputs_are_gone() -> None:
    with make_engine(Net(count=3), device=lagged()) as engine:
        loss = engine.model(**make_batch(0)).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="through the same graph a second time"):
            loss.backward()
        engine.discard_gradients()
        engine.train_step(batches_of(0, 1))


# -- each wait --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in WAITS if n not in ("weights_read", "checks_made")])
def test_without_a_wait_training_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait, left out, changes what is computed (or stops it) in one of a few interleavings."""
    memory = 40_000 if name.startswith("inputs") or name == "computed" else None  # a limit makes inputs leave
    if name == "update":
        slow_updates(monkeypatch)
    slow = {
        "update": "",
        "weights_arrived": "up",
        "slot_free": "compute",
        "gradient_packed": "compute",
        "inputs_restored": "up",
        "computed": "compute",
        "squares_summed": "compute",
        "state_updated": "compute",
    }.get(name, "down")

    def run(**options: Any) -> list[Any]:
        return train(Net(count=5), lagged(slow=slow, memory_bytes=memory, **options), **settings_of_wait(name))

    right = run()
    if not settings_of_wait(name):
        assert same(right, train(Net(count=5), "cpu"))
    for seed in range(5):
        try:
            if not same(run(seed=seed, without=[name]), right):
                return
        except Exception:
            return
    pytest.fail(f"nothing went wrong without the wait {name!r}: {WAITS[name]}")


def test_a_copy_waits_for_the_computation_before_it_where_it_is_told_to() -> None:
    device, source, target = lagged(slow="compute"), torch.zeros(8), torch.zeros(8)
    for value in range(1, 4):
        device.compute(lambda value=value: source.fill_(value), ())
        device.down.copy([(target, source)], (), computed=True).wait()
        assert target.tolist() == [value] * 8
    device.close()


def test_saved_inputs_leave_and_return_in_the_order_of_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the lagged device computation is over when inputs leave: what is asked of a GPU has to be looked at."""
    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: True)
    device, seen = lagged(), []
    for stream in (device.up, device.down):
        own = stream.copy

        def watched(*given: Any, own: Any = own, name: str = stream._track, **options: Any) -> Any:
            if options["label"] == "inputs":
                seen.append((name, options.get("computed"), [wait for wait, _ in given[1]]))
            return own(*given, **options)

        monkeypatch.setattr(stream, "copy", watched)
    train(Net(count=4), device, keep_graphs="off")
    assert seen and {str(call) for call in seen} == {
        "('down', True, [])",
        "('up', True, ['inputs_saved'])",
    }


def slow_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SlabUpdate.run

    def late(self: SlabUpdate, *given: Any) -> None:
        time.sleep(0.003)
        run(self, *given)

    monkeypatch.setattr(SlabUpdate, "run", late)


def settings_of_wait(name: str) -> dict[str, Any]:
    """With which the wait is needed: two are for units in the device's memory, and norms that clip."""
    return {"resident_units": 7, "clip_norm": 0.01} if name in ("squares_summed", "state_updated") else {}


class Stopping(Net):
    """Stops after two blocks when told to."""

    stops = False

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        if self.stops:
            return self.blocks[1](self.blocks[0](self.embed(input_ids)))
        return super().forward(input_ids, labels)


@pytest.mark.parametrize("without", [[], ["weights_read"]], ids=["with", "without"])
def test_no_update_begins_while_a_copy_still_reads(without: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an evaluation that ended before what was copied ahead for it arrived. Here computation has waited for all that
    it uses, so that the values do not tell; on a GPU the evaluation itself may still be under way."""
    device, model, copies, over = lagged(without=without), Stopping(count=4), [], []
    own_copy, own_run = device.up.copy, SlabUpdate.run

    def copy_late(*given: Any, **options: Any) -> Any:
        if model.stops:
            device.up.submit(lambda: time.sleep(0.1), (), "late")
        copies.append(own_copy(*given, **options))
        return copies[-1]

    def run(self: SlabUpdate, *given: Any) -> None:
        over.append(copies[-1]._happened.is_set())
        own_run(self, *given)

    monkeypatch.setattr(device.up, "copy", copy_late)
    monkeypatch.setattr(SlabUpdate, "run", run)
    engine = make_engine(model, device=device, keep_graphs="off")
    for step in range(3):
        model.stops = False
        model(**make_batch(step)).loss.backward()
        with torch.no_grad():
            model(**make_batch(50))
            model.stops = True
            model(**make_batch(50))
        engine.step()
        engine.flush()
    assert all(over) != bool(without)
    engine.close()


def test_a_device_serves_one_engine() -> None:
    device = lagged()
    make_engine(Net(), device=device).close()
    with make_engine(Net(), device=device) as engine, pytest.raises(RuntimeError, match="make another one"):
        engine.train_step(batches_of(0, 1))


def test_an_unknown_wait_is_refused() -> None:
    with pytest.raises(ConfigError, match="no wait"):
        lagged(without=["upadte"])


# -- other orders and other loops -------------------------------------------------------------------------------------


class Skipping(Net):
    """Leaves one block out of every second forward."""

    def __init__(self) -> None:
        super().__init__(count=5)
        self.calls = 0

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        self.calls += 1
        for number, block in enumerate(self.blocks):
            if number != 2 or self.calls % 2:
                x = block(x)
        return x


@pytest.mark.filterwarnings("ignore:.*was called out of the order")
@pytest.mark.parametrize("keep_graphs", ["off", "auto"])
def test_another_order_each_step_is_still_right(keep_graphs: str) -> None:
    assert_trains_like_plain(Skipping(), steps=6, device=lagged(), keep_graphs=keep_graphs)


def test_another_order_is_said_once() -> None:
    engine = make_engine(Skipping(), device=lagged())
    engine.train_step(batches_of(0, 1))
    with pytest.warns(UserWarning, match="out of the order of earlier steps"):
        engine.train_step(batches_of(1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2, 5):
            engine.train_step(batches_of(step, 1))
    engine.close()


def test_a_callers_own_loop_with_an_evaluation_inside() -> None:
    def loop(device: Any) -> list[Any]:
        model = Net(count=4)
        engine = make_engine(model, device=device)
        seen: list[Any] = []
        for step in range(4):
            losses = [engine.model(**batch).loss for batch in batches_of(step, 2)]
            with torch.no_grad():
                seen.append(float(engine.model(**make_batch(50)).loss))
            for loss in losses:
                loss.backward()
            seen.append(engine.step().grad_norm)
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        engine.close()
        return seen

    assert same(loop(lagged()), loop("cpu"))


@pytest.mark.filterwarnings("ignore:.*was called out of the order")
def test_in_a_callers_own_loop_inputs_leave_only_where_memory_is_short() -> None:
    """As in training steps; and a larger batch, or several before one backward, is noticed when it comes."""

    def sent(cap: int, steps: list[list[list[dict[str, Tensor]]]]) -> list[bool]:
        """For each step whether inputs left; it has groups of batches, each with its forwards before its backwards."""
        model = Net(count=8)
        engine = make_engine(model, device=lagged(memory_bytes=cap), keep_graphs="off")
        found = []
        for groups in steps:
            before = engine.device.d2h_bytes
            for group in groups:
                losses = [model(**batch).loss for batch in group]
                for loss in losses:
                    loss.backward()
            assert engine.step().device_peak_bytes <= cap
            gradients = len(groups) * sum(p.nbytes for p in model.parameters())
            found.append(engine.device.d2h_bytes - before > gradients)
        engine.close()
        return found

    small, large = make_batch(0, rows=2, length=6), make_batch(1, rows=16, length=6)
    one, two, big = [[small]], [[small, small]], [[large]]
    assert sent(8_000, [one, one, one]) == [True, True, True]
    assert sent(1_000_000, [one, one, big]) == [True, False, False]
    assert sent(40_000, [one, one, big, one, big]) == [True, False, True, False, True]
    assert sent(40_000, [two, [[small]] * 6, [[small]] * 6]) == [True, False, False]


def test_weights_read_between_steps_are_up_to_date() -> None:
    late, host = make_engine(Net(), device=lagged()), make_engine(Net())
    for step in range(3):
        for engine in (late, host):
            engine.train_step(batches_of(step, 2))
        for name, value in late.model.state_dict().items():
            assert torch.equal(value, host.model.state_dict()[name])
    late.close()
    host.close()


# -- the model around the units --------------------------------------------------------------------------------------


class ReadsOutside(Net):
    """Uses the embedding's weight as its head, without calling the embedding."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return Output(self.loss(torch.nn.functional.linear(self.hidden(input_ids), self.embed.weight), labels))


def test_a_weight_read_outside_its_unit_is_refused_by_name() -> None:
    engine = make_engine(ReadsOutside(), device=lagged())
    with pytest.raises(UnsupportedModelError, match=r"embed\.weight is read outside"):
        engine.train_step(batches_of(0, 1))
    assert engine.model.embed.weight.shape == (29, 8)
    engine.close()
    assert not isinstance(engine.model.embed.weight, HiddenParameter)


def test_shape_and_dtype_of_a_weight_may_be_read_anywhere() -> None:
    class Reads(Net):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            assert self.head.weight.shape == (29, 8) and self.head.weight.dtype == torch.float32
            assert next(self.parameters()).device.type == "cpu" and self.embed.weight.requires_grad
            return super().forward(input_ids, labels)

    assert_trains_like_plain(Reads(), device=lagged())


def test_generations_of_engines_leave_no_threads() -> None:

    before = set(threading.enumerate())
    engine = make_engine(copy.deepcopy(Net()), device=lagged())
    engine.train_step(batches_of(0, 2))
    engine.close()
    left = [t.name for t in set(threading.enumerate()) - before if t.is_alive()]
    assert left == []


def test_a_model_of_transformers_reports_the_device_and_gets_its_own_class_back() -> None:
    from megatrain.model.root import report_device

    model = tiny_llama()
    own = type(model)
    undo = report_device(model, torch.device("cuda", 1))
    assert model.device == model.model.device == torch.device("cuda", 1)
    assert isinstance(model, own) and type(model).__name__ == own.__name__
    undo()
    assert type(model) is own and model.device == torch.device("cpu")


def test_generation_and_saving_while_weights_stream(tmp_path: Path) -> None:
    host, model = tiny_llama(), tiny_llama()
    engine = make_engine(model, device=lagged())
    prompt = torch.tensor([[3, 5, 7]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(engine.model.generate(prompt, **options), host.generate(prompt, **options))
    engine.save_pretrained(tmp_path / "out")
    again = type(host).from_pretrained(tmp_path / "out")
    assert torch.equal(again(prompt).logits, host(prompt).logits)
    engine.close()


def test_saved_inputs_come_back_only_where_memory_is_short() -> None:
    """With room for them, inputs stay; the first step, which does not know yet, sends them away."""
    tight = make_engine(Net(count=8), device=lagged(memory_bytes=12_000), keep_graphs="off")
    roomy = make_engine(Net(count=8), device=lagged(memory_bytes=1_000_000), keep_graphs="off")
    sent = []
    for engine in (tight, roomy):
        for step in range(2):
            stats = engine.train_step(batches_of(step, 3))
        sent.append(stats.d2h_bytes - sum(p.nbytes for p in engine.model.parameters()))
        engine.close()
    assert sent[0] > 0 and sent[1] == 0


def test_inputs_leave_beside_the_forward_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their copy is issued, and on a GPU ordered, before the unit computes."""
    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: True)
    device, seen = lagged(), []
    own_copy = device.down.copy
    monkeypatch.setattr(device.down, "copy", lambda *a, **k: seen.append(k["label"]) or own_copy(*a, **k))
    engine = make_engine(Net(count=4), device=device, keep_graphs="off")
    for number, block in enumerate(engine.model.blocks):
        block.norm.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
    for _ in range(2):
        seen.clear()
        engine.train_step(batches_of(0, 1))
    first_forward = seen[: seen.index(3) + 1]
    assert first_forward == ["inputs", 0, "inputs", 1, "inputs", 2, "inputs", 3]
    engine.close()
