"""benchmarks/page: docs/results.md from recorded results."""

from pathlib import Path

import pytest
import reproduce
from harness.percentiles import Spread
from harness.results import Results, read_results
from page import plots
from page.recorded import comparisons
from page.write import write_page

MACHINE = {
    "date": "2026-11-21 10:00",
    "commit": "abc",
    "device": "lagged",
    "cpu": "AMD EPYC",
    "cores": "2",
    "load": "0.1",
}
GPU = MACHINE | {"device": "NVIDIA H200"}
SETTING = "hidden 128, 1 x 256 tokens, fp32 on lagged"


def _sweep(results: Results, setting: str, ratio: float) -> None:
    for name, value in (("28 layers", 1.0), ("180 layers", ratio)):
        metrics = {"seconds_per_step": (Spread(0.9, 1.0, 1.25), "s"), "rate_of_first": (value, "")}
        results.record("depth", f"{setting}: {name}", **metrics, device_peak_of_first=(1.0, ""))


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    older, newer = Results(path, MACHINE), Results(path, MACHINE | {"date": "2026-11-21 11:00"})
    _sweep(older, SETTING, 0.5)
    older.record("depth", f"{SETTING}: 999 layers", rate_of_first=(0.1, ""))
    _sweep(newer, SETTING, 0.97)
    newer.not_measured("ablation", "38M: no fused kernels", "Liger's kernels need a CUDA device")
    return path


def _write(tmp_path: Path, recorded: Path) -> str:
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    write_page(page, read_results(recorded))
    return page.read_text()


def test_of_each_comparison_the_last_run_is_shown_whole(recorded: Path) -> None:
    (found,) = comparisons(read_results(recorded), "depth")
    assert found.setting == SETTING and found.machine["date"] == "2026-11-21 11:00"
    assert [case.name for case in found.cases.values()] == ["28 layers", "180 layers"]
    assert found.cases["180 layers"].median("rate_of_first") == 0.97


def test_cases_that_are_compared_with_nothing_stay(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    for date, cases in (("10:00", {"1b": 1.0, "8b": 2.0}), ("11:00", {"8b": 3.0})):
        for name, seconds in cases.items():
            Results(path, GPU | {"date": date}).record("models", name, seconds_per_step=(seconds, "s"))
    (found,) = comparisons(read_results(path), "models")
    assert {name: case.median("seconds_per_step") for name, case in found.cases.items()} == {"1b": 1.0, "8b": 3.0}


def test_what_was_not_measured_says_so(tmp_path: Path, recorded: Path) -> None:
    text = _write(tmp_path, recorded)
    assert "beside other work" not in text
    assert "| 180 layers | – | 1 (0.9–1.25) | – | – | 0.97x | – |" in text
    assert "| no fused kernels | not measured: Liger's kernels need a CUDA device |" in text
    assert "| 28 to 180 layers, one width | 284 to 227 TFLOP/s (0.80x) | GH200 | reviews | not measured yet |" in text
    assert "0.97x (hidden" not in text  # the host in the role of a GPU answers no claim about GPUs
    assert text.count("On a GPU: not measured yet.") == 5


def test_a_busy_machine_is_told(tmp_path: Path, recorded: Path) -> None:
    _sweep(Results(recorded, MACHINE | {"date": "2026-11-21 12:00", "load": "2.5"}), SETTING, 0.97)
    assert "Measured beside other work (a load of 2.5 on 2 cores before it began)" in _write(tmp_path, recorded)


def test_claims_are_answered_by_gpus(tmp_path: Path, recorded: Path) -> None:
    results = Results(recorded, GPU)
    _sweep(results, "hidden 1536, bf16 on cuda", 0.93)
    results.record("rivals", "8b, bf16 on cuda: megatrain", model_rate=(Spread(300.0, 310.0, 320.0), "TFLOP/s"))
    text = _write(tmp_path, recorded)
    assert "| reviews | 0.93x (hidden 1536, bf16 on cuda; NVIDIA H200) |" in text
    assert "| 310 TFLOP/s (300–320) (8b, bf16 on cuda; NVIDIA H200) |" in text
    assert "| 14B, beside ZeRO-3 with CPU offload | 1.84x | GH200 | abstract | not measured yet |" in text
    assert text.count("On a GPU: not measured yet.") == 3


def test_without_matplotlib_the_page_has_no_plots(
    tmp_path: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    assert "](plots/" not in _write(tmp_path, recorded)
    assert not (tmp_path / "docs" / "plots").exists()


def test_plots_depend_on_the_numbers_alone(tmp_path: Path, recorded: Path) -> None:
    pytest.importorskip("matplotlib")
    assert f"![depth: {SETTING}](plots/depth-1.svg)" in _write(tmp_path, recorded)
    path = tmp_path / "docs" / "plots" / "depth-1.svg"
    before = path.read_bytes()
    write_page(tmp_path / "docs" / "results.md", read_results(recorded))
    assert path.read_bytes() == before and b"180 layers" in before


def test_the_page_can_be_written_without_measuring(tmp_path: Path, recorded: Path) -> None:
    page = tmp_path / "results.md"
    assert reproduce.main(["--page", "--results", str(recorded), "--write", str(page)]) == 0
    assert page.read_text().startswith("# Results\n")


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    page = tmp_path / "results.md"
    write_page(page, read_results(reproduce.RESULTS))
    committed = reproduce.PAGE.read_text(encoding="utf-8").split("\n\n")
    assert page.read_text().split("\n\n") == [part for part in committed if not part.startswith("![")]


def test_every_part_gets_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[tuple[str, list[str]]] = []
    for module in (reproduce.compare, reproduce.sweeps, reproduce.ablations):
        name = module.__name__
        monkeypatch.setattr(module, "main", lambda argv, name=name: called.append((name, argv)) or 0)
    results = tmp_path / "results.csv"
    assert reproduce.main(["--quick", "--systems", "torch", "--results", str(results)]) == 0
    assert [name for name, _ in called] == ["compare", *["sweeps"] * 4, *["ablations"] * 2]
    assert all("--tiny" in argv and argv[argv.index("--results") + 1] == str(results) for _, argv in called)
    assert called[0][1][-2:] == ["--systems", "torch"]
    assert [argv[-4:] for _, argv in called[3:5]] == [
        ["--device", device, "--only", "width"] for device in ("lagged", "cpu")
    ]


def test_wrong_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reproduce.main(["--only", "speed"])
    assert "there is no speed; there are rivals, depth, width, ablations, gpu" in capsys.readouterr().err
