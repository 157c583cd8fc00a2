"""Counting operations: the formula against what PyTorch counts while a model runs."""

from typing import Any

import pytest
import torch
from test_engine_toys import make_engine
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from megatrain.planner.flops import Shape, StepFlops, step_flops

ROWS, LENGTH = 3, 16
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def model_of(kind: str, attention: str = "eager") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, model = (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (Qwen3Config, Qwen3ForCausalLM)
    torch.manual_seed(0)
    return model(config(**SIZES, **HEADS, tie_word_embeddings=False, attn_implementation=attention))


def batch() -> dict[str, Any]:
    ids = torch.randint(0, 96, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def rotary(model: nn.Module) -> int:
    """Positions times frequencies, which some versions of transformers compute as a product of matrices."""
    return 2 * (Shape.of(model.config).head_dim // 2) * LENGTH


class Counter(TorchDispatchMode):
    """As FlopCounterMode counts, without its hooks on modules, which a backward inside a backward trips over."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_plain_step_is_the_models(kind: str) -> None:
    model = model_of(kind)
    with FlopCounterMode(display=False) as counter:
        model(**batch(), use_cache=False).loss.backward()
    expected = step_flops(Shape.of(model.config), [LENGTH] * ROWS, causal=False)
    assert counter.get_total_flops() - expected.model in (0, rotary(model))


@pytest.mark.parametrize("kept", [0, 2])
def test_an_engines_step_is_the_hardwares(kept: int) -> None:
    model = model_of("llama")
    shape = Shape.of(model.config)
    units_after_the_layers = 2  # norm and head
    engine = make_engine(model, keep_graphs=kept + units_after_the_layers if kept else "off")
    engine.train_step([batch()])
    with Counter() as counter:
        engine.train_step([batch()])
    expected = step_flops(
        shape, [LENGTH] * ROWS, causal=False, recomputed_layers=shape.layers - kept, scores_repeated=False
    )
    # the model's own forward passes the head with one token of each sequence, which is thrown away
    thrown_away = shape.head_forward(1) * ROWS
    assert counter.total - thrown_away - expected.hardware in (0, rotary(model))
    engine.close()


def test_causal_attention_is_half_and_its_backward_repeats_the_scores() -> None:
    shape = Shape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocabulary=10)
    length = 6
    assert shape.layer_weights == 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    assert shape.attention_forward(length, causal=False) == 2 * (2 * 2 * 4 * length**2)
    assert 2 * shape.attention_forward(length) == shape.attention_forward(length, causal=False)
    forward = 2 * shape.layer_weights * length + shape.attention_forward(length)
    model = 3 * (2 * forward + 2 * 8 * 10 * length)
    scores = 2 * shape.attention_forward(length) // 2
    assert step_flops(shape, [length]) == StepFlops(model, model + 2 * forward + scores)
    assert step_flops(shape, [length], recomputed_layers=0, scores_repeated=False) == StepFlops(model, model)
    assert step_flops(shape, [length, length]).hardware == 2 * step_flops(shape, [length]).hardware


def test_eight_billion_parameters() -> None:
    """6 operations per weight and token, and attention, which at 8k tokens is a seventh more."""
    shape = Shape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256)
    weights = 32 * shape.layer_weights + 4096 * 128256
    assert weights == pytest.approx(7.5e9, rel=0.01)
    step = step_flops(shape, [8192])
    assert step.model == 6 * weights * 8192 + 3 * 32 * shape.attention_forward(8192)
    assert step.model / (6 * weights * 8192) == pytest.approx(1.14, abs=0.01)
    assert step.hardware / step.model == pytest.approx(1.33, abs=0.02)


def test_heads_that_a_configuration_leaves_out() -> None:
    class Config:
        num_hidden_layers, hidden_size, intermediate_size, num_attention_heads, vocab_size = 2, 64, 128, 8, 100

    assert (Shape.of(Config()).kv_heads, Shape.of(Config()).head_dim) == (8, 8)
