"""Models with random weights, and batches for them: the same numbers for every system that is measured."""

import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from megatrain.engine import setup
from megatrain.memory.store import bits
from megatrain.model.loading import build_on_meta
from megatrain.model.partition import partition
from megatrain.optim.adamw import AdamW
from megatrain.planner.flops import Shape


@dataclass(frozen=True, slots=True)
class Model:
    """A known model's shape. `instead`: what to take where it does not fit into host memory. `extra`: further settings
    of its configuration, such as those of experts."""

    kind: str
    shape: Shape
    tied: bool
    instead: str | None = None
    extra: tuple[tuple[str, int], ...] = ()


def shape_of(layers: int, hidden: int, intermediate: int, heads: int, kv: int, head_dim: int, vocabulary: int) -> Shape:
    return Shape(layers, hidden, intermediate, heads, kv, head_dim, vocabulary)


MODELS = {
    "1b": Model("llama", shape_of(16, 2048, 8192, 32, 8, 64, 128256), tied=True),  # Llama 3.2 1B
    "3b": Model("qwen2", shape_of(36, 2048, 11008, 16, 2, 128, 151936), tied=True),  # Qwen 2.5 3B
    "7b": Model("qwen2", shape_of(28, 3584, 18944, 28, 4, 128, 152064), tied=False),  # Qwen 2.5 7B
    "8b": Model("llama", shape_of(32, 4096, 14336, 32, 8, 128, 128256), tied=False, instead="7b"),  # Llama 3.1 8B
}
TINY_MODELS = {
    "1b": Model("llama", shape_of(3, 32, 64, 4, 2, 8, 128), tied=True),
    "8b": Model("qwen2", shape_of(4, 48, 96, 6, 2, 8, 128), tied=False),
}
SMALL_MODELS = {
    "21m": Model("llama", shape_of(8, 384, 1056, 6, 6, 64, 8192), tied=False),
    "tiny": TINY_MODELS["8b"],
    "tiny-moe": Model(
        "qwen3_moe",
        shape_of(2, 32, 64, 4, 2, 8, 128),
        tied=False,
        extra=(("num_experts", 4), ("num_experts_per_tok", 2), ("moe_intermediate_size", 16)),
    ),
}
NAMED_MODELS = MODELS | SMALL_MODELS
_KINDS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}


def config_of(model: Model) -> transformers.PretrainedConfig:
    shape = model.shape
    settings: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": model.tied,
    }
    return _KINDS[model.kind](**settings | dict(model.extra))


def random_model(model: Model, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """On the host, with normal numbers of standard deviation 0.02, ones for norms, zeros for biases.

    All weights are mappings of one file of numbers, each from another place on: the engine copies them, so the state is
    never held beside a second copy of the model.
    """
    config = config_of(model)
    made: Any = build_on_meta(config, dtype=dtype)
    made.model.rotary_emb = type(made.model.rotary_emb)(config=config)  # its tables are computed, not loaded
    generator = torch.Generator().manual_seed(seed)
    largest, count = max(p.numel() for p in made.parameters()), len(list(made.parameters()))
    piece = torch.empty(min(largest, 1 << 24), dtype=torch.float32).normal_(0, 0.02, generator=generator).to(dtype)
    step = 1031  # a prime: no two weights of a size begin at the same number
    numbers = np.resize(bits(piece), largest + step * count)
    known: dict[int, nn.Parameter] = {}
    with tempfile.NamedTemporaryFile() as file:
        numbers.tofile(file.name)
        for module in made.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in known:
                    offset = step * len(known) * numbers.itemsize
                    mapped = np.memmap(file.name, numbers.dtype, "c", offset, (parameter.numel(),))
                    values = torch.from_numpy(mapped).view(dtype).view(parameter.shape)
                    if parameter.ndim < 2:
                        values = torch.zeros_like(values) if name == "bias" else torch.ones_like(values)
                    known[id(parameter)] = nn.Parameter(values)
                module._parameters[name] = known[id(parameter)]
    held = [*made.named_parameters(), *made.named_buffers()]
    assert not any(tensor.is_meta for _, tensor in held), [name for name, tensor in held if tensor.is_meta]
    return made.train()  # type: ignore[no-any-return]


def planned_bytes(model: Model) -> dict[str, int]:
    """Host bytes by clip_scope."""
    made = build_on_meta(config_of(model), dtype=torch.bfloat16)
    part = partition(made)
    _, group_of = AdamW().group_slots(part.slots)
    layouts = setup.lay_out_units(part, setup.weight_dtypes(made, part, "bf16"), group_of)
    kept = {"global": True, "unit": False}
    return {scope: setup.plan_for(layouts, keep_gradients=k, streaming=True).total_bytes for scope, k in kept.items()}


def batch_of(vocabulary: int, rows: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids}
