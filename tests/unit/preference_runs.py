"""Runs on pairs of answers: a small file of them, a tokenizer, and settings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatrain import cli
from megatrain.config import Config
from megatrain.data.examples import Examples, PreferenceExamples
from megatrain.data.sources import Corpus
from megatrain.data.tokenizer import train_bpe
from megatrain.train import build

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


def read_pairs(path: Path, tokenizer: Any) -> PreferenceExamples:
    """Each answer with the prompt before it, which is no target."""
    sides: dict[str, list[tuple[list[int], list[int]]]] = {"chosen": [], "rejected": []}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        for side, found in sides.items():
            answer = [*tokenizer(row[side], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            found.append((prompt, answer))
    return PreferenceExamples(_examples(sides["chosen"]), _examples(sides["rejected"]))


def _examples(found: list[tuple[list[int], list[int]]]) -> Examples:
    tokens = [token for prompt, answer in found for token in (*prompt, *answer)]
    targets = [kind for prompt, answer in found for kind in (*[False] * len(prompt), *[True] * len(answer))]
    offsets = np.cumsum([0, *(len(prompt) + len(answer) for prompt, answer in found)])
    return Examples(np.array(tokens, np.uint16), np.array(targets), offsets, 0)


@contextmanager
def pairs_as_data() -> Iterator[None]:
    """data.train is a file of pairs."""

    def find(config: Config) -> build.Corpora:
        assert config.data.train is not None
        train = Corpus(config.data.train, split="train", key="data.train", text_field="prompt")
        return build.Corpora(train, None, kind="preference")

    def read(config: Config, corpora: build.Corpora, tokenizer: Any) -> build.Data:
        pairs = read_pairs(corpora.train.files[0], tokenizer)
        return build.Data(None, build.total_steps(config, len(pairs)), 0, None, pairs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "find_corpora", find)
        patch.setattr(build, "build_data", read)
        yield


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
