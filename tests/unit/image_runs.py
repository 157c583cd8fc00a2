"""Rows with images and what a run makes of them, for tests of several files."""

import json
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tiny_vision import save_tiny

from megatrain.config import Config, parse_config
from megatrain.train import build
from megatrain.train.build import Data

Row = dict[str, Any]
RED: Row = {
    "messages": [
        {"role": "user", "content": "<image>what is in this picture?"},
        {"role": "assistant", "content": "it is red."},
        {"role": "user", "content": "and this one?<image>"},
        {"role": "assistant", "content": "it is blue"},
    ],
    "images": ["red.png", "blue.jpg"],
}
TEXT: Row = {"messages": [{"role": "user", "content": "is it red?"}, {"role": "assistant", "content": "it is."}]}
BLUE: Row = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "what is this"}, {"type": "image", "path": "blue.jpg"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
    ]
}
ROWS = [RED, TEXT, BLUE, TEXT, TEXT]
_MODELS = tempfile.TemporaryDirectory()


@lru_cache
def model_of(family: str) -> Path:
    """The folder of a family's tiny model."""
    folder = Path(_MODELS.name) / family
    save_tiny(family, folder)
    return folder


def config_of(model: Path, data: Path, rows: Sequence[Row] | Path, /, **sections: Any) -> Config:
    path = rows if isinstance(rows, Path) else data / "rows.jsonl"
    if not isinstance(rows, Path):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    settings: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": str(path), "seq_len": 256, "shuffle": False, "bad_rows": "fail", "cache": "off"},
        "train": {"steps": 2, "tokens_per_step": 4 * 256},
        "engine": {"device": "cpu", "precision": "fp32", "micro_batch": 2},
        "output": str(data.parent / "run"),
    }
    for section, keys in sections.items():
        settings[section] = settings.get(section, {}) | keys
    return parse_config(settings)


def built(config: Config) -> tuple[Data, Any]:
    tokenizer = build.given_tokenizer(config)
    return build.build_data(config, build.find_corpora(config), tokenizer, None), tokenizer  # rows are not packed


def learned(batch: dict[str, torch.Tensor], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
