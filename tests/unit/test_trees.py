"""Arguments taken apart into tensors and put together again."""

import collections
import copy
import dataclasses
import enum
import operator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatrain.errors import UnsupportedModelError
from megatrain.model.trees import FlatTree, written_entries


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Record:
    value: Any
    number: int = 3


class Colour(enum.Enum):
    RED = 1


def numbered(count: int) -> list[Tensor]:
    return [torch.full((2,), float(n)) for n in range(count)]


def same(a: Any, b: Any) -> bool:
    """Equal in structure and types, with the very same tensors."""
    if isinstance(a, Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=3),
    st.sampled_from([torch.float32, torch.Size([1, 2]), Colour.RED, slice(1, 2), range(3), b"x", 1.5, 2j]),
    st.builds(lambda: torch.zeros(2)),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


@given(trees)
@settings(max_examples=150, deadline=None)
def test_build_gives_the_tree_back(tree: Any) -> None:
    flat = FlatTree(tree, "unit x")
    assert same(tree, flat.build(flat.tensors))


@given(trees)
@settings(max_examples=50, deadline=None)
def test_untouched_tree_has_no_written_entries(tree: Any) -> None:
    flat = FlatTree(tree, "unit x")
    assert written_entries(flat, flat.build(flat.tensors), flat.tensors) == []


def test_containers_are_fresh() -> None:
    tree = {"a": [torch.ones(1)], "b": {"c": torch.ones(1)}}
    flat = FlatTree(tree, "unit x")
    first, second = flat.build(flat.tensors), flat.build(flat.tensors)
    first["a"].append(3)
    first["b"]["d"] = 4
    assert len(tree["a"]) == len(second["a"]) == 1
    assert set(tree["b"]) == set(second["b"]) == {"c"}


def test_distinct_tensors_appear_once() -> None:
    shared, other = numbered(2)
    flat = FlatTree((shared, {"x": shared, "y": other}, [shared]), "unit x")
    assert len(flat.tensors) == 2
    replacement = numbered(2)
    built = flat.build(replacement)
    assert built[0] is built[1]["x"] is built[2][0] is replacement[0]
    assert built[1]["y"] is replacement[1]


def test_order_of_tensors_is_the_trees() -> None:
    tensors = numbered(4)
    flat = FlatTree(([tensors[0]], {"z": tensors[1], "a": Pair(tensors[2], tensors[3])}), "unit x")
    assert all(a is b for a, b in zip(flat.tensors, tensors, strict=True))


def test_transformers_model_output() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    output = BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.zeros(1), torch.zeros(1)))
    flat = FlatTree(output, "unit x")
    built = flat.build([t + 1 for t in flat.tensors])
    assert type(built) is BaseModelOutput
    assert built.last_hidden_state.tolist() == [2, 2] and built.attentions is None
    assert built.hidden_states[1].tolist() == [1]


class Box:
    pass


@pytest.mark.parametrize("bad", [
    {1, 2}, bytearray(b"x"), np.zeros(2), SimpleNamespace(a=1), Box(), iter([1]), collections.deque([1]),
], ids=lambda bad: type(bad).__name__)  # fmt: skip
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_other_mutable_objects_are_refused_by_name(bad: Any, depth: int) -> None:
    tree: Any = bad
    for _ in range(depth):
        tree = {"inner": [tree]}
    with pytest.raises(UnsupportedModelError, match=f"unit model.layers.3.*{type(bad).__name__}"):
        FlatTree(((tree,), {}), "unit model.layers.3")


def test_refusal_names_the_way_to_the_object() -> None:
    with pytest.raises(UnsupportedModelError, match=r"states\.2"):
        FlatTree({"states": [1, 2, Box()]}, "unit x")


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_written_entries_of_mappings(kind: Any) -> None:
    kept, replaced, new = numbered(3)
    tree = ({"inner": kind({"kept": kept, "replaced": replaced, "number": 1})},)
    flat = FlatTree(tree, "unit x")
    (seen,) = flat.build(flat.tensors)
    seen["inner"]["replaced"] = new
    seen["inner"]["number"] = 2
    seen["inner"]["fresh"] = new
    seen["outer"] = kept
    found = written_entries(flat, (seen,), flat.tensors)
    assert {key for _, key, _ in found} == {"replaced", "number", "fresh", "outer"}
    for mapping, key, value in found:
        mapping[key] = value  # the originals are what is written into
    assert tree[0]["inner"]["replaced"] is new and tree[0]["inner"]["fresh"] is new
    assert tree[0]["outer"] is kept


def test_value_put_back_unchanged_is_not_written() -> None:
    tree = {"a": torch.ones(1), "b": 1.5}
    flat = FlatTree(tree, "unit x")
    seen = flat.build(flat.tensors)
    seen["a"], seen["b"] = seen["a"], 1.5
    assert written_entries(flat, seen, flat.tensors) == []


def test_swapped_tensors_are_written() -> None:
    flat = FlatTree({"a": torch.ones(1), "b": torch.zeros(1)}, "unit x")
    seen = flat.build(flat.tensors)
    seen["a"], seen["b"] = seen["b"], seen["a"]
    assert {key for _, key, _ in written_entries(flat, seen, flat.tensors)} == {"a", "b"}


def test_deleted_entry_is_not_overlooked() -> None:
    """A key that the run removed: the caller would go on with a stale one."""
    tree = {"a": torch.ones(1), "b": torch.zeros(1)}
    flat = FlatTree(tree, "unit x")
    seen = flat.build(flat.tensors)
    del seen["a"]
    try:
        found = written_entries(flat, seen, flat.tensors)
    except UnsupportedModelError:
        return
    assert found != []


@pytest.mark.parametrize("change", [
    lambda x: x.append(torch.ones(1)), lambda x: x.clear(), lambda x: x.__setitem__(0, torch.ones(1)),
    lambda x: x.reverse(), lambda x: x[2].append(1), lambda x: x.__setitem__(2, [5]),
])  # fmt: skip
def test_changed_list_is_refused(change: Any) -> None:
    flat = FlatTree(([torch.ones(1), torch.zeros(1), [7]],), "unit x")
    (seen,) = flat.build(flat.tensors)
    change(seen)
    with pytest.raises(UnsupportedModelError, match=r"unit x.*list"):
        written_entries(flat, (seen,), flat.tensors)


def test_written_dataclass_is_honoured_or_refused() -> None:
    record = Record(torch.ones(1))
    flat = FlatTree((record,), "unit x")
    (seen,) = flat.build(flat.tensors)
    seen.value = torch.zeros(1)
    try:
        found = written_entries(flat, (seen,), flat.tensors)
    except UnsupportedModelError:
        return
    assert found != []


def test_default_dict_stays_one() -> None:
    tree = collections.defaultdict(list, {"a": torch.ones(1)})
    try:
        built = FlatTree(tree, "unit x").build([torch.zeros(1)])
    except UnsupportedModelError:
        return
    assert built["missing"] == []


def test_dataclass_with_computed_field_is_rebuilt_or_refused() -> None:
    @dataclasses.dataclass
    class Computed:
        value: Tensor
        double: Tensor = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.double = self.value * 2

    try:
        flat = FlatTree(Computed(torch.ones(1)), "unit x")
        built = flat.build([t + 1 for t in flat.tensors])
    except UnsupportedModelError:
        return
    assert built.value.item() == 2 and built.double.item() == 3


def filled_cache() -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    return cache


def test_filled_cache_is_refused_and_an_empty_one_is_fresh_for_each_run() -> None:
    from transformers import DynamicCache

    with pytest.raises(UnsupportedModelError, match=r"unit x.*DynamicCache"):
        FlatTree({"past_key_values": filled_cache()}, "unit x")
    cache = DynamicCache()
    flat = FlatTree((cache,), "unit x")
    for _ in range(2):
        (fresh,) = flat.build([])
        assert fresh is not cache
        fresh.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
        assert fresh.get_seq_length() == 2
        assert cache.get_seq_length() == 0


def test_of_a_cache_only_the_layer_that_is_used_is_copied() -> None:
    """In each run of each unit: copying all layers would take time that grows with the square of the depth."""
    from transformers import DynamicCache, LlamaConfig

    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=40))
    flat = FlatTree((cache,), "unit")
    own = copy.copy
    copied: list[str] = []
    with pytest.MonkeyPatch.context() as watched:
        watched.setattr(copy, "copy", lambda x: copied.append(type(x).__name__) or own(x))
        (fresh,) = flat.build([])
        keys = torch.ones(1, 2, 3, 4)
        fresh.update(keys, 2 * keys, 7)
        assert copied == ["DynamicCache", "DynamicLayer"]
    assert fresh.get_seq_length(7) == 3 and fresh.get_seq_length(6) == 0
    assert cache.get_seq_length(7) == 0 and not cache.layers[7].is_initialized
    for layers in (list(fresh.layers), fresh.layers[:], fresh.layers.copy(), operator.add(fresh.layers, [])):
        assert layers[7] is fresh.layers[7] and len(layers) == 40
        assert not {id(layer) for layer in layers} & {id(layer) for layer in cache.layers}
    assert next(reversed(fresh.layers)) is fresh.layers[-1]
    cache.update(keys, keys, 7)
    (fresh,) = FlatTree((cache,), "unit").build([])
    assert fresh.get_seq_length(6) == 0
    with pytest.raises(UnsupportedModelError, match=r"unit: a filled cache \(DynamicLayer\) reached it"):
        fresh.get_seq_length(7)
    fresh = FlatTree((DynamicCache(config=LlamaConfig(num_hidden_layers=40)),), "unit").build([])[0]
    assert fresh.layers.pop() is not cache.layers[-1] and len(cache.layers) == 40
