"""The command line: what each mistake says, and that it costs nothing but a line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatrain import cli
from megatrain.version import __version__

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.py").write_text("".join(f"x{n} = {n}\n" for n in range(400)))
    return {
        "model": {"config": dict(TINY), "tokenizer": {"train": "bpe", "vocab_size": 280}},
        "data": {"train": str(text), "seq_len": 32},
        "train": {"steps": 2},
        "engine": {"precision": "fp32"},
        "output": str(tmp_path / "run"),
    }


def run(settings: dict[str, Any], tmp_path: Path, *overrides: str) -> int:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return cli.main(["train", str(path), *overrides])


def change(settings: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    place = settings
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.stepps", 3, "train.stepps: unknown key; did you mean train.steps?"),
        ("train.steps", "few", "train.steps: 'few' is wrong; expected a whole number of at least 1 or null"),
        (
            "schedule.name",
            "step",
            "schedule.name: 'step' is wrong; expected one of constant, linear, cosine, wsd",
        ),
        (
            "schedule.warmup_steps",
            3,
            "schedule.warmup_steps: 3 is wrong; expected at most the 2 steps of the run",
        ),
        ("data.train", "nowhere", "data.train: 'nowhere' does not exist; give"),
        ("data.seq_len", 60, "data.train: "),
        ("model.tokenizer", "./nowhere", "model.tokenizer: './nowhere' does not exist; give a folder"),
        ("model.config.model_type", "lama", "model.config: model_type 'lama' is unknown"),
        (
            "model.config.hiden_size",
            8,
            "model.config.hiden_size: unknown to model type llama; did you mean hidden_size?",
        ),
        (
            "model.config.vocab_size",
            100,
            "model.config: vocab_size 100 is less than the tokenizer's 280 tokens",
        ),
        ("model.config.hidden_size", "big", "model.config: "),
        (
            "model.config.max_position_embeddings",
            16,
            "data.seq_len: 32 is more than the model's max_position_embeddings",
        ),
        ("model.config", "nowhere.json", "model.config: cannot read 'nowhere.json': No such file"),
        ("model.attn_implementation", "quick", "model.config: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_2_and_writes_nothing(
    name: str,
    value: Any,
    message: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "data.seq_len":  # longer than the text
        (tmp_path / "text" / "a.py").write_text("x = 1\n")
    change(settings, name, value)
    assert run(settings, tmp_path) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"megatrain: {message}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_data(content: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text" / "a.py").write_text(content)
    assert run(settings, tmp_path) == 2
    folder = settings["data"]["train"]
    assert f"megatrain: data.train: no text in {folder}; give files with UTF-8 text" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_folder_without_tokenizer_or_model(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    settings["model"] = {"path": str(folder)}
    (folder / "config.json").write_text(json.dumps(TINY))
    assert run(settings, tmp_path) == 2
    assert f"model.tokenizer: no tokenizer in '{folder}'" in capsys.readouterr().err
    settings["model"] = {"path": str(tmp_path / "none")}
    assert run(settings, tmp_path) == 2
    assert f"model.path: {tmp_path / 'none'} is not a folder" in capsys.readouterr().err


def test_a_used_run_folder_is_refused_before_anything_happens(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = tmp_path / "run"
    used.mkdir()
    (used / "metrics.jsonl").write_text("mine")
    assert run(settings, tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (used / "metrics.jsonl").read_text() == "mine" and len(list(used.iterdir())) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--train.steps"], "--train.steps has no value"),
        (["train.steps", "3"], "unrecognized arguments: train.steps 3"),
        (["--train.steps=x"], "train.steps: 'x' is wrong"),
        (["--train.steps", "-4"], "train.steps: -4 is wrong"),
    ],
)
def test_wrong_overrides(
    overrides: list[str],
    message: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(settings, tmp_path, *overrides) == 2
    assert capsys.readouterr().err.startswith(f"megatrain: {message}")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian", "x.yaml"],
        ["train"],
        ["generate", "x"],
        ["export", "a", "b", "--dtype", "fp8"],
        ["config", "x"],
    ],
)
def test_bad_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatrain: ") and error.count("\n") == 1


@pytest.mark.parametrize("before", [True, False])
def test_overrides_stand_anywhere(before: bool) -> None:
    words = ["--train.steps", "2", "--output=x"]
    others, pairs = cli._take_overrides(["train", *words, "c.yaml"] if before else ["train", "c.yaml", *words])
    assert others == ["train", "c.yaml"] and pairs == [("train.steps", "2"), ("output", "x")]


def test_version_and_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"megatrain {__version__}\n"
    assert cli.main(["config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["optimizer"]["lr"] == 1e-5


def test_generate_and_export_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path), str(tmp_path)]) == 2
    (tmp_path / "file").write_text("")
    assert cli.main(["export", str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("give a new folder") == 1
