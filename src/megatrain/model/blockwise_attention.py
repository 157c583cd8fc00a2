"""Attention of transformers models over one block of queries at a time, where its mask is deferred.

The model's own attention function (its eager code, or SDPA) is called for some queries with only the keys that their
mask reaches, and a mask of that size: windows, sinks, soft-caps and groups of heads stay its own. Going forward a
block's graph is dropped with the block; going back each is run again, differentiated and forgotten. Gradients of keys
and values, which several blocks share, add up in fp32.

A row of several documents is attention over each document by itself (`document_attention.py`), which may in turn go
over blocks.

Only functions of transformers itself are called so: what another one does to many keys a trial would not show. Theirs
are tried out all the same, on a few random queries.
"""

import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.errors import CapacityError
from megatrain.model.deferred_masks import DeferredMask, DeferredMasks, DocumentsMask, VarlenMask
from megatrain.model.document_attention import over_documents, try_out_documents
from megatrain.model.root import configurations
from megatrain.model.sequence_chunks import ChunkTokens, GradientSums, Repetition, graph_of_ones_own
from megatrain.model.side_effects import RandomState
from megatrain.model.stand_in import StandIn
from megatrain.model.token_wise import Run, close, random_like

AttentionFunction = Callable[..., Any]
Others = dict[str, Any]  # what an attention function is called with beside module, states and mask

_TOKENS, _WINDOW, _CUT = 8, 3, 4  # of the probe, and where its two blocks meet


class BlockwiseAttention:
    """Attention of a transformers model where its sequences run in parts, or rows hold several documents, until
    `remove`.

    Other models find what they would have found: their masks are not deferred.
    """

    def __init__(self, model: nn.Module, setting: ChunkTokens) -> None:
        found = configurations(model)
        used = found and "transformers.modeling_utils" in sys.modules
        self._masks = DeferredMasks(found, setting, _why_masks_have_to_be_tensors(model)) if used else None
        if used:
            _count(1)

    def remove(self) -> None:
        if self._masks is not None:
            self._masks.remove()
            self._masks = None
            _count(-1)

    @property
    def whole_documents(self) -> str | None:
        """Why a row of several documents had its mask as a whole; None where none had."""
        return self._masks.whole_documents if self._masks is not None else None

    def largest_blocks_inside(self, module: nn.Module) -> list["LargestBlock"]:
        """Of attention inside `module` that has run over blocks on the meta device."""
        on_meta = self._masks.on_meta if self._masks is not None else {}
        return [on_meta[id(m)] for m in module.modules() if id(m) in on_meta]


def _why_masks_have_to_be_tensors(model: nn.Module) -> str | None:
    """A forward that asks whether its mask is a tensor would take a deferred one for none."""
    for kind in {type(m) for m in model.modules()}:
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        names = set(code.co_names) if code is not None else set()
        if code is not None and {"isinstance", "Tensor"} <= names and any("mask" in n for n in code.co_varnames):
            return f"{kind.__name__} asks whether its arguments are tensors"
    return None


_changing = threading.Lock()
_users = 0
_stand_in: StandIn | None = None


def _count(change: int) -> None:
    """Stand in for how models come by their attention function while anybody needs it."""
    global _users, _stand_in
    with _changing:
        _users += change
        if _users and _stand_in is None:
            interface: Any = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS  # type: ignore[attr-defined]
            own = interface.get_interface
            _stand_in = StandIn(interface, "get_interface", lambda *args, **kwargs: over_blocks(own(*args, **kwargs)))
        elif not _users and _stand_in is not None:
            _stand_in.remove()
            _stand_in = None


def over_blocks(function: AttentionFunction) -> AttentionFunction:
    """`function`, which with a deferred mask runs over blocks of queries, or documents, if it can, and else with the
    whole mask."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        mask, states = attention_mask, (query, key, value)
        if isinstance(mask, VarlenMask):
            return function(module, query, key, value, None, *args, **(kwargs | mask.borders()))
        if isinstance(mask, DocumentsMask):
            obstacle = _obstacle_to_documents(function, module, states, mask, args, kwargs)
            if obstacle is None:
                return over_documents(attend, module, states, mask, kwargs), None
            mask = mask.whole(obstacle)
        elif isinstance(mask, DeferredMask):
            obstacle = _obstacle(function, module, states, mask, args, kwargs)
            if obstacle is None:
                return _attend(_Call(function, module, mask, kwargs), query, key, value), None
            mask = mask.whole(obstacle)
        return function(module, query, key, value, mask, *args, **kwargs)

    return attend


@dataclass(frozen=True, slots=True)
class _Call:
    """An attention function with all but the states."""

    function: AttentionFunction
    module: nn.Module
    mask: DeferredMask
    others: Others

    def blocks(self, query: Tensor) -> list[tuple[slice, slice]]:
        return self.mask.blocks(query.shape[1])

    def block(self, states: list[Tensor], rows: slice, keys: slice, others: Others) -> Tensor:
        """[batch, rows, heads, width], of queries, keys and values that are cut already."""
        found: Tensor = self.function(self.module, *states, self.mask.of(rows, keys), **others)[0]
        return found


# -- forward and backward ---------------------------------------------------------------------------------------------


def _attend(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if query.is_meta:
        call.mask.owner.on_meta[id(call.module)] = _largest_block(call, query, key, value)
    if not torch.is_grad_enabled():
        return _forward(call, query, key, value)
    places = [(m, name) for m in call.module.modules() for name, p in m._parameters.items() if p is not None]
    weights = [owner._parameters[name] for owner, name in places]
    differentiable = [n for n, v in call.others.items() if isinstance(v, Tensor) and v.requires_grad]
    given = [call.others[name] for name in differentiable]
    record = _Record(call, Repetition(call.module, places, query.device), differentiable)
    return _OverBlocks.apply(record, query, key, value, *given, *weights)  # type: ignore[no-any-return]


def _forward(call: _Call, *states: Tensor) -> Tensor:
    result: Tensor | None = None
    for rows, keys in call.blocks(states[0]):
        found = call.block(_leaves(states, rows, keys), rows, keys, call.others).detach()
        if result is None:
            result = found.new_empty((found.shape[0], states[0].shape[2], *found.shape[2:]))
        result[:, rows] = found
    assert result is not None
    return result


def _leaves(states: Iterable[Tensor], rows: slice, keys: slice) -> list[Tensor]:
    """Queries of a block, and its keys and values."""
    cuts = (rows, keys, keys)
    return [s[:, :, cut].detach().requires_grad_(s.requires_grad) for s, cut in zip(states, cuts, strict=True)]


@dataclass(frozen=True, slots=True)
class _Record:
    """From which a backward repeats a forward. `differentiable`: names of the other arguments that get a gradient."""

    call: _Call
    repetition: Repetition
    differentiable: list[str]


class _OverBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: _Record, query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> Tensor:
        # what gets a gradient is saved as a tensor: a record that held it would keep a graph alive
        others_kept = {n: v for n, v in record.call.others.items() if n not in record.differentiable}
        ctx.record = _Record(
            _Call(record.call.function, record.call.module, record.call.mask, others_kept),
            record.repetition,
            record.differentiable,
        )
        ctx.save_for_backward(query, key, value, *others)
        with graph_of_ones_own():
            return _forward(record.call, query, key, value)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call, repetition, names = ctx.record.call, ctx.record.repetition, ctx.record.differentiable
        query, key, value, *others = ctx.saved_tensors
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in others]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        sums = GradientSums(wanted)
        states = _StateGradients((query, key, value))
        with repetition.repeating(leaves[len(names) :]):
            arguments = call.others | dict(zip(names, leaves, strict=False))
            for rows, keys in reversed(call.blocks(query)):
                given = _leaves((query, key, value), rows, keys)
                first = [leaf for leaf in given if leaf.requires_grad]
                found = call.block(given, rows, keys, arguments)
                gradients = torch.autograd.grad(found, [*first, *wanted], gradient[:, rows], allow_unused=True)
                states.add(rows, keys, gradients[: len(first)])
                sums.add(gradients[len(first) :])
                del given, first, found, gradients
        by_leaf = {id(leaf): total for leaf, total in zip(wanted, sums.rounded(), strict=True)}
        return (None, *states.rounded(), *(by_leaf.get(id(leaf)) for leaf in leaves))


class _StateGradients:
    """Of queries, whose blocks are apart, and of keys and values, which several blocks share."""

    def __init__(self, states: tuple[Tensor, Tensor, Tensor]) -> None:
        self._states = states
        wide = [torch.promote_types(s.dtype, torch.float32) for s in states]
        dtypes = [states[0].dtype, *wide[1:]]
        self._sums = [
            torch.zeros_like(s, dtype=dtype) if s.requires_grad else None
            for s, dtype in zip(states, dtypes, strict=True)
        ]

    def add(self, rows: slice, keys: slice, gradients: Iterable[Tensor | None]) -> None:
        wanted = [(s, cut) for s, cut in zip(self._sums, (rows, keys, keys), strict=True) if s is not None]
        for (total, cut), gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                total[:, :, cut].add_(gradient)

    def rounded(self) -> list[Tensor | None]:
        return [None if t is None else t.to(s.dtype) for t, s in zip(self._sums, self._states, strict=True)]


# -- what can run over blocks -----------------------------------------------------------------------------------------


def _obstacle(
    function: AttentionFunction,
    module: Any,
    states: tuple[Tensor, Tensor, Tensor],
    mask: DeferredMask,
    args: tuple[Any, ...],
    others: Others,
) -> str | None:
    """Why attention needs the whole mask; None where blocks do."""
    obstacle = _obstacle_to_parts(function, module, states, mask, args, others)
    if obstacle is None and others.get("dropout"):
        obstacle = "attention has dropout"
    if obstacle is not None:
        return obstacle
    verdict = _verdict(_try_out, function, module, states, mask, others)
    if verdict.obstacle is None and verdict.averages_without_keys and mask.may_leave_out_a_query():
        return f"{_name_of(function)} gives a query without keys the mean of all tokens (pad on the right)"
    return verdict.obstacle


def _obstacle_to_documents(
    function: AttentionFunction,
    module: Any,
    states: tuple[Tensor, Tensor, Tensor],
    mask: DocumentsMask,
    args: tuple[Any, ...],
    others: Others,
) -> str | None:
    """Why attention needs the whole mask; None where each document may go by itself."""
    obstacle = _obstacle_to_parts(function, module, states, mask, args, others)
    if obstacle is not None:
        return obstacle
    without_dropout = others | ({"dropout": 0.0} if "dropout" in others else {})
    return _verdict(_try_out_documents, function, module, states, mask, without_dropout).obstacle


def _name_of(function: AttentionFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _obstacle_to_parts(
    function: AttentionFunction,
    module: Any,
    states: tuple[Tensor, Tensor, Tensor],
    mask: DeferredMask,
    args: tuple[Any, ...],
    others: Others,
) -> str | None:
    """Why attention cannot be called for some tokens; None where a trial has to tell."""
    name = _name_of(function)
    if args or not isinstance(module, nn.Module):
        return f"{name} is called in a way of its own"
    if not getattr(function, "__module__", "").startswith("transformers."):
        return f"{name} is not of transformers, and a trial on a few tokens would not show what it does to many"
    if [s.shape[2] if s.ndim == 4 else None for s in states] != [mask.shape[2], mask.shape[3], mask.shape[3]]:
        return f"{name} gets states of another shape than its mask"
    if _weights_are_wanted(module, others):
        return "attention weights are asked for (output_attentions)"
    long = [n for n, v in others.items() if isinstance(v, Tensor) and _spans(v, mask.shape[2:])]
    return f"{name} gets {long[0]} for all tokens" if long else None


def _spans(tensor: Tensor, lengths: Iterable[int]) -> bool:
    """Positions [batch, tokens] are none of attention's business: they come along for flash attention alone."""
    return tensor.is_floating_point() and any(n in lengths for n in tensor.shape)


def _weights_are_wanted(module: nn.Module, others: Others) -> bool:
    capturing: Any = sys.modules.get("transformers.utils.output_capturing")
    collected = (capturing._active_collector.get() if capturing is not None else None) or {}
    configured = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(configured or others.get("output_attentions") or any("attentions" in key for key in collected))


@dataclass(frozen=True, slots=True)
class _Verdict:
    """`averages_without_keys`: whether a query that may attend to no key gets something that depends on all of them, as
    a softmax of equal numbers does."""

    obstacle: str | None
    averages_without_keys: bool = False


def _verdict(
    try_out: Callable[..., _Verdict],
    function: AttentionFunction,
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: DeferredMask,
    others: Others,
) -> _Verdict:
    verdicts, query = mask.owner.verdicts, states[0]
    constants = tuple((n, str(v)) for n, v in sorted(others.items()) if not isinstance(v, Tensor))
    key = (try_out, function, id(module), module.training, query.dtype, query.device, mask.additive, constants)
    if key not in verdicts:
        random = RandomState(query.device) if not query.is_meta else None
        try:
            with torch.no_grad():
                found = try_out(function, module, states, mask, others)
        except (CapacityError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever the model's own code raises on a stand-in
            found = _Verdict(f"{type(error).__name__}: {error}".splitlines()[0])
        finally:
            if random is not None:
                random.restore()
        verdicts[key] = found
    kept: _Verdict = verdicts[key]
    return kept


def _try_out(
    function: AttentionFunction,
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: DeferredMask,
    others: Others,
) -> _Verdict:
    """Whether a window's block of queries and keys gives what all of them give for these queries."""
    name = getattr(function, "__name__", type(function).__name__)
    probes = [random_like((1, s.shape[1], _TOKENS, s.shape[3]), s) for s in states]
    query, key, value = probes[0], probes[1].flip(2), probes[2].flip(3)

    def run(rows: slice, keys: slice, mask_function: Any = _window) -> Any:
        lengths = {"q_length": rows.stop - rows.start, "kv_length": keys.stop - keys.start}
        offsets = {"q_offset": rows.start, "kv_offset": keys.start}
        made = mask.like(batch_size=1, mask_function=mask_function, attention_mask=None, **lengths, **offsets)
        return function(module, query[:, :, rows], key[:, :, keys], value[:, :, keys], made, **others)[0]

    everything, before, after = slice(0, _TOKENS), slice(0, _CUT), slice(_CUT, _TOKENS)
    whole = run(everything, everything)
    if not isinstance(whole, Tensor) or whole.ndim != 4 or whole.shape[:2] != (1, _TOKENS):
        return _Verdict(f"{name} does not return a tensor [batch, tokens, heads, width]")
    blocks = torch.cat([run(before, before), run(after, slice(_CUT - _WINDOW + 1, _TOKENS))], dim=1)
    if query.is_meta:
        return _Verdict(None)
    if not close(blocks, whole):
        return _Verdict(f"{name} gives other results for some queries than for all")
    return _Verdict(None, not close(run(before, before, _nothing), run(before, everything, _nothing)))


def _try_out_documents(
    function: AttentionFunction,
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: DocumentsMask,
    others: Others,
) -> _Verdict:
    return _Verdict(try_out_documents(function, module, states, mask, others))


def _window(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - _WINDOW)


def _nothing(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
    return (key < 0) & (query < 0)


# -- for plans --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LargestBlock:
    """Of an attention that ran over blocks on the meta device: `run`, given its queries. `states`: its keys and values;
    `sum_bytes`: of the gradients of all keys and values as sums."""

    run: Run
    query: Tensor
    states: list[Tensor]
    sum_bytes: int


def _largest_block(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> LargestBlock:
    rows, keys = max(call.blocks(query), key=lambda b: (b[0].stop - b[0].start) * (b[1].stop - b[1].start))
    states = [t[:, :, keys].detach().requires_grad_() for t in (key, value)]
    others = {n: v.detach() if isinstance(v, Tensor) else v for n, v in call.others.items()}
    sums = sum(t.numel() * torch.promote_types(t.dtype, torch.float32).itemsize for t in (key, value))
    return LargestBlock(
        lambda given: call.block([given, *states], rows, keys, others), query[:, :, rows].detach(), states, sums
    )
