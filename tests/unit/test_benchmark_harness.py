"""benchmarks/harness: how measurements are summed up, counted and written."""

import subprocess
from pathlib import Path

import pytest
from harness.machine import commit_of
from harness.models import NAMED_MODELS, config_of
from harness.percentiles import Spread
from harness.rates import count_step
from harness.results import COLUMNS, Results, read_results

from megatrain.model.loading import build_on_meta
from megatrain.planner.flops import step_flops


def test_a_fifth_lies_below_and_a_fifth_above() -> None:
    assert Spread.of(reversed(range(11))) == Spread(2.0, 5.0, 8.0)
    assert Spread.of([4.0]) == Spread(4.0, 4.0, 4.0)


def test_slow_times_are_low_rates() -> None:
    assert Spread(1.0, 2.0, 4.0).rates(8.0) == Spread(2.0, 4.0, 8.0)


def test_operations_are_those_of_the_planner() -> None:
    model, lengths = NAMED_MODELS["tiny"], [64, 64]
    work = count_step(model, lengths)
    assert work.flops == step_flops(model.shape, lengths)
    for recomputed in range(model.shape.layers + 1):
        expected = step_flops(model.shape, lengths, recomputed_layers=recomputed)
        assert work.hardware_flops(recomputed) == expected.hardware
        assert work.flops_kept.model == expected.model


def test_of_experts_those_count_that_a_token_passes() -> None:
    model = NAMED_MODELS["tiny-moe"]
    work = count_step(model, [16])
    assert work.parameters == sum(p.numel() for p in build_on_meta(config_of(model)).parameters())
    attention, router, expert, head = 2 * 32 * 8 * (4 + 2), 32 * 4, 3 * 32 * 16, 32 * 128
    assert work.active_parameters == 2 * (attention + router + 2 * expert) + head  # two of four experts
    attended = 2 * (2 * 4 * 8) * 16**2 // 2
    assert work.flops.model == 3 * (2 * work.active_parameters * 16 + 2 * attended)


def test_rates_are_of_target_tokens_and_say_nothing_of_unknown_repetitions() -> None:
    work = count_step(NAMED_MODELS["tiny"], [16])
    metrics = work.metrics(Spread(1.0, 2.0, 4.0), 15)
    assert metrics["target_tokens_per_second"] == (Spread(3.75, 7.5, 15.0), "1/s")
    rate, unit = metrics["hardware_rate"]
    assert isinstance(rate, Spread) and unit == "TFLOP/s"
    assert rate.p50 == pytest.approx(work.flops.hardware / 2e12)
    assert "hardware_rate" not in work.metrics(Spread(1.0, 2.0, 4.0), 15, repeats_known=False)


def test_rows_are_appended_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    machine = {"date": "2026-11-21 10:00", "device": "cpu", "versions": "torch 2, numba 1"}
    Results(path, machine).record("rivals", "a: torch", seconds=(Spread(1.0, 2.0, 3.0), "s"), parameters=(7, ""))
    Results(path, machine).not_measured("rivals", "a: slideformer", "its checkout is not on the path")
    first, second, third = read_results(path)
    assert tuple(first) == COLUMNS and first["versions"] == "torch 2, numba 1"
    assert [first[name] for name in ("value", "p20", "p80", "unit")] == ["2", "1", "3", "s"]
    assert [second[name] for name in ("metric", "value", "p20", "note")] == ["parameters", "7", "", ""]
    assert (third["metric"], third["value"], third["note"]) == ("not_measured", "", "its checkout is not on the path")
    assert read_results(tmp_path / "none.csv") == []


def test_results_do_not_make_a_commit_another_one_and_code_does(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert commit_of(tmp_path) == "unknown"
    git("init", "--quiet")
    for name in ("code.py", "results.csv"):
        (tmp_path / name).write_text("1\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    head = git("rev-parse", "--short", "HEAD").strip()
    assert commit_of(tmp_path) == head
    (tmp_path / "results.csv").write_text("2\n")
    assert commit_of(tmp_path) == head
    (tmp_path / "code.py").write_text("2\n")
    assert commit_of(tmp_path) == f"{head}-dirty"
