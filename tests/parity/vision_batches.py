"""Micro-batches for vision-language types of ``zoo`` whose rows have images of different sizes, several or none."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import zoo
import zoo_vision
from torch import Tensor

Tensors = dict[str, Tensor]
Row = Sequence[int]  # the image after each piece of text, by the number of its size

_TEXT = 4  # tokens of a piece of text


def _square(config: Any, size: int, draw: Callable[..., Tensor]) -> Tensors:
    """Every image has the same number of pixels."""
    return {"pixel_values": draw(1, 3, zoo_vision.SIDE, zoo_vision.SIDE)}


def _tiles(config: Any, size: int, draw: Callable[..., Tensor]) -> Tensors:
    """The whole image and its tiles: one, or two beside each other or one below the other."""
    height, width = ((16, 16), (16, 32), (32, 16))[size]
    tiles = 1 + height * width // zoo_vision.SIDE**2
    pixels = draw(1, tiles, 3, zoo_vision.SIDE, zoo_vision.SIDE)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


def _grid(config: Any, size: int, draw: Callable[..., Tensor]) -> Tensors:
    """All patches of an image, and its height and width in patches."""
    vision = config.vision_config
    grid = ((1, 4, 4), (1, 4, 8), (1, 8, 6))[size]
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": draw(grid[1] * grid[2], width), "image_grid_thw": torch.tensor([grid])}


IMAGES = {"llava": _square, "llava_next": _tiles, "qwen2_5_vl": _grid, "qwen3_vl": _grid, "gemma3": _square}


def micro_batch(model: torch.nn.Module, model_type: str, rows: Sequence[Row], seed: int) -> Tensors:
    """Rows of text with images in between, padded on the right; images are no targets."""
    generator = torch.Generator().manual_seed(seed)
    token = zoo_vision.image_token(model.config)
    assert token is not None

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    made: list[Tensors] = []
    texts: list[Tensor] = []
    for row in rows:
        pieces = [torch.randint(*zoo.TEXT_IDS, (_TEXT,), generator=generator)]
        for size in row:
            made.append(IMAGES[model_type](model.config, size, draw))
            pieces.append(torch.full((_features(model, made[-1]),), token))
            pieces.append(torch.randint(*zoo.TEXT_IDS, (_TEXT,), generator=generator))
        texts.append(torch.cat(pieces))
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": mask}
    batch["labels"] = ids.masked_fill((mask == 0) | (ids == token), -100)
    kind = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids"}
    if model_type in kind:
        batch[kind[model_type]] = (ids == token).long()
    return batch | _together(made)


def _features(model: torch.nn.Module, image: Tensors) -> int:
    """How many tokens the model makes of an image."""
    owner: Any = model if hasattr(model, "get_image_features") else model.model
    with torch.no_grad():
        found = owner.get_image_features(**image).pooler_output
    return sum(part.numel() // part.shape[-1] for part in found)


def _together(made: Sequence[Tensors]) -> Tensors:
    """All images one after the other; fewer tiles than the most are filled up."""
    if not made:
        return {}
    batch = {name: torch.cat([image[name] for image in made]) for name in made[0] if name != "pixel_values"}
    pixels = [image["pixel_values"] for image in made]
    if pixels[0].ndim == 5:
        most = max(len(one[0]) for one in pixels)
        pixels = [torch.cat([one, one.new_zeros(1, most - one.shape[1], *one.shape[2:])], 1) for one in pixels]
    return batch | {"pixel_values": torch.cat(pixels)}
