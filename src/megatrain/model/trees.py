"""Arguments and results of a unit, taken apart into tensors and put together again.

Recomputation is exact only when a unit sees the same inputs twice, so every tensor it can reach through its arguments
has to be found: containers are flattened and rebuilt fresh for each run. A mapping that the unit writes into (layers
sharing keys and values through a dict) is compared afterwards, and what was written becomes an output. Any other
mutable object is refused by name: its content could change between the two runs without anyone noticing.
"""

import copy
import dataclasses
import enum
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.errors import UnsupportedModelError
from megatrain.model.deferred_masks import DeferredMask

_CONSTANT_TYPES = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout,
    torch.memory_format, slice, range, frozenset, enum.Enum, type, types.FunctionType, types.BuiltinFunctionType,
    types.MethodType, partial, nn.Module,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class TensorAt:
    """Stands in a tree for the tensor at `index` of the flat list."""

    index: int


class FlatTree:
    """A tree of containers with its tensors taken out; each distinct tensor appears once in `tensors`.

    `where` names the tree in errors ("unit model.layers.3").
    """

    def __init__(self, tree: Any, where: str) -> None:
        self.where = where
        self.tensors: list[Tensor] = []
        self.masks: list[DeferredMask] = []
        self._index_of: dict[int, int] = {}
        self.skeleton = self._flatten(tree, ())

    def build(self, tensors: list[Tensor]) -> Any:
        """The tree with fresh containers around `tensors` (same length and order as `self.tensors`)."""
        return _build(self.skeleton, tensors)

    def _flatten(self, node: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(node, Tensor):
            index = self._index_of.setdefault(id(node), len(self.tensors))
            if index == len(self.tensors):
                self.tensors.append(node)
            return TensorAt(index)
        if isinstance(node, _CONSTANT_TYPES):
            return _Constant(node)
        if _is_cache(node):
            return _EmptyCache(node, self.where)
        if isinstance(node, DeferredMask):
            self.masks.append(node)
        children = list(_children(node, self.where, path))
        return _Container(node, [(key, self._flatten(value, (*path, key))) for key, value in children])


@dataclasses.dataclass(frozen=True, slots=True)
class _Constant:
    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class _Container:
    original: Any
    children: list[tuple[Any, Any]]


def _children(node: Any, where: str, path: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """(key, child) pairs of a container we know how to rebuild; refuses everything else by name."""
    if isinstance(node, Mapping):
        yield from node.items()
    elif isinstance(node, (list, tuple)):
        yield from enumerate(node)
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        yield from ((f.name, getattr(node, f.name)) for f in dataclasses.fields(node))
    elif not _is_known_constant(node):
        name = ".".join(str(key) for key in path) or "result"
        raise UnsupportedModelError(
            f"{where}: argument {name} is a {type(node).__module__}.{type(node).__name__}, which may change between"
            " forward and recomputation; pass tensors, numbers or containers of them"
        )


class CacheError(UnsupportedModelError):
    """A cache that cannot be repeated reached a unit with gradients on."""


def _is_cache(node: Any) -> bool:
    """Caches of transformers, whose copies are known to be cheap and independent; others are refused as arguments."""
    caches = sys.modules.get("transformers.cache_utils")
    kind = type(node)
    known = kind.__module__.startswith("transformers.") and kind.__name__.endswith("Cache")
    return known or (caches is not None and isinstance(node, caches.Cache))


class _EmptyCache:
    """A cache that a training forward made and nothing has been put into yet.

    Each run of a unit gets a fresh one, used and thrown away: the unit computes as it would with the real one (its
    keys become contiguous, its convolution states are prepended), and recomputation appends to nothing.
    """

    def __init__(self, cache: Any, where: str) -> None:
        _refuse_filled(cache, 3, where)
        self._cache = cache
        self._where = where

    def fresh(self) -> Any:
        return _copy_cache(self._cache, 3, self._where)


def _refuse_filled(node: Any, depth: int, where: str) -> None:
    if _holds_tensors(node, depth):
        raise CacheError(
            f"{where}: a filled cache ({type(node).__name__}) reached it with gradients on; recomputation would"
            " append to it twice. Call the model without past_key_values, or under torch.no_grad()"
        )


def _are_layers(node: Any) -> bool:
    return type(node) is list and any(type(value).__module__.startswith("transformers") for value in node)


def _holds_tensors(node: Any, depth: int) -> bool:
    if isinstance(node, Tensor):
        return node.numel() > 1  # single numbers are settings, such as a window
    if depth == 0:
        return False
    if _are_layers(node):  # who fills a cache fills these; the others are looked at when they are reached for
        return any(_holds_tensors(layer, depth - 1) for layer in (node[0], node[-1]))
    if isinstance(node, Mapping):
        return any(_holds_tensors(v, depth - 1) for v in node.values())
    if isinstance(node, (list, tuple)):
        return any(_holds_tensors(v, depth - 1) for v in node)
    if isinstance(node, _CONSTANT_TYPES) or not hasattr(node, "__dict__"):
        return False
    return any(_holds_tensors(v, depth) for k, v in vars(node).items() if k != "config")


def _copy_cache(node: Any, depth: int, where: str) -> Any:
    """A copy down to the layers' own lists and dicts; what they refer to is shared."""
    if isinstance(node, dict):
        return {k: _copy_cache(v, depth, where) for k, v in node.items()}
    if _are_layers(node):
        return _FreshLayers(node, depth, where)
    if isinstance(node, list):
        return [_copy_cache(v, depth, where) for v in node]
    if (
        depth == 0
        or isinstance(node, (*_CONSTANT_TYPES, Tensor))
        or not type(node).__module__.startswith("transformers")
    ):
        return node
    if hasattr(node, "model_type"):
        return node
    made = copy.copy(node)
    for name, value in vars(node).items():
        made.__dict__[name] = _copy_cache(value, depth - 1, where)
    return made


class _FreshLayers(list):  # type: ignore[type-arg]
    """A cache's layers, each looked at and copied when it is first reached for: a unit uses one, and going through all
    of them for each unit would take time that grows with the square of the depth."""

    def __init__(self, layers: list[Any], depth: int, where: str) -> None:
        super().__init__(layers)
        self._depth = depth
        self._where = where
        self._shared = {id(layer) for layer in layers}  # by identity: lists may be changed

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self)[index]
        layer = super().__getitem__(index)
        if id(layer) in self._shared:
            _refuse_filled(layer, self._depth, self._where)
            layer = _copy_cache(layer, self._depth, self._where)
            super().__setitem__(index, layer)
        return layer

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def _own(self) -> None:
        for _ in self:
            pass

    def __reversed__(self) -> Iterator[Any]:
        self._own()
        return super().__reversed__()

    def __add__(self, other: Any) -> Any:
        self._own()
        return super().__add__(other)

    def copy(self) -> list[Any]:
        return list(self)

    def pop(self, index: Any = -1) -> Any:
        self._own()
        return super().pop(index)


def copy_whole_caches(arguments: Iterable[Any], depth: int = 3) -> None:
    """Make plain lists of the layers of the caches among a unit's `arguments`, for a compiler: it would look at what is
    shared and make a graph for each layer that it finds."""
    for node in arguments:
        if depth and type(node).__module__.startswith("transformers") and hasattr(node, "__dict__"):
            for name, value in vars(node).items():
                if isinstance(value, _FreshLayers):
                    node.__dict__[name] = list(value)
            copy_whole_caches(vars(node).values(), depth - 1)


def _is_known_constant(node: Any) -> bool:
    """Configurations, masks made by flex attention, and masks that are yet to be made: read by the unit, never
    written."""
    return type(node).__name__ == "BlockMask" or isinstance(node, DeferredMask) or hasattr(node, "model_type")


def _build(node: Any, tensors: list[Tensor]) -> Any:
    if isinstance(node, TensorAt):
        return tensors[node.index]
    if isinstance(node, _Constant):
        return node.value
    if isinstance(node, _EmptyCache):
        return node.fresh()
    original = node.original
    values = [(key, _build(child, tensors)) for key, child in node.children]
    if isinstance(original, tuple):
        items = [value for _, value in values]
        return type(original)(*items) if hasattr(original, "_fields") else tuple(items)
    if isinstance(original, list):
        return [value for _, value in values]
    if type(original) is dict:
        return dict(values)
    if not values and not isinstance(original, Mapping):
        return original
    made = copy.copy(original)  # keeps what is no element: a default factory, fields that are not arguments
    if isinstance(original, Mapping):  # the original may have been written since it was taken apart
        for key in [key for key in made if key not in dict(values)]:
            del made[key]
    for key, value in values:
        if isinstance(original, Mapping):
            made[key] = value  # type: ignore[index]
        else:
            object.__setattr__(made, key, value)
    return made


def written_entries(flat: FlatTree, seen: Any, given: list[Tensor]) -> list[tuple[Mapping[Any, Any], Any, Any]]:
    """What a run wrote into the mappings of the tree it was given.

    `seen` is the tree that `flat.build(given)` made and the run used. Returns (original mapping, key, value) for each
    new or replaced entry, in tree order. Raises UnsupportedModelError when a list was changed.
    """
    found: list[tuple[Mapping[Any, Any], Any, Any]] = []
    _compare(flat.skeleton, seen, flat.where, found, Unchanged(given))
    return found


class Unchanged:
    """Whether a value found after the run is the one that was put in."""

    def __init__(self, given: list[Tensor]) -> None:
        self._given = given

    def __call__(self, node: Any, value: Any) -> bool:
        if isinstance(node, TensorAt):
            return value is self._given[node.index]
        if isinstance(node, _Constant):
            return value is node.value or bool(type(value) is type(node.value) and value == node.value)
        if isinstance(node, _EmptyCache):
            return True
        return type(value) is type(node.original) or isinstance(value, (dict, list, tuple))


def _compare(
    node: Any, seen: Any, where: str, found: list[tuple[Mapping[Any, Any], Any, Any]], unchanged: Unchanged
) -> None:
    if not isinstance(node, _Container):
        return
    known = dict(node.children)
    if isinstance(node.original, Mapping) and isinstance(seen, Mapping):
        if any(key not in seen for key in known):
            raise UnsupportedModelError(f"{where}: it deleted an entry of a mapping passed as argument")
        for key, value in seen.items():
            if key not in known or not unchanged(known[key], value):
                found.append((node.original, key, value))
            else:
                _compare(known[key], value, where, found, unchanged)
    elif isinstance(node.original, (list, tuple)):
        if len(seen) != len(known) or not all(unchanged(known[i], value) for i, value in enumerate(seen)):
            raise UnsupportedModelError(
                f"{where}: it changed a list passed as argument; return the tensors instead, or use a dict"
            )
        for i, value in enumerate(seen):
            _compare(known[i], value, where, found, unchanged)
    elif dataclasses.is_dataclass(node.original):
        for name, child in node.children:
            if not unchanged(child, getattr(seen, name)):
                raise UnsupportedModelError(
                    f"{where}: it changed the field {name} of a {type(node.original).__name__} passed as argument;"
                    " return the tensor instead, or use a dict"
                )
