"""Runs of a very small model, and what of them has to be equal."""

import json
from pathlib import Path
from typing import Any

import yaml
from forked_runs import Ended, ForkedRuns

from megatrain import cli

SETTINGS: dict[str, Any] = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
        "tokenizer": {"train": "bpe", "vocab_size": 320},
    },
    "data": {"train": "text", "seq_len": 16},
    "optimizer": {"lr": 1e-2},
    "train": {"steps": 60, "tokens_per_step": 64},
    "engine": {"device": "cpu", "precision": "bf16", "micro_batch": 2, "threads": 1},
    "checkpoint": {"every": 1, "keep": 2},
}
EXACT = ("step", "loss", "grad_norm", "lr", "target_tokens")  # what training depends on, and not the moment


def write_texts(folder: Path) -> None:
    """1,504 tokens in three files."""
    (folder / "text").mkdir()
    for number in range(3):
        lines = [f"def f{n}(x):\n    return x + {n % 7}\n\n\n" for n in range(100 * number, 100 * number + 40)]
        (folder / "text" / f"{number}.py").write_text("".join(lines))


def settings_of(forked: ForkedRuns, name: str, **changes: dict[str, Any]) -> str:
    settings = {section: {**keys, **changes.get(section, {})} for section, keys in SETTINGS.items()}
    path = forked.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def train(forked: ForkedRuns, settings: str, output: str, *more: str) -> Ended:
    ended = forked.run("train", settings, "--output", output, *more)
    assert ended.code == 0, ended.output
    assert "Traceback" not in ended.output
    return ended


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """What is the same in every run, of each line."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in EXACT} for line in lines]


def model_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "model").iterdir()}


def assert_same_run(run: Path, expected: Path) -> None:
    assert metrics_of(run) == metrics_of(expected)
    assert model_of(run) == model_of(expected)
    assert {path.name for path in run.iterdir()} == {path.name for path in expected.iterdir()}
    here, there = ([path.name for path in (one / "checkpoints").iterdir()] for one in (run, expected))
    assert sorted(here) == sorted(there)  # no other names: nothing half-done is left
    assert cli.main(["verify", str(run)]) == 0
