"""What the names of configuration fields do not tell ``zoo``: exceptions, type by type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_TIMM = "its vision tower comes from timm, which is not installed"
_DRAFT = "a draft head: it needs the keys and values of its target model and has no loss"

SKIPPED: dict[str, str] = {
    "diffusion_gemma": "generates blocks by diffusion: its forward takes no labels and returns no loss",
    "fast_vlm": _TIMM,
    "gemma3n": _TIMM,
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "inkling_mm_model": "its vision tower needs scipy, which is not installed",
    "perception_lm": _TIMM,
    "pi0": "a robot policy: trained on actions, without language-model labels",
}

# Types whose model is built from one part of the registered configuration.
PART_OF: dict[str, str] = {"musicgen": "decoder", "musicgen_melody": "decoder"}

# Arguments without which the default configuration cannot even be made.
BASE: dict[str, dict[str, Any]] = {
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
}

_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
_SHARED_KV = {"num_hidden_layers": 4, "layer_types": [_SLIDING, _FULL] * 2, "num_kv_shared_layers": 2}

_GEMMA4 = {**_SHARED_KV, "global_head_dim": 32}
_DOTS = {
    "sliding_window": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}


def _inside(part: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{name}": value for name, value in changes.items()}


# Changes on top of the generic shrinking; a dotted name reaches into a sub-configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {
        "vq_config.channel_multiplier": (1, 1, 2),
        "vq_config.num_res_blocks": 1,
        "vocabulary_map": {
            "<image>": 209,
            **{f"IMGIMG{'' if i < 10 else 'B'}{'ABCDEFGHIJ'[i % 10]}Z": 220 + i for i in range(16)},
        },
    },
    "emu3": {
        "vq_config.channel_multiplier": (1, 2),
        "vq_config.num_res_blocks": 1,
        "vocabulary_map": {
            "<image>": 209,
            "<|extra_200|>": 208,
            **{f"<|visual token {i:06d}|>": 220 + i for i in range(16)},
        },
    },
    "janus": {"vq_config.channel_multiplier": (1, 2), "vq_config.num_res_blocks": 1},
    "deepseek_ocr2": {
        **_inside("text_config", {"mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1}),
        **_inside(
            "vision_config.sam_config",
            {"image_size": 192, "downsample_channels": [32, 64], "window_size": 14},
        ),
    },
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": (32, 64)},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "florence2": {
        "vision_config.embed_dim": (32, 32, 64, 64),
        "vision_config.num_heads": (2, 2, 4, 4),
        "vision_config.num_groups": (2, 2, 4, 4),
        "vision_config.depths": (1, 1, 1, 1),
        "vision_config.window_size": 4,
    },
    "glm5_next": {"text_config.index_kpool": 2},
    "granite4_vision": {
        "deepstack_layer_map": [(1, 0)],
        "spatial_target_layers": [1, 2],
        "text_config.num_hidden_layers": 4,
        "image_grid_pinpoints": [[16, 16]],
        "downsample_rate": "1/2",
    },
    "llama4": {"vision_config.intermediate_size": 256},
    "llava_next": {"image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]]},
    "llava_next_video": {"image_grid_pinpoints": [[16, 16]]},
    "llava_onevision": {"image_grid_pinpoints": [[16, 16]]},
    "minicpm_ocr": {"image_token_id": 209, "vision_config.insert_layer_id": 0},
    "minicpmv4_6": {"image_token_id": 209, "vision_config.insert_layer_id": 0},
    "minicpmv4_7": {"image_token_id": 209, "vision_config.insert_layer_id": 0},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 207, "vision_end_token_id": 206},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 207, "vision_end_token_id": 206},
    "step3p7": {"text_config.sliding_window": 4},
    "udop": {"decoder_start_token_id": 3},
    "vision-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 3},
    "dots3_note": _inside("text_config", _DOTS),
    "dots3_note_text": _DOTS,
    "gemma4": {**_inside("text_config", _GEMMA4), "vision_config.position_embedding_size": 16},
    "gemma4_unified": {**_inside("text_config", _GEMMA4), "vision_config.mm_posemb_size": 16},
    "gemma4_unified_text": _GEMMA4,
    "idefics": {"freeze_text_layers": False, "freeze_vision_layers": False},
    "paddleocr_vl": {"text_config.rope_parameters.mrope_section": [2, 3, 3]},
    "mllama": {"vision_config.vision_output_dim": 128},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "nemotron_h_omni": {"image_token_id": 209},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "blip-2": {"image_token_index": 210},
    "instructblip": {"image_token_index": 210},
    "instructblipvideo": {"video_token_index": 210},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2": {"encoder.mm_tokens_per_image": 4},
    "qwen4_exp_text": _QSA,
    "qwen4_exp": _inside("text_config", _QSA),
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh", "local"], "num_hidden_layers": 3},
    "vipllava": {"vision_feature_layers": [-1, -2, 1]},
    "granitemoehybrid": {"num_hidden_layers": 4, "layer_types": [_LINEAR, _FULL] * 2, "num_local_experts": 4},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4], "use_cache": False},
    "cohere_compass": {"text_config.rope_parameters": {_FULL: {"rope_type": "default", "rope_theta": 1e4}}},
    "cohere_compass_text": {"rope_parameters": {_FULL: {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"n_group": 1, "topk_group": 1},
    "diffllama": {"attention_dropout": 0.0},
    "mpt": {"attn_config.attn_pdrop": 0},
    "dots1": {"n_routed_experts": 4, "n_group": 2, "n_shared_experts": 1},
    "gemma3n_text": {**_SHARED_KV, "laurel_rank": 16, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.5]},
    "gemma4_text": _GEMMA4,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", _FULL, "conv", _FULL]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mixtral": {"output_router_logits": True},
    "qwen3_moe": {"output_router_logits": True},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"num_blocks": 2, "use_cache": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": [_LINEAR, "hybrid"] * 2},
}


# Last changes to a batch.
def _codebooks(batch: dict[str, Any], config: Any, generator: Any) -> dict[str, Any]:
    """Audio codes: the rows of a batch are the codebooks of its samples."""
    books = config.num_codebooks
    ids = batch["input_ids"].repeat_interleave(books, dim=0)
    labels = batch["labels"].unsqueeze(-1).repeat(1, 1, books)
    return {**batch, "input_ids": ids, "labels": labels}


def _image_to_text(batch: dict[str, Any], config: Any, generator: Any) -> dict[str, Any]:
    """An encoder that reads the image alone, and a decoder that is given the labels."""
    return {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}


def _boxes(batch: dict[str, Any], config: Any, generator: torch.Generator) -> dict[str, Any]:
    """Where each token stands on the page."""
    corners = torch.rand(*batch["input_ids"].shape, 2, generator=generator) * 0.5
    return {**batch, "bbox": torch.cat([corners, corners + 0.3], dim=-1)}


BATCHES: dict[str, Callable[..., dict[str, Any]]] = {
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "pix2struct": _image_to_text,
    "udop": _boxes,
    "vision-encoder-decoder": _image_to_text,
}
