"""A tiny, randomly initialised instance of every causal and vision-language model type of transformers.

``build`` shrinks a type's default configuration by the names of its fields and builds the model;
``make_batch`` makes a batch on which ``model(**batch).loss.backward()`` works.  What the names do not
tell is in ``zoo_overrides``; what a vision-language type wants besides text is in ``zoo_vision``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import torch
import transformers
import zoo_overrides
import zoo_vision
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_CAUSAL: dict[str, Any] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_VISION: dict[str, Any] = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

MODEL_TYPES: list[str] = sorted({*_CAUSAL, *_VISION})

NAMED: list[str] = [
    "llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gemma3n_text", "gpt2", "phi", "mixtral",
    "qwen3_moe", "deepseek_v3", "qwen3_5_text", "jamba", "cohere2", "gpt_oss", "llava", "qwen2_5_vl",
]  # fmt: skip

VOCAB = 272
HIDDEN = 64
TEXT_IDS = (10, 200)  # ordinary tokens; special ones are below and above
_FIRST_SPECIAL = 210

# The first pattern that matches a field's whole name gives its new value, unless the old one is smaller.
_LAYERS = re.compile(
    r"(num|n|number_of)_(hidden_|encoder_|decoder_|local_|global_)?layers?|depth|(en|de)coder_layers|layers|num_blocks"
)
_SIZES: list[tuple[int, list[str]]] = [
    (VOCAB, [r"(\w+_)?vocab_size(_per_layer_input)?"]),
    (
        256,
        [
            r"(max|n|original_max)_(\w+_)?(positions?(_embeddings)?|ctx|seq_len)",
            "n_ctx|seq_len|context_length",
        ],
    ),
    (4, [r"(swa_|\w*local_)?(sliding_window(_size)?|attention_window_(size|len))", "local_attention"]),
    (4, ["(attention_|mamba_)?chunk_size|block_size|index_topk"]),
    (2, [r"(\w+_)?num_experts_per_tok|(moe_)?top_?k(_experts)?|num_selected_experts|moe_k"]),
    (4, [r"(\w+_)?(num|n)_(local_|routed_)?experts|zero_expert_num"]),
    (2, ["n_group|num_expert_groups?|n_groups|mamba_n_groups"]),
    (1, ["topk_group|first_k_dense_replace|moe_layer_start_index|n_dense_layers|num_dense_layers"]),
    (2, [r"(\w+_)?(kv_heads|key_value_heads|num_key_heads)"]),
    (8, ["mamba_(n_heads|num_heads)"]),
    (4, [r"(\w+_)?(num_heads|n_heads?|attention_heads|num_value_heads)"]),
    (32, [r"(base|latent|output)_channels|\w*conv_(in|mid|out)_channels|\w+_out_channel|nemo_conv_channels"]),
    (16, ["num_embeddings|codebook_size|qk_head_dim|hidden_size_per_layer_input"]),
    (8, ["qk_(nope|rope)_head_dim|v_head_dim|mamba_d_state|state_size|ssm_state_size"]),
    (24, [r"(\w+_)?q_lora_rank|o_lora_rank"]),
    (16, [r"(\w+_)?(rank|lowrank|head_dim|d_head|dim_head|head_size|d_kv)", "kv_channels|rotary_dim"]),
    (16, ["query_pre_attn_scalar"]),
    (
        32,
        [r"((moe_)?shared_experts?|moe|expert_ffn)_(intermediate|hidden)_size|share_expert_dim|num_filters"],
    ),
    (
        96,
        [r"(\w+_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|mlp_dim|feed_forward_size)"],
    ),
    (96, ["d_inner|n_inner"]),
    (4, ["patch_size", r"num_query_tokens|latent_query_num|\w*num_latents|\w*n_latents"]),
    (
        16,
        ["(image|img|crop|max_image|max_img)_size|resolution|num_patches|num_position_embeddings|window_size"],
    ),
    (
        HIDDEN,
        [r"(\w+_)?(hidden_sizes?|embed_dim|emb_dim|embedding_dim|embedding_size|projection_dim|hidden_dim)"],
    ),
    (
        HIDDEN,
        [r"(\w+_)?(d_model|n_embd|lru_width|hidden_size_global|input_size|output_size|output_proj_dims)"],
    ),
    (HIDDEN, [r"(\w+_)?(output_dim|out_dim|in_dim|input_dim|word_embed_proj_dim|num_pos_feats)"]),
]
_RULES = [(re.compile("|".join(patterns)), size) for size, patterns in _SIZES]
_TOKEN = re.compile(r"(\w+_)?(token_id|token_index|im_(start|end|newline)_id|image_patch_id|token_ids)")
_MISSING: dict[str, Any] = {"head_dim": 16, "num_key_value_heads": 2, "num_experts_per_tok": 2}
_INDEXES = re.compile(r"\w*(index(es)?|indices|idxs|layers|layer_ids|layer)")
_DROPOUT = re.compile(r"\w*(dropout|drop)\w*|\w+_pdrop|drop_path_rate")
_NO_DROPOUT = re.compile(r"\w*(layerdrop|layer_drop|drop_path|drop_tokens)\w*")


def _smaller(name: str, value: int) -> int:
    return next((min(value, size) for pattern, size in _RULES if pattern.fullmatch(name)), value)


class Shrinker:
    """Turns default configurations into small ones; a special token gets one id in all sub-configurations."""

    def __init__(self, dropout: bool) -> None:
        self.dropout = 0.1 if dropout else 0.0
        self.tokens: dict[str, int] = {
            "pad_token": 0,
            "bos_token": 1,
            "eos_token": 2,
            "decoder_start_token": 3,
        }

    def shrink(self, config: PreTrainedConfig, given: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments for a small configuration of the same class; ``given`` built ``config``."""
        alias = config.attribute_map
        values = {f.name: config.__dict__.get(alias.get(f.name, f.name)) for f in dataclasses.fields(config)}
        defaults = {f.name: f.default for f in dataclasses.fields(config)}
        for name, value in _MISSING.items():
            if name in values and values[name] is None:
                given = {**given, name: value}
        many = self._layers(values)
        few = self._few(values, many)
        kwargs = {k: v if k in values else self._value(k, v, many, few) for k, v in given.items()}
        if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()) and config.rope_parameters:
            values["rope_parameters"] = {"mrope_section": [16, 24, 24], **config.rope_parameters}
        for name, value in values.items():
            if isinstance(value, PreTrainedConfig):
                spec = type(config).sub_configs_defaults.get(name)
                same = spec is not None and type(value).model_type == spec.model_type
                init = dict(getattr(spec, "init_kwargs", {})) if same else {}
                kwargs[name] = {**self.shrink(value, init), "model_type": value.model_type}
                continue
            if value is None or name in ("id2label", "label2id"):
                continue
            derived = defaults[name] is None and name not in given
            new = self._value(name, value, many, few)
            if name in ("num_key_value_heads", "num_kv_heads") and value == values.get("num_attention_heads"):
                new = min(value, 4)  # not grouped stays not grouped
            if new != value and (not derived or isinstance(value, list | tuple | dict)):
                kwargs[name] = new
        return kwargs

    @staticmethod
    def _layers(values: dict[str, Any]) -> int:
        return max((v for k, v in values.items() if _LAYERS.fullmatch(k) and type(v) is int), default=0)

    @staticmethod
    def _few(values: dict[str, Any], many: int) -> int:
        """How many layers keep at least one of each kind, and two where all are of one kind."""
        kinds = 1
        for name, value in values.items():
            if isinstance(value, list | tuple) and len(value) == many and name.endswith(("types", "block_type")):
                kinds = max(kinds, len(set(value)))
        return min(many, 2 if kinds == 1 else max(4, kinds))

    def _value(self, name: str, value: Any, many: int, few: int) -> Any:
        if _DROPOUT.fullmatch(name) and type(value) in (int, float):
            return 0.0 if _NO_DROPOUT.fullmatch(name) else self.dropout
        if _TOKEN.fullmatch(name):
            if isinstance(value, list | tuple):
                return [self._token(f"{name}.{i}" if i else name) for i in range(len(value))]
            return self._token(name) if type(value) is int and value >= 0 else value
        if _LAYERS.fullmatch(name) and type(value) is int:
            return min(value, few)
        if isinstance(value, list | tuple):
            return self._sequence(name, value, many, few)
        if name == "rope_parameters":
            return _rope(value)
        if type(value) is int:
            return _smaller(name, value)
        return value

    def _token(self, name: str) -> int:
        key = re.sub(r"_(id|index|ids)$", "", name)
        return self.tokens.setdefault(key, _FIRST_SPECIAL + len(self.tokens) - 4)

    @staticmethod
    def _sequence(name: str, value: Any, many: int, few: int) -> Any:
        ordered = all(type(v) is int and 0 <= v < many for v in value) and list(value) == sorted(set(value))
        if _INDEXES.fullmatch(name) and value and ordered:
            return type(value)(sorted({min(v, few - 1) for v in value}))
        if many and len(value) == many and not isinstance(value[0], list | tuple):
            kept = list(value[:few])
            for kind in dict.fromkeys(value):  # one of each kind, in place of the last repeated one
                spare = [i for i, k in enumerate(kept) if kept.count(k) > 1]
                if kind not in kept and spare:
                    del kept[spare[-1]]
                    kept.append(kind)
            return type(value)(_smaller(name, v) if type(v) is int else v for v in kept)
        if all(type(v) is int for v in value):
            return type(value)(_smaller(name, v) for v in value)
        return value


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters for a head of 16: the sections add up to half of what is rotated."""
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    rope = dict(rope)
    if sections := rope.get("mrope_section"):
        part = max(rope.get("partial_rotary_factor", 1.0), 0.5)
        if "partial_rotary_factor" in rope:
            rope["partial_rotary_factor"] = part
        total = int(8 * part)
        small = [max(1, math.floor(total * s / sum(sections))) for s in sections]
        small[0] += total - sum(small)
        rope["mrope_section"] = small
    return rope


def _merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for path, value in changes.items():
        *parents, leaf = path.split(".")
        where = into
        for parent in parents:
            where = where.setdefault(parent, {})
        where[leaf] = value


def small_config(model_type: str, dropout: bool = False) -> PreTrainedConfig:
    """The type's default configuration, shrunk."""
    config_class = CONFIG_MAPPING[model_type]
    if part := zoo_overrides.PART_OF.get(model_type):
        config_class = type(getattr(config_class(), part))
    given = zoo_overrides.BASE.get(model_type, {})
    kwargs = Shrinker(dropout).shrink(config_class(**given), given)
    if model_type in _CAUSAL and "is_decoder" in {f.name for f in dataclasses.fields(config_class)}:
        kwargs["is_decoder"] = True
    _merge(kwargs, zoo_overrides.OVERRIDES.get(model_type, {}))
    return config_class(**kwargs)


def _model_class(model_type: str) -> Any:
    # Where a type has both classes its text half is a type of its own, so the whole is taken here.
    return getattr(transformers, _VISION.get(model_type) or _CAUSAL[model_type])


def skip_reason(model_type: str) -> str | None:
    """Why this type is not in the zoo, or None."""
    return zoo_overrides.SKIPPED.get(model_type)


def build(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, dropout: bool = False) -> torch.nn.Module:
    """A tiny model of this type in training mode; the same seed gives the same weights."""
    config = small_config(model_type, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        was = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what nobody initialises with NaN
        try:
            model = _model_class(model_type)._from_config(config)
        finally:
            torch.use_deterministic_algorithms(was)
        with torch.no_grad():
            for parameter in model.parameters():  # no zero gates, no uninitialised memory
                noise = torch.randn(parameter.shape) * 0.02
                parameter.copy_(torch.nan_to_num(parameter.float(), 0.0, 0.0, 0.0) + noise)
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.nan_to_num_(0.0, math.inf, -math.inf)
    model.to(dtype)
    for part in model._keep_in_fp32_modules_strict or ():  # as loading does
        inside = re.compile(rf"(^|\.){re.escape(part)}(\.|$)")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if inside.search(name) and tensor.is_floating_point():
                tensor.data = tensor.data.float()
    return model.train()


def make_batch(
    model: torch.nn.Module,
    model_type: str,
    seed: int,
    batch: int = 2,
    length: int = 12,
    mask_labels: bool = True,
    padded: bool = False,
) -> dict[str, torch.Tensor]:
    """Inputs and labels for one training step; for vision types ``length`` counts the text tokens alone."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(*TEXT_IDS, (batch, length), generator=generator)
    dtype = next(model.parameters()).dtype
    extra: dict[str, torch.Tensor] = {}
    if model_type in _VISION:
        ids, extra = zoo_vision.with_images(model, model_type, ids, generator, _image_tokens(model_type))
    labels = torch.where((ids >= TEXT_IDS[0]) & (ids < TEXT_IDS[1]), ids, -100)
    mask = torch.ones_like(ids)
    if mask_labels:
        labels = labels.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    if padded:
        for row in range(1, batch, 2):
            mask[row, ids.shape[1] - max(1, length // 4) :] = 0
        labels = labels.masked_fill(mask == 0, -100)
    made = {"input_ids": ids, "attention_mask": mask, "labels": labels, **extra}
    adapt = zoo_overrides.BATCHES.get(model_type)
    if adapt is not None:
        made = adapt(made, model.config, generator)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}


@functools.cache
def _image_tokens(model_type: str) -> int:
    """How many tokens one image of ``zoo_vision`` becomes in this type: asked of a model built for it."""
    return zoo_vision.count_tokens(build(model_type).eval(), model_type)


def plain_step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss and gradients by parameter name, the way everybody computes them."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}
