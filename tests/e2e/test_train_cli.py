"""`megatrain train` as a user runs it: in a process of its own, on the real engine."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatrain import cli
from megatrain.train.run_folder import RunFolder

SETTINGS: dict[str, Any] = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        "tokenizer": {"train": "bpe", "vocab_size": 320},
    },
    "data": {"seq_len": 32},
    "optimizer": {"lr": 1e-2},
    "train": {"steps": 12, "tokens_per_step": 128},
    "engine": {"precision": "fp32", "micro_batch": 2, "threads": 1},
}


def write_settings(folder: Path, **changes: dict[str, Any]) -> Path:
    text = folder / "text"
    text.mkdir()
    for name, start in (("train.py", 0), ("held_out.py", 5000)):
        lines = [f"def f{n}(x):\n    return x + {n % 7}\n\n\n" for n in range(start, start + 300)]
        (text / name).write_text("".join(lines))
    settings = {section: {**keys, **changes.get(section, {})} for section, keys in SETTINGS.items()}
    settings["data"] |= {"train": str(text / "train.py"), "eval": str(text / "held_out.py")}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "megatrain.cli", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics_of(run: Path, of: str = "loss") -> list[dict[str, Any]]:
    """The lines of steps, or of evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if of in line]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()  # one that is only late would go on for ever
            pytest.fail(process.communicate()[1])
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run: the folder it was started in, and its output."""
    folder = tmp_path_factory.mktemp("train")
    settings = write_settings(folder)
    process = start("train", settings.name, "--output", "run", "--train.seed=3", cwd=folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return folder, out


def test_a_run_learns_and_leaves_its_folder(finished: tuple[Path, str]) -> None:
    folder, out = finished
    run = folder / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "ledger.jsonl",
        "model",
        "report.html",
    }
    page = (run / "report.html").read_text()
    assert ">complete<" in page and "<strong>12</strong>" in page
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert all(line["target_tokens"] == 4 * 31 for line in lines)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["train"]["seed"] == 3 and settings["output"] == "run"
    assert "bits per byte" in out and "trained 12 steps" in out
    (evaluation,) = metrics_of(run, "eval")
    assert evaluation["step"] == 12 and f"(loss {evaluation['eval']['loss']:.3f} over " in out


def test_a_streamed_run_gives_the_same_model_and_a_timeline(finished: tuple[Path, str]) -> None:
    """On the device with late copies, with 2 MiB of memory and a profile: the losses and weights of the run on the
    host, to the last bit."""
    folder, _ = finished
    arguments = (
        "--output",
        "streamed",
        "--train.seed=3",
        "--engine.device",
        "lagged",
        "--engine.device_memory",
        "2MiB",
    )
    process = start("train", "tiny.yaml", *arguments, "--profile", "3", cwd=folder)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    ours, theirs = metrics_of(folder / "streamed"), metrics_of(folder / "run")
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    assert all(0 < line["device_peak_bytes"] <= 2 * 1024**2 for line in ours)
    weights = "model/model.safetensors"
    assert (folder / "streamed" / weights).read_bytes() == (folder / "run" / weights).read_bytes()
    events = json.loads((folder / "streamed" / "trace.json").read_text())["traceEvents"]
    backward = [event for event in events if event["name"] == "model.layers.1 backward"]
    assert len(backward) == 3


def test_the_model_loads_in_transformers_with_its_tokenizer(finished: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_folder = finished[0] / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = tokenizer("def f1(x):\n    return x + 1\n", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids, labels=ids).loss.item() < metrics_of(finished[0] / "run")[0]["loss"] - 1


def test_generate_and_export(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    run = str(finished[0] / "run")
    arguments = ["generate", run, "--prompt", "def ", "--max-new-tokens", "8"]
    texts = []
    for seed in ("1", "1", "2"):
        assert cli.main([*arguments, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("def ") and texts[0] == texts[1] != texts[2]
    out = str(finished[0] / "exported")
    assert cli.main(["export", run, out, "--dtype", "bf16"]) == 0
    assert json.loads((finished[0] / "exported" / "config.json").read_text())["dtype"] == "bfloat16"
    assert cli.main(["generate", out, "--prompt", "def ", "--max-new-tokens", "2", "--temperature", "0"]) == 0
    assert cli.main(["export", run, out]) == 2


def test_the_same_settings_train_the_same_model(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = write_settings(tmp_path)
    arguments = ["train", str(settings), "--train.seed", "3", "--output", str(tmp_path / "again")]
    assert cli.main(arguments) == 0
    ours, theirs = metrics_of(tmp_path / "again"), metrics_of(finished[0] / "run")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-4)
    # go on from the saved model: the pretrained path, with its own tokenizer
    onward = {
        "model": {"path": str(tmp_path / "again")},
        "data": {"train": str(tmp_path / "text" / "train.py"), "seq_len": 32},
        "train": {"tokens": 96},
        "engine": {"precision": "fp32"},
        "output": str(tmp_path / "onward"),
    }
    settings.write_text(yaml.safe_dump(onward))
    assert cli.main(["train", str(settings)]) == 0
    assert len(metrics_of(tmp_path / "onward")) == 3
    assert metrics_of(tmp_path / "onward")[0]["loss"] < theirs[0]["loss"] - 1
    capsys.readouterr()


def test_a_mistake_costs_one_line_and_exit_2(tmp_path: Path) -> None:
    settings = write_settings(tmp_path)
    process = start("train", settings.name, "--train.stepz", "3", cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (out, err) == ("", "megatrain: train.stepz: unknown key; did you mean train.steps?\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
def test_where_no_metrics_can_be_written_the_model_is_still_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RunFolder, "metrics", Path("/dev/full"))
    settings = write_settings(tmp_path, train={"steps": 3})
    assert cli.main(["train", str(settings), "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if "/dev/full" in line]
    assert len(lines) == 2 and "No space left on device" in lines[0]
    assert lines[1] == "warning: /dev/full lacks 3 lines that could not be written"


def test_where_the_model_cannot_be_saved_one_line_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("megatrain.files.os.pwrite", full)
    settings = write_settings(tmp_path, train={"steps": 1})
    assert cli.main(["train", str(settings), "--output", str(tmp_path / "run")]) == 1
    ledger, line = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatrain: ")]
    assert "ledger.jsonl" in ledger and "training goes on" in ledger
    assert line.startswith(f"megatrain: output: cannot save the model to {str(tmp_path / 'run' / 'model')!r}: ")
    assert "No space left on device" in line
    assert len(metrics_of(tmp_path / "run")) == 1


def test_interrupted_once_the_step_is_finished_and_the_model_saved(tmp_path: Path) -> None:
    process = start("train", write_settings(tmp_path, train={"steps": 100_000}).name, cwd=tmp_path)
    run = tmp_path / "runs" / "tiny"
    wait_for(run / "metrics.jsonl", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "finishing this step" in err and "Traceback" not in err
    assert (run / "model" / "config.json").exists() and (run / "model" / "tokenizer.json").exists()
    assert f"trained {len(metrics_of(run))} of 100,000 steps\n" in out


def test_interrupted_while_measuring_the_run_is_kept(tmp_path: Path) -> None:
    settings = write_settings(tmp_path, train={"steps": 2})
    (tmp_path / "text" / "held_out.py").write_text("def f(x):\n    return x + 1\n\n\n" * 50_000)
    process = start("train", settings.name, cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if "measuring" in line:
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "ending the measurement" in err and "Traceback" not in err
    assert "trained 2 steps" in out and "bits per byte" not in out
    assert (tmp_path / "runs" / "tiny" / "model" / "config.json").exists()


def test_interrupted_twice_it_is_out_at_once(tmp_path: Path) -> None:
    # one step of many micro-batches: the second signal finds it unfinished
    process = start(
        "train", write_settings(tmp_path, train={"steps": 2, "tokens_per_step": 640_000}).name, cwd=tmp_path
    )
    run = tmp_path / "runs" / "tiny"
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < 5
    assert not (run / "model").exists()
