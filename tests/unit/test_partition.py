"""Cutting a module tree into units: every parameter exactly once, by structure alone."""

from typing import Any

import pytest
from test_engine_random import tiny_llama
from test_engine_toys import WIDTH, Block, Net
from torch import nn
from torch.nn import Parameter

from megatrain.model.partition import Partition, partition


def names(part: Partition) -> list[str]:
    return [unit.name for unit in part.units]


def homes(part: Partition) -> list[str]:
    """Names of all parameters, by home; each must appear once."""
    found = [slot.name for unit in part.units for slot in part.homes(unit)]
    return found + [slot.name for slot in part.strays]


def assert_complete(model: nn.Module, part: Partition) -> None:
    assert sorted(homes(part)) == sorted(name for name, _ in model.named_parameters())
    assert [slot.name for slot in part.slots] == [name for name, _ in model.named_parameters()]
    assert [slot.index for slot in part.slots] == list(range(len(part.slots)))
    assert [unit.index for unit in part.units] == list(range(len(part.units)))
    for unit in part.units:
        assert model.get_submodule(unit.name) is unit.module
        for owner, attribute, slot in unit.places:
            assert owner._parameters[attribute] is slot.parameter
    for slot in part.slots:
        assert all(owner._parameters[attribute] is slot.parameter for owner, attribute in slot.places)


def test_blocks_and_what_is_around_them() -> None:
    model = Net(count=3)
    part = partition(model)
    assert names(part) == ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert part.strays == []
    assert_complete(model, part)


def test_transformers_model() -> None:
    model = tiny_llama()
    part = partition(model)
    assert names(part) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    assert_complete(model, part)


def test_lists_inside_a_block_belong_to_it() -> None:
    class Experts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    model = Net(Experts, count=2)
    part = partition(model)
    assert names(part) == ["embed", "blocks.0", "blocks.1", "head"]
    assert_complete(model, part)


def test_several_lists_side_by_side() -> None:
    model = Net(count=2)
    model.more = nn.ModuleList([Block(), Block()])
    part = partition(model)
    assert names(part) == ["embed", "blocks.0", "blocks.1", "head", "more.0", "more.1"]
    assert_complete(model, part)


def test_list_of_lists() -> None:
    model = Net(count=1)
    model.blocks = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block()])])
    part = partition(model)
    assert names(part) == ["embed", "blocks.0.0", "blocks.0.1", "blocks.1.0", "head"]
    assert_complete(model, part)


def test_sequential_of_composites_is_a_stack_and_of_layers_a_block() -> None:
    model = Net(count=1)
    model.blocks = nn.Sequential(Block(), Block())
    model.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 29))
    part = partition(model)
    assert names(part) == ["embed", "blocks.0", "blocks.1", "head"]
    assert_complete(model, part)


def test_parameters_of_enclosing_modules_are_stray() -> None:
    model = Net()
    model.start = Parameter(model.head.weight.detach()[0].clone())
    part = partition(model)
    assert [slot.name for slot in part.strays] == ["start"]
    assert part.strays[0].units == []
    assert_complete(model, part)


def test_parameter_list_beside_blocks_is_stray() -> None:
    model = Net()
    model.scales = nn.ParameterList([Parameter(model.head.weight.detach()[n].clone()) for n in range(2)])
    part = partition(model)
    assert [slot.name for slot in part.strays] == ["scales.0", "scales.1"]
    assert_complete(model, part)


def test_module_without_parameters_is_no_unit() -> None:
    model = Net()
    model.drop = nn.Dropout()
    model.blocks.append(nn.ReLU())
    part = partition(model)
    assert names(part) == ["embed", "blocks.0", "blocks.1", "head"]


def test_model_without_repetition_is_one_unit() -> None:
    model = Block()
    part = partition(model)
    assert names(part) == [""]
    assert_complete(model, part)


def test_tied_weights_have_one_home_and_two_readers() -> None:
    model = Net()
    model.head.weight = model.embed.weight
    part = partition(model)
    (slot,) = [slot for slot in part.slots if slot.name == "embed.weight"]
    assert slot.units == [0, 3]
    assert len(slot.places) == 2
    assert part.homes(part.units[3]) == []
    assert [s.name for s in part.units[3].slots] == ["embed.weight"]
    assert_complete(model, part)


def test_parameter_held_twice_by_one_unit() -> None:
    def tied_inside() -> nn.Module:
        block = Block()
        block.again = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        block.again.weight = block.up.weight
        return block

    model = Net(tied_inside, count=1)
    part = partition(model)
    unit = part.units[1]
    assert len(unit.places) == len(unit.slots) + 1
    assert_complete(model, part)


def test_block_under_several_names_is_one_unit() -> None:
    model = Net(count=3)
    model.blocks[2] = model.blocks[0]
    model.alias = model.blocks[1]
    part = partition(model)
    assert names(part) == ["embed", "blocks.0", "blocks.1", "head"]
    assert_complete(model, part)


def test_stray_tied_to_a_unit_is_read_by_the_unit() -> None:
    model = Net()
    model.table = model.embed.weight
    part = partition(model)
    assert [slot.name for slot in part.strays] == []
    (slot,) = [slot for slot in part.slots if slot.parameter is model.embed.weight]
    assert slot.units == [0] and len(slot.places) == 2


@pytest.mark.parametrize("frozen", ["all", "some", "none"])
def test_trainable(frozen: str) -> None:
    model = Net()
    model.blocks[0].requires_grad_(frozen == "none")
    if frozen == "some":
        model.blocks[0].up.bias.requires_grad_(True)
    assert partition(model).units[1].trainable == (frozen != "all")


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        partition(nn.ReLU())


def test_names_do_not_decide() -> None:
    """The same structure under other names and classes gives the same cut."""

    def shape(part: Partition) -> list[Any]:
        return [[slot.parameter.shape for slot in part.homes(unit)] for unit in part.units]

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            plain = Net()
            self.zeta, self.eta, self.theta = plain.embed, plain.blocks, plain.head

        def forward(self) -> None: ...

    assert shape(partition(Other())) == shape(partition(Net()))
