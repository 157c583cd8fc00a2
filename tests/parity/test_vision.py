"""Vision-language models: gradients into vision tower and projector, and past what is frozen, equal to plain PyTorch's
to the last bit, with images of several sizes in the middle of text, and micro-batches with none."""

import re

import pytest
import torch
import zoo
from comparison import Batches, Comparison, compare_models
from torch import nn
from vision_batches import micro_batch

# images of each row of three micro-batches; of those with one size only it does not matter which
ROWS = [[(1,), (0, 2)], [(), ()], [(2,), (), (0, 1)]]
PROJECTOR = {
    "llava_next": "multi_modal_projector|image_newline",
    "qwen2_5_vl": r"visual\.merger",
    "qwen3_vl": r"visual\.(deepstack_)?merger",
    "gemma3": "multi_modal_projector",
}
TOWER = {t: r"visual\.(patch_embed|pos_embed|blocks)" if t.startswith("qwen") else "vision_tower" for t in PROJECTOR}
LANGUAGE = r"language_model|lm_head"


def train(model_type: str, freeze: tuple[str, ...] = (), device: str = "cpu") -> tuple[Comparison, nn.Module]:
    plain, mine = zoo.build(model_type), zoo.build(model_type)

    def batches(step: int) -> Batches:
        return [micro_batch(mine, model_type, rows, 10 * step + n) for n, rows in enumerate(ROWS)]

    given = [batches(step) for step in range(2)]  # counted before the engine has the model
    found = compare_models(plain, mine, lambda step: given[step], steps=2, freeze=freeze, device=device)
    return found, mine


def changed(mine: nn.Module, model_type: str) -> set[str]:
    before = dict(zoo.build(model_type).named_parameters())
    return {name for name, p in mine.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize(
    ("model_type", "device"), [(t, "lagged") for t in ("llava_next", "qwen2_5_vl", "gemma3")] + [("qwen3_vl", "cpu")]
)
def test_every_part_is_trained_as_in_plain_pytorch(model_type: str, device: str) -> None:
    found, mine = train(model_type, device=device)
    assert found.equal, str(found)
    assert found.head == "chunked"
    moved = changed(mine, model_type)
    for part in (TOWER[model_type], PROJECTOR[model_type], LANGUAGE):
        assert any(re.search(part, name) for name in moved), part


@pytest.mark.parametrize(
    ("model_type", "part", "device"),
    [
        ("llava_next", "tower", "cpu"),
        ("qwen2_5_vl", "projector", "cpu"),
        ("gemma3", "language", "cpu"),
        *((model_type, "all but projector", "lagged") for model_type in ("llava_next", "qwen2_5_vl", "gemma3")),
    ],
)
def test_a_frozen_part_stays_and_lets_gradients_pass(model_type: str, part: str, device: str) -> None:
    patterns = {
        "tower": (TOWER[model_type],),
        "projector": (PROJECTOR[model_type],),
        "language": (LANGUAGE,),
        "all but projector": (TOWER[model_type], LANGUAGE),
    }[part]
    found, mine = train(model_type, patterns, device)
    assert found.equal, str(found)
    frozen = {name for name, _ in mine.named_parameters() if any(re.search(p, name) for p in patterns)}
    moved = changed(mine, model_type)
    assert frozen and moved and not frozen & moved
