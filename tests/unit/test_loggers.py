"""Programs that show runs: what they are told, and that none of them can end one."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatrain as mt
from megatrain.config import Config, parse_config
from megatrain.train import loggers
from megatrain.train.evaluate import Evaluation
from megatrain.train.held_out import Measured
from megatrain.train.loggers import Loggers, WeightsAndBiases, check_installed, scalars
from megatrain.train.samples import Sample

CONFIG: Config = parse_config({"model": {"path": "m"}, "data": {"train": "a", "seq_len": 8}, "train": {"steps": 3}})
MEASURED = Measured(4, {"eval": Evaluation(2.0, 10, 20)}, [Sample("a", "b")], 0.5, 0, False)


class Recorder:
    """Takes what it is told; raises in the call that it is told to."""

    def __init__(self, fails_in: str = "") -> None:
        self.told: list[tuple[str, Any]] = []
        self._fails_in = fails_in

    def _take(self, call: str, what: Any) -> None:
        if call == self._fails_in:
            raise ValueError("the disk\nis full")
        self.told.append((call, what))

    def step(self, line: Any) -> None:
        self._take("step", line["step"])

    def evaluation(self, measured: Measured) -> None:
        self._take("evaluation", measured.step)

    def close(self) -> None:
        self._take("close", None)


def tell_all(monkeypatch: pytest.MonkeyPatch, **made: Recorder) -> None:
    monkeypatch.setattr(loggers, "_LOGGERS", {name: lambda *_, one=one: one for name, one in made.items()})
    every = Loggers(list(made), Path(), CONFIG, 0)
    every.step({"step": 1})
    every.evaluation(MEASURED)
    every.step({"step": 5})
    every.close()


@pytest.mark.parametrize("call", ["step", "evaluation", "close"])
def test_one_that_fails_is_said_once_and_the_others_are_told_on(
    call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    good = Recorder()
    tell_all(monkeypatch, broken=Recorder(call), good=good)
    assert good.told == [("step", 1), ("evaluation", 4), ("step", 5), ("close", None)]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("train.log_to: broken fails (ValueError: the disk")
    assert said.endswith("it is told nothing more, and training goes on") and "\n" not in said


def test_one_that_does_not_begin_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> Any:
        random.random()
        raise RuntimeError("no key")

    monkeypatch.setattr(loggers, "_LOGGERS", {"wandb": refuse})
    random.seed(1)
    Loggers(["wandb"], Path(), CONFIG, 0).step({"step": 1})
    assert [record.getMessage() for record in caplog.records] == [
        "train.log_to: wandb fails (RuntimeError: no key); it is told nothing more, and training goes on"
    ]
    first = random.random()
    random.seed(1)
    assert random.random() == first, "what it draws is not missing in the run"


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == "wandb" else object())
    check_installed(("tensorboard",))
    with pytest.raises(
        mt.ConfigError, match=r"^train.log_to: wandb is not installed; pip install 'megatrain\[wandb\]'$"
    ):
        check_installed(("tensorboard", "wandb"))


def test_numbers_by_name() -> None:
    line = {"step": 3, "loss": 2, "grad_norm": None, "skipped": True, "a": {"loss": 1.5, "text": "x"}}
    assert scalars("train", line) == {"train/loss": 2.0, "train/a/loss": 1.5}


class StandIn:
    """In the role of the package wandb."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.over = False

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802 (theirs)
        return settings

    def Table(self, columns: list[str], data: list[list[str]]) -> Any:  # noqa: N802
        return columns, data

    def init(self, **settings: Any) -> Any:
        self.begun = settings
        log = lambda values, step: self.logged.append((values, step))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: setattr(self, "over", True))


def test_what_wandb_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    run = WeightsAndBiases(tmp_path, CONFIG, 0)
    run.step({"step": 1, "loss": 2.5})
    run.evaluation(MEASURED)
    run.close()
    assert module.logged[0] == ({"train/loss": 2.5}, 1) and module.logged[1][0]["eval/loss"] == 2.0
    assert module.logged[2] == ({"samples": (["prompt", "text"], [["a", "b"]])}, 4) and module.over
    begun = module.begun
    assert begun["project"] == "megatrain" and begun["name"] == tmp_path.name and begun["resume"] == "allow"
    assert begun["settings"] == {"console": "off", "disable_git": True, "save_code": False}
    assert begun["config"]["train"]["steps"] == 3
    assert (tmp_path / "wandb").stat().st_mode & 0o077 == 0
    monkeypatch.setenv("WANDB_NAME", "mine")
    WeightsAndBiases(tmp_path, CONFIG, 7)
    assert module.begun["id"] == begun["id"] and module.begun["name"] == "mine"  # it goes on with its curves
    other = tmp_path / "other"
    other.mkdir()
    WeightsAndBiases(other, CONFIG, 0)
    assert module.begun["id"] != begun["id"]


def test_wandb_itself_works_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    one = Loggers(["wandb"], tmp_path, CONFIG, 0)
    one.step({"step": 1, "loss": 2.5})
    one.evaluation(MEASURED)
    one.close()
    identity = (tmp_path / "wandb" / "run-id").read_text().strip()
    (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{identity}")
    (written,) = folder.glob("*.wandb")
    assert b"train/loss" in written.read_bytes() and b"eval/perplexity" in written.read_bytes()
    assert [record for record in caplog.records if record.name.startswith("megatrain")] == []
