"""The model's own forward on the meta device: in which order its units are called and what they keep, without memory.

Shapes are those of one sequence. Units that are alike (class, parameters, inputs, attention window) are run once; the
others get the first one's results, which on the meta device have no values anyway.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megatrain.errors import MegaTrainError
from megatrain.model.blockwise_attention import BlockwiseAttention
from megatrain.model.partition import Partition, Unit, partition
from megatrain.model.sequence_chunks import ChunkedModules, ChunkTokens
from megatrain.model.stand_in import StandIn
from megatrain.model.trees import FlatTree
from megatrain.planner.live_bytes import differentiation_bytes


@dataclass(frozen=True, slots=True)
class UnitRun:
    """One call of a unit over one sequence: bytes of its inputs that carry gradients, of those that carry none, of what
    its graph holds beside weights and inputs, and what it was called with. Of what runs over a part of the sequence at
    a time: the most that a part takes while it is differentiated, and elements of its matrices; `blockwise`: whether
    attention runs over a block of queries at a time."""

    input_bytes: int
    graph_bytes: int
    constant_bytes: int = 0
    arguments: FlatTree | None = None
    part_bytes: int = 0
    part_elements: int = 0
    blockwise: bool = False


@dataclass(slots=True)
class MetaPass:
    """`order`: units as they are called, those of the base model first; `runs` by unit. `complete`: whether the forward
    ran to its end; where it did not, the order is the tree's and the bytes are estimates."""

    order: list[int] = field(default_factory=list)
    runs: dict[int, UnitRun] = field(default_factory=dict)
    complete: bool = True


def run_on_meta(model: nn.Module, seq_len: int, sequence_chunk_tokens: ChunkTokens = None) -> MetaPass:
    """Run `model`, which is on the meta device in the precision of its computation, on one sequence."""
    part, found = partition(model), MetaPass()
    chunked = ChunkedModules([unit.module for unit in part.units], sequence_chunk_tokens)
    attention = BlockwiseAttention(model, sequence_chunk_tokens)
    recorders = [_Recorder(unit, found, chunked, attention) for unit in part.units]
    seen: dict[Any, tuple[UnitRun, Any]] = {}
    for recorder in recorders:
        recorder.install(seen)
    try:
        with torch.device("meta"), torch.enable_grad(), _MetaAnswers():
            ids = torch.zeros(1, seq_len, dtype=torch.int64)
            model.train()(input_ids=ids, use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, MegaTrainError):
        # meta tensors have no values; what a model reads out of them cannot be had
        found.complete = False
        _fill_in(found, part, model, seq_len)
    finally:
        for recorder in recorders:
            recorder.remove()
        attention.remove()
        chunked.remove()
    return found


class _Recorder:
    """Stands in for a unit's forward."""

    def __init__(self, unit: Unit, found: MetaPass, chunked: ChunkedModules, attention: BlockwiseAttention) -> None:
        self.unit, self.found, self.chunked, self.attention = unit, found, chunked, attention
        self.forward: Callable[..., Any] = unit.module.forward
        self._stand_in: StandIn | None = None
        self._seen: dict[Any, tuple[UnitRun, Any]] = {}

    def install(self, seen: dict[Any, tuple[UnitRun, Any]]) -> None:
        self._seen = seen
        self._stand_in = StandIn(self.unit.module, "forward", self)

    def remove(self) -> None:
        if self._stand_in is not None:
            self._stand_in.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = FlatTree((args, kwargs), self.unit.name)
        given = tuple((t.shape, t.dtype, t.requires_grad) for t in arguments.tensors)
        key = (_kind_of(self.unit.module), given, tuple(id(mask) for mask in arguments.masks))
        if key not in self._seen:
            saved = _Saved([*arguments.tensors, *self.unit.module.parameters()])
            with torch.autograd.graph.saved_tensors_hooks(saved, saved.unpack):
                result = self.forward(*args, **kwargs)
            self._seen[key] = self._run(arguments, saved.n_bytes), result
        run, result = self._seen[key]
        if self.unit.index not in self.found.runs:
            self.found.order.append(self.unit.index)
            self.found.runs[self.unit.index] = run
        return result

    def _run(self, arguments: FlatTree, graph_bytes: int) -> UnitRun:
        in_parts = self.chunked.in_parts_inside(self.unit.module)
        blocks = self.attention.largest_blocks_inside(self.unit.module)
        part_bytes = [differentiation_bytes(*f.last, [*f.module.parameters()]) for f in in_parts if f.last]
        part_bytes += [differentiation_bytes(b.run, b.query, b.states) + b.sum_bytes for b in blocks]
        matrices = {id(p): p.numel() for f in in_parts for p in f.module.parameters() if p.ndim >= 2}
        return UnitRun(
            sum(t.nbytes for t in arguments.tensors if t.requires_grad),
            graph_bytes,
            sum(t.nbytes for t in arguments.tensors if not t.requires_grad),
            arguments,
            max(part_bytes, default=0),
            sum(matrices.values()),
            bool(blocks),
        )


def attentions(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in `module` that call themselves attention."""
    if "attention" in type(module).__name__.lower():
        yield module
        return
    for child in module.children():
        yield from attentions(child)


def _kind_of(module: nn.Module) -> Any:
    """What makes two units compute alike: classes, shapes, what is trained, and windows of attention."""
    windows = tuple(getattr(m, "sliding_window", None) for m in module.modules())
    shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters())
    return type(module), shapes, windows


class _Saved:
    """Adds up what a graph would hold, each memory once; `given` is held anyway."""

    def __init__(self, given: list[Tensor]) -> None:
        self.n_bytes = 0
        self._alive: list[Any] = [t.untyped_storage() for t in given]  # an address is one's own while it lives
        self._seen = {storage._cdata for storage in self._alive}

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)
            self.n_bytes += storage.nbytes()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor


class _MetaAnswers(TorchFunctionMode):
    """What meta tensors cannot say, as it is for sequences without padding; fused attention as it is on a device that
    has it: it keeps its operands, its result and one number per row, and no product of positions with positions."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            operands = (given.get(n, args[i] if i < len(args) else None) for i, n in enumerate(_OPERANDS))
            return _FusedAttention.apply(*operands)
        if func is Tensor.__bool__ and args[0].is_meta:
            return True  # such as `(mask == 1).all()`
        return func(*args, **given)


_OPERANDS = ("query", "key", "value", "attn_mask")


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # as numbers to be added, made anew where it is boolean
        added = [] if mask is None else [query.new_empty(mask.shape) if mask.dtype == torch.bool else mask]
        ctx.save_for_backward(query, key, value, result, rows, *added)
        return result

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(t) for t in ctx.saved_tensors[: len(_OPERANDS) - 1]), None


def _fill_in(found: MetaPass, part: Partition, model: nn.Module, seq_len: int) -> None:
    """Units that the pass did not reach, in the order of the tree: hidden states as inputs, and a graph of sixteen of
    them, as a llama's block keeps (norms, projections, attention, a gated MLP)."""
    hidden = getattr(_text_config(model), "hidden_size", 0)
    itemsize = next(model.parameters()).dtype.itemsize
    for position, unit in enumerate(part.units):
        if unit.index not in found.runs:
            found.order.append(unit.index)
            n_bytes = seq_len * hidden * itemsize
            found.runs[unit.index] = UnitRun(0 if position == 0 else n_bytes, 16 * n_bytes)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
