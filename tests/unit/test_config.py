"""Settings: every error is one line that names the key, the value and what would be right."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatrain.config import Config, describe, load_config, parse_config, to_yaml
from megatrain.errors import ConfigError

MINIMAL = {"model": {"path": "some/model"}, "data": {"train": "stdlib", "seq_len": 64}, "train": {"steps": 3}}


def with_key(name: str, value: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {section: dict(keys) for section, keys in MINIMAL.items()}
    section, _, key = name.partition(".")
    if key:
        settings.setdefault(section, {})[key] = value
    else:
        settings[section] = value
    return settings


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_defaults_fill_in_what_is_not_given() -> None:
    config = parse_config(MINIMAL)
    assert config.data.train == ("stdlib",)
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.tokens_per_step == 64  # one micro-batch of one sequence


def test_sections_are_frozen_and_keyword_only() -> None:
    config = parse_config(MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config(config.model)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optimizer.leraning_rate", "`megatrain config` lists all keys"),
        ("optimizer.weight_deacy", "did you mean optimizer.weight_decay?"),
        ("train.lr", "did you mean optimizer.lr?"),
        ("trian", "did you mean train?"),
        ("checkpoint.every", "unknown key"),
    ],
)
def test_unknown_key_is_an_error_with_the_nearest_name(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_key(name, 1))
    assert str(caught.value).startswith(f"{name}: unknown key; ")
    if "lists" not in hint:
        assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("optimizer.lr", "fast", "a number of at least 0"),
        ("optimizer.lr", -1, "a number of at least 0"),
        ("optimizer.lr", True, "a number"),
        ("optimizer.lr", float("nan"), "a number"),
        ("optimizer.betas", [0.9], "two numbers"),
        ("optimizer.betas", 0.9, "two numbers"),
        ("optimizer.betas", [0.9, 1.0], "two numbers"),
        ("optimizer.eps", 0, "a number above 0"),
        ("schedule.name", "cosin", "one of constant, linear, cosine, wsd"),
        ("schedule.min_lr_ratio", 1.5, "a number from 0 to 1"),
        ("train.steps", 2.5, "a whole number of at least 1"),
        ("train.steps", "many", "a whole number"),
        ("train.seed", None, "a whole number of at least 0"),
        ("train.clip_norm", 0, "a number above 0 or null"),
        ("data.shuffle", "yes please", "true or false"),
        ("data.train", 3, "a path, stdlib, or a list"),
        ("data.train", [], "a path, stdlib, or a list"),
        ("data.seq_len", 1, "a whole number of at least 2"),
        ("model.tokenizer", {"train": "wordpiece", "vocab_size": 300}, "{train: bpe, vocab_size: N}"),
        ("model.tokenizer", {"train": "bpe", "vocab_size": 10}, "at least 259"),
        ("engine.device", "gpu", "one of auto, cpu"),
        ("engine.precision", "fp16", "one of auto, bf16, fp32"),
        ("engine.device_memory", "lots", "a size such as 24GiB"),
        ("output", 7, "a path"),
    ],
)
def test_wrong_value_names_key_value_and_what_is_right(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_key(name, value))
    message = str(caught.value)
    shown = "null" if value is None else repr(value)
    assert message.startswith(f"{name}: {shown} is wrong; expected ")
    assert expected in message and "\n" not in message


def test_numbers_as_yaml_1_1_reads_them(tmp_path: Path) -> None:
    text = """
    model: {path: m}
    data: {train: [a.txt, b/], seq_len: 1_000}
    optimizer: {lr: 1e-5, eps: 1e-8}
    train: {tokens: 1e6, clip_norm: null}
    engine: {device_memory: 2GiB}
    """
    config = load_config(write(tmp_path, text))
    assert (config.optimizer.lr, config.optimizer.eps) == (1e-5, 1e-8)
    assert config.train.tokens == 1_000_000 and isinstance(config.train.tokens, int)
    assert config.data.seq_len == 1000 and config.data.train == ("a.txt", "b/")
    assert config.engine.device_memory == 2 * 1024**3
    assert config.output == "runs/mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model.path: missing"),
        ({"model": {"path": "a", "config": "b.json"}}, "model.config: not together with model.path"),
        ({"model": {"config": {"model_type": "llama"}}}, "model.tokenizer: missing"),
        (
            {"model": {"path": "a", "tokenizer": {"train": "bpe", "vocab_size": 300}}},
            "model.tokenizer: a pretrained",
        ),
        ({"model": {"path": "a"}}, "data.train: missing"),
        ({"model": {"path": "a"}, "data": {"train": "b"}}, "given: none"),
        (with_key("train.epochs", 2), "given: train.steps and train.epochs"),
        (
            with_key("train.tokens_per_step", 100),
            "expected a multiple of engine.micro_batch * data.seq_len = 64",
        ),
        ({"data": 3}, "data: 3 is wrong; expected a section"),
    ],
)
def test_keys_that_do_not_fit_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_overrides_are_typed_and_reach_into_mappings(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {config: {model_type: llama}, tokenizer: t}\ndata: {train: a}\ntrain: {steps: 9}\n")
    overrides = [
        ("train.steps", "null"),
        ("train.epochs", "0.5"),
        ("optimizer.betas", "[0.8, 0.9]"),
        ("model.config.hidden_size", "64"),
        ("output", "elsewhere"),
    ]
    config = load_config(path, overrides)
    assert config.train.steps is None and config.train.epochs == 0.5
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model.config == {"model_type": "llama", "hidden_size": 64}
    assert config.output == "elsewhere"
    with pytest.raises(ConfigError, match=r"^train.steps.more: cannot be set, train.steps is 9$"):
        load_config(path, [("train.steps.more", "1")])
    with pytest.raises(ConfigError, match=r"^optimizer.lr: 'x' is wrong"):
        load_config(path, [("optimizer.lr", "x")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping of settings, found a list"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "'train' is given twice, line 2"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"cannot read 'nowhere.yaml': No such file"):
        load_config("nowhere.yaml")


def test_resolved_settings_read_back_equal(tmp_path: Path) -> None:
    config = parse_config(with_key("optimizer.lr", 3e-4))
    text = to_yaml(config)
    assert parse_config(yaml.safe_load(text)) == config
    config = dataclasses.replace(config, output="here")
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_description_names_every_key_with_its_default() -> None:
    assert yaml.safe_load(describe()) == yaml.safe_load(to_yaml(Config()))


def test_demo_settings_are_valid() -> None:
    demo = Path(__file__).parents[2] / "src" / "megatrain" / "recipes" / "demo.yaml"
    assert load_config(demo).data.eval == ("stdlib",)
