"""A model's other files, from strangers: its tokenizer's, and how it would like to generate. None of them takes a
command's memory or time, or ends it in an error that nobody foresaw."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config

from megatrain import cli
from megatrain.data.tokenizer import load_tokenizer, train_bpe
from megatrain.errors import ConfigError
from megatrain.model import loading


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_config("llama")
    config.vocab_size = 280
    loading.initialise(config, seed=0).save_pretrained(folder)
    train_bpe(["some text to train on\n"] * 20, 280).save_pretrained(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(file: Path, **entries: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | entries))


def run(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(command)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def generated(model: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    return run(["generate", str(model), "--prompt", "some", "--max-new-tokens", "4"], capsys)


# ---- tokenizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "most"),
    [(name, 512 << 20) for name in ("tokenizer.json", "vocab.json", "tokenizer.model", "merges.txt", "x.tiktoken")]
    + [(name, 16 << 20) for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")]
    + [("additional_chat_templates/tool.jinja", 16 << 20)],
)
def test_a_tokenizers_file_without_an_end(name: str, most: int, model: Path) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    with (model / name).open("wb") as stream:
        stream.truncate(most + 1)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(model))
    assert f"{model / name} has {most + 1} bytes; expected at most {most}" in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"])
def test_a_tokenizers_file_that_is_none(name: str, model: Path) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(ConfigError, match=f"{name} is no regular file"):
        load_tokenizer(str(model))


def test_large_files_of_others_are_not_the_tokenizers(model: Path) -> None:
    for name in ("more.safetensors", "README.md", "results.json"):
        with (model / name).open("wb") as stream:
            stream.truncate(1 << 40)
    assert load_tokenizer(str(model)).eos_token_id == 1


@pytest.mark.parametrize("longest", ["x", [], True, 0, -1, {"a": 1}, float("nan")])
def test_a_longest_text_that_is_no_number(longest: Any, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(model / "tokenizer_config.json", model_max_length=longest)
    code, _, error = generated(model, capsys)
    assert code == 2 and error.count("\n") == 1
    assert error.startswith("megatrain: tokenizer: the tokenizer in ")
    assert "has model_max_length " in error and error.endswith("; expected a number above 0\n")


# ---- generating ------------------------------------------------------------------------------------

OF_NO_ACCOUNT: dict[str, dict[str, Any]] = {
    "beams and text": {"max_length": "x", "num_beams": 10**6},
    "beams": {"num_beams": 100_000, "num_return_sequences": 100_000},
    "stop strings": {"stop_strings": ["a"]},
    "a forced token": {"forced_bos_token_id": 10**9, "forced_eos_token_id": 10**9},
    "forbidden words": {"bad_words_ids": "x"},
    "all tokens suppressed": {"suppress_tokens": list(range(280))},
    "others' code": {"custom_generate": "org/name"},
    "look-up": {"prompt_lookup_num_tokens": 10**9},
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "tokens that there are not": {"eos_token_id": [10**12, -1], "bos_token_id": 10**12},
    "a penalty": {"repetition_penalty": 1e9, "min_length": 10**9, "min_new_tokens": 10**9},
}


@pytest.mark.parametrize("kind", OF_NO_ACCOUNT)
def test_settings_of_generation_that_are_of_no_account(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    _, expected, _ = generated(model, capsys)
    change(model / "generation_config.json", **OF_NO_ACCOUNT[kind])
    code, text, error = generated(model, capsys)
    assert (code, text) == (0, expected), error
    code, _, error = run(["export", str(model), str(tmp_path / "out")], capsys)
    assert code == 0 or (code == 2 and error.count("megatrain: ") == 1), error


@pytest.mark.parametrize("value", ["x", 1.5, True, [1, "x"], [[1]], {"a": 1}])
def test_the_end_of_a_text_has_to_be_tokens(value: Any, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(model / "generation_config.json", eos_token_id=value)
    code, _, error = generated(model, capsys)
    assert code == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("megatrain: ") and "TypeError" not in error


def test_a_text_ends_where_the_model_says(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(model), "--prompt", "some", "--max-new-tokens", "40"]
    assert len(run(command, capsys)[1]) > 30
    change(model / "generation_config.json", eos_token_id=list(range(280)))
    assert len(run(command, capsys)[1]) < 15  # one token


@pytest.mark.parametrize(
    "entries", [{"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True}]
)
def test_what_outputs_look_like_is_ours_to_say(
    entries: dict[str, Any], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, expected, _ = generated(model, capsys)
    change(model / "config.json", **entries)
    code, text, error = generated(model, capsys)
    assert (code, text) == (0, expected), error
    code, _, error = run(["export", str(model), str(tmp_path / "out")], capsys)
    assert code == 0, error


def test_settings_of_generation_without_an_end(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (model / "generation_config.json").open("wb") as stream:
        stream.truncate(1 << 40)
    code, _, error = generated(model, capsys)
    assert code == 2 and "generation_config.json has 1099511627776 bytes; expected at most 16777216" in error
