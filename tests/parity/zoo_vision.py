"""Images, and what goes with them, for the vision-language types of ``zoo``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

GRID = (1, 4, 8)  # time, height and width of an image in patches, where the size is free
SIDE = 16  # pixels of an image where it is fixed


def first(config: Any, *names: str) -> Any:
    """The first of these attributes that the configuration has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def image_token(config: Any) -> int | None:
    """The id that holds an image's place in the text, if the type works that way."""
    for part in (config, getattr(config, "text_config", None)):
        found = first(part, "image_token_id", "image_token_index", "image_patch_id", "video_token_index")
        if found is not None:
            return int(found)
    return None


def _patch(config: Any) -> int:
    vision = first(config, "vision_config") or config
    patch = first(vision, "patch_size") or 4
    return int(patch if isinstance(patch, int) else patch[0])


def _grid(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    """Patches of all images in one row after the other, flattened."""
    vision, patch = config.vision_config, _patch(config)
    depth = getattr(vision, "temporal_patch_size", 1)
    depth = depth if isinstance(depth, int) else depth[0]
    channels = first(vision, "in_channels", "num_channels", "in_chans") or 3
    count = rows * GRID[0] * GRID[1] * GRID[2]
    return {
        "pixel_values": draw(count, channels * depth * patch * patch),
        "image_grid_thw": torch.tensor([GRID] * rows),
    }


def _plain(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    return {"pixel_values": draw(rows, 3, SIDE, SIDE)}


def _sized(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    return {"pixel_values": draw(rows, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, SIDE]] * rows)}


def _tiles(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    """The whole image and one tile of it."""
    return {"pixel_values": draw(rows, 2, 3, SIDE, SIDE), "image_sizes": torch.tensor([[SIDE, SIDE]] * rows)}


def _several(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    return {
        "pixel_values": draw(rows, 1, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(rows, 1, SIDE, SIDE, dtype=torch.bool),
    }


def _ragged(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    patch = _patch(config)
    return {
        "pixel_values": draw(rows, 16, 3 * patch * patch),
        "spatial_shapes": torch.tensor([[4, 4]] * rows),
        "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.long),
    }


def _merge_sizes(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    return {**_grid(config, rows, draw), "image_merge_sizes": torch.full((rows,), 2)}


def _patches(*shape: int) -> Callable[..., Tensors]:
    """Patches that are not flattened, in the given order of dimensions (-1: all patches of all images)."""

    def make(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
        count = rows * GRID[0] * GRID[1] * GRID[2]
        sizes = [count if size == -1 else size for size in shape]
        return {"pixel_values": draw(*sizes), "image_grid_thw": torch.tensor([GRID] * rows)}

    return make


def _tile_mask(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    return {
        "pixel_values": draw(rows, 1, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(rows, 1, dtype=torch.bool),
    }


def _aspects(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    tiles = config.vision_config.max_num_tiles
    return {
        "pixel_values": draw(rows, 1, tiles, 3, SIDE, SIDE),
        "aspect_ratio_ids": torch.full((rows, 1), 1),
        "aspect_ratio_mask": torch.ones(rows, 1, tiles, dtype=torch.long),
    }


def _targets(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    """Images of all rows side by side, as strips of patches."""
    return {
        "pixel_values": draw(1, 3, 4, rows * 32 * 4),
        "target_sizes": torch.tensor([[4, 8]] * rows, dtype=torch.int32),
    }


def _two_resolutions(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    return {"pixel_values": draw(rows, 3, SIDE, SIDE), "high_res_pixel_values": draw(rows, 3, SIDE, SIDE)}


def _questions(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    ids = torch.arange(10, 16).repeat(rows, 1)
    return {
        "pixel_values": draw(rows, 3, SIDE, SIDE),
        "qformer_input_ids": ids,
        "qformer_attention_mask": torch.ones_like(ids),
    }


def _clips(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    return {**_questions(config, rows, draw), "pixel_values": draw(rows, 2, 3, SIDE, SIDE)}


def _positions(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    """Flattened patches of one image each, and where they are."""
    grid = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1).flatten(0, 1)
    patch = first(config.vision_config, "model_patch_size", "patch_size")
    return {
        "pixel_values": draw(rows, 36, 3 * patch * patch),
        "image_position_ids": grid.flip(-1).repeat(rows, 1, 1),
    }


def _rows_and_columns(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    where = torch.tensor([[i // 4, i % 4] for i in range(16)]).repeat(rows, 1, 1)
    size = config.vision_config.patch_embed_hidden_size
    return {"flattened_patches": torch.cat([where.float() + 1, draw(rows, 16, size)], dim=-1)}


def _hw(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    patch = _patch(config)
    return {
        "pixel_values": draw(rows * 32, 3 * patch * patch),
        "image_grid_hw": torch.tensor([GRID[1:]] * rows),
    }


def _protein(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    ids = torch.arange(5, 15).repeat(rows, 1)
    return {"protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids)}


def _pooled(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    """One crop of 16 patches each, pooled four by four."""
    return {
        "pixel_values": draw(rows, 16, 3 * _patch(config) ** 2),
        "image_token_pooling": torch.arange(rows * 16).view(rows * 4, 4),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * rows),
        "image_num_crops": torch.ones(rows, dtype=torch.long),
    }


def _flat(config: Any, rows: int, draw: Callable[..., torch.Tensor]) -> Tensors:
    return {"pixel_values": draw(rows, 16, 3 * config.patch_size**2)}


_STYLES: dict[str, Callable[..., Tensors]] = {
    "deepseek_vl_hybrid": _two_resolutions,
    "emu3": _sized,
    "evolla": _protein,
    "fuyu": _flat,
    "gemma4": _positions,
    "gemma4_unified": _positions,
    "granite4_vision": _tiles,
    "granite_docling": _tile_mask,
    "idefics": _several,
    "idefics2": _several,
    "idefics3": _several,
    "inkling2": _patches(-1, 8, 8, 3),
    "instructblip": _questions,
    "instructblipvideo": _clips,
    "kimi_k25": _patches(-1, 3, 4, 4),
    "kosmos-2.5": _rows_and_columns,
    "lfm2_vl": _ragged,
    "lighton_ocr": _sized,
    "llava_next": _tiles,
    "llava_next_video": _tiles,
    "llava_onevision": _tiles,
    "minicpm_ocr": _targets,
    "minicpmv4_6": _targets,
    "minicpmv4_7": _targets,
    "mistral3": _sized,
    "mistral_large4": _sized,
    "mllama": _aspects,
    "molmo2": _pooled,
    "muse_glimmer": _patches(-1, 96),
    "muse_spark": _patches(-1, 96),
    "nemotron_h_omni": _hw,
    "paddleocr_vl": _patches(-1, 3, 4, 4),
    "pix2struct": _rows_and_columns,
    "smolvlm": _several,
    "video_llama_3": _merge_sizes,
}

# Images that reach the text some other way than in place of tokens.
_NO_TOKENS = {"mllama", "idefics"}
_LATENTS = {"instructblipvideo": 8, "kosmos-2": 4, "kosmos-2.5": 4, "fuyu": 16}


def images(model: torch.nn.Module, model_type: str, rows: int, generator: torch.Generator) -> Tensors:
    """One image for each row, the way the type's image processor would hand it over."""
    style = _STYLES.get(model_type)
    if style is None:
        style = _grid if "image_grid_thw" in inspect.signature(model.forward).parameters else _plain
    return style(model.config, rows, lambda *shape: torch.randn(shape, generator=generator))


def count_tokens(model: torch.nn.Module, model_type: str) -> int:
    """How many tokens the model makes of one image."""
    if model_type in _LATENTS:
        return _LATENTS[model_type]
    if image_token(model.config) is None or model_type in _NO_TOKENS:
        return 0
    given = images(model, model_type, 1, torch.Generator().manual_seed(0))
    owner = model if hasattr(model, "get_image_features") else model.model
    with torch.no_grad():
        known = inspect.signature(owner.get_image_features).parameters
        given = {k: v for k, v in given.items() if k in known or "args" in known or k == "image_merge_sizes"}
        features = owner.get_image_features(**given)
    found = first(features, "pooler_output", "last_hidden_state")
    if found is None:
        found = features.deepstack_features[0][1]
    parts = found if isinstance(found, list | tuple) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts)


def with_images(
    model: torch.nn.Module, model_type: str, ids: torch.Tensor, generator: torch.Generator, tokens: int
) -> tuple[torch.Tensor, Tensors]:
    """Token ids with the image's tokens after the first text token, and the images."""
    extra = images(model, model_type, len(ids), generator)
    token = image_token(model.config) or 209
    if tokens:
        holes = torch.full((len(ids), tokens), token)
        ids = torch.cat([ids[:, :1], holes, ids[:, 1:]], dim=1)
    wanted = inspect.signature(model.forward).parameters
    if "image_embeds_position_mask" in wanted:
        extra["image_embeds_position_mask"] = (ids == token).long()
    if "image_attention_mask" in wanted:
        extra["image_attention_mask"] = torch.ones(*ids.shape, 1, dtype=torch.long)
        extra.pop("pixel_attention_mask")
    if "cross_attention_mask" in wanted:
        extra["cross_attention_mask"] = torch.ones(*ids.shape, *extra["aspect_ratio_mask"].shape[1:]).long()
    if "mm_token_type_ids" in wanted:
        extra["mm_token_type_ids"] = (ids == token).long()
    return ids, extra
