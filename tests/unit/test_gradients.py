"""Gradients of a step: summed in fp32, rounded once, complete when the last backward call is."""

import math
from typing import Any

import pytest
import torch
from test_engine_toys import WIDTH, Net, make_engine
from torch import Tensor

import megatrain as mt


def engine_of(**settings: Any) -> mt.Engine:
    return make_engine(Net(count=1), **settings)


def unit_named(engine: mt.Engine, name: str) -> Any:
    return next(unit for unit in engine.partition.units if unit.name == name)


def gradients_for(unit: Any, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        slot.index: (scale * torch.randn(slot.parameter.shape, generator=generator)).to(dtype) for slot in unit.slots
    }


def held(engine: mt.Engine, slot: int) -> Tensor:
    entry = engine.store.slots[slot]
    slab = entry.slab
    return entry.view(slab.gradient if slab.accumulated is None else slab.accumulated)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_calls_are_complete_with_the_last_one(precision: str) -> None:
    engine = engine_of(precision=precision)
    book, unit = engine.gradients, unit_named(engine, "blocks.0")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    book.begin(keep=True)
    given = [gradients_for(unit, seed, dtype) for seed in range(3)]
    for _ in given:
        book.opened(unit)
    for number, gradients in enumerate(given):
        assert book.squares == {}, number
        book.receive(unit, {slot: g.clone() for slot, g in gradients.items()})
    assert set(book.squares) == {slot.index for slot in unit.slots}
    for slot in unit.slots:
        total = given[0][slot.index].float() + given[1][slot.index].float() + given[2][slot.index].float()
        expected = total if precision == "fp32" else total.to(torch.bfloat16)
        found = held(engine, slot.index)
        assert found.dtype == dtype
        if precision == "fp32":
            assert torch.equal(found, expected)
        else:  # rounded once; ties aside
            assert (found.float() - total).abs().max() <= 2**-8 * total.abs().max()
            assert (found == expected).float().mean() > 0.98
        square = float(found.double().square().sum())
        assert book.squares[slot.index] == pytest.approx(square, rel=1e-12)


def test_sum_of_bf16_gradients_is_in_fp32() -> None:
    """256 + 1 + ... in bf16 would stay 256."""
    engine = engine_of(precision="bf16")
    book, unit = engine.gradients, unit_named(engine, "head")
    (slot,) = unit.slots
    book.begin(keep=True)
    values = [256.0, *[1.0] * 8]
    for _ in values:
        book.opened(unit)
    for value in values:
        book.receive(unit, {slot.index: torch.full(slot.parameter.shape, value, dtype=torch.bfloat16)})
    assert torch.all(held(engine, slot.index) == 264)


def test_contributions_do_not_change_what_was_handed_in() -> None:
    engine = engine_of()
    book, unit = engine.gradients, unit_named(engine, "head")
    (slot,) = unit.slots
    book.begin(keep=True)
    given = [torch.full(slot.parameter.shape, value) for value in (1.0, 2.0, 3.0)]
    for _ in given:
        book.opened(unit)
    for gradient in given:
        book.receive(unit, {slot.index: gradient})
    assert [g.unique().item() for g in given] == [1, 2, 3]
    assert torch.all(held(engine, slot.index) == 6)


def test_non_contiguous_and_expanded_gradients() -> None:
    engine = engine_of()
    book, unit = engine.gradients, unit_named(engine, "head")
    (slot,) = unit.slots
    rows, columns = slot.parameter.shape
    book.begin(keep=True)
    transposed = torch.arange(rows * columns, dtype=torch.float32).view(columns, rows).t()
    for gradient in (transposed, torch.ones(1, 1).expand(rows, columns)):
        book.opened(unit)
        book.receive(unit, {slot.index: gradient})
    assert torch.equal(held(engine, slot.index), transposed + 1)


def test_norm_is_exact_whatever_the_order() -> None:
    engine = engine_of()
    book = engine.gradients
    norms, squares = set(), 0.0
    for order in (1, -1):
        book.begin(keep=True)
        for unit in engine.partition.units[::order]:
            book.opened(unit)
            book.receive(unit, gradients_for(unit, unit.index, scale=10.0 ** (4 * unit.index - 4)))
        norms.add(book.norm())
    for unit in engine.partition.units:
        for gradient in gradients_for(unit, unit.index, scale=10.0 ** (4 * unit.index - 4)).values():
            squares += float(gradient.double().square().sum())
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(math.sqrt(squares), rel=1e-13)


def test_norm_does_not_overflow_fp32() -> None:
    engine = engine_of()
    book, unit = engine.gradients, unit_named(engine, "head")
    (slot,) = unit.slots
    book.begin(keep=True)
    book.opened(unit)
    book.receive(unit, {slot.index: torch.full(slot.parameter.shape, 1e30)})
    assert book.norm() == pytest.approx(1e30 * math.sqrt(slot.parameter.numel()), rel=1e-6)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_bad_element_shows_in_the_norm(value: float, precision: str) -> None:
    engine = engine_of(precision=precision)
    book, unit = engine.gradients, unit_named(engine, "head")
    (slot,) = unit.slots
    book.begin(keep=True)
    book.opened(unit)
    gradient = torch.zeros(slot.parameter.shape)
    gradient[-1, -1] = value
    book.receive(unit, {slot.index: gradient})
    assert not book.norm() < float("inf")


def test_tied_parameter_waits_for_both_readers() -> None:
    model = Net(count=1)
    model.head.weight = model.embed.weight
    engine = make_engine(model)
    book = engine.gradients
    embed, head = unit_named(engine, "embed"), unit_named(engine, "head")
    (slot,) = embed.slots
    book.begin(keep=True)
    book.opened(embed)
    book.opened(head)
    book.receive(head, {slot.index: torch.ones(slot.parameter.shape)})
    assert book.squares == {}
    book.receive(embed, {slot.index: torch.ones(slot.parameter.shape)})
    assert torch.all(held(engine, slot.index) == 2)
    assert book.norm() == pytest.approx(2 * math.sqrt(slot.parameter.numel()))


def test_abandoned_call_is_not_waited_for() -> None:
    engine = engine_of()
    book, unit = engine.gradients, unit_named(engine, "blocks.0")
    book.begin(keep=True)
    book.opened(unit)
    book.opened(unit)
    book.receive(unit, gradients_for(unit, 0))
    assert book.squares == {}
    book.abandoned(unit)
    book.finish()
    assert set(book.squares) == {slot.index for slot in unit.slots}


def test_hold_keeps_units_open() -> None:
    engine = engine_of()
    book, unit = engine.gradients, unit_named(engine, "blocks.0")
    book.begin(keep=True)
    book.hold(2)
    book.opened(unit)
    book.receive(unit, gradients_for(unit, 0))
    book.release_hold()
    assert book.squares == {}
    book.release_hold()
    assert book.squares != {}


def test_clear_forgets_everything() -> None:
    engine = engine_of()
    book, unit = engine.gradients, unit_named(engine, "blocks.0")
    for _ in range(2):
        book.begin(keep=True)
        book.opened(unit)
        book.receive(unit, gradients_for(unit, 1))
        norm = book.norm()
        book.clear()
        assert book.norm() == 0 and book.touched() == {}
    book.opened(unit)
    book.receive(unit, gradients_for(unit, 1))
    assert book.norm() == norm


def test_missing_gradients_are_not_zeros() -> None:
    engine = engine_of()
    book, unit = engine.gradients, unit_named(engine, "blocks.0")
    book.begin(keep=True)
    book.opened(unit)
    some = dict(list(gradients_for(unit, 0).items())[:2])
    book.receive(unit, some)
    assert set(book.squares) == set(some)
    assert {e.slot.index for entries in book.touched().values() for e in entries} == set(some)


def test_unit_is_handed_over_as_soon_as_it_is_complete() -> None:
    engine = engine_of(clip_norm=None)
    book = engine.gradients
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    book.begin(keep=False)
    units = [unit_named(engine, name) for name in ("head", "blocks.0")]
    for unit in units:
        book.opened(unit)
    book.receive(units[0], gradients_for(units[0], 0))
    weights = dict(engine.model.named_parameters())
    assert not torch.equal(weights["head.weight"], before["head.weight"])
    assert torch.equal(weights["blocks.0.up.weight"], before["blocks.0.up.weight"])
    book.receive(units[1], gradients_for(units[1], 1))
    assert not torch.equal(weights["blocks.0.up.weight"], before["blocks.0.up.weight"])
    assert engine.store.bytes_by_category()["gradients"] == 0
    assert weights["blocks.0.up.weight"].shape == (2 * WIDTH, WIDTH)
