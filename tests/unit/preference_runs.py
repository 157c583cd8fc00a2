"""Runs on pairs of answers: a small file of them, a tokenizer, and settings."""

import json
from pathlib import Path
from typing import Any

import yaml

from megatrain import cli
from megatrain.data.tokenizer import train_bpe

SETTINGS: dict[str, Any] = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        }
    },
    "data": {"seq_len": 24},
    "optimizer": {"lr": 1e-2},
    "schedule": {"name": "constant"},
    "train": {"steps": 4, "tokens_per_step": 192, "dpo_beta": 0.5},  # four pairs to a step
    "engine": {"device": "cpu", "precision": "bf16", "micro_batch": 2, "threads": 1},
    "checkpoint": {"every": 2, "keep": None},
}


def rows(count: int = 10) -> list[dict[str, str]]:
    return [
        {"prompt": f"{n} + {n} = ", "chosen": f"{2 * n}", "rejected": f"{2 * n + 1}, I think" + "!" * (n % 3)}
        for n in range(count)
    ]


def write_inputs(folder: Path) -> str:
    """The pairs, the tokenizer and the settings; returns the settings' path."""
    texts = [" ".join(row.values()) for row in rows()]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    train_bpe(iter(texts * 4), 300).save_pretrained(folder / "tokenizer")
    settings = {section: dict(keys) for section, keys in SETTINGS.items()}
    settings["model"]["tokenizer"] = str(folder / "tokenizer")
    settings["data"]["train"] = str(folder / "pairs.jsonl")
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "settings.yaml")


def train(folder: Path, name: str, *arguments: str) -> Path:
    path = folder / "settings.yaml"
    settings = str(path) if path.exists() else write_inputs(folder)
    assert cli.main(["train", settings, "--output", str(folder / name), *arguments]) == cli.DONE
    return folder / name
