"""Settings: every error is one line that names the key, the value and what would be right."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatrain.config import Config, describe, load_config, parse_config, to_yaml
from megatrain.errors import ConfigError
from megatrain.yaml_file import read_yaml

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
        ("data.seq_len", 1, "a whole number from 2 to 16,777,216"),
        ("model.tokenizer", {"train": "wordpiece", "vocab_size": 300}, "{train: bpe, vocab_size: N}"),
        ("model.tokenizer", {"train": "bpe", "vocab_size": 10}, "at least 259"),
        ("engine.device", "gpu", "one of auto, cpu, cuda"),
        ("engine.device", "cuda:x", "one of auto, cpu, cuda"),
        ("engine.slots", 0, "a whole number"),
        ("engine.precision", "fp16", "one of auto, bf16, fp32"),
        ("engine.device_memory", "lots", "a size such as 24GiB"),
        ("output", 7, "a path"),
        ("output", "a\0b", "a path"),
        ("output", "\udcff", "a path"),
        ("train.steps", 1e300, "a whole number below 2**63"),
        ("train.epochs", 1e300, "at most 1e9"),
        ("engine.device_memory", -1, "a size"),
        ("model.config", {"model_type": "llama", "x": datetime.date(2020, 1, 1)}, "a mapping with model_type"),
        ("optimizer.param_groups", {"match": "x"}, "a list, each a mapping with match and any of lr, betas"),
    ],
)
def test_wrong_value_names_key_value_and_what_is_right(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_key(name, value))
    message = str(caught.value)
    shown = "null" if value is None else "true (yes and on are the same)" if value is True else repr(value)
    assert message.startswith(f"{name}: {shown} is wrong; expected ")
    assert expected in message and "\n" not in message


def test_what_has_to_be_given_is_not_offered_as_null() -> None:
    for value, message in (
        (3, "3 is wrong; expected a path, stdlib, or a list of these"),
        (None, "missing; give a text"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(with_key("data.train", value))
        assert str(caught.value).startswith(f"data.train: {message}") and "null" not in str(caught.value)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (3, "[1]: 3 is wrong; expected a mapping with match and any of lr, betas, eps, weight_decay"),
        ({"lr": 1}, "[1]: {'lr': 1} is wrong; expected a mapping with match"),
        ({"match": "x", "lrr": 1}, "[1]: {'lrr': 1, 'match': 'x'} is wrong; expected a mapping with match"),
        ({"match": "x", "lr": "fast"}, "[1].lr: 'fast' is wrong; expected a number of at least 0"),
        ({"match": "x", "betas": [1, 1]}, "[1].betas: [1, 1] is wrong; expected two numbers"),
        ({"match": "x", "eps": None}, "[1].eps: null is wrong; expected a number above 0"),
        ({"match": ["x", "("]}, "[1].match: '(' is wrong; expected a regular expression (missing )"),
        ({"match": []}, "[1].match: [] is wrong; expected a regular expression, or a list of these"),
    ],
)
def test_wrong_parameter_groups(group: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_key("optimizer.param_groups", [{"match": "ok"}, group]))
    assert str(caught.value).startswith(f"optimizer.param_groups{message}")


def test_large_whole_numbers_are_exact() -> None:
    assert parse_config(with_key("train.seed", (1 << 63) - 1)).train.seed == (1 << 63) - 1


def test_an_error_shows_no_more_than_a_line_of_a_value() -> None:
    value: Any = "x"
    for _ in range(60):  # YAML's aliases can write this in 60 lines
        value = [value, value]
    with pytest.raises(ConfigError) as caught:
        parse_config(with_key("train.steps", value))
    assert len(str(caught.value)) < 1000


def test_warmup_longer_than_the_run_where_that_is_known() -> None:
    for train in ({"steps": 4}, {"tokens": 4 * 64}):
        settings = {**MINIMAL, "train": train}
        assert parse_config({**settings, "schedule": {"warmup_steps": 4}}).planned_steps == 4
        with pytest.raises(ConfigError, match=r"^schedule.warmup_steps: 5 is wrong; expected at most the 4 steps"):
            parse_config({**settings, "schedule": {"warmup_steps": 5}})
    unknown = parse_config({**MINIMAL, "train": {"epochs": 1}, "schedule": {"warmup_steps": 10**6}})
    assert unknown.planned_steps is None


def test_numbers_as_yaml_1_1_reads_them(tmp_path: Path) -> None:
    text = """
    model: {config: {model_type: llama, rms_norm_eps: 1e-5, x: [1.5e5, .5E-3, 1e5x]}, tokenizer: t}
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
    assert config.model.config == {"model_type": "llama", "rms_norm_eps": 1e-5, "x": [1.5e5, 0.5e-3, "1e5x"]}


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
        ("train: {steps: 1\n", "not valid YAML: expected ',' or '}', but got '<stream end>', line 2, column 1"),
        ("train: 2020-13-45", "not valid YAML: month must be in 1..12"),
        ("[" * 50_000, "not valid YAML: nested too deeply"),
        ("x: \0", "not valid YAML: unacceptable character"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_merged_mappings(tmp_path: Path) -> None:
    text = "model: &m {path: m}\ndata: {<<: {train: a, seq_len: 8}, seq_len: 64}\ntrain: {steps: 3}\n"
    assert load_config(write(tmp_path, text)).data.seq_len == 64


def test_json_is_read_as_json(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{\n\t"a": 1e-05\n}')
    assert read_yaml(path) == {"a": 1e-5}
    for text, message in [
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ("{", "not valid JSON"),
        ("[" * 99_999, "nested"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_yaml(path)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"cannot read 'nowhere.yaml': No such file"):
        load_config("nowhere.yaml")


def test_resolved_settings_read_back_equal(tmp_path: Path) -> None:
    config = parse_config(with_key("optimizer.lr", 3e-4))
    text = to_yaml(config)
    assert parse_config(yaml.safe_load(text)) == config
    groups = [{"match": ["norm", "b$"], "lr": 1e-6, "betas": [0.5, 0.9]}]
    config = parse_config(with_key("optimizer.param_groups", groups))
    for output in ("here", "1e5", "1.5e5", "null", "~/x y: é"):  # texts that look like something else
        config = dataclasses.replace(config, output=output)
        assert load_config(write(tmp_path, to_yaml(config))) == config


def test_description_names_every_key_with_its_default() -> None:
    assert yaml.safe_load(describe()) == yaml.safe_load(to_yaml(Config()))


def test_demo_settings_are_valid() -> None:
    demo = Path(__file__).parents[2] / "src" / "megatrain" / "recipes" / "demo.yaml"
    assert load_config(demo).data.eval == ("stdlib",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every": 10}, "eval.every: there is nothing to measure; give data.eval"),
        ({"at_start": True}, "eval.at_start: there is nothing to measure; give data.eval"),
        ({"prompts": ["a"]}, "eval.prompts: there is nothing to measure; give data.eval"),
    ],
)
def test_nothing_is_evaluated_without_text(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        parse_config(MINIMAL | {"eval": settings})
    evaluated = MINIMAL | {"data": {**MINIMAL["data"], "eval": "stdlib"}}  # type: ignore[dict-item]
    assert parse_config(evaluated | {"eval": settings}).eval != parse_config(MINIMAL).eval


def test_patience_counts_evaluations_during_training() -> None:
    evaluated = MINIMAL | {"data": {**MINIMAL["data"], "eval": "stdlib"}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"^eval.patience: counts evaluations during training; give eval.every, too$"):
        parse_config(evaluated | {"eval": {"patience": 2}})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("eval.prompts", ["a", ""], "eval.prompts[1]: '' is wrong; expected a text, or a list of messages"),
        ("eval.prompts", [[{"role": "user"}]], "eval.prompts[0]: [{'role': 'user'}] is wrong; expected a text, or"),
        ("eval.prompts", -1, "eval.prompts: -1 is wrong; expected a whole number, or a list of texts and chats"),
        ("eval.temperature", 1e-9, "eval.temperature: 1e-09 is wrong; expected 0 or a number of at least 0.0001"),
        ("train.log_to", "tensorbord", "train.log_to: 'tensorbord' is wrong; expected tensorboard, wandb, or a list"),
        ("train.log_to", ["wandb", "wandb"], "train.log_to: ['wandb', 'wandb'] is wrong; expected tensorboard, wandb"),
        ("checkpoint.keep_best", -1, "checkpoint.keep_best: -1 is wrong; expected a whole number of at least 0"),
    ],
)
def test_what_is_wrong_with_evaluations_and_loggers_is_named(key: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_key(key, value))
    assert str(caught.value).startswith(said)


def test_prompts_are_read_back_as_they_were(tmp_path: Path) -> None:
    prompts = ["a: b", [{"role": "user", "content": "c\nd"}]]
    settings = with_key("eval.prompts", prompts)
    settings["data"]["eval"] = "stdlib"
    config = dataclasses.replace(parse_config(settings), output="here")
    assert config.eval.prompts == tuple(prompts)
    assert load_config(write(tmp_path, to_yaml(config))) == config
