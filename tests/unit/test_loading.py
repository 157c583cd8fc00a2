"""Loading models: classes, dtypes, errors in one line, memory."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, logits_of, tiny_config
from transformers import AutoModelForCausalLM, BertConfig, CLIPConfig, Llama4Config, LlamaConfig, MambaConfig
from transformers.utils import logging as transformers_logging

from megatrain.errors import ConfigError
from megatrain.model import loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny float32 llama, saved by transformers itself."""
    loading.initialise(tiny_config("llama"), seed=1).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def edit_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# ---- configurations and classes --------------------------------------------------------------------


def test_config_from_folder_file_and_mapping(folder: Path) -> None:
    entries = json.loads((folder / "config.json").read_text())
    sources = [folder, str(folder), folder / "config.json", entries]
    for config in map(loading.load_config, sources):
        assert isinstance(config, LlamaConfig)
        assert config.hidden_size == 32
    assert loading.load_config(folder, hidden_size=64).hidden_size == 64


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "is not a folder"),
        ({"hidden_size": 3}, "needs an entry model_type"),
        ({"model_type": "lama"}, "did you mean llama"),
        ({"model_type": ["llama"]}, "is unknown to transformers"),
        ({"model_type": "llama", "vocab_size": "x"}, "^Field 'vocab_size' expected int, got str"),
        ({"model_type": "llama", "num_attention_heads": 0}, "division or modulo by zero"),
        ({"model_type": "llama", "dtype": "float99"}, "no attribute 'float99'"),
        ("~nobody-here/x", "is not a folder"),
        ("x" * 300, "is no folder here"),
    ],
)
def test_bad_config(source: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loading.load_config(source)
    assert "\n" not in str(caught.value)


def test_entries_are_not_written_to() -> None:
    entries = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}
    loading.load_config(entries)
    assert entries["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_a_folder_with_wrong_settings(folder: Path) -> None:
    edit_config(folder, vocab_size="x")
    for load in (loading.load_config, loading.load_pretrained):
        with pytest.raises(ConfigError, match=r"from .*llama: Field 'vocab_size' expected int") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_unknown_override(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no entry 'hiden_size'"):
        loading.load_config(folder, hiden_size=3)


def test_model_classes() -> None:
    def name(config: Any) -> str:
        return loading.model_class_for(config).__name__

    assert name(tiny_config("llama")) == "LlamaForCausalLM"
    assert name(tiny_config("llava")) == "LlavaForConditionalGeneration"
    assert name(tiny_config("t5")) == "T5ForConditionalGeneration"
    assert name(BertConfig(architectures=["BertForSequenceClassification"])) == "BertForSequenceClassification"
    # a bare model has no head; a class of another type or an unknown one says nothing about this type
    for architecture in ("LlamaModel", "GPT2LMHeadModel", "MyLlama", "load_tool"):
        assert name(LlamaConfig(architectures=[architecture])) == "LlamaForCausalLM"
    # one that also sees is built whole, though its text part has a class, too
    assert name(Llama4Config()) == "Llama4ForConditionalGeneration"
    with pytest.raises(ConfigError, match="'clip'"):
        loading.model_class_for(CLIPConfig())


# ---- building --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_meta_twin_and_seeded_weights(name: str) -> None:
    config = tiny_config(name)
    state = torch.get_rng_state()
    model = loading.initialise(config, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    twin = loading.build_on_meta(config, dtype=torch.bfloat16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = loading.model_class_for(config)._from_config(tiny_config(name))
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in twin.parameters())


def test_initialise_is_from_config_under_the_seed() -> None:
    config = tiny_config("llama")
    model = loading.initialise(config, seed=5, dtype=torch.bfloat16)
    torch.manual_seed(5)
    expected = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.bfloat16)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert config.dtype is None  # the caller's configuration is not written to


def test_bad_settings_are_config_errors() -> None:
    config = tiny_config("llama")
    with pytest.raises(ConfigError, match="cannot build LlamaForCausalLM"):
        loading.initialise(config, seed=0, attn_implementation="none_such")
    for name, value in (("hidden_act", "bogus"), ("num_key_value_heads", 0), ("pad_token_id", 999)):
        wrong = tiny_config("llama")
        setattr(wrong, name, value)
        with pytest.raises(ConfigError, match=r"^cannot build LlamaForCausalLM: ") as caught:
            loading.build_on_meta(wrong)
        assert "\n" not in str(caught.value)


def test_parameters_kept_in_fp32() -> None:
    llama = loading.initialise(tiny_config("llama"), seed=0)
    assert loading.kept_in_fp32(llama) == set()
    assert loading.kept_in_fp32(torch.nn.Linear(2, 2)) == set()
    llama._keep_in_fp32_modules_strict = {"input_layernorm"}
    assert loading.kept_in_fp32(llama) == {f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)}


# ---- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_stored_dtype_wins_over_the_configurations(tmp_path: Path, dtype: torch.dtype, shard: str) -> None:
    model = loading.initialise(tiny_config("llama"), seed=1, dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    edit_config(tmp_path, dtype="bfloat16")
    loaded = loading.load_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    for (name, one), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert other.dtype == dtype, name
        assert torch.equal(one, other), name


def test_pinned_parameters_are_fp32(tmp_path: Path) -> None:
    loading.initialise(tiny_config("t5"), seed=1, dtype=torch.float16).save_pretrained(tmp_path)
    loaded = loading.load_pretrained(tmp_path)
    assert {p.dtype for n, p in loaded.named_parameters() if n.endswith("wo.weight")} == {torch.float32}
    assert loaded.shared.weight.dtype == torch.float16
    assert loaded.lm_head.weight is loaded.shared.weight


def test_classifier_folder_loads_as_classifier(tmp_path: Path) -> None:
    config = LlamaConfig(**tiny_config("llama").to_diff_dict(), num_labels=3)
    config.architectures = ["LlamaForSequenceClassification"]
    loading.initialise(config, seed=0).save_pretrained(tmp_path)
    assert type(loading.load_pretrained(tmp_path)).__name__ == "LlamaForSequenceClassification"


def expect_error(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loading.load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_missing_weight_is_named(folder: Path) -> None:
    edit_weights(folder, lambda w: {k: v for k, v in w.items() if k != "model.norm.weight"})
    expect_error(folder, r"lacks 1 of the weights of LlamaForCausalLM .*: model\.norm\.weight$")


def test_missing_head_is_an_error_only_where_untied(folder: Path) -> None:
    edit_weights(folder, lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"})
    expect_error(folder, "lm_head.weight")
    edit_config(folder, tie_word_embeddings=True)
    loaded = loading.load_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_wrong_shape_is_named(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    expect_error(folder, r"does not fit its config.json: .*mlp.* and 2 more")


def test_unexpected_weight_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(folder, lambda w: w | {"extra.weight": torch.ones(2)})
    with caplog.at_level(logging.WARNING, "megatrain"):
        loading.load_pretrained(folder)
    assert "no place for extra.weight" in caplog.text


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    expect_error(tmp_path / "nothing", "is not a folder")
    expect_error(tmp_path, "has no config.json")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    expect_error(folder, "not a whole safetensors file")
    weights.write_bytes(whole[:-100])
    expect_error(folder, "bytes where its header describes")
    weights.rename(folder / "pytorch_model.bin")
    expect_error(folder, "only safetensors weights are read")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expect_error(folder, "lacks model-00001-of-00002.safetensors")
    (folder / "config.json").write_text("{")
    expect_error(folder, "is not JSON")


def test_weights_are_checked_without_loading_them(folder: Path) -> None:
    loading.check_weights(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="bytes where its header describes"):
        loading.check_weights(folder)
    weights.unlink()
    with pytest.raises(ConfigError, match="only safetensors weights are read"):
        loading.check_weights(folder)


def test_loading_shows_no_bar(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = transformers_logging.is_progress_bar_enabled()
    loading.load_pretrained(folder)
    assert capfd.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled() == shown


def test_quantized_weights_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    expect_error(folder, "quantized")


def test_remote_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    expect_error(folder, "never run")
    assert not (tmp_path / "ran").exists()


MEMORY = """
import gc, sys, torch
from megatrain.memory import arena
from megatrain.memory.limits import peak_resident_bytes, reset_peak_resident, resident_bytes
from megatrain.model.loading import load_pretrained
load_pretrained(sys.argv[1])
gc.collect()
print(reset_peak_resident())
before = resident_bytes()
model = load_pretrained(sys.argv[2])
loaded = peak_resident_bytes() - before
copies = []
for module in model.modules():
    for name, p in list(module._parameters.items()):
        if p is not None:
            copy = arena.allocate(p.nbytes)
            copy[:p.nbytes].copy_(p.detach().reshape(-1).view(torch.uint8))
            copies.append(copy)
            module._parameters[name] = None
            arena.discard_pages(p.detach())
            del p
print(loaded, peak_resident_bytes() - before, sum(c.nbytes for c in copies))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.long), "mixtral"])
def test_peak_of_loading_and_taking_over(folder: Path, tmp_path: Path, name: str) -> None:
    config = tiny_config(name)
    config.update({"hidden_size": 256, "intermediate_size": 2048, "vocab_size": 40_000})
    big = loading.initialise(config, seed=0, dtype=torch.bfloat16)
    big.save_pretrained(tmp_path / "big")
    command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "big")]
    can_reset, figures = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if can_reset != "True":
        pytest.skip("the system does not let a process reset its peak")
    loaded, peak, n_bytes = map(int, figures.split())
    slack = 12 << 20
    # renamed weights stay in the mapped file until they are read, converted ones are allocated
    assert loaded < (slack if name == "llama" else 2 * n_bytes + slack)
    assert peak < 2 * n_bytes + slack
    if name == "llama":
        assert peak < n_bytes + (40_000 * 256 * 2) + slack  # the copies, and one source beside its copy


def test_loaded_logits_equal(folder: Path) -> None:
    expected = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(logits_of(loading.load_pretrained(folder)), expected)


def test_mamba_builds_on_meta() -> None:
    twin = loading.build_on_meta(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1))
    assert all(p.device.type == "meta" for p in twin.parameters())
