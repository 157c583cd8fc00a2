"""What a batch brings to a device of its own, on the host: how it is moved, and what is left out."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_engine_random import tiny_llama
from test_engine_toys import make_batch, make_engine
from torch import Tensor, nn

from megatrain.model.root import RootForward, on_device

ELSEWHERE = torch.device("meta")  # a device without the host's memory, which is here everywhere


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(memory, whether the caller goes on at once) of each move off the host."""
    noted: list[tuple[str, bool]] = []
    locked: dict[int, Tensor] = {}
    own = Tensor.to

    def pin_memory(self: Tensor) -> Tensor:
        copy = self.clone()
        locked[copy.data_ptr()] = copy
        return copy

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if args[:1] == (ELSEWHERE,) and self.device.type == "cpu":
            memory = "page-locked" if self.data_ptr() in locked else "pageable"
            noted.append((memory, options.get("non_blocking", False)))
        return own(self, *args, **options)

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", to)
    return noted


def test_a_batch_goes_through_page_locked_memory(moves: list[tuple[str, bool]]) -> None:
    ids = torch.arange(6).view(2, 3)
    batch = on_device({"input_ids": ids, "labels": ids, "name": "a"}, ELSEWHERE)
    assert batch["input_ids"].device == ELSEWHERE and batch["name"] == "a"
    assert moves == 2 * [("page-locked", True)]


def test_so_do_arguments_of_a_callers_own_loop(moves: list[tuple[str, bool]]) -> None:
    root = RootForward(nn.Identity(), lambda: None, lambda _elements: nullcontext(), device=ELSEWHERE)
    assert root(torch.zeros(3)).device == ELSEWHERE
    assert root(input=torch.zeros(3)).device == ELSEWHERE
    root(torch.zeros(3, device=ELSEWHERE))
    assert moves == 2 * [("page-locked", True)]


@pytest.mark.parametrize(("tokens", "chunks"), [(64, 1), (4, 3)])
def test_so_do_labels_of_the_head(tokens: int, chunks: int, moves: list[tuple[str, bool]]) -> None:
    """The base forward is launched by then, so that a hidden wait would be a long one."""
    with make_engine(tiny_llama(), head_chunk_tokens=tokens) as engine:
        hidden, labels = torch.zeros(2, 6, 8, device=ELSEWHERE), torch.arange(12).view(2, 6)
        found = list(engine.head.chunks(hidden, labels))
    assert {part[1].device for part in found} == {ELSEWHERE}
    assert moves == chunks * [("page-locked", True)]


@pytest.mark.usefixtures("moves")
def test_a_mask_of_ones_stays_on_the_host_unless_it_means_something() -> None:
    """Beside position_ids it says that they are one sequence each, however they are numbered."""
    ones, positions = torch.ones(2, 6, dtype=torch.long), torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    some = ones.clone()
    some[0, 5] = 0
    batch = make_batch(0)
    assert set(on_device(batch | {"attention_mask": ones}, ELSEWHERE)) == {"input_ids", "labels"}
    for kept in ({"attention_mask": some}, {"attention_mask": ones, "position_ids": positions}):
        assert set(on_device(batch | kept, ELSEWHERE)) == {"input_ids", "labels", *kept}
    model = tiny_llama()
    outputs = [
        model(batch["input_ids"], position_ids=positions, use_cache=False, **extra).logits
        for extra in ({}, {"attention_mask": ones})
    ]
    assert not torch.allclose(*outputs), "transformers treats both alike now: the mask can always be left out"


class Looks(nn.Module):
    """Says which arguments it got."""

    def forward(self, input_ids: Tensor, **rest: Any) -> set[str]:
        assert input_ids.device == ELSEWHERE
        assert all(value.device == ELSEWHERE for value in rest.values() if isinstance(value, Tensor))
        return set(rest)


@pytest.mark.usefixtures("moves")
@pytest.mark.parametrize("gradients", [False, True])
def test_nor_does_it_go_along_in_a_callers_own_loop(gradients: bool) -> None:
    """Of a model of transformers: another may use it for something else."""
    ids, ones = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    some = ones.tril(4)
    for config, left in ((SimpleNamespace(model_type="llama"), set()), (None, {"attention_mask"})):
        model = Looks()
        model.config = config
        root = RootForward(model, lambda: None, lambda _elements: nullcontext(), device=ELSEWHERE)
        with torch.set_grad_enabled(gradients):
            assert root(ids, attention_mask=ones) == root(input_ids=ids, attention_mask=ones) == left
            assert root(ids, attention_mask=some) == {"attention_mask"}
            assert root(ids, attention_mask=ones, position_ids=ids) == {"attention_mask", "position_ids"}
            assert root(ids, attention_mask=ones, position_ids=None) == {"position_ids", *left}
            cached = root(ids, attention_mask=ones, past_key_values=object())
            assert cached == {"attention_mask", "past_key_values"}
