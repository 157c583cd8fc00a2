"""`megatrain export`: a folder that transformers, servers and converters take as it is."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from ledgers import START, write_chain
from report_runs import ALL_FACTS, write_lines, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatrain import cli
from megatrain.data.tokenizer import train_bpe
from megatrain.report.model_card import model_card

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


def make_model(folder: Path, **changes: Any) -> Path:
    """A tiny Llama with a tokenizer, a chat template and generation settings of its own, as a base model's folder."""
    tokenizer = train_bpe(["def f(x):\n    return x + 1\n"] * 20, 280)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ids, **changes))
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("export") / "run")
    make_model(run / "model")
    return run


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    assert cli.main(["export", str(run), str(run.parent / "out"), "--dtype", "fp32", "--no-verify"]) == 0
    return run.parent / "out"


def read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content


def test_transformers_generates_from_it(run: Path, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    before = LlamaForCausalLM.from_pretrained(run / "model").state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids = tokenizer("def f", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|user|>x<|eos|>"


def test_what_servers_read(exported: Path) -> None:
    config = read(exported / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    generation = read(exported / "generation_config.json")
    assert (generation["temperature"], generation["do_sample"]) == (0.6, True)  # the base model's own
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 1, 2]  # pad: the tokenizer's
    assert read(exported / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (exported / "chat_template.jinja").read_text() == TEMPLATE
    assert read(exported / "tokenizer_config.json")["split_special_tokens"] is False  # a chat's are whole, as learned
    assert (exported / "tokenizer.json").exists()


def test_files_of_a_tokenizer_that_transformers_does_not_write_come_along(run: Path, tmp_path: Path) -> None:
    (run / "model" / "tokenizer.model").write_bytes(b"sentences")
    assert cli.main(["export", str(run / "model"), str(tmp_path / "out"), "--no-verify"]) == 0
    (run / "model" / "tokenizer.model").unlink()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"sentences"
    assert read(tmp_path / "out" / "config.json")["torch_dtype"] == "bfloat16"


def test_a_tokenizer_that_cannot_be_read_comes_along_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    assert cli.main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert "tokenizer's files are damaged" in caplog.text and "copied as they are" in caplog.text
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{"


# -- the card -------------------------------------------------------------------------------------------------


def parts_of(card: str) -> tuple[dict[str, Any], str]:
    _, header, body = card.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_card_says_what_the_run_recorded(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    header, body = parts_of(card)
    assert header == {
        "base_model": "base/model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatrain"],
    }
    assert "# license: to be filled in" in card and "name the license" in body
    assert "A `llama` model with 38,240 parameters in fp32, trained from `base/model`." in body
    for row in (
        "optimizer steps | 40",
        "target tokens | 40,000",
        "last training loss | 1.311 nats",
        "last eval code loss | 6.5",
    ):
        assert f"| {row}" in body
    assert f"- `texts/a.txt`, sha256 `{ALL_FACTS['data'][0]['sha256']}`" in body
    assert "NVIDIA H100 80GB HBM3, fp32" in body and "torch 2.13.0" in body
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["train"]["steps"] == 40


def test_the_hub_s_own_reader_takes_the_card(exported: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard.load(exported / "README.md").data
    assert (data.base_model, data.tags, data.license) == ("base/model", ["megatrain"], None)


def test_a_card_keeps_folders_to_itself_and_marks_nothing_up(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run_*x*")
    (run / "config.yaml").write_text(
        json.dumps({"model": {"path": "/home/me/secret/base`x"}, "data": {"train": ["/home/me/secret/a```.txt"]}})
    )
    hostile = ALL_FACTS | {"data": [{"path": "/home/me/secret/a`\n# b", "bytes": 1, "sha256": "0" * 64}]}
    hostile["hardware"] = {"device": "<script>alert(1)</script>", "cpu": "[x](http://y) |"}
    write_chain(run / "ledger.jsonl", [START | {"facts": hostile}])
    header, body = parts_of(model_card(str(run), SimpleNamespace(model_type="llama", vision_config={}), 1, "bf16"))
    assert "base_model" not in header and header["pipeline_tag"] == "image-text-to-text"
    assert "secret" not in body
    assert "trained from `base'x`" in body and "- `a' # b`, sha256" in body
    assert "<script>" not in body and "[x](" not in body and "# run\\_\\*x\\*" in body
    assert "````yaml" in body


@pytest.mark.parametrize("model", ["", "model"])
def test_a_card_of_a_checkpoint_says_what_its_run_had_done_by_then(model: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "checkpoints" / "step-000015" / "model").mkdir(parents=True)
    (run / "checkpoints" / "step-000015" / "config.yaml").write_text("model: {path: x}")  # as each one holds
    folder = run / "checkpoints" / "step-000015" / model
    _, body = parts_of(model_card(str(folder), SimpleNamespace(model_type="llama"), 1, "bf16"))
    assert "# run, step 15\n" in body and "trained from `base/model`" in body
    assert "| optimizer steps | 15 |" in body and "| last training loss | 2.292 nats per target token |" in body
    assert "| last eval held out loss | 4.65 nats per target token |" in body
    assert "1 file, " in body and "- `texts/a.txt`, sha256" in body and "meant to have 40 steps" in body


def test_a_card_of_preferences_has_their_unit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 40", "steps: 40, method: dpo"))
    card = model_card(str(run), SimpleNamespace(model_type="llama"), 1, "bf16")
    assert "per pair of answers |" in card and "nats" not in card


def test_a_card_of_a_folder_without_a_run_and_of_a_run_without_steps(tmp_path: Path) -> None:
    llama = SimpleNamespace(model_type="llama")
    assert "what it was trained on is not known" in model_card(str(tmp_path), llama, 1, "bf16")
    run = write_run(tmp_path / "run")
    write_lines(run / "metrics.jsonl", [])
    assert "## Training" not in model_card(str(run), llama, 1, "bf16")
    (run / "ledger.jsonl").unlink()
    assert "- `a.txt`" in model_card(str(run), llama, 1, "bf16")


# -- llama.cpp ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed")
def test_every_tensor_has_a_name_in_gguf(exported: Path) -> None:
    import gguf
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    with safe_open(exported / "model.safetensors", "pt") as tensors:
        assert all(names.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors.keys())  # noqa: SIM118
