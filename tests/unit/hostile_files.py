"""Files as somebody would make them who wants to harm whoever loads a model. Bytes are put together by hand."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def pickled_payload(trace: Path) -> bytes:
    return pickle.dumps({"model.norm.weight": Payload(trace)})


def safetensors_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of `header` (JSON, or the bytes that stand for it) and data; `length`: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, *, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    """A tensor of a header; by default one of float32 numbers that fits its place."""
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def model_folder(folder: Path, **entries: Any) -> Path:
    """A folder with a llama's config.json, and no weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | entries))
    return folder
