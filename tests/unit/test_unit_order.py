"""Micro-batches of which some leave out a part of the model meet at the units that they share."""

import pytest
import torch
from test_engine_toys import VOCABULARY, WIDTH, Net
from torch import Tensor, nn

import megatrain as mt


class WithTower(Net):
    """Text, and in front of it what a tower of blocks makes of an image, where there is one."""

    def __init__(self) -> None:
        super().__init__(count=3)
        self.tower = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, input_ids: Tensor, labels: Tensor, image: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embed(input_ids)
        if image is not None:
            for block in self.tower:
                image = torch.tanh(block(image))
            hidden = hidden + image
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


def batch(seed: int, image: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (1, 6), generator=generator)
    there = {"image": torch.randn(1, 1, WIDTH, generator=generator)} if image else {}
    return {"input_ids": ids, "labels": ids, **there}


@pytest.mark.parametrize("images", [(True, False, True), (False, True, False)])
def test_every_unit_is_visited_by_all_in_turn(images: tuple[bool, ...]) -> None:
    with mt.Engine(WithTower(), device="cpu", precision="fp32", keep_graphs="off") as engine:
        visits: list[str] = []
        fetch = engine.executor.fetch
        for step in range(2):
            visits.clear()
            engine.executor.fetch = lambda unit, **how: visits.append((unit.name, *how.values())) or fetch(unit, **how)
            engine.train_step([batch(10 * step + n, image) for n, image in enumerate(images)])
    changes = [visit for n, visit in enumerate(visits) if n == 0 or visit != visits[n - 1]]
    assert len(changes) == len(set(changes)), "a unit was left and visited again"
    assert len(visits) > len(changes)
