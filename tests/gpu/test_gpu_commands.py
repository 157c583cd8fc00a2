"""The commands as a user gives them: a GPU is used where there is one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from on_gpu import DRY, needs_cuda

from megatrain import cli

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """A run that `megatrain train` made, with what it said."""
    for name, count in (("train", 400), ("eval", 40)):
        (tmp_path / f"{name}.txt").write_text("".join(f"x{n} = {n * n}\n" for n in range(count)))
    settings: dict[str, Any] = {
        "model": {"config": TINY, "tokenizer": {"train": "bpe", "vocab_size": 280}},
        "data": {"train": str(tmp_path / "train.txt"), "eval": str(tmp_path / "eval.txt"), "seq_len": 32},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 8, "tokens_per_step": 128},
        "engine": {"micro_batch": 2} | ({"device": "lagged"} if DRY else {}),
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert cli.main(["train", str(path), "--profile", "2"]) == 0
    said = capsys.readouterr()
    return tmp_path / "run", said.out + said.err


def test_training_and_its_evaluation(trained: tuple[Path, str]) -> None:
    folder, said = trained
    assert f"on {'lagged' if DRY else 'cuda'}" in said and "bits per byte" in said
    *lines, evaluation = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert evaluation["step"] == 8 and evaluation["eval"]["bits_per_byte"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["h2d_bytes"] > 0
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert (folder / "model" / "model.safetensors").exists()


@needs_cuda
def test_text_is_made_on_the_gpu(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    assert cli.main(["generate", str(trained[0]), "--prompt", "x1 =", "--max-new-tokens", "8"]) == 0
    assert "x1 =" in capsys.readouterr().out
    assert torch.cuda.max_memory_allocated() > before
