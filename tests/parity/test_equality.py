"""Loss, every gradient, every weight and every buffer equal to plain PyTorch's to the last bit, in fp32.

Models are called the default way (caches stay on), with masked labels, padding, weight decay, clipping, and dropout
where the model has it.
"""

from typing import Any

import pytest
import torch
import zoo
from comparison import Batches, compare, compare_models
from torch import Tensor, nn

from megatrain.device.lagged import LaggedDevice

ALL = 1000  # units that keep their graph: more than any of these models has


@pytest.mark.parametrize("model_type", zoo.NAMED)
def test_named_types_are_equal(model_type: str) -> None:
    found = compare(model_type, steps=5, micro_batches=3)
    assert found.equal, str(found)


@pytest.mark.parametrize("model_type", zoo.NAMED)
def test_named_types_are_equal_where_copies_are_late(model_type: str) -> None:
    device = LaggedDevice("fp32", longest_delay_seconds=0.0005)
    found = compare(model_type, steps=3, micro_batches=3, keep_graphs="auto", device=device)
    assert found.equal, str(found)


@pytest.mark.parametrize("keep_graphs", ["auto", ALL])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe", "gemma3n_text", "jamba", "llava"])
def test_kept_graphs_change_nothing(model_type: str, keep_graphs: str | int) -> None:
    found = compare(model_type, steps=2, micro_batches=2, keep_graphs=keep_graphs)
    assert found.equal, str(found)


@pytest.mark.parametrize("clip_norm", [None, 1e9])
@pytest.mark.parametrize("model_type", ["gpt2", "qwen3_moe"])
def test_without_clipping(model_type: str, clip_norm: float | None) -> None:
    found = compare(model_type, steps=2, micro_batches=2, clip_norm=clip_norm)
    assert found.equal, str(found)


TIED = ["gpt2", "gemma3_text", "gemma3n_text", "cohere2", "camembert", "xlm-roberta", "xlnet", "t5"]


@pytest.mark.parametrize("model_type", [t for t in TIED if t in zoo.MODEL_TYPES])
def test_tied_weights_in_one_micro_batch_need_no_other_order(model_type: str) -> None:
    """The reference is then plain autograd on the model as it is; nothing is untied."""
    model = zoo.build(model_type)
    places = [p for m in model.modules() for p in m._parameters.values() if p is not None]
    assert len(places) > len(set(places)), "not tied"
    found = compare(model_type, steps=3, micro_batches=1)
    assert found.equal, str(found)


# -- a module that somebody wrote ---------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, 4, batch_first=True, dropout=dropout)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor, mask: Tensor, *, scale: Tensor) -> Tensor:
        self.runs += 1
        h = self.norm(x)
        x = x + scale * self.mix(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.dropout(self.down(torch.relu(self.up(x))))


class Written(nn.Module):
    """No configuration, no base class of transformers; a stray parameter, a table of positions, its own loss."""

    def __init__(
        self, tied: bool, shared: bool = False, dropout: float = 0.1, width: int = 32, vocab: int = 97
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(64, width)
        self.scale = nn.Parameter(torch.full((width,), 0.7))
        blocks = [Block(width, 0.1) for _ in range(3)]
        self.blocks = nn.ModuleList([*blocks, blocks[1]] if shared else blocks)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, vocab, bias=False)
        if tied:
            self.out.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        length = input_ids.shape[1]
        x = self.tokens(input_ids) + self.positions(torch.arange(length))
        mask = torch.full((length, length), float("-inf")).triu(1)
        for block in self.blocks:
            x = block(x, mask, scale=self.scale)
        logits = self.out(self.norm(x))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def written(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Written(**options)


def text(step: int, shapes: tuple[tuple[int, int], ...] = ((2, 12), (3, 17), (1, 9))) -> Batches:
    generator = torch.Generator().manual_seed(step)
    batches = []
    for shape in shapes:
        ids = torch.randint(0, 97, shape, generator=generator)
        masked = torch.rand(shape, generator=generator) < 0.2
        batches.append({"input_ids": ids, "labels": ids.masked_fill(masked, -100)})
    return batches


@pytest.mark.parametrize("device", ["cpu", "lagged"])
@pytest.mark.parametrize("keep_graphs", ["off", ALL])
@pytest.mark.parametrize("tied", [False, True])
def test_a_module_of_ones_own_is_equal(tied: bool, keep_graphs: str | int, device: str) -> None:
    models = written(tied=tied), written(tied=tied)
    found = compare_models(*models, text, steps=5, keep_graphs=keep_graphs, device=device)
    assert found.units == 7  # two embeddings, three blocks, norm and output
    assert found.equal, str(found)


def test_a_block_called_twice_is_equal_in_one_micro_batch() -> None:
    def one(step: int) -> Batches:
        return text(step)[:1]

    found = compare_models(written(tied=True, shared=True), written(tied=True, shared=True), one, steps=5)
    assert found.equal, str(found)


def test_a_block_called_twice_is_equal_to_rounding_in_several() -> None:
    found = compare_models(written(tied=False, shared=True), written(tied=False, shared=True), text, steps=1)
    assert found.several_calls == {"blocks.1": 2}
    assert found.relative < 1e-6, str(found)


# -- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe"])
def test_two_threads_are_equal(model_type: str) -> None:
    torch.set_num_threads(2)
    found = compare(model_type, steps=2, micro_batches=2, threads=2)
    assert found.equal, str(found)


def test_two_threads_are_equal_where_torch_uses_them() -> None:
    """Wide enough for torch to split its loops, and for the optimizer to split its slabs."""
    torch.set_num_threads(2)

    def wide(step: int) -> Batches:
        return text(step, ((8, 40), (2, 40)))

    found = compare_models(written(tied=True, width=128), written(tied=True, width=128), wide, steps=2, threads=2)
    assert found.equal, str(found)
