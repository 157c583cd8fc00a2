"""Saving models: what transformers reads back, shards, replacing folders, memory."""

import itertools
import json
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import MODELS, logits_of, tiny_config

from megatrain.errors import ConfigError
from megatrain.model import folder_swap, saved_weights
from megatrain.model.loading import initialise, load_pretrained, model_class_for
from megatrain.model.saving import save_model


def as_is(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


# ---- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 7000])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_it_back(tmp_path: Path, name: str, max_shard_bytes: int) -> None:
    model = initialise(tiny_config(name), seed=3)
    read: list[str] = []

    def reader(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        read.append(name)
        return parameter

    save_model(model, tmp_path / "out", reader, torch.float32, max_shard_bytes=max_shard_bytes)
    assert sorted(read) == sorted(set(read)) == sorted(n for n, _ in model.named_parameters())

    loaded, found = model_class_for(model.config).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values())
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.config.architectures == [type(model).__name__]
    # the very files that transformers itself writes
    model.save_pretrained(tmp_path / "own")
    own, ours = weights_of(tmp_path / "own"), weights_of(tmp_path / "out")
    assert own.keys() == ours.keys()
    assert all(torch.equal(own[key], ours[key]) for key in own)
    tied = {id(p) for _, p in model.named_parameters()}
    assert len(tied) == len({id(p) for _, p in loaded.named_parameters()})


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3_text", "t5", "llava"])
def test_loaded_models_save_what_they_were_loaded_from(tmp_path: Path, name: str) -> None:
    """A model that came through a conversion remembers it; so does our save."""
    initialise(tiny_config(name), seed=3, dtype=torch.bfloat16).save_pretrained(tmp_path / "hub")
    model = load_pretrained(tmp_path / "hub")
    save_model(model, tmp_path / "out", as_is, torch.bfloat16)
    hub, ours = weights_of(tmp_path / "hub"), weights_of(tmp_path / "out")
    assert hub.keys() == ours.keys()
    assert all(torch.equal(hub[key], ours[key]) for key in hub)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_dtypes(tmp_path: Path, source: torch.dtype, target: torch.dtype) -> None:
    model = initialise(tiny_config("llama"), seed=3, dtype=source)
    save_model(model, tmp_path / "out", lambda _, p: p.detach().float(), target)
    weights = weights_of(tmp_path / "out")
    for name, parameter in model.named_parameters():
        assert weights[name].dtype == target
        assert torch.equal(weights[name], parameter.detach().to(target))  # nearest, ties to even
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(target)[len("torch.") :]
    assert load_pretrained(tmp_path / "out").dtype == target
    assert model.config.dtype == source  # the model at hand is as it was


def test_pinned_parameters_and_buffers_keep_their_dtype(tmp_path: Path) -> None:
    model = initialise(tiny_config("llama"), seed=3)
    model._keep_in_fp32_modules_strict = {"input_layernorm"}
    model.register_buffer("scales", torch.rand(3))
    model.register_buffer("not_saved", torch.rand(3), persistent=False)
    save_model(model, tmp_path / "out", as_is, torch.bfloat16, max_shard_bytes=5001)
    weights = weights_of(tmp_path / "out")
    assert {k for k, v in weights.items() if v.dtype == torch.float32} == {
        "scales",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
    }
    assert torch.equal(weights["scales"], model.scales)


def test_views_of_one_buffer_are_not_taken_for_ties(tmp_path: Path) -> None:
    model = initialise(tiny_config("llama-tied"), seed=3)
    expected = logits_of(model)
    parameters = list(model.parameters())
    buffer = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, part in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    save_model(model, tmp_path / "out", as_is, torch.float32)
    loaded = load_pretrained(tmp_path / "out")
    assert "lm_head.weight" not in weights_of(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded), expected)


def test_undeclared_tie_is_written_under_both_names(tmp_path: Path) -> None:
    model = initialise(tiny_config("llama"), seed=3)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    save_model(model, tmp_path / "out", as_is, torch.float32)
    assert torch.equal(logits_of(load_pretrained(tmp_path / "out")), logits_of(model))


def test_plain_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
    module[0].weight = torch.nn.Parameter(module[0].weight.double().t().contiguous().t())
    module.register_parameter("scalar", torch.nn.Parameter(torch.tensor(2.5)))
    module.register_parameter("empty", torch.nn.Parameter(torch.zeros(0, 4)))
    module.register_parameter("again", module[2].weight)
    save_model(module, tmp_path / "out", as_is, torch.float32)
    assert files_of(tmp_path / "out") == ["model.safetensors"]
    weights = load_file(tmp_path / "out/model.safetensors")
    state = module.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[k], state[k].to(weights[k].dtype)) for k in state)
    assert weights["1.num_batches_tracked"].dtype == torch.int64


def test_module_without_weights(tmp_path: Path) -> None:
    save_model(torch.nn.ReLU(), tmp_path / "out", as_is, torch.float32)
    assert load_file(tmp_path / "out/model.safetensors") == {}


# ---- shards ----------------------------------------------------------------------------------------


def test_shards_keep_their_size_and_alignment(tmp_path: Path) -> None:
    model = initialise(tiny_config("mixtral"), seed=3)
    model._keep_in_fp32_modules_strict = {"layernorm"}
    save_model(model, tmp_path / "out", as_is, torch.bfloat16, max_shard_bytes=7000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    for file in (tmp_path / "out").glob("*.safetensors"):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        assert header.pop("__metadata__") == {"format": "pt"}
        spans = sorted(entry["data_offsets"] for entry in header.values())
        assert spans[0][0] == 0 and start + spans[-1][1] == len(raw)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))  # no gaps
        assert len(header) == 1 or spans[-1][1] <= 7000
        for name, entry in header.items():
            assert index["weight_map"][name] == file.name
            assert (start + entry["data_offsets"][0]) % {"F32": 4, "BF16": 2}[entry["dtype"]] == 0
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == header.keys()


def test_one_group_is_held_at_a_time(tmp_path: Path) -> None:
    """What was read for one layer's experts is let go before the next layer's are read."""
    model = initialise(tiny_config("mixtral"), seed=3)
    held: list[Any] = []
    most = 0

    def reader(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        nonlocal most
        value = parameter.detach().clone()
        held.append(weakref.ref(value.untyped_storage()))
        most = max(most, sum(ref() is not None for ref in held))
        return value

    save_model(model, tmp_path / "out", reader, torch.float32)
    assert most == 1  # each of the fused weights is a group of its own


def test_conversion_that_needs_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = initialise(tiny_config("mixtral"), seed=3)
    save_model(model, tmp_path / "lazy", as_is, torch.bfloat16)
    own = saved_weights.revert_weight_conversion

    def needs_numbers(model: Any, tensors: dict[str, torch.Tensor]) -> Any:
        assert all(float(tensor.sum().item()) is not None for tensor in tensors.values())
        return own(model, tensors)

    monkeypatch.setattr(saved_weights, "revert_weight_conversion", needs_numbers)
    save_model(model, tmp_path / "eager", as_is, torch.bfloat16, max_shard_bytes=7000)
    lazy, eager = weights_of(tmp_path / "lazy"), weights_of(tmp_path / "eager")
    assert lazy.keys() == eager.keys()
    assert all(torch.equal(lazy[key], eager[key]) for key in lazy)


# ---- replacing a folder ----------------------------------------------------------------------------


def test_interrupted_save_leaves_the_old_folder(tmp_path: Path) -> None:
    old, new = (initialise(tiny_config("llama"), seed=seed) for seed in (1, 2))
    target = tmp_path / "model"
    save_model(old, target, as_is, torch.float32, max_shard_bytes=20_000)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    calls = 0

    def fails_half_way(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return parameter

    with pytest.raises(KeyboardInterrupt):
        save_model(new, target, fails_half_way, torch.float32, max_shard_bytes=20_000)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert files_of(tmp_path) == ["model"]


@pytest.mark.parametrize("atomic", [True, False])
def test_complete_save_replaces_the_folder(tmp_path: Path, atomic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not atomic:
        monkeypatch.setattr(folder_swap, "_exchange", lambda one, other: False)
    old, new = (initialise(tiny_config("llama"), seed=seed) for seed in (1, 2))
    target = tmp_path / "model"
    save_model(old, target, as_is, torch.float32, max_shard_bytes=20_000)
    (target / "README.md").write_text("mine")
    (target / "notes").mkdir()
    (target / "notes/a.txt").write_text("kept")
    (tmp_path / "link").symlink_to(target)
    save_model(new, tmp_path / "link", as_is, torch.float32)
    assert files_of(tmp_path) == ["link", "model"]
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in target.glob("*.safetensors*")] == ["model.safetensors"]
    assert (target / "README.md").read_text() == "mine"
    assert (target / "notes/a.txt").read_text() == "kept"
    assert torch.equal(logits_of(load_pretrained(target)), logits_of(new))


def test_model_is_saved_over_the_files_that_it_maps(tmp_path: Path) -> None:
    model = initialise(tiny_config("llama"), seed=1)
    save_model(model, tmp_path / "model", as_is, torch.float32)
    mapped = load_pretrained(tmp_path / "model")
    save_model(mapped, tmp_path / "model", as_is, torch.float32)
    assert torch.equal(logits_of(load_pretrained(tmp_path / "model")), logits_of(model))
    assert torch.equal(logits_of(mapped), logits_of(model))


def test_targets_that_are_refused(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="it is a file"):
        save_model(module, tmp_path / "file", as_is, torch.float32)
    with pytest.raises(ConfigError, match="holds files but no model"):
        save_model(module, tmp_path, as_is, torch.float32)
    with pytest.raises(ConfigError, match="int8"):
        save_model(module, tmp_path / "new", as_is, torch.int8)
    assert files_of(tmp_path) == ["file"]
    (tmp_path / "empty").mkdir()
    save_model(module, tmp_path / "empty", as_is, torch.float32)
    assert files_of(tmp_path / "empty") == ["model.safetensors"]


def test_wrong_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was read with shape"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "out", lambda _, p: p.detach()[:1], torch.float32)


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = socket.gethostname()
    (tmp_path / f".out.saving-{host}-{dead.stdout.strip()}").mkdir()
    (tmp_path / f".out.saving-{host}-{os.getppid()}").mkdir()
    save_model(torch.nn.Linear(2, 2), tmp_path / "out", as_is, torch.float32)
    assert files_of(tmp_path) == [f".out.saving-{host}-{os.getppid()}", "out"]


# ---- settings --------------------------------------------------------------------------------------


class Tokenizer:
    """Stands for anything with `save_pretrained`."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def test_settings_and_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = initialise(tiny_config("llama"), seed=1)
    model.generation_config.max_new_tokens = 17
    save_model(model, tmp_path / "out", as_is, torch.float32, tokenizer=Tokenizer())
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert files_of(tmp_path / "out") == names
    assert load_pretrained(tmp_path / "out").generation_config.max_new_tokens == 17
    # settings that transformers refuses to write must not lose the weights
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.5
    save_model(model, tmp_path / "out", as_is, torch.float32)
    assert files_of(tmp_path / "out") == names
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["temperature"] == 0.5
