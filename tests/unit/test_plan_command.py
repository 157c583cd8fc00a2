"""`megatrain plan`: what it prints, its exit codes, and that training keeps to it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatrain import cli
from megatrain.memory import pieces
from megatrain.memory.limits import HostLimits
from megatrain.train import planning

KEYS = ["fits", "missing_bytes", "bytes", "placement", "bytes_per_parameter", "step_seconds", "bound_by"]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(LLAMA))
    return path


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_json_begins_with_the_promised_keys(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = plan_of(capsys, str(model), "--hardware", "h200", "--tokens", "10B")
    assert code == 0
    assert list(found)[: len(KEYS) + 1] == [*KEYS, "tokens_per_second"]
    assert found["fits"] is True and found["missing_bytes"] == 0
    assert found["bytes_per_parameter"] == pytest.approx(14, rel=1e-3)  # and gaps between parameters
    assert found["tokens_per_second"] == pytest.approx(found["tokens_per_step"] / found["step_seconds"])
    assert set(found["bytes"]) == {"device", "host", "nvme"}
    hours = 10e9 / found["tokens_per_second"] / 3600
    assert found["for_tokens"]["days"] == pytest.approx(hours / 24)
    assert found["for_tokens"]["kwh"] == pytest.approx(hours * 1.2)
    assert found["for_tokens"]["dollars"] == pytest.approx(hours * 3.5)


def test_what_does_not_fit_is_printed_and_exit_code_1(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(model), "--hardware", "h200", "--host-memory", "1GB", "--device-memory", "1GB"]
    code, found = plan_of(capsys, *arguments)
    assert code == 1 and not found["fits"]
    assert found["missing_bytes"] == sum(found["missing"].values()) > 0
    assert cli.main(["plan", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "It does not fit: " in printed and "of host memory missing." in printed


def test_people_read_what_goes_where(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(model), "--hardware", "rtx4090", "--tokens", "1M"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "weights",
        "moments",
        "in all",
        "can be had",
        "It fits.",
        "bound by ",
        "tokens/s",
        "1,000,000 tokens: ",
    ):
        assert words in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_settings_of_a_run_count_and_overrides_come_over_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"config": LLAMA},
                "data": {"seq_len": 32},
                "train": {"tokens_per_step": 128, "clip_scope": "unit"},
                "engine": {"micro_batch": 2, "resident_units": 0},
            }
        )
    )
    _, found = plan_of(capsys, str(path), "--hardware", "h200")
    assert (found["seq_len"], found["tokens_per_step"]) == (32, 128)
    assert found["placement"]["micro_batch"] == 2 and found["placement"]["clip_scope"] == "unit"
    assert found["bytes_per_parameter"] < 13
    _, found = plan_of(capsys, str(path), "--hardware", "h200", "--train.clip_norm", "null", "--seq-len", "64")
    assert found["placement"]["clip_scope"] == "none" and found["seq_len"] == 64


def test_the_timeline_is_a_profile(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    plan_of(capsys, str(model), "--hardware", "h200", "--timeline", str(out))
    assert any(event["ph"] == "X" for event in json.loads(out.read_text())["traceEvents"])


def test_this_machine_is_measured(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = plan_of(capsys, str(model), "--tokens-per-step", "256", "--engine.precision", "fp32")
    assert found["hardware"] == "this machine"
    assert found["hardware_sources"]["host_bandwidth"] == "measured here, now"
    assert found["hardware_sources"]["nvme_read"] == "a guess"
    assert found["step_seconds"] > 0 and list(found["bytes"]) == ["host"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h300"], "--hardware: 'h300' is no file and none of a100-80, "),
        (["--host-memory", "much"], "--host-memory: 'much' is wrong; expected a size such as 24GiB"),
        (["--tokens", "few"], "--tokens: 'few' is no number of tokens; write for example 10B or 512k"),
        (["--seq-len", "1"], "--seq-len: '1' is wrong; expected a whole number from 2 to 16,777,216"),
        (["--engine.slotss", "3"], "engine.slotss: unknown key; did you mean engine.slots?"),
        (["--train.clip_norm"], "--train.clip_norm has no value"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--timeline", "/nowhere/out.json", "--hardware", "h200"], "--timeline: cannot write '/nowhere/out.json'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(model), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith(f"megatrain: {message}")


# -- training keeps to it ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.py").write_text("".join(f"x{n} = {n}\n" for n in range(400)))
    path = tmp_path / "run.yaml"
    settings = {
        "model": {"config": LLAMA | {"vocab_size": 300}, "tokenizer": {"train": "bpe", "vocab_size": 280}},
        "data": {"train": str(text), "seq_len": 32},
        "train": {"steps": 5},
        "engine": {"precision": "fp32"},
        "output": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_is_planned_as_it_would_be_carried_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan's own defaults, and its choice of micro-batch, are for models by themselves."""
    for hardware in ((), ("--hardware", "h200", "--engine.precision", "bf16")):
        _, found = plan_of(capsys, str(run), *hardware)
        assert (found["tokens_per_step"], found["placement"]["micro_batch"]) == (32, 1)


def test_a_run_says_what_was_predicted_and_what_came(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(run)]) == 0
    printed = capsys.readouterr().err
    assert "step: predicted " in printed and "host peak: predicted " in printed
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    outcome = written["outcome"]
    assert outcome["step_seconds"]["predicted"] == written["step_seconds"]
    assert outcome["host_peak_bytes"]["predicted"] == sum(written["bytes"]["host"].values())
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert outcome["host_peak_bytes"]["measured"] == max(line["host_peak_bytes"] for line in lines)


def test_the_device_peak_is_compared_too(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(run), "--engine.device", "lagged"]) == 0
    assert "device peak: predicted " in capsys.readouterr().err


def test_training_refuses_what_does_not_fit_before_it_writes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "host_memory_limits", lambda: HostLimits(10**9, 1000))
    assert cli.main(["train", str(run)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("megatrain: host memory: ") and " missing: " in last
    assert not (tmp_path / "out").exists()


def test_a_run_is_planned_with_its_own_memory_and_moments(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file says holds, and an option says otherwise."""
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 4096)  # as small beside this model as they are beside large ones
    settings = {
        "model": {"config": str(model)},
        "data": {"seq_len": 32},
        "optimizer": {"moments": "int8"},
        "engine": {"host_memory": "700kB", "nvme": str(tmp_path)},
    }
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(settings))
    _, small = plan_of(capsys, str(run), "--hardware", "h200", "--engine.nvme", "null", "--engine.resident_units", "0")
    assert not small["fits"] and small["placement"]["moments"] == "int8"
    _, spilled = plan_of(capsys, str(run), "--hardware", "h200", "--engine.resident_units", "0")
    assert spilled["bytes"]["nvme"]
    code, large = plan_of(capsys, str(run), "--hardware", "h200", "--host-memory", "8GB", "--moments", "fp32")
    assert code == 0 and large["placement"]["moments"] == "fp32"


def test_another_machine_and_a_device_of_this_one_contradict(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cpu", "lagged"):
        assert cli.main(["plan", str(model), "--hardware", "h200", "--engine.device", device]) == 2
        assert f"engine.device is {device!r}, which is not what computes in --hardware h200" in capsys.readouterr().err
    assert cli.main(["plan", str(model), "--hardware", "h200", "--engine.device", "cuda"]) == 0


def test_a_sequence_that_nobody_can_train_is_refused_at_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(model), "--hardware", "h200", "--seq-len", "1e8"]) == 2
    assert "--seq-len: '1e8' is wrong; expected a whole number from 2 to 16,777,216" in capsys.readouterr().err
