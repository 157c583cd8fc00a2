"""A small model of the same kind as a large one, to try something out on: the same modules and kinds of layers, fewer
of them, with fewer heads and experts, a smaller vocabulary and narrower feed-forwards.

Sizes are found by the names of a configuration's entries. Whether what comes out is of the same kind is looked at.
"""

import math
import re
from typing import Any

import torch
from torch import nn

from megatrain.errors import CapacityError, ConfigError
from megatrain.model.loading import build_on_meta, initialise, one_line

VOCABULARY = 128
_MOST_ELEMENTS = 2**28  # 1 GB
_DEPTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
_LAYERS = re.compile(r"(num|n)_(hidden_|decoder_)?layers?|num_blocks")
_TOKEN = re.compile(r"(\w+_)?token_(id|index)")
_HEADS = re.compile(r"n_heads?|num_(attention_|key_value_|kv_)?heads|mamba_(n|num)_heads|linear_num_(key|value)_heads")
_WIDTHS = re.compile(r"(hidden_size|d_model|n_embd)")
_SIZES = [
    (VOCABULARY, r"(\w+_)?vocab_size(_per_layer_input)?"),
    (64, r"(\w+_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim)"),
    (4, r"(\w+_)?(num|n)_(local_|routed_)?experts"),
    (2, r"(\w+_)?num_experts_per_tok|experts_per_token|(moe_)?top_?k(_experts)?|moe_k"),
    (1, r"n_group|num_expert_groups?|n_groups|topk_group|first_k_dense_replace|num_dense_layers"),
    # shorter than the documents of a trial, so that they do something
    (4, r"sliding_window(_size)?|attention_chunk_size|window_size"),
]
_SMALLER = [(size, re.compile(names)) for size, names in _SIZES]


def reduced_model(config: Any, attention: str | None) -> nn.Module:
    """On the CPU in fp32, in evaluation mode, with random weights of a size at which everything has an effect. Raises
    ConfigError where none is found."""
    wanted = _kinds(build_on_meta(config, attn_implementation=attention))
    why = "its kinds of layers do not all occur in a part of it"
    for divisor in _divisors(config):  # the narrow one first, then the full width
        try:
            small = _shallowest(config, divisor, attention, wanted)
            if small is None:
                continue
            model: nn.Module = initialise(small, 0, attn_implementation=attention).eval()
            _enlarge_weights(model)
            with torch.no_grad():
                model(input_ids=torch.arange(8)[None], use_cache=False)
            return model
        except (CapacityError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever the model's own code raises on sizes that it does not expect
            why = one_line(error)
    raise ConfigError(f"no small {config.model_type} could be made to try it out on: {why}")


def _divisors(config: Any) -> list[int]:
    """By which widths and numbers of heads may be divided together."""
    heads = [getattr(config.get_text_config(), name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    return list(dict.fromkeys((math.gcd(*(n for n in heads if isinstance(n, int) and n > 0)) or 1, 1)))


def _shallowest(config: Any, divisor: int, attention: str | None, wanted: set[Any]) -> Any:
    """The configuration with the fewest layers that has all kinds of them; None where that would not be small. Raises
    the last error of the type's own checks where they let none pass."""
    entries, layers = config.to_dict(), getattr(config.get_text_config(), "num_hidden_layers", None) or max(_DEPTHS)
    refusal: Exception | None = None
    for depth in [*(depth for depth in _DEPTHS if depth < layers), layers]:
        try:
            small = type(config).from_dict(_shrunk(entries, layers, depth, divisor))
            shapes = build_on_meta(small, attn_implementation=attention)
        except Exception as error:
            refusal = error
            continue
        if _kinds(shapes) == wanted:
            return small if sum(p.numel() for p in shapes.parameters()) <= _MOST_ELEMENTS else None
    if refusal is not None:
        raise refusal
    return None


def _shrunk(entries: dict[str, Any], layers: int, depth: int, divisor: int) -> dict[str, Any]:
    return {name: _smaller(name, value, layers, depth, divisor) for name, value in entries.items()}


def _smaller(name: str, value: Any, layers: int, depth: int, divisor: int) -> Any:
    if isinstance(value, dict) and name not in ("rope_parameters", "rope_scaling", "id2label", "label2id"):
        return _shrunk(value, layers, depth, divisor)
    if isinstance(value, (list, tuple)):
        return value[:depth] if len(value) == layers else value
    if type(value) is not int:
        return value
    if _LAYERS.fullmatch(name):
        return min(value, depth)
    if _TOKEN.fullmatch(name):
        return min(value, VOCABULARY - 1)
    if _HEADS.fullmatch(name) or _WIDTHS.fullmatch(name):
        return value // divisor if value % divisor == 0 else value
    return next((min(value, size) for size, names in _SMALLER if names.fullmatch(name)), value)


def _kinds(model: nn.Module) -> set[Any]:
    """Classes of modules, and names that the configuration has for kinds of layers."""
    config: Any = model.config
    named = getattr(config.get_text_config(), "layer_types", None) or ()
    return {type(module) for module in model.modules()} | set(named)


def _enlarge_weights(model: nn.Module) -> None:
    """Matrices that keep what they are given about as large as it is: with the small weights of a fresh model, the
    effect of a token on others would be lost in rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and name.endswith("weight"):
                std = parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, std, generator=generator)
