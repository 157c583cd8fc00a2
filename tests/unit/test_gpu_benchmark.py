"""benchmarks/gpu.py: what it decides before it measures, what it writes, and a dry run on the host."""

import csv
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from gpu_parts import check, training
from gpu_parts.cases import Case, Timing, choose_cases, choose_scope, inputs_on_host_bytes
from harness import machine
from harness.models import MODELS, TINY_MODELS, batch_of, config_of, random_model
from harness.traces import busy_seconds

from megatrain.model.loading import build_on_meta
from megatrain.planner.flops import Shape, step_flops

CASES = [Case("1b", 1024, 8192), Case("1b", 8192, 65536), Case("8b", 1024, 8192), Case("8b", 8192, 65536)]
SECONDS = dict(zip(CASES, [1.0, 8.0, 6.0, 60.0], strict=True))
SETUP = {"1b": 10.0, "8b": 90.0}


@pytest.mark.parametrize(
    ("available", "kept", "dropped"),
    [
        (175.0, [0, 1, 2, 3], []),
        (174.0, [0, 1, 2], [3]),
        (114.0, [0, 2], [3, 1]),
        (106.0, [0], [3, 1, 2]),  # with its last case the large model's setup goes too
        (10.0, [], [3, 1, 2, 0]),
    ],
)
def test_the_longest_cases_are_dropped_first(available: float, kept: list[int], dropped: list[int]) -> None:
    found = choose_cases(CASES, SECONDS, SETUP, available)
    assert found == ([CASES[n] for n in kept], [CASES[n] for n in dropped])


def test_clipping_is_exact_where_memory_allows_it() -> None:
    plans = {"global": 112 * 10**9, "unit": 96 * 10**9}
    assert choose_scope(plans, 17 * 10**9, 200 * 10**9)[0] == "global"
    assert choose_scope(plans, 17 * 10**9, 120 * 10**9)[0] == "unit"
    scope, why = choose_scope(plans, 17 * 10**9, 100 * 10**9)
    assert scope is None
    assert why == (
        "host memory: 100.00 GB can be had, it needs 132.00 GB with clip_scope global or 116.00 GB with clip_scope unit"
    )


def test_inputs_on_the_host_take_powers_of_two() -> None:
    shape = Shape(layers=3, hidden=3584, intermediate=1, heads=1, kv_heads=1, head_dim=1, vocabulary=1)
    # micro-batches of 8k tokens: 56 MiB each, 64 MiB as allocated
    assert inputs_on_host_bytes(shape, Case("x", 1024, 65536)) == 3 * 8 * 64 * 1024**2
    assert inputs_on_host_bytes(shape, Case("x", 8192, 8192)) == 3 * 64 * 1024**2


def test_time_is_foreseen_from_what_has_been_timed() -> None:
    timing = Timing(100.0, MODELS, steps=3)
    case, longer = Case("1b", 1024, 8192), Case("1b", 1024, 65536)
    flops = step_flops(MODELS["1b"].shape, case.lengths).hardware
    assert timing.seconds(case) == pytest.approx(6 * flops / (0.4 * 100e12))
    timing.learn(case, 2 * timing.seconds(case))
    assert timing.seconds(case) == pytest.approx(2 * 6 * flops / (0.4 * 100e12))
    assert timing.seconds(longer) == pytest.approx(8 * timing.seconds(case))


@pytest.mark.parametrize(
    ("name", "billions"), [("1b", (1.23, 1.24)), ("3b", (3.0, 3.1)), ("7b", (7.6, 7.7)), ("8b", (8.0, 8.1))]
)
def test_models_have_the_size_of_those_they_are_named_after(name: str, billions: tuple[float, float]) -> None:
    model = build_on_meta(config_of(MODELS[name]))
    assert billions[0] < sum(p.numel() for p in model.parameters()) / 1e9 < billions[1]
    assert Shape.of(model.config) == MODELS[name].shape


def test_random_models_compute() -> None:
    model: Any = random_model(TINY_MODELS["8b"], torch.float32)
    names = dict(model.named_parameters())
    assert torch.equal(names["model.norm.weight"], torch.ones(48))
    assert not names["model.layers.0.self_attn.q_proj.bias"].any()
    first, second = (names[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 1))
    assert not torch.equal(first, second) and 0.015 < first.std().item() < 0.025
    assert model(**batch_of(128, 2, 8, 0)).loss.item() == pytest.approx(4.85, abs=0.2)  # log(128)


def test_spans_that_overlap_count_once_and_computation_not_while_it_waits() -> None:
    events: list[dict[str, Any]] = [
        {"ph": "M", "tid": 0, "args": {"name": "compute"}},
        {"ph": "M", "tid": 1, "args": {"name": "up"}},
        {"ph": "X", "tid": 0, "ts": 0.0, "dur": 2e6},
        {"ph": "X", "tid": 0, "ts": 1e6, "dur": 2e6},
        {"ph": "X", "tid": 0, "ts": 1.5e6, "dur": 1e5},
        {"ph": "X", "tid": 0, "ts": 5e6, "dur": 1e6},
    ]
    assert busy_seconds(events) == {"compute": 4.0, "up": 0.0}
    events += [
        {"ph": "M", "tid": 2, "name": "thread_name", "args": {"name": "waits of compute"}},
        {"ph": "X", "tid": 2, "ts": 2e6, "dur": 0.5e6},  # within a unit's computation
        {"ph": "X", "tid": 2, "ts": 4.5e6, "dur": 1e6},  # half of it before one
    ]
    assert busy_seconds(events) == {"compute": 3.0, "up": 0.0, "waits of compute": 1.5}


def test_versions_are_of_all_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"triton": "3.4.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise machine.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(machine.importlib.metadata, "version", version)
    versions = machine.describe_machine("lagged", "abc")["versions"]
    assert versions.endswith(" triton 3.4.0 liger-kernel none deepspeed none")


def test_a_dry_run_measures_everything_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.csv"
    options = ["--device", "lagged", "--tiny", "--threads", "1", "--steps", "1", "--results", str(results)]
    assert gpu.main([*options, "--commit", "abc"]) == 0
    assert gpu.main([*options, "--only", "link"]) == 0  # appended to
    with results.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["part"] for row in rows} == set(gpu.PARTS)
    assert {row["commit"] for row in rows if row["part"] == "models"} == {"abc"}
    found = {(row["case"], row["metric"]): float(row["value"]) for row in rows}
    assert found["8b, 64 x 2, global clipping", "target_tokens_per_second"] == pytest.approx(
        2 * 63 / found["8b, 64 x 2, global clipping", "seconds_per_step"], rel=1e-4
    )
    assert found["fp32", "bits_equal"] == 1 and found["fp32, tied", "bits_equal"] == 1
    case = "8b, 64 x 2, global clipping"
    shape = TINY_MODELS["8b"].shape
    flops = step_flops(shape, [64, 64], recomputed_layers=shape.layers - int(found[case, "kept_layers"]))
    seconds = found[case, "seconds_per_step"]
    assert found[case, "hardware_rate"] == pytest.approx(flops.hardware / seconds / 1e12, rel=1e-4)
    assert found[case, "model_rate"] == pytest.approx(flops.model / seconds / 1e12, rel=1e-4)
    assert found[case, "compute_busy"] > 0 and found[case, "up_bytes"] > 0
    assert found["page-locked 65.54 kB", "up"] > 0 and found["1 threads", "beside_copies"] > 0
    assert "Training steps" in capsys.readouterr().out


def test_kernels_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatrain.engine import attachment, engine
    from megatrain.model.kernels import Kernels

    # the host has no such kernels: the same code under both names
    monkeypatch.setattr(engine, "choose_kernels", lambda setting, *_: Kernels(setting, ""))
    monkeypatch.setattr(engine, "install_kernels", lambda chosen, *_, **__: (chosen, lambda: None))
    monkeypatch.setattr(attachment, "liger_loss", lambda: None)
    results = tmp_path / "results.csv"
    options = ["--device", "lagged", "--tiny", "--threads", "1", "--steps", "1", "--results", str(results)]
    assert gpu.main([*options, "--only", "models", "--models", "1b", "--kernels", "torch,liger"]) == 0
    with results.open(newline="") as stream:
        found = {(row["case"], row["metric"]): float(row["value"]) for row in csv.DictReader(stream)}
    case, metric = "1b, 64 x 2", "target_tokens_per_second"
    ratio = found[f"{case}, liger kernels, global clipping", metric] / found[f"{case}, global clipping", metric]
    assert found[f"{case}, liger kernels", "speed_of_torch"] == pytest.approx(ratio, rel=1e-3)


def test_a_failed_check_ends_the_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "CHECK_BOUNDS", {"fp32": -1.0})
    assert gpu.main(["--device", "lagged", "--tiny", "--only", "check,link"]) == 1
    printed = capsys.readouterr().out
    assert "nothing else is run" in printed and "== link" not in printed


def test_a_part_that_fails_leaves_the_others_their_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_bench: Any) -> None:
        raise RuntimeError("somebody's bug")

    monkeypatch.setitem(gpu.RUN, "link", fail)
    assert gpu.main(["--device", "lagged", "--tiny", "--only", "matmul,link"]) == 1
    printed = capsys.readouterr().out
    assert "somebody's bug" in printed and "Products in bf16" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "link,speed"], "there is no speed; there are check, link, matmul, adamw, models"),
        (["--device", "rocm"], "cuda, cuda:NUMBER or lagged"),
        (["--kernels", "torch,cutlass"], "torch, liger, or both, separated by a comma"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert message in capsys.readouterr().err


def test_options() -> None:
    options = gpu.parse(["--only", "models", "--tokens", "32,8", "--sequences", "1", "--device-memory", "2"])
    assert options.only == ["models"] and options.device_memory == 2 * 1024**3
    assert training._sizes(options) == [(1024, 8192), (1024, 32768)]
    assert options.results is not None and options.results.name == "results.csv"
    assert gpu.parse(["--device", "lagged"]).results is None
    assert gpu.parse(["--keep-graphs", "2"]).keep_graphs == 2
