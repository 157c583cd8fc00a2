"""The loop and its parts, on a stand-in for the engine."""

import dataclasses
import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from test_engine_toys import Net, batches_of, make_engine
from tiny_models import MODELS, tiny_config

from megatrain.config import ModelConfig, OptimizerConfig, ScheduleConfig, parse_config
from megatrain.data.packing import TokenStream
from megatrain.data.tokenizer import BPE_SPECIAL_TOKENS
from megatrain.engine.targets import target_mask
from megatrain.errors import CapacityError, ConfigError, MegaTrainError
from megatrain.model.partition import ParameterSlot
from megatrain.train import build, metrics
from megatrain.train.evaluate import eval_set, evaluate
from megatrain.train.folder_lock import FolderLock
from megatrain.train.generate import _placed
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.loop import LoopResult, NoEvaluations, train
from megatrain.train.metrics import MetricsFile
from megatrain.train.model_settings import Vocabulary, read_model_settings
from megatrain.train.param_groups import make_optimizer
from megatrain.train.profile import ProfiledEngine
from megatrain.train.progress import BarProgress, LineProgress, show_progress
from megatrain.train.run_folder import RunFolder, check_writable
from megatrain.train.trial import try_out

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
    "weights_exposed_seconds",
    "inputs_exposed_seconds",
    "gradients_exposed_seconds",
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
            weights_exposed_seconds=0.0,
            inputs_exposed_seconds=0.0,
            gradients_exposed_seconds=0.0,
            loss_values={},
            **counts,
        )


def run_loop(
    engine: StandIn, folder: Path, steps: int = 5, log_every: int = 1, evaluations: NoEvaluations | None = None
) -> tuple[LoopResult, list[Any], str]:
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
            evaluations=evaluations,
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


class FullDisk(io.RawIOBase):
    """A file on a disk that is full from the `first` to the `last` write on, after half of the line."""

    def __init__(self, file: Any, first: int, last: int) -> None:
        self._file, self._first, self._last, self._calls, self._half = file, first, last, 0, False

    def write(self, data: Any) -> int:
        if self._half:
            self._half = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._calls += 1
        self._half = self._first <= self._calls <= self._last
        return int(self._file.write(data[: len(data) // 2] if self._half else data))

    def fileno(self) -> int:
        return int(self._file.fileno())

    def truncate(self, size: int | None = None) -> int:
        return int(self._file.truncate(size))


def test_a_full_disk_costs_lines_of_the_metrics_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*given: Any, **options: Any) -> FullDisk:
        return FullDisk(open(*given, **options), first=2, last=3)

    monkeypatch.setattr(metrics, "open", opened, raising=False)
    result, lines, _ = run_loop(StandIn(), tmp_path)
    assert result.steps == 5
    assert [line["step"] for line in lines] == [1, 4, 5]  # whole lines, and again as soon as there is room
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"output: cannot write to {str(tmp_path / 'metrics.jsonl')!r}: No space left on device")


def test_metrics_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"^output: cannot write to '.*metrics\.jsonl': Is a directory$"):
        MetricsFile(tmp_path / "metrics.jsonl")


def test_a_timeline_that_cannot_be_written_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(Net())
    profiled = ProfiledEngine(engine, 1, 1, tmp_path / "missing" / "trace.json")
    profiled.train_step(batches_of(0, 1))
    assert not profiled.written and engine.step_count == 1
    assert "cannot write" in caplog.text and "trace.json" in caplog.text
    engine.close()


def test_fewer_lines_with_log_every_but_always_the_last(tmp_path: Path) -> None:
    _, lines, _ = run_loop(StandIn(), tmp_path, steps=5, log_every=2)
    assert [line["step"] for line in lines] == [2, 4, 5]


def test_the_last_line_is_there_where_an_evaluation_ends_the_run(tmp_path: Path) -> None:
    class Enough(NoEvaluations):
        enough = False

        def after_step(self, done: int, *, last: bool) -> None:
            self.enough = done == 4

    _, lines, _ = run_loop(StandIn(), tmp_path, steps=7, log_every=3, evaluations=Enough())
    assert [line["step"] for line in lines] == [3, 4]


def test_first_interrupt_finishes_the_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    result, lines, _ = run_loop(StandIn(interrupt_in_step=3), tmp_path, log_every=10)
    assert result.interrupted and result.steps == 3
    assert [line["step"] for line in lines] == [3]
    assert "finishing this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_batch_system_ends_a_run_as_ctrl_c_does(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopOnInterrupt() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before
    assert "finishing this step, then saving (once more to stop at once)" in capfd.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """In front of a terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


STEP = {"step": 2, "loss": 1.5, "seconds": 2.0, "target_tokens": 100, "host_peak_bytes": 5e9}


def drawn() -> str:
    """What a terminal gets of one step and what is said after it."""
    stream = Terminal()
    bar = show_progress(3, stream)
    assert isinstance(bar, BarProgress)
    with bar:
        bar.update(STEP)
        bar.say("step 2  eval: [bold]loss[/bold] 1.25")
    return stream.getvalue()


def test_progress_fits_the_stream(person: pytest.MonkeyPatch) -> None:
    assert isinstance(show_progress(3, io.StringIO()), LineProgress)
    shown = drawn()
    assert "50 target tokens/s" in " ".join(shown.split())
    assert "step 2  eval: [bold]loss[/bold] 1.25\n" in shown  # as it is, on a line of its own, above the bar
    assert "\x1b[" in shown


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TERM", ""), ("CI", "true"), ("CI", "1")])
def test_no_bar_where_nobody_looks_or_nothing_can_be_redrawn(name: str, value: str, person: pytest.MonkeyPatch) -> None:
    person.setenv(name, value)
    stream = Terminal()
    progress = show_progress(3, stream)
    with progress:
        progress.update(STEP)
        progress.say("two\nlines")
    assert isinstance(progress, LineProgress) and stream.getvalue().endswith("\ntwo\nlines\n")
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_colour_is_a_choice(person: pytest.MonkeyPatch) -> None:
    colours = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    assert colours.search(drawn())
    person.setenv("NO_COLOR", "1")
    assert not colours.search(drawn())


def test_what_comes_between_steps_counts_in_the_time_left() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = LineProgress(10, stream, clock=lambda: now[0])
    for step in range(1, 11):
        now[0] += 20.0  # of which a step is a half
        progress.update(STEP | {"step": step, "seconds": 10.0})
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("  20.0 s, 3 min 00 s left") and lines[4].endswith("  1 min 40 s, 1 min 40 s left")


def test_a_long_run_is_told_of_less_often() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = LineProgress(1_000_000, stream, clock=lambda: now[0])
    for step in range(1, 20_001):  # two days
        now[0] += 8.64
        progress.update(STEP | {"step": step, "seconds": 8.64})
    assert 500 < len(stream.getvalue().splitlines()) < 1000


def test_plain_progress_is_throttled_by_time() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = LineProgress(1000, stream, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += 0.5
        progress.update({"step": step, "loss": 1.0, "seconds": 0.5, "target_tokens": 1, "host_peak_bytes": 1})
    assert len(stream.getvalue().splitlines()) == 5


class Uniform:
    """An engine whose model finds each of 16 tokens as likely as the other."""

    shifts_labels = True

    def __init__(self) -> None:
        self.calls = 0

    def log_probabilities(self, batch: Any) -> torch.Tensor:
        self.calls += 1
        assert batch["input_ids"].shape == batch["labels"].shape and batch["labels"].shape[1] == 5
        return -math.log(16) * target_mask(batch["labels"], shifted=True).float()


def test_evaluation_counts_every_byte_once() -> None:
    for length in range(2, 14):  # windows that fit exactly, and that do not
        stream = TokenStream(np.arange(length, dtype=np.uint16), utf8_bytes=2 * (length - 1))
        one = eval_set(stream, seq_len=5, micro_batch=2)
        found = evaluate(Uniform(), one)
        assert found is not None and found.target_tokens == length - 1
        assert found.loss == pytest.approx(math.log(16))
        assert found.bits_per_byte == pytest.approx(2.0)  # 4 bits per token of 2 bytes
        assert found.perplexity == pytest.approx(16)


def test_an_interrupted_evaluation_measures_nothing() -> None:
    class Interrupted(Uniform):
        def log_probabilities(self, batch: Any) -> torch.Tensor:
            signal.raise_signal(signal.SIGINT)
            return super().log_probabilities(batch)

    engine = Interrupted()
    stream = TokenStream(np.arange(30, dtype=np.uint16), utf8_bytes=30)
    with StopOnInterrupt() as stop:
        assert evaluate(engine, eval_set(stream, seq_len=5, micro_batch=1), stop) is None
    assert engine.calls == 1


def test_a_first_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    class Broken(StandIn):
        def train_step(self, batches: Any, lr: float | None = None) -> Any:
            return SimpleNamespace(**{**vars(super().train_step(batches, lr)), "loss": math.nan})

    with pytest.raises(MegaTrainError, match=r"^the loss of the first step is nan"):
        run_loop(Broken(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(("steps", "done"), [(30, 13), (4, None), (3, None)])
def test_gradients_that_stay_infinite_end_the_run(steps: int, done: int | None, tmp_path: Path) -> None:
    class Broken(StandIn):
        def train_step(self, batches: Any, lr: float | None = None) -> Any:
            stats = vars(super().train_step(batches, lr))
            return SimpleNamespace(**stats | {"skipped": done is None or len(self.calls) > 3})

    ended = done or steps
    with pytest.raises(MegaTrainError, match=f"^step {ended}: no finite gradient in {min(steps, 10)} steps in a row"):
        run_loop(Broken(), tmp_path, steps=steps)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == ended


def config(**train_settings: Any) -> Any:
    return parse_config({"model": {"path": "m"}, "data": {"train": "a", "seq_len": 10}, "train": train_settings})


def test_number_of_steps() -> None:
    assert build.total_steps(config(steps=7), 100) == 7
    assert build.total_steps(config(tokens=95), 100) == 10
    assert build.total_steps(config(epochs=2, tokens_per_step=30), 100) == 66
    assert build.total_steps(config(epochs=0.001), 100) == 1
    assert build.total_steps(config(epochs=1e9), 1 << 60) > 1e20
    long_warmup = dataclasses.replace(config(epochs=1), schedule=ScheduleConfig(warmup_steps=101))
    with pytest.raises(ConfigError, match=r"schedule.warmup_steps: 101 is wrong; expected at most the 100 steps"):
        build.total_steps(long_warmup, 100)


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


@pytest.mark.parametrize("replace", [False, True])
def test_of_two_runs_that_start_together_one_gets_the_folder(tmp_path: Path, replace: bool) -> None:
    if replace:
        before = RunFolder(str(tmp_path / "run"))
        before.create(config(steps=1))
        before.finish(complete=True)
    first, second = (RunFolder(str(tmp_path / "run"), replace=replace) for _ in range(2))
    first.create(config(steps=3))
    first.metrics.write_text("line\n")
    with pytest.raises(ConfigError, match=r"^output: another run is writing to '.*run.*'; give another folder$"):
        second.create(config(steps=4))
    assert "steps: 3\n" in (first.path / "config.yaml").read_text() and first.metrics.read_text() == "line\n"
    first.finish(complete=True)
    assert {path.name for path in first.path.iterdir()} == {"config.yaml", "metrics.jsonl"}
    if not replace:  # it is over now, but its files are there
        with pytest.raises(ConfigError, match="another run's files"):
            second.create(config(steps=4))
    else:
        second.create(config(steps=4))
        assert not second.metrics.exists()


def test_settings_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that goes on, too, which keeps their permissions; at no moment can another run have the folder."""
    run, settings = tmp_path / "run", tmp_path / "run" / "config.yaml"
    first = RunFolder(str(run))
    first.create(config(steps=1))
    first.close()
    settings.chmod(0o640)
    (run / ".config.yaml.partial").write_text("half")  # of one that was killed
    before, replaced = settings.read_bytes(), os.replace

    def observed(source: Path, target: Path) -> None:
        for content, step in ((before, lambda: None), (Path(source).read_bytes(), lambda: replaced(source, target))):
            step()
            assert settings.read_bytes() == content
            with pytest.raises(ConfigError, match="another run is writing to"):
                FolderLock().take(settings)

    again = RunFolder(str(run), resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", observed)
        again.create(config(steps=3))
    assert b"steps: 3\n" in settings.read_bytes() and settings.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    with pytest.raises(ConfigError, match="another run is writing to"):
        FolderLock().take(settings)
    again.close()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    last, whole = RunFolder(str(run), resume=True), settings.read_bytes()
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(ConfigError, match="No space left on device"):
        last.create(config(steps=4))
    assert settings.read_bytes() == whole and [path.name for path in run.iterdir()] == ["config.yaml"]


def test_a_run_that_was_killed_holds_its_folder_no_longer(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom megatrain.train.folder_lock import FolderLock\n"
        "FolderLock().take(Path(sys.argv[1]))\nos.kill(os.getpid(), 9)"
    )
    file = tmp_path / "config.yaml"
    ended = subprocess.run([sys.executable, "-c", program, str(file)], check=False)
    assert ended.returncode == -9 and file.exists()
    FolderLock().take(file)


def test_replacing_a_run_touches_nothing_else(tmp_path: Path) -> None:
    RunFolder(str(tmp_path / "run")).create(config(steps=1))
    (tmp_path / "run.old").mkdir()
    (tmp_path / "run.old" / "mine").write_text("kept by hand")
    again = RunFolder(str(tmp_path / "run"), replace=True)
    again.create(config(steps=1))
    again.finish(complete=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old"]
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "mine").write_text("kept by hand")
    with pytest.raises(ConfigError, match="holds more than a run"):
        RunFolder(str(tmp_path / "run"), replace=True)


def test_a_run_in_the_current_folder_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    RunFolder(".").create(config(steps=1))
    assert RunFolder(".", replace=True).path == tmp_path / "run.partial"


def test_trying_a_folder_and_discarding_a_run_leave_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "c", "output")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    for name in ("x/y", "mine"):
        folder = RunFolder(str(tmp_path / name))
        folder.create(config(steps=1))
        folder.metrics.write_text("")
        folder.discard()
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything is writable for root")
def test_a_folder_that_must_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"^output: cannot write to folder '.*': Permission denied"):
        RunFolder(str(tmp_path / "run"))


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "not" / "yet"))
    folder.require_room(1000)
    with pytest.raises(CapacityError, match=r"^output: what is saved takes 1000000.00 TB and the disk"):
        folder.require_room(10**18)


@pytest.mark.parametrize(
    ("checkpoint", "moments", "precision", "there", "bytes_each"),
    [
        ({}, "fp32", "bf16", 0, 2),
        ({"every": 5}, "fp32", "bf16", 0, 2 + 3 * 12),  # two stay, and one is written before the oldest goes
        ({"every": 5}, "fp32", "bf16", 2, 2 + 12),
        ({"every": 5, "keep": None}, "fp32", "bf16", 7, 2 + 12),
        ({"every": 5, "keep": 1, "at_end": False}, "fp32", "fp32", 0, 2 * 12),
        ({"every": 5, "keep": 1, "at_end": False}, "int8", "bf16", 0, 2 * (4 + 2 + 8 / 64)),
    ],
)
def test_room_for_checkpoints_is_asked_for_before_training(
    checkpoint: dict[str, Any], moments: str, precision: str, there: int, bytes_each: float
) -> None:
    settings = {"model": {"path": "x"}, "checkpoint": checkpoint, "optimizer": {"moments": moments}}
    config = parse_config(settings, for_training=False)
    assert build._saved_bytes(config, 6400, precision, there) == 6400 * bytes_each


def test_parameter_groups_mean_the_names_they_find() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3) for name in ("first", "second", "odd[1]")})
    groups = [{"match": ["odd"], "weight_decay": 0.5}, {"match": ["bias$", "^first"], "lr": 0.25, "betas": [0.5, 0.6]}]
    text = {
        "model": {"path": "m"},
        "data": {"train": "a"},
        "train": {"steps": 1},
        "optimizer": {"param_groups": groups},
    }
    settings = dataclasses.replace(parse_config(text).optimizer, lr=1.0, weight_decay=0.125)
    slots = [ParameterSlot(index, *named) for index, named in enumerate(model.named_parameters())]
    made, group_of = make_optimizer(settings, model).group_slots(slots)
    found = {slot.name: made[group_of[slot.index]] for slot in slots}
    assert {name: (group["lr"], group["betas"], group["weight_decay"]) for name, group in found.items()} == {
        "odd[1].weight": (1.0, (0.9, 0.95), 0.5),
        "odd[1].bias": (1.0, (0.9, 0.95), 0.5),
        # without a decay of its own, a group does not make one-dimensional parameters decay
        "first.weight": (0.25, (0.5, 0.6), 0.125),
        "first.bias": (0.25, (0.5, 0.6), 0.0),
        "second.weight": (1.0, (0.9, 0.95), 0.125),
        "second.bias": (0.25, (0.5, 0.6), 0.0),
    }


@pytest.mark.parametrize(
    ("groups", "lr", "message"),
    [
        (
            ["first", "nothing"],
            1.0,
            r"^optimizer.param_groups\[1\].match: 'nothing' matches no parameter; .* first.weight",
        ),
        (
            ["first", "first.bias"],
            1.0,
            r"^optimizer.param_groups\[1\].match: all parameters that \['first.bias'\] match",
        ),
        (["first"], 0.0, r"^optimizer.param_groups\[0\].lr: 0.5 is wrong; expected 0, as optimizer.lr is 0"),
    ],
)
def test_parameter_groups_without_effect(groups: list[str], lr: float, message: str) -> None:
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 3), "second": torch.nn.Linear(2, 3)})
    settings = OptimizerConfig(lr=lr, param_groups=tuple({"match": (pattern,), "lr": 0.5} for pattern in groups))
    with pytest.raises(ConfigError, match=message):
        make_optimizer(settings, model)


@pytest.mark.parametrize("name", [*MODELS, *zoo.NAMED, "jetmoe", "reformer", "xlnet", "xlstm"])
def test_models_that_can_be_trained_pass_the_trial(name: str) -> None:
    # also those with operations that meta tensors do not know, or not in every dtype
    made = tiny_config(name) if name in MODELS else zoo.small_config(name)
    entries = {key: value for key, value in made.to_dict().items() if not key.startswith("_")}
    if entries["model_type"] == "t5":
        entries["decoder_start_token_id"] = 0
    settings = dataclasses.replace(config(steps=1), model=ModelConfig(config=entries, tokenizer="t"))
    try_out(settings, read_model_settings(settings), Vocabulary(96, BPE_SPECIAL_TOKENS))


class Placed(torch.nn.Linear):
    """Says where it was brought."""

    where = "host"

    def cuda(self, device: Any = None) -> Any:
        self.where = "cuda"
        return self


@pytest.mark.parametrize(("free_bytes", "where"), [(1_000_000, "cuda"), (4_000, "host")])
def test_text_is_made_on_a_gpu_that_has_room(free_bytes: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, 2_000_000))
    assert _placed(Placed(32, 32)).where == where
