"""benchmarks/rivals: who is available, what is compared with what, and that the exact ones compute the same."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import compare
import pytest
import torch
from harness.models import NAMED_MODELS
from harness.percentiles import Spread
from rivals import contest, original, ours, slideformer, zero3
from rivals.contest import LOSS_BOUNDS, Outcome, largest_loss_difference, run_rounds, speed_ratio
from rivals.interface import Settings
from rivals.ours import fetch_late
from rivals.systems import OURS, SYSTEMS
from rivals.worker import Measured, Task, measure

from megatrain.schedule.build import build_schedule
from megatrain.schedule.check import check_schedule
from megatrain.schedule.operations import Kind, Schedule, Sizes, SlotClass, Visit

ON_HOST = Settings("fp32", micro_batches=2)
ON_GPU = Settings("bf16", "cuda")
TASK = Task(OURS, NAMED_MODELS["tiny"], ON_HOST, sequences=2, seq_len=16, steps=1)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- who is available ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero3-offload", "zero3-superoffload", "megatrain-original", "slideformer"])
def test_what_is_not_installed_is_not_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (zero3, original, slideformer):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
    reason = SYSTEMS[name].available(ON_GPU)
    assert reason is not None and ("not installed" in reason or "not on the path" in reason)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("zero3-offload", ON_HOST, None),
        ("zero3-superoffload", ON_HOST, "SuperOffload needs a CUDA device"),
        ("zero3-superoffload", ON_GPU, None),
        ("megatrain-original", ON_GPU, None),
        ("megatrain-original", ON_HOST, "it needs a CUDA device"),
        ("megatrain-original", replace(ON_GPU, precision="fp32"), "it trains in bf16 only"),
        ("slideformer", ON_GPU, None),
        ("slideformer", replace(ON_GPU, micro_batches=2), "it updates in every backward: one micro-batch a step"),
        ("torch", replace(ON_HOST, device="lagged"), "lagged is a device of MegaTrain's tests"),
        ("megatrain", replace(ON_HOST, device="lagged"), None),
    ],
)
def test_what_cannot_be_measured_says_why(
    name: str, settings: Settings, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (zero3, original, slideformer):
        monkeypatch.setattr(module, "find_spec", lambda _: object())
    monkeypatch.setattr(zero3, "version", lambda _: "0.19.8")
    assert SYSTEMS[name].available(settings) == reason


def test_an_old_deepspeed_is_not_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero3, "find_spec", lambda _: object())
    monkeypatch.setattr(zero3, "version", lambda _: "0.19.7+abc")
    assert SYSTEMS["zero3-offload"].available(ON_HOST) == "deepspeed is 0.19.7+abc; 0.19.8 or newer is compared with"


def test_deepspeed_gets_the_contract() -> None:
    config = zero3.zero3_config(ON_HOST, super_offload=False)
    assert config["gradient_accumulation_steps"] == 2 and config["gradient_clipping"] == 1.0
    assert "super_offload" not in config["zero_optimization"]["offload_optimizer"]
    config = zero3.zero3_config(ON_GPU, super_offload=True)
    assert config["bf16"] == {"enabled": True}
    assert config["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": True,
        "super_offload": True,
    }


# -- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("system", ["torch", "fsdp2-offload", "zero3-offload", "megatrain-recomputing"])
def test_exact_systems_have_our_losses(system: str) -> None:
    reason = SYSTEMS[system].available(ON_HOST)
    if reason is not None:
        pytest.skip(reason)
    found, expected = measure(replace(TASK, system=system)), measure(TASK)
    if system == "zero3-offload":
        assert found.losses == pytest.approx(expected.losses, rel=LOSS_BOUNDS["fp32"])
    else:
        assert found.losses == expected.losses
    assert len(found.seconds) == 1 and found.device_peak_bytes is None


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_system_that_updates_nothing_is_found_out(precision: str) -> None:
    task = replace(TASK, settings=replace(ON_HOST, precision=precision))
    mine = Outcome(task, [measure(task)])
    same = Outcome(task, [replace(mine.rounds[0], losses=list(mine.losses))])
    stuck = Outcome(task, [replace(mine.rounds[0], losses=[mine.losses[0]] * 3)])
    assert compare.arithmetic(same, mine).startswith("agrees")
    assert compare.arithmetic(stuck, mine) == "other arithmetic"
    assert largest_loss_difference(stuck, mine) > 10 * LOSS_BOUNDS[precision]
    assert compare.arithmetic(same, None).startswith("not checked")
    assert compare.arithmetic(same, Outcome(task, failure="out of memory")).startswith("not checked")


def test_weights_that_come_late_are_the_same_copies() -> None:
    units = [0, 1, 2, 3]
    visits = [Visit((u,)) for u in units] + [Visit((u,), backward=True) for u in reversed(units)]
    sizes = Sizes(dict.fromkeys(units, 8), {}, dict.fromkeys(units, 4))
    early = build_schedule(visits, sizes, [SlotClass(8, 2)])
    late = fetch_late(early)
    check_schedule(late, sizes)
    assert sorted(map(str, late.operations)) == sorted(map(str, early.operations))
    assert _ahead(early) > 0 and _ahead(late) == 0


def _ahead(schedule: Schedule) -> int:
    """Fetches that are issued before a visit that does not need them."""
    computed, ahead = -1, 0
    for operation in schedule.operations:
        if operation.kind is Kind.COMPUTE:
            computed = operation.visit
        elif operation.kind is Kind.FETCH:
            ahead += operation.visit > computed + 1
    return ahead


@pytest.mark.usefixtures("threads")
def test_without_a_part_the_losses_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lagged = replace(TASK, settings=replace(ON_HOST, device="lagged"))
    expected, late = measure(lagged), []
    monkeypatch.setattr(ours.weight_stream, "build_schedule", ours.weight_stream.build_schedule)  # put back afterwards
    monkeypatch.setattr(ours, "fetch_late", lambda schedule: late.append(schedule) or fetch_late(schedule))
    for engine in ({"slots": 1}, {"synchronous_updates": True}, {"prefetch": False}):
        assert not late
        found = measure(replace(lagged, settings=replace(lagged.settings, engine=engine)))
        assert found.losses == expected.losses and found.device_peak_bytes
    assert late


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("leave", [True, False])
def test_inputs_that_leave_take_no_device_memory_by_depth(leave: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ours.weight_stream.WeightStream
    monkeypatch.setattr(stream, "_inputs_must_leave", stream._inputs_must_leave)  # put back afterwards
    settings = replace(ON_HOST, device="lagged", engine={"keep_graphs": "off", "inputs_leave": leave})
    tiny = NAMED_MODELS["tiny"]
    models = [replace(tiny, shape=replace(tiny.shape, layers=layers)) for layers in (4, 8)]
    peaks = [measure(replace(TASK, model=model, settings=settings)).device_peak_bytes for model in models]
    assert (peaks[0] == peaks[1]) == leave


# -- rounds ----------------------------------------------------------------------------------------------------------


def test_a_task_survives_its_journey() -> None:
    task = replace(
        TASK, model=NAMED_MODELS["tiny-moe"], settings=replace(ON_HOST, engine={"slots": 1, "keep_graphs": "off"})
    )
    assert Task.loads(task.dumps()) == task
    assert task.target_tokens == 2 * 2 * 15


def _measured(seconds: float) -> Measured:
    return Measured([3.0, 2.0, 1.0], [seconds] * 3, [seconds] * 3, 100, None, None, True)


def test_systems_take_turns_and_what_fails_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(task: Task, _seconds: float) -> Measured | str:
        ran.append(task.system)
        return "failed: MemoryError" if task.system == "b" else _measured(1.0)

    monkeypatch.setattr(contest, "run_apart", run)
    outcomes = run_rounds({n: replace(TASK, system=n) for n in "abc"}, 3, 100.0, lambda _: None)
    assert "".join(ran) == "abc" + "ca" + "ca"
    assert [len(outcomes[n].rounds) for n in "abc"] == [3, 0, 3]
    assert outcomes["b"].failure == "failed: MemoryError"


def test_no_round_is_begun_that_would_not_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(contest.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(contest, "run_apart", lambda *_: _measured(1.0))
    outcomes = run_rounds({"a": TASK}, 3, 45.0, lambda _: None)
    assert len(outcomes["a"].rounds) == 1


def test_ratios_are_of_what_ran_side_by_side() -> None:
    fast = Outcome(TASK, [_measured(1.0), _measured(10.0)])  # the machine became ten times slower
    slow = Outcome(TASK, [_measured(2.0), _measured(20.0)])
    assert speed_ratio(fast, slow) == Spread(2.0, 2.0, 2.0)


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = (
        "Traceback (most recent call last):\n  ...\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n[rank0] bye\n"
    )
    assert contest._why(printed, 1) == "failed: torch.OutOfMemoryError: CUDA out of memory. Tried"
    assert contest._why("Killed\n", 137) == "failed: Killed"
    assert contest.run_apart(TASK, 0.0) == "there was no time left"
    assert contest.run_apart(TASK, 0.01) == "not done after 0 s"
    monkeypatch.setattr(contest.sys, "executable", "false")
    assert contest.run_apart(TASK, 60.0) == "failed: exit code 1"


@pytest.mark.long  # half a minute, of a benchmark
def test_two_systems_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.csv"
    options = ["--tiny", "--rounds", "1", "--steps", "2", "--threads", "1", "--results", str(path)]
    assert compare.main([*options, "--systems", "megatrain,torch,slideformer"]) == 0
    with path.open(newline="") as stream:
        rows: dict[Any, dict[str, str]] = {(row["case"], row["metric"]): row for row in csv.DictReader(stream)}
    workload = "tiny, 2 x 16 tokens, fp32 on cpu"
    mine, plain = (
        {metric: row for (case, metric), row in rows.items() if case == f"{workload}: {name}"}
        for name in ("megatrain", "torch")
    )
    assert plain["arithmetic"]["note"] == "agrees within 1e-05"
    assert float(plain["loss_difference"]["value"]) == 0 and float(plain["host_peak"]["value"]) > 0
    seconds = [float(found["seconds_per_step"]["value"]) for found in (mine, plain)]
    assert float(mine["speed_of_torch"]["value"]) == pytest.approx(seconds[1] / seconds[0], rel=1e-4)
    assert float(mine["target_tokens_per_second"]["value"]) == pytest.approx(2 * 15 / seconds[0], rel=1e-4)
    assert rows[f"{workload}: slideformer", "not_measured"]["note"] == "its checkout is not on the path"
    assert "slideformer              not measured: its checkout is not on the path" in capsys.readouterr().out


def test_wrong_systems_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.parse(["--systems", "torch,colossal"])
    assert "there is no colossal; there are megatrain," in capsys.readouterr().err
