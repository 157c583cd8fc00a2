"""The command line: what each mistake says, and that it costs nothing but a line."""

import json
import logging
import os
import subprocess
import sys
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


@pytest.mark.parametrize("arguments", [["foo"], ["memory", "--x"], ["--threads", "many"]])
def test_a_mistake_in_bench_is_one_line_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatrain: ") and line.endswith("(see megatrain bench --help)")


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
        (
            "engine.compile",
            True,
            "engine.compile: true (yes and on are the same) is wrong; expected one of off, blocks",
        ),
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
            "model.config.vocab_size: 100 is wrong; expected at least the tokenizer's 280 tokens",
        ),
        (
            "schedule",
            {"warmup_steps": 9},
            "schedule.warmup_steps: 9 is wrong; expected at most the 2 steps of the run",
        ),
        ("engine.threads", 10**6, "engine.threads is 1000000; it must be a number from 1"),
        ("train.tokens_per_step", 32 * 10**15, "host memory: "),
        ("output", "~nobody-here/x", "output: '~nobody-here/x' is wrong; expected a path"),
        ("optimizer.param_groups", [{"match": "("}], "optimizer.param_groups[0].match: '(' is wrong; expected a reg"),
        (
            "optimizer.param_groups",
            [{"match": ["norm", "nrom"]}],
            "optimizer.param_groups[0].match: 'nrom' matches no parameter; their names are such as model.embed_tokens.",
        ),
        (
            "model.config.max_position_embeddings",
            16,
            "data.seq_len: 32 is more than the model's max_position_embeddings",
        ),
        ("model.config", "nowhere.json", "model.config: cannot read 'nowhere.json': No such file"),
        ("model.attn_implementation", "quick", "model.attn_implementation: 'quick' is wrong: "),
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


T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1}
LLAVA = {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 0},
            ".num_hidden_layers: 0 is wrong (a model needs at least one layer); left out, it is",
        ),
        ({"num_hidden_layers": -1}, ".num_hidden_layers: -1 is wrong (a model needs at least one layer)"),
        ({"num_hidden_layers": 10**9}, ".num_hidden_layers: 1000000000 is wrong; expected at most 10000 layers"),
        ({"num_key_value_heads": 3}, ".num_key_value_heads: 3 is wrong ("),
        ({"num_key_value_heads": 0}, ".num_key_value_heads: 0 is wrong ("),
        (
            {"num_attention_heads": 3},
            ".hidden_size: 16 and model.config.num_attention_heads: 3 are wrong together (The",
        ),
        ({"hidden_size": 15}, ".hidden_size: 15 is wrong (The hidden size (15) is not a multiple"),
        ({"hidden_size": "big"}, ".hidden_size: 'big' is wrong (Field 'hidden_size' expected int, got str"),
        ({"hidden_size": 10**12}, ".hidden_size: 1000000000000 is wrong ("),
        (
            {"intermediate_size": 0},
            ".intermediate_size: 0 is wrong (model.layers.0.mlp.gate_proj.weight would be empty",
        ),
        ({"rope_theta": "abc"}, ".rope_theta: 'abc' is wrong ("),
        ({"rope_parameters": {"rope_type": "x"}}, ".rope_parameters.rope_type: 'x' is wrong ("),
        (
            {"hidden_act": "bogus"},
            ".hidden_act: 'bogus' is wrong (cannot build LlamaForCausalLM: unknown name 'bogus'); ",
        ),
        ({"dtype": "float99"}, ".dtype: 'float99' is wrong ("),
        ({"num_labels": "x"}, ".num_labels: 'x' is wrong ("),
        ({"vocab_size": 0}, ".vocab_size: 0 is wrong; expected at least the tokenizer's 280 tokens"),
        ({"pad_token_id": 9999}, ".pad_token_id: 9999 is wrong (cannot build LlamaForCausalLM: Padding_idx"),
        ({"attention_dropout": 2}, ".attention_dropout: 2 is wrong (dropout probability has to be between 0 and 1"),
        ({"return_dict": False}, ".return_dict: false is wrong ("),
        ({"output_attentions": True}, ".output_attentions: true is wrong ("),  # what only saving would refuse
        ({"hiden_size": 8}, ".hiden_size: unknown to model type llama; did you mean hidden_size?"),
        ({"colour": 8}, ".colour: unknown to model type llama; its entries are those of transformers' LlamaConfig"),
        (T5, ".decoder_start_token_id: missing ("),
        ({**GPT2, "n_layer": 0}, ".n_layer: 0 is wrong (a model needs at least one layer)"),
        ({**GPT2, "rope_theta": 1}, ".rope_theta: unknown to model type gpt2"),
        (
            {**LLAVA, "text_config": {**TINY, "hiden_size": 8}},
            ".text_config.hiden_size: unknown to model type llama; did",
        ),
        ({**LLAVA, "text_config": {**TINY, "vocab_size": 10}}, ".text_config.vocab_size: 10 is wrong; expected at"),
        ({"model_type": "vit"}, ": transformers "),
        ({"quantization_config": {"quant_method": "fp8"}}, ".quantization_config: "),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_wrong_model_config_is_named_before_any_text_is_read(
    changes: dict[str, Any],
    message: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings["model"]["config"] = changes if "model_type" in changes else {**TINY, **changes}
    assert run(settings, tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megatrain: model.config{message}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_of_a_model_config_may_hold_what_its_type_does_not_know(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.json"
    # as transformers writes it: 1e-05 is a number, and old versions had other entries
    path.write_text(json.dumps({**TINY, "rms_norm_eps": 1e-05, "attn_pdrop": 0.1}, indent="\t"))
    settings["model"]["config"] = str(path)
    assert run(settings, tmp_path) == 0
    assert "model.config.attn_pdrop is unknown to model type llama and has no effect" in caplog.text


def test_models_that_cannot_be_measured(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["model"]["config"] = {**T5, "decoder_start_token_id": 0}
    settings["data"]["eval"] = settings["data"]["train"]
    assert run(settings, tmp_path) == 2
    assert "data.eval: T5ForConditionalGeneration cannot be measured on text (" in capsys.readouterr().err


def test_a_run_that_fails_in_its_first_step_leaves_nothing(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["model"]["config"]["rms_norm_eps"] = -1.0  # the root of a negative number
    settings["output"] = str(tmp_path / "runs" / "nan")
    assert run(settings, tmp_path) == 1
    assert "megatrain: the loss of the first step is nan" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_output_is_tried_before_anything_is_read(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    for output in ("file", "file/x/y", "link", "x" * 300, "/proc/x/y"):
        settings["output"] = str(tmp_path / output)
        assert run(settings, tmp_path) == 2
        error = capsys.readouterr().err
        assert error.startswith("megatrain: output: ") and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "settings.yaml"])


def test_warmup_of_epochs_is_compared_once_the_text_is_tokenized(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["train"] = {"tokens": 64}
    settings["schedule"] = {"warmup_steps": 3}
    assert run(settings, tmp_path) == 2
    error = "megatrain: schedule.warmup_steps: 3 is wrong; expected at most the 2 steps of the run\n"
    assert capsys.readouterr().err == error
    settings["train"] = {"epochs": 1}
    settings["schedule"] = {"warmup_steps": 3000}
    assert run(settings, tmp_path) == 2
    assert "schedule.warmup_steps: 3000 is wrong; expected at most the" in capsys.readouterr().err


def test_a_run_folder_is_a_model_path(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings, tmp_path) == 0
    first = settings["output"]
    settings |= {"model": {"path": first}, "output": str(tmp_path / "onward")}
    assert run(settings, tmp_path, "--optimizer.param_groups", "[{match: norm, lr: 1e-4}]") == 0
    capsys.readouterr()
    # weights that are damaged or missing are found before the text is read
    weights = tmp_path / "run" / "model" / "model.safetensors"
    for damage in (lambda: weights.write_bytes(b"x"), weights.unlink):
        damage()
        settings["output"] = str(tmp_path / "third")
        assert run(settings, tmp_path) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"megatrain: model.path: {weights.parent}") and error.count("\n") == 1
    (weights.parent / "config.json").unlink()
    assert run(settings, tmp_path) == 2
    assert f"megatrain: model.path: {first} has no config.json" in capsys.readouterr().err


def test_export_not_into_the_model(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings, tmp_path) == 0
    model = tmp_path / "run" / "model"
    before = sorted(model.iterdir())
    capsys.readouterr()
    for source, out in [
        (model.parent, model / "sub"),
        (model, model / "a" / "b"),
        (model.parent, model.parent / ".." / "run" / "model" / "c"),
        (model.parent, model),
        (model.parent, model.parent),
        (model.parent, tmp_path),
        (model.parent, tmp_path / "settings.yaml" / "x"),
    ]:
        assert cli.main(["export", str(source), str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(out) in error
    assert sorted(model.iterdir()) == before
    assert cli.main(["export", str(model), str(tmp_path / "out")]) == 0


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
        (["--train.steps", "1", "--train.steps=2"], "train.steps: given twice on the command line; give it once"),
        (["--output=a", "--train.steps=1", "--output=a"], "output: given twice"),
        (["--model.config.n_embd=8", "--model.config={}"], "model.config: would replace model.config.n_embd"),
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
        ["export", "a", "b\0"],
        ["export", "a", "~nobody-here/b"],
        ["generate", "x", "--prompt", "a\udcff"],
        ["generate", "x", "--prompt", "a", "--seed", "x"],
        ["generate", "x", "--prompt", "a", "--seed", str(1 << 63)],
        ["generate", "x", "--prompt", "a", "--temperature", "1e-300"],
        ["generate", "x", "--prompt", "a", "--temperature", "hot"],
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


def test_the_next_command_is_one_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(folder: str) -> Path:
        path = tmp_path / folder / "megatrain"
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "environment" / "python"))
    monkeypatch.setattr("sys.argv", ["/somewhere/megatrain/__main__.py", "demo"])
    assert cli._own_command() == f"{tmp_path}/environment/python -m megatrain"
    beside = script("environment")
    assert cli._own_command() == "environment/megatrain"
    monkeypatch.setattr("sys.argv", [str(script("path")), "demo"])
    assert cli._own_command() == "megatrain"
    monkeypatch.setattr("sys.argv", [str(beside), "demo"])
    monkeypatch.chdir(tmp_path / "path")
    assert cli._own_command() == str(beside)


def test_an_interrupt_outside_of_training_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_config", interrupted)
    assert cli.main(["train", "x.yaml"]) == 130
    assert capsys.readouterr().err == "megatrain: interrupted\n"


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


def test_a_hub_that_cannot_be_reached_is_one_line_soon(tmp_path: Path) -> None:
    program = (
        "import sys, time; time.sleep = lambda seconds: print(f'paused {seconds}')\n"
        "from megatrain import cli; sys.exit(cli.main(['generate', 'nowhere', '--prompt', 'x']))"
    )
    left_out = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    for endpoint, why in (("http://127.0.0.1:9", "Connection refused"), ("http://no-such-host.invalid", "")):
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2
        line = f"megatrain: nowhere is no folder here, and the hub did not give it: {endpoint} cannot be reached: {why}"
        assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
        assert done.stdout == "paused 1.0\n"  # huggingface_hub by itself: 1, 2, 4, 8 and 8 seconds


def test_the_command_leaves_the_root_logger_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    own = list(logging.getLogger("megatrain").handlers)
    assert cli.main(["train"]) == 2
    assert logging.root.handlers == [] and logging.getLogger("megatrain").handlers == own


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_no_more_text_than_a_learned_table_has_positions(
    family: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opt = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    opt |= {"word_embed_proj_dim": 16, "max_position_embeddings": 40}
    settings["model"]["config"] = {**GPT2, "n_positions": 40} if family == "gpt2" else opt
    settings["train"] = {"steps": 1}
    assert run(settings, tmp_path) == 0
    capsys.readouterr()
    command = ["generate", str(tmp_path / "run"), "--prompt", "x", "--max-new-tokens"]
    assert cli.main([*command, "41"]) == 2
    message = "max-new-tokens is 41; the model has 40 positions and the prompt 1 tokens, so it must be at most 40"
    assert message in capsys.readouterr().err
    assert cli.main([*command, "40"]) == 0
    assert cli.main(["generate", str(tmp_path / "run"), "--prompt", "~" * 41]) == 2
    assert "the prompt has 41 tokens and the model 40 positions; shorten it" in capsys.readouterr().err


def test_what_an_error_is_annotated_with_is_said_in_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_given: object) -> int:
        error = RuntimeError("somebody's bug")
        error.add_note("step 1 is half done")
        raise error

    monkeypatch.delenv("MEGATRAIN_DEBUG", raising=False)
    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["doctor"]) == cli.FAILED
    assert capsys.readouterr().err.startswith("megatrain: RuntimeError: somebody's bug. step 1 is half done")
