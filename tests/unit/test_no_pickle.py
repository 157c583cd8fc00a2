"""Nothing is unpickled and no text is run as code: not in our sources, and not by what they call on a folder."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import model_folder, pickled_payload
from tiny_models import tiny_config

import megatrain
from megatrain import cli
from megatrain.data.tokenizer import train_bpe
from megatrain.errors import ConfigError
from megatrain.model import loading

SOURCES = Path(megatrain.__file__).parent
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.package", "torch.hub.load", "torch.serialization.load"),
    *("pandas.read_pickle", "pd.read_pickle"),
}
KEYWORDS = {"allow_pickle", "trust_remote_code", "weights_only", "allow_all_kernels"}
SAFE_LOADERS = {"UniqueKeyLoader", "yaml.SafeLoader"}


def offences(tree: ast.AST) -> Iterator[str]:
    """What in a module unpickles, or runs text as code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"imports {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            if str(node.module).split(".")[0] in MODULES:
                yield f"imports from {node.module}"
            yield from (f"imports {a.name}" for a in node.names if f"{node.module}.{a.name}" in METHODS)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in METHODS:
            yield f"names {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            yield from _offences_of(node)


def _offences_of(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    if name in CALLS:
        yield f"calls {name}"
    if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
        loaders = [ast.unparse(argument) for argument in [*call.args[1:], *(k.value for k in call.keywords)]]
        if name != "yaml.load" or not set(loaders) & SAFE_LOADERS:
            yield f"calls {name} without a safe loader"
    for keyword in call.keywords:
        off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in KEYWORDS and not off:
            yield f"{name} with {keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize("path", sorted([*SOURCES.rglob("*.py"), *BENCHMARKS.rglob("*.py")]), ids=str)
def test_sources_unpickle_nothing_and_run_no_text(path: Path) -> None:
    assert list(offences(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from joblib import load", "import dill.source", "torch.load(f)", "from torch import load"),
        *("f = torch.save", "eval('1')", "exec(code)", "np.load(f, allow_pickle=True)", "x(trust_remote_code=asked)"),
        *("yaml.load(text)", "yaml.load(text, yaml.Loader)", "yaml.unsafe_load(text)", "import shelve, marshal"),
    ],
)
def test_the_search_finds(code: str) -> None:
    assert list(offences(ast.parse(code)))


def test_the_search_lets_pass() -> None:
    innocent = "model.eval(); yaml.load(t, UniqueKeyLoader); np.load(f, allow_pickle=False); f(trust_remote_code=False)"
    assert list(offences(ast.parse(innocent))) == []


# ---- folders whose weights are pickles --------------------------------------------------------------


def commands(folder: Path, place: Path) -> dict[str, list[str]]:
    """A command line of each command that takes a model's path."""
    (place / "text.txt").write_text("some text to train on\n" * 100)
    settings = {
        "model": {"path": str(folder)},
        "data": {"train": str(place / "text.txt"), "seq_len": 16},
        "train": {"steps": 1},
        "output": str(place / "run"),
    }
    (place / "run.yaml").write_text(json.dumps(settings))
    return {
        "train": ["train", str(place / "run.yaml")],
        "plan": ["plan", str(folder), "--hardware", "h200"],
        "export": ["export", str(folder), str(place / "out")],
        "generate": ["generate", str(folder), "--prompt", "x"],
    }


PICKLED = {
    "bin": ["pytorch_model.bin"],
    "pt": ["model.pt"],
    "pth": ["consolidated.00.pth"],
    "ckpt": ["last.ckpt"],
    "sharded bin": ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
}

AUDITED = """
import json, os, sys
opened = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        name = os.fsdecode(arguments[0])
        if name.endswith((".bin", ".pt", ".pth", ".ckpt")):
            opened.append(name)
    elif event.startswith("pickle."):
        opened.append(event)
sys.addaudithook(watch)
from megatrain import cli
codes = [cli.main(arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps([codes, opened]))
"""


def test_folders_of_pickles_are_refused_unopened(tmp_path: Path) -> None:
    """By every command, in a process that notes whatever is opened or unpickled."""
    trace, lines = tmp_path / "unpickled", []
    for number, files in enumerate(PICKLED.values()):
        folder = model_folder(tmp_path / f"model-{number}")
        for file in files:
            (folder / file).write_bytes(pickled_payload(trace))
        place = tmp_path / f"place-{number}"
        place.mkdir()
        lines += commands(folder, place).values()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, json.dumps(lines)], capture_output=True, text=True, env=environment, timeout=300
    )
    codes, opened = json.loads(done.stdout)
    assert codes == [2] * len(lines) and opened == [] and not trace.exists()
    said = done.stderr.splitlines()
    assert len(said) == len(lines)
    for line in said:
        assert re.search(r"has \S*(bin|pt|pth|ckpt).* and no model\.safetensors; only safetensors weights are", line)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, saved by transformers itself."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    tokenizer = train_bpe(["some text to train on\n"] * 20, 280)
    config = tiny_config("llama")
    config.update({"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1})
    loading.initialise(config, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_safetensors_win_over_pickles(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).symlink_to(file)
    names = ["pytorch_model.bin", "adapter_model.bin", "spk_dict.pt", "optimizer.pt", "training_args.bin"]
    for name in [*names, "pytorch_model.bin.index.json"]:
        (folder / name).write_bytes(pickled_payload(tmp_path / "unpickled"))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere"}))
    lines = commands(folder, tmp_path)
    for name in ("plan", "export", "generate"):
        assert cli.main(lines[name]) == 0, capsys.readouterr().err
    assert not (tmp_path / "unpickled").exists()
    expected = loading.load_pretrained(saved)
    for one, other in zip(loading.load_pretrained(folder).parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_transformers_sees_the_checked_files_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    real, seen = LlamaForCausalLM.from_pretrained.__func__, []

    def look(cls: type, folder: Any, **settings: Any) -> Any:
        seen.append(sorted(os.listdir(folder)))
        return real(cls, folder, **settings)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(look))
    model = loading.load_pretrained(saved)
    assert seen == [["config.json", "generation_config.json", "model.safetensors"]]
    assert model.name_or_path == model.config.name_or_path == str(saved)


@pytest.mark.parametrize("named", ["adapter_model.bin", "../other.safetensors", "other.safetensors", 3])
def test_a_configuration_cannot_name_other_weights(saved: Path, tmp_path: Path, named: Any) -> None:
    """transformers itself would unpickle the first of these."""
    entries = json.loads((saved / "config.json").read_text()) | {"transformers_weights": named}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    (tmp_path / "adapter_model.bin").write_bytes(pickled_payload(tmp_path / "unpickled"))
    for load in (loading.load_config, loading.load_pretrained):
        with pytest.raises(ConfigError, match=r"config\.json: transformers_weights: .* is wrong; expected"):
            load(tmp_path)
    assert not (tmp_path / "unpickled").exists()
    entries["transformers_weights"] = "model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert loading.load_pretrained(tmp_path).config.hidden_size == 32
