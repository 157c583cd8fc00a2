"""Tiny transformers models for tests of loading and saving: one of each kind of checkpoint."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    T5Config,
)

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def _llama(tied: bool) -> PretrainedConfig:
    return LlamaConfig(**TEXT, tie_word_embeddings=tied)


def _llava() -> PretrainedConfig:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    return LlavaConfig(vision_config=vision, text_config=_llama(False), image_token_index=95)


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _llama(False),
    "llama-tied": lambda: _llama(True),
    "mixtral": lambda: MixtralConfig(**TEXT, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "gemma3_text": lambda: Gemma3TextConfig(**TEXT, sliding_window=4),
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llava": _llava,
    "t5": lambda: T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
}


def tiny_config(name: str) -> PretrainedConfig:
    """A fresh configuration of one of `MODELS`."""
    return MODELS[name]()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Logits (batch, tokens, vocabulary) of a fixed input, in the model's dtype."""
    tokens = torch.arange(3, 19).view(2, 8)
    inputs = {"input_ids": tokens}
    if model.config.model_type == "t5":
        inputs["decoder_input_ids"] = tokens.flip(0)
    if model.config.model_type == "llava":
        inputs["input_ids"] = torch.cat([torch.full((2, 4), 95), tokens], dim=1)
        dtype = next(model.parameters()).dtype
        inputs["pixel_values"] = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).to(dtype)
    with torch.no_grad():
        return model.eval()(**inputs).logits
