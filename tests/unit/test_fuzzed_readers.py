"""Readers of files that people write or get from others, on whatever hypothesis comes up with: what they promise, or
ConfigError in one line; never another exception, and never for long."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile_files import safetensors_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatrain.checkpoint.description import Description, random_numbers, read_description, set_random_numbers
from megatrain.config import Config, load_config, override, parse_config, to_yaml
from megatrain.data.bad_rows import BadRows
from megatrain.data.sources import Corpus
from megatrain.data.tokenizer import load_tokenizer, train_bpe
from megatrain.errors import ConfigError, IntegrityError
from megatrain.model.config_entries import read_entries
from megatrain.model.safetensors_header import StoredTensor, read_header
from megatrain.optim.adamw import AdamW
from megatrain.train.resume import _warn_of_versions, check_data, find_checkpoint
from megatrain.trust.manifest import write_manifest
from megatrain.yaml_file import read_yaml

# one folder for all examples of a test: each writes its file anew
often = settings(max_examples=60, deadline=10_000, suppress_health_check=list(HealthCheck))
seldom = settings(often, max_examples=20)

SECTIONS = ["model", "data", "optimizer", "schedule", "train", "engine", "checkpoint", "eval", "output"]
KEYS = [
    "path",
    "config",
    "tokenizer",
    "train",
    "eval",
    "seq_len",
    "lr",
    "betas",
    "param_groups",
    "steps",
    "epochs",
    "seed",
]
KEYS += [
    "device_memory",
    "nvme",
    "threads",
    "keep_graphs",
    "at_end",
    "warmup_steps",
    "clip_norm",
    "match",
    "model_type",
    "prompts",
    "log_to",
]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**30), 2**63, float("inf"), float("-inf"), float("nan"), 1e308, "1e999", "\ud800"])
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=5)
    | st.dates()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner),
    max_leaves=8,
)
sections = st.dictionaries(
    st.sampled_from(KEYS) | scalars.filter(lambda x: not isinstance(x, float)), values, max_size=4
)
structures = st.dictionaries(st.sampled_from(SECTIONS) | st.text(max_size=8), sections | values, max_size=5)
RUN: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": "stdlib", "seq_len": 8}, "train": {"steps": 1}}

# pieces of YAML's own language, which random characters seldom come upon
TOKENS = [
    "!!int ''",
    "!!bool x",
    "!!timestamp x",
    "!!float",
    "!!binary '*'",
    "!!set {a}",
    "!!python/object:os.system x",
]
TOKENS += [
    "&a ",
    "*a",
    "<<: ",
    "<<: [*a, *a]",
    "? ",
    ": ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "|\n",
    ">\n",
    "---\n",
    "...\n",
    "%YAML 1.1",
]
TOKENS += [
    "'",
    '"',
    "#",
    "\t",
    "\n",
    "\n  ",
    "\r\n",
    "\0",
    "\ufeff",
    "\x85",
    "2020-99-99",
    "9999-12-31 23:59:59-23:59",
    "0x",
    "1:60",
]
TOKENS += ["9" * 5000, "0b_", "=", "~", "model", "data:", "train: stdlib", "steps: 1", "path: m"]
yaml_texts = st.lists(st.sampled_from(TOKENS) | st.text(max_size=4), max_size=14).map("".join)


def one_line(error: Exception, names: str = "") -> None:
    assert "\n" not in str(error) and 0 < len(str(error)) < 5000 and names in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


# ---- settings --------------------------------------------------------------------------------------


@often
@given(structures)
def test_settings_of_any_structure(content: dict[str, Any]) -> None:
    for whole in (content, RUN | content):
        try:
            config = parse_config(whole)
        except ConfigError as error:
            one_line(error)
        else:
            assert parse_config(yaml.safe_load(to_yaml(config))) == config


@often
@given(
    st.binary(max_size=200) | yaml_texts.map(lambda text: text.encode("utf-8", "replace")),
    st.sampled_from(["yaml", "json"]),
)
def test_settings_of_any_text(folder: Path, content: bytes, kind: str) -> None:
    path = folder / f"settings.{kind}"
    path.write_bytes(content)
    try:
        assert isinstance(load_config(path), Config)
    except ConfigError as error:
        one_line(error)


@often
@given(
    st.lists(st.tuples(st.sampled_from([f"{s}.{k}" for s in SECTIONS for k in KEYS]) | st.text(max_size=9), yaml_texts))
)
def test_any_overrides(pairs: list[tuple[str, str]]) -> None:
    settings = {name: dict(section) for name, section in RUN.items()}
    try:
        override(settings, pairs)
        assert isinstance(parse_config(settings), Config)
    except ConfigError as error:
        one_line(error)


def bomb(first: str, line: str) -> str:
    """Ten levels, each ten times the one before."""
    lines = [f"a0: &a0 {first}"]
    for level in range(1, 11):
        lines.append(f"a{level}: &a{level} " + line.format(", ".join([f"*a{level - 1}"] * 10)))
    return "model: {config: {model_type: llama, " + ", ".join(lines) + "}}\n"


BOMBS = {
    "aliases": bomb("[x]", "[{}]"),
    "merged mappings": bomb("{k: x}", "{{<<: [{}]}}"),
    "long texts": "model: {config: {model_type: llama, a: &a " + "x" * 100_000 + ", b: [" + "*a," * 100_000 + "]}}",
    "a circle": "model: {config: &a {model_type: llama, a: *a}}",
    "a circle in groups": "optimizer: {param_groups: &a [*a]}",
    "depth": "model: " + "[" * 99_999,
    "depth of blocks": "\n".join(" " * depth + "a:" for depth in range(500)),
    "length": "# " + "x" * (1 << 20),
    "many merges": "a: &a {b: c}\nmodel: {" + "<<: *a, " * 9999 + "}",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_settings_that_stand_for_more_than_they_are_long(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(BOMBS[kind])
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    one_line(caught.value)
    assert time.monotonic() - start < 20


def test_settings_without_an_end() -> None:
    with pytest.raises(ConfigError, match=r"^/dev/zero: more than 16777216 bytes; expected settings$"):
        read_yaml("/dev/zero")


@often
@given(st.binary(max_size=100) | st.dictionaries(st.text(max_size=9), values.map(repr)).map(json.dumps).map(str.encode))
def test_configurations_of_models(folder: Path, content: bytes) -> None:
    path = folder / "config.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_entries(path), dict)
    except ConfigError as error:
        one_line(error)


# ---- weights ---------------------------------------------------------------------------------------

numbers = st.integers(-1, 20) | st.sampled_from([2**31, 2**63, 2**64, 1.5, True, "1", None])
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "F4", "x", 1]), "shape": st.lists(numbers, max_size=3) | numbers},
    optional={"data_offsets": st.lists(numbers, max_size=3), "more": numbers},
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), entries | numbers, max_size=3)


@often
@given(headers | st.binary(max_size=40), st.binary(max_size=90), st.none() | st.integers(0, 200))
def test_headers_of_weights(folder: Path, header: Any, data: bytes, length: int | None) -> None:
    """What is accepted, the library accepts as well."""
    from safetensors import safe_open

    path = folder / "model.safetensors"
    path.write_bytes(safetensors_file(header, data, length=length))
    try:
        found = read_header(path)
    except ConfigError as error:
        one_line(error)
        return
    assert all(isinstance(tensor, StoredTensor) for tensor in found.values())
    with safe_open(path, framework="pt") as whole:
        assert set(whole.keys()) == set(found)


# ---- text ------------------------------------------------------------------------------------------

PIECES = [
    b'{"text": "a"}',
    b"\n",
    b"\r\n",
    b"\0",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"[" * 2000,
    b'{"a":' * 2000,
]
PIECES += [
    b'{"text": ',
    b'"\\ud800"',
    b'"\\u0000"',
    b"}",
    b"9" * 5000,
    b"NaN",
    b'{"text": "' + b"x" * 300_000 + b'"}',
    b" ",
    b'"\x1b[2J"',
]
contents = st.binary(max_size=200) | st.lists(st.sampled_from(PIECES) | st.binary(max_size=6), max_size=8).map(b"".join)


@often
@given(contents, st.sampled_from(["a.txt", "a.jsonl", "a.md", "a"]))
def test_texts_and_jsonl(folder: Path, content: bytes, name: str) -> None:
    path = folder / name
    path.write_bytes(content)
    try:
        documents = list(
            Corpus([str(path)], split="train", key="data.train").documents(BadRows("data.train", skip=False))
        )
    except ConfigError as error:
        one_line(error, names=str(path))
    else:
        for text in documents:
            assert text.strip() and text.encode()
        if name != "a.jsonl":
            assert "".join(documents).encode() in content


# ---- tokenizers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["some text to train on\n"] * 20, 280).save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".json"}


@seldom
@given(st.data())
def test_tokenizers_of_any_bytes(folder: Path, tokenizer_files: dict[str, bytes], data: st.DataObject) -> None:
    """A file of random bytes, or a whole one with a part of it replaced."""
    place = folder / "tokenizer"
    place.mkdir(exist_ok=True)
    damaged = data.draw(st.sampled_from(sorted(tokenizer_files)))
    for name, content in tokenizer_files.items():
        if name == damaged and data.draw(st.booleans()):
            content = data.draw(st.binary(max_size=100) | values.map(repr).map(json.dumps).map(str.encode))
        elif name == damaged:
            start = data.draw(st.integers(0, len(content)))
            content = (
                content[:start] + data.draw(st.binary(max_size=9)) + content[start + data.draw(st.integers(0, 9)) :]
            )
        (place / name).write_bytes(content)
    try:
        tokenizer = load_tokenizer(str(place))
    except ConfigError as error:
        one_line(error, names="model.tokenizer: ")
    else:
        assert tokenizer.eos_token_id is not None


@pytest.mark.parametrize("charsmap", ["", "AAAA"])
def test_a_tokenizer_that_makes_its_library_panic(
    charsmap: str, tokenizer_files: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A panic of Rust's is no Exception in Python."""
    for name, content in tokenizer_files.items():
        (tmp_path / name).write_bytes(content)
    entries = json.loads(tokenizer_files["tokenizer.json"])
    entries["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    (tmp_path / "tokenizer.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"its tokenizer's files are damaged \(Precompiled: .*charsmap") as caught:
        load_tokenizer(str(tmp_path))
    one_line(caught.value, names=str(tmp_path))
    assert "panicked" in capfd.readouterr().err


# ---- checkpoints -----------------------------------------------------------------------------------

DESCRIPTION = Description(
    step=8,
    seed=3,
    precision="bf16",
    moments="fp32",
    model_dtype="float32",
    steps={"a": 8, "b": 7},
    param_groups=[
        {"params": ["a"], "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "lr_scale": 1.0},
        {"params": ["b"], "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0, "lr_scale": 0.5, "name": "x"},
    ],
    random=random_numbers(),
    run={"steps": 8},
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 700)
    | st.sampled_from([2**32, 2**63, 2**80, 10**400, 1e308, 8.0, -0.0, "MT19937", "float32", "1", ""])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from([*"ab", "lr", "params"]), inner),
    max_leaves=5,
)


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """(mapping or list, key) of all that is in it."""
    if not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(min(len(value), 4))) + [-1] * bool(value)
    return [place for key in keys for place in [(value, key), *places_in(value[key])]]


@settings(often, max_examples=150)
@given(st.data())
def test_descriptions_of_training(folder: Path, data: st.DataObject) -> None:
    """A whole one in which one to three places hold something else, or nothing, or more: as it is, or one line."""
    content = json.loads(DESCRIPTION.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(places_in(content)))
        change = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "remove":
            del holder[key]
        elif change == "replace" or isinstance(holder, list):
            holder[key] = data.draw(json_values)
        else:
            holder[data.draw(st.text(max_size=3))] = data.draw(json_values)
    path = folder / "training.json"
    path.write_text(json.dumps(content))
    try:
        found = read_description(folder)
    except IntegrityError as error:
        one_line(error, names=str(path))
        return
    assert json.loads(found.to_bytes()) == content
    set_random_numbers(found.random)
    assert json.loads(json.dumps(random_numbers())).items() >= content["random"].items()
    assert found.seed >= 0 and all(0 <= count <= 10**12 for count in (found.step, *found.steps.values()))
    for group in found.param_groups:
        AdamW(**{name: group[name] for name in ("betas", "eps", "weight_decay")})


@often
@given(
    st.dictionaries(
        st.sampled_from(["code", "config_sha256", "data", "hardware", "ledger", "libraries", "step", "mine"]),
        json_values
        | st.lists(st.fixed_dictionaries({"path": json_values, "sha256": json_values, "bytes": json_values})),
    )
)
def test_facts_of_manifests(folder: Path, facts: dict[str, Any]) -> None:
    """What a run that goes on asks of them, after they were accepted."""
    run = folder / "run" / "step-000008"
    run.mkdir(exist_ok=True, parents=True)
    (run / "training.json").write_bytes(DESCRIPTION.to_bytes())
    (run / "manifest.json").unlink(missing_ok=True)
    try:
        write_manifest(run, facts)
    except ValueError:  # JSON has no NaN
        return
    try:
        resumed = find_checkpoint(str(run), folder, verify=True)
        assert resumed is not None and resumed.step == 8
        _warn_of_versions(resumed.manifest.facts)
        check_data(resumed, {"data": []}, force=False)
    except ConfigError as error:
        one_line(error, names="--resume: ")
