"""The loop and its parts, on a stand-in for the engine."""

import dataclasses
import io
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatrain.config import parse_config
from megatrain.data.packing import TokenStream
from megatrain.errors import ConfigError
from megatrain.train import build
from megatrain.train.evaluate import evaluate
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.loop import LoopResult, train
from megatrain.train.metrics import MetricsFile
from megatrain.train.progress import BarProgress, LineProgress, show_progress
from megatrain.train.run_folder import RunFolder

FIELDS = [
    "step",
    "loss",
    "grad_norm",
    "lr",
    "target_tokens",
    "seconds",
    "tokens_per_second",
    "h2d_bytes",
    "d2h_bytes",
    "optimizer_exposed_seconds",
    "device_peak_bytes",
    "host_peak_bytes",
]


class StandIn:
    """An engine that only counts."""

    def __init__(self, interrupt_in_step: int | None = None) -> None:
        self.calls: list[tuple[Any, float | None]] = []
        self.interrupt_in_step = interrupt_in_step

    def train_step(self, batches: Any, lr: float | None = None) -> Any:
        self.calls.append((batches, lr))
        if len(self.calls) == self.interrupt_in_step:
            signal.raise_signal(signal.SIGINT)
        loss = float(len(self.calls))
        counts = dict.fromkeys(("h2d_bytes", "d2h_bytes", "device_peak_bytes", "host_peak_bytes"), 7)
        return SimpleNamespace(
            loss=loss,
            grad_norm=math.inf if loss == 2 else 0.5,
            target_tokens=100,
            seconds=0.25,
            skipped=loss == 2,
            optimizer_exposed_seconds=0.0,
            **counts,
        )


def run_loop(engine: StandIn, folder: Path, steps: int = 5, log_every: int = 1) -> tuple[LoopResult, list[Any], str]:
    shown = io.StringIO()
    with StopOnInterrupt() as stop, MetricsFile(folder / "metrics.jsonl") as metrics:
        result = train(
            engine,
            batches_of=lambda step: [{"input_ids": torch.tensor([[step]])}],
            learning_rate_of=lambda step: step / 10,
            total_steps=steps,
            metrics=metrics,
            progress=LineProgress(steps, shown, clock=lambda: 0.0),
            stop=stop,
            log_every=log_every,
        )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return result, lines, shown.getvalue()


def test_the_loop_feeds_steps_and_writes_metrics(tmp_path: Path) -> None:
    engine = StandIn()
    result, lines, shown = run_loop(engine, tmp_path)
    assert result == LoopResult(steps=5, interrupted=False, last_loss=5.0, skipped=1)
    assert [int(batches[0]["input_ids"]) for batches, _ in engine.calls] == [0, 1, 2, 3, 4]
    assert [lr for _, lr in engine.calls] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(list(line) == FIELDS for line in lines)
    assert lines[0]["tokens_per_second"] == 400.0
    assert lines[1]["grad_norm"] is None  # JSON has no infinity
    assert len(shown.splitlines()) == 2  # the first and the last: the clock stands still
    assert shown.splitlines()[-1].startswith("step 5/5  loss ") and "400 target tokens/s" in shown


def test_fewer_lines_with_log_every_but_always_the_last(tmp_path: Path) -> None:
    _, lines, _ = run_loop(StandIn(), tmp_path, steps=5, log_every=2)
    assert [line["step"] for line in lines] == [2, 4, 5]


def test_first_interrupt_finishes_the_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    result, lines, _ = run_loop(StandIn(interrupt_in_step=3), tmp_path, log_every=10)
    assert result.interrupted and result.steps == 3
    assert [line["step"] for line in lines] == [3]
    assert "finishing this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_fits_the_stream() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(show_progress(3, io.StringIO()), LineProgress)
    stream = Terminal()
    bar = show_progress(3, stream)
    assert isinstance(bar, BarProgress)
    line = {"step": 2, "loss": 1.5, "seconds": 2.0, "target_tokens": 100, "host_peak_bytes": 5e9}
    with bar:
        bar.update(line)
    assert "50 target tokens/s" in " ".join(stream.getvalue().split())


def test_plain_progress_is_throttled_by_time() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = LineProgress(1000, stream, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 0.5
        progress.update({"step": step, "loss": 1.0, "seconds": 0.5, "target_tokens": 1, "host_peak_bytes": 1})
    assert len(stream.getvalue().splitlines()) == 5


def test_evaluation_counts_every_byte_once() -> None:
    class Uniform(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            assert not self.training and input_ids.shape[1] == 5
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 16))

    model = Uniform()
    model.train()
    for length in range(2, 14):  # windows that fit exactly, and that do not
        stream = TokenStream(np.arange(length, dtype=np.uint16), utf8_bytes=2 * (length - 1))
        found = evaluate(model, stream, seq_len=5, micro_batch=2)
        assert found.target_tokens == length - 1
        assert found.loss == pytest.approx(math.log(16))
        assert found.bits_per_byte == pytest.approx(2.0)  # 4 bits per token of 2 bytes
    assert model.training


def config(**train_settings: Any) -> Any:
    return parse_config({"model": {"path": "m"}, "data": {"train": "a", "seq_len": 10}, "train": train_settings})


def test_number_of_steps() -> None:
    assert build.total_steps(config(steps=7), 100) == 7
    assert build.total_steps(config(tokens=95), 100) == 10
    assert build.total_steps(config(epochs=2, tokens_per_step=30), 100) == 66
    assert build.total_steps(config(epochs=0.001), 100) == 1
    short = dataclasses.replace(
        config(steps=7),
        schedule=parse_config(
            {
                "model": {"path": "m"},
                "data": {"train": "a"},
                "train": {"steps": 1},
                "schedule": {"warmup_steps": 8},
            }
        ).schedule,
    )
    with pytest.raises(ConfigError, match=r"schedule.warmup_steps: 8 is wrong; expected at most the 7 steps"):
        build.total_steps(short, 100)


def test_run_folder_never_takes_the_place_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    RunFolder(str(tmp_path / "run"))  # empty: fine
    (tmp_path / "run" / "thesis.tex").write_text("years")
    for replace in (False, True):
        with pytest.raises(ConfigError, match="output: "):
            RunFolder(str(tmp_path / "run"), replace=replace)
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(str(tmp_path / "run" / "thesis.tex"))


def test_a_finished_run_gives_way_only_to_a_complete_one(tmp_path: Path) -> None:
    final = tmp_path / "run"
    first = RunFolder(str(final))
    first.create(config(steps=1))
    first.finish(complete=True)
    with pytest.raises(ConfigError, match="already holds files"):
        RunFolder(str(final))
    for complete, steps in ((False, 1), (True, 3)):
        again = RunFolder(str(final), replace=True)
        again.create(config(steps=3))
        assert f"steps: {1}\n" in (final / "config.yaml").read_text()
        again.finish(complete=complete)
        assert f"steps: {steps}\n" in (final / "config.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
