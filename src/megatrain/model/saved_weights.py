"""A model's weights as a checkpoint has them: names, shapes and dtypes at once, values one group after the other.

transformers' own inverse weight conversion first runs on meta tensors, on shapes alone, while it is noted which of the
model's tensors each weight on disk is made of. From that come the groups that a conversion needs together (the fused
experts of one layer). Then the groups are read and converted one by one.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from megatrain.model.loading import kept_in_fp32

logger = logging.getLogger(__name__)

ReadTensor = Callable[[str, torch.Tensor], torch.Tensor]


class SavedWeights:
    """What a save of `model` writes; see `save_model` for the arguments.

    `shapes`: name on disk -> meta tensor of its shape and dtype, in the order of writing.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, read_tensor: ReadTensor) -> None:
        tensors = _tensors_to_save(model)
        self._model = model
        self._source = _Source(tensors, _dtypes_on_disk(model, tensors, dtype), read_tensor)
        traced = _trace_conversion(model, self._source)
        if traced is None:
            self._source, traced = _convert_all(model, self._source)
        self.shapes, self._groups = traced

    def groups(self) -> Iterator[tuple[list[str], Iterator[tuple[str, torch.Tensor]]]]:
        """Weights that are converted together: the names in the model of what they are made of, and, read when it is
        asked for, name on disk and CPU tensor of each. All groups give the weights in the order of `shapes`."""
        return ((group.sources, self._values(group)) for group in self._groups)

    def _values(self, group: "_Group") -> Iterator[tuple[str, torch.Tensor]]:
        converted = self._convert(group)
        while converted:
            # out of the dict before it is handed on, so that it can be freed before the next
            name = next(iter(converted))
            yield name, converted.pop(name)

    def _convert(self, group: "_Group") -> dict[str, torch.Tensor]:
        """Read one group and convert it: name on disk -> CPU tensor with the planned shape and dtype."""
        values = {name: self._source.read(name) for name in group.sources}
        if group.renamed_only:
            return {group.outputs[0]: values[group.sources[0]]}
        converted = _revert(self._model, values)
        # by position: a renaming that looks at other weights may name a part of the model differently
        result = dict(zip(group.outputs, converted.values(), strict=True))
        for name, tensor in result.items():
            planned = self.shapes[name]
            if tensor.shape != planned.shape or tensor.dtype != planned.dtype:
                raise RuntimeError(f"{name} came out as {tensor.dtype} {list(tensor.shape)}, not as planned")
        return result


@dataclass(frozen=True, slots=True)
class _Source:
    """What is saved: the model's tensors, and how to read one."""

    tensors: dict[str, torch.Tensor]
    """Name in the model -> its parameter or buffer, without names that loading ties again."""
    dtypes: dict[str, torch.dtype]
    """Name in the model -> dtype on disk."""
    read_tensor: ReadTensor

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` on the CPU, in its dtype on disk; a view where nothing has to change."""
        tensor = self.tensors[name]
        value = self.read_tensor(name, tensor)
        if value.shape != tensor.shape:
            raise ValueError(f"{name} was read with shape {list(value.shape)}, not {list(tensor.shape)}")
        return value.detach().to(device="cpu", dtype=self.dtypes[name])


@dataclass(slots=True)
class _Group:
    """Tensors of the model that are converted together, and the weights on disk that come of them."""

    sources: list[str]
    outputs: list[str]
    renamed_only: bool = False
    """One tensor goes to disk as it is, perhaps under another name."""


def _tensors_to_save(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, less the names that transformers ties again on loading."""
    # the objects themselves: tied names are one object, while views of one buffer may share an address
    state = model.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    for name in state.keys() - tensors.keys():
        logger.warning("%s is no tensor and is not saved", name)
    if not isinstance(model, PreTrainedModel):
        return tensors
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        tensors.pop(name, None)
    # {tied name: name that holds the weight}, submodels included. A pair that is two tensors is written twice, and so
    # are names that share a tensor without saying so: loading would not tie them
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    redundant = {name for name, holder in ties.items() if name in tensors and tensors.get(holder) is tensors[name]}
    return {name: tensor for name, tensor in tensors.items() if name not in redundant}


def _dtypes_on_disk(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Each tensor's dtype in the files."""
    in_fp32 = kept_in_fp32(model) if dtype in (torch.bfloat16, torch.float16) else set()

    def choose(name: str, tensor: torch.Tensor) -> torch.dtype:
        if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if name in in_fp32 else dtype

    return {name: choose(name, tensor) for name, tensor in tensors.items()}


class _Provenance(TorchDispatchMode):
    """Notes, during a conversion of meta tensors, which named tensors each result was computed from."""

    def __init__(self, sources: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): frozenset([name]) for name, tensor in sources.items()}
        self._alive: list[torch.Tensor] = list(sources.values())  # so that no id is used again

    def names_of(self, tensor: torch.Tensor) -> frozenset[str]:
        return self._names.get(id(tensor), frozenset())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, torch.Tensor)]
        names = frozenset[str]().union(*(self.names_of(x) for x in inputs))
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor):
                self._alive.append(x)
                self._names[id(x)] = self.names_of(x) | names
        return result


def _trace_conversion(model: torch.nn.Module, source: _Source) -> tuple[dict[str, torch.Tensor], list[_Group]] | None:
    """Weights on disk as meta tensors, and the groups that are converted together, in the order of writing.

    None where the conversion needs the numbers, loses a weight on the way, or makes one out of nothing.
    """
    shapes = {
        name: torch.empty(tensor.shape, dtype=source.dtypes[name], device="meta")
        for name, tensor in source.tensors.items()
    }
    trace = _Provenance(shapes)
    try:
        with trace:
            outputs = _revert(model, shapes)
    except Exception as error:
        logger.debug("weights cannot be converted without their numbers: %s", error)
        return None
    origins = {name: trace.names_of(tensor) for name, tensor in outputs.items()}
    if frozenset[str]().union(*origins.values()) != shapes.keys() or not all(origins.values()):
        return None
    groups = _group_by_origin(origins, list(source.tensors))
    for group in groups:
        first = group.outputs[0]
        group.renamed_only = len(group.outputs) == 1 and outputs[first] is shapes[group.sources[0]]
    return {name: outputs[name] for group in groups for name in group.outputs}, groups


def _group_by_origin(origins: dict[str, frozenset[str]], order: list[str]) -> list[_Group]:
    """Groups of outputs that share sources, directly or through others, in `order` of their first source: a model that
    was loaded names its weights in another order than one that was made."""
    group_of: dict[str, _Group] = {}
    for output, names in origins.items():
        merged = _Group(sorted(names - group_of.keys()), [output])
        for group in _distinct(group_of[name] for name in sorted(names & group_of.keys())):
            merged.sources += group.sources
            merged.outputs += group.outputs
        group_of |= dict.fromkeys(merged.sources, merged)
    groups = _distinct(group_of.values())
    # in a group, too, the order of the whole conversion: that of the group alone gives them in that order
    place = {name: i for i, name in enumerate(origins)}
    for group in groups:
        group.outputs.sort(key=place.__getitem__)
    position = {name: i for i, name in enumerate(order)}
    return sorted(groups, key=lambda group: min(position[name] for name in group.sources))


def _distinct(groups: Iterable[_Group]) -> list[_Group]:
    return list({id(group): group for group in groups}.values())


def _convert_all(
    model: torch.nn.Module, source: _Source
) -> tuple[_Source, tuple[dict[str, torch.Tensor], list[_Group]]]:
    """The way of transformers' own save, where a conversion needs the numbers: a second copy of the model."""
    converted = _revert(model, {name: source.read(name) for name in source.tensors})
    dtypes = {name: tensor.dtype for name, tensor in converted.items()}
    shapes = {name: tensor.to("meta") for name, tensor in converted.items()}
    groups = [_Group([name], [name], renamed_only=True) for name in converted]
    return _Source(converted, dtypes, source.read_tensor), (shapes, groups)


def _revert(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' inverse weight conversion; other modules' names are those on disk already."""
    if not isinstance(model, PreTrainedModel):
        return tensors
    with torch.no_grad():
        result: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return result
