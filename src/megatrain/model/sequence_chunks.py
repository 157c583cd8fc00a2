"""Long sequences: what acts token by token inside a unit (norms, feed-forward) runs over one part of them at a time.

A unit's graph would hold the wide activations of its feed-forward and the fp32 intermediates of its norms for all
tokens at once. Here it holds such a module's input; its forward goes over the sequence in parts, and so does its
backward, in which each part is run again, differentiated and forgotten. Gradients of weights add up over the parts in
fp32. Attention sees the sequence whole.

Every module inside the units gets a stand-in, and the outermost ones that act token by token (`token_wise.py`) make use
of it, at the first long sequence, where their weights and the kind of their input are at hand. The model's names and
classes do not matter.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from numbers import Integral
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.errors import ConfigError
from megatrain.model.binding import Place, bound_at
from megatrain.model.side_effects import Attributes, AutocastState, WrittenAttributes, no_autocast_cache
from megatrain.model.stand_in import StandIn
from megatrain.model.token_wise import Run, Verdict, judge

ChunkTokens = int | str | None  # of each sequence: a number, 'auto', or None for whole sequences
LONG_TOKENS = 8192  # 'auto': longer sequences run in parts of so many; enough for products to be fast

_CONSTANTS = (type(None), bool, int, float, str)


def check_sequence_chunk_tokens(setting: ChunkTokens) -> None:
    """Raise ConfigError unless `setting` is a number of tokens, 'auto' or None."""
    number = isinstance(setting, Integral) and not isinstance(setting, bool) and setting >= 1
    if setting is not None and setting != "auto" and not number:
        raise ConfigError(
            f"engine.sequence_chunk_tokens is {setting!r}; it must be a number of tokens > 0, 'auto' for parts of"
            f" {LONG_TOKENS} where sequences are longer, or None for whole sequences"
        )


def part_tokens(setting: ChunkTokens, tokens: int) -> int | None:
    """Tokens of a part where sequences of `tokens` run in parts, all but the last of one size; None: as a whole."""
    most = LONG_TOKENS if isinstance(setting, str) else setting
    if most is None or tokens <= most:
        return None
    return -(-tokens // -(-tokens // most))


class ChunkedModules:
    """Stand-ins for the forwards of `modules` and all modules inside them, until `remove`."""

    def __init__(self, modules: Iterable[nn.Module], setting: ChunkTokens) -> None:
        found = {id(m): m for module in modules for m in module.modules()} if setting is not None else {}
        self._forwards = [ChunkedForward(m, setting) for m in found.values() if type(m).forward is not _NO_FORWARD]

    def remove(self) -> None:
        """Give the modules their forwards back."""
        for forward in self._forwards:
            forward.remove()

    def in_parts_inside(self, module: nn.Module) -> list["ChunkedForward"]:
        """Those inside `module` that have run in parts."""
        inside = {id(m) for m in module.modules()}
        return [f for f in self._forwards if id(f.module) in inside and f.last is not None]


class _Judging(threading.local):
    """Of the calling thread."""

    now = False


_judging = _Judging()
_NO_FORWARD = nn.Module.forward
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ChunkedForward:
    """Stands in for `module.forward`, which it is itself where sequences are short or the module mixes tokens."""

    def __init__(self, module: nn.Module, setting: ChunkTokens) -> None:
        self.module = module
        self.forward: Callable[..., Any] = module.forward
        self.last: tuple[Run, Tensor] | None = None  # the last run over parts: of what, and the shape of a part
        self._setting = setting
        self._verdicts: dict[Any, Verdict] = {}
        self._removed = False
        self._stand_in = StandIn(module, "forward", self)

    def remove(self) -> None:
        """What somebody has wrapped around this one goes on calling it."""
        self._removed = True
        self._stand_in.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = None if self._removed or _judging.now else _place_of_hidden(args, kwargs)
        if key is None:
            return self.forward(*args, **kwargs)
        hidden, run = _apart(self.forward, args, kwargs, key)
        part = part_tokens(self._setting, hidden.shape[1])
        if part is None or self._has_hooks_inside() or not self._takes_parts(run, hidden, part, (args, kwargs)):
            return run(hidden)
        self.last = run, hidden.new_empty((1, part, *hidden.shape[2:]), device="meta")
        return in_parts(self.module, run, hidden, part)

    def _takes_parts(self, run: Run, hidden: Tensor, part: int, given: Any) -> bool:
        """Whether the module acts token by token, and its graph holds more than half of its input besides."""
        verdict = self._verdict(run, hidden, part, given)
        return verdict.obstacle is None and 2 * verdict.token_bytes > hidden[0, 0].nbytes

    def _verdict(self, run: Run, hidden: Tensor, part: int, given: Any) -> Verdict:
        """By all that decides what the forward does: what it is called with, and attributes of its modules."""
        kind = (hidden.shape, part, hidden.dtype, hidden.device, _constants_in(given), _states_of(self.module))
        if kind not in self._verdicts:
            _judging.now = True  # what is inside runs as it is
            try:
                self._verdicts[kind] = judge(self.module, run, hidden, part)
            finally:
                _judging.now = False
        return self._verdicts[kind]

    def _has_hooks_inside(self) -> bool:
        """Hooks would be called for each part: those that collect a router's outputs, or somebody's own."""
        inside = (m for m in self.module.modules() if m is not self.module)
        of_all = any(getattr(nn.modules.module, f"_global{name}") for name in _HOOKS)
        return of_all or any(getattr(m, name) for m in inside for name in _HOOKS)


def _constants_in(given: tuple[tuple[Any, ...], Mapping[str, Any]]) -> tuple[Any, ...]:
    """Arguments but tensors, with their places."""
    args, kwargs = given
    named = [*enumerate(args), *sorted(kwargs.items())]
    return tuple((key, str(type(value)), str(value)) for key, value in named if not isinstance(value, Tensor))


def _states_of(module: nn.Module) -> tuple[Any, ...]:
    """Attributes of the modules inside: plain ones by value, others by which they are, and by what they hold in turn
    where they are collections, or settings."""
    own = (pair for inside in module.modules() for pair in inside.__dict__.items() if pair[0] not in _TORCHS_OWN)
    return tuple((name, *_content(value)) for name, value in own)


_TORCHS_OWN = frozenset(nn.Module().__dict__) - {"training"}  # weights are others in each run
_PLAIN = (bool, int, float, str, type(None))
_WITHOUT_SETTINGS = (Tensor, nn.Module, type, FunctionType, MethodType, ModuleType)


def _content(value: Any) -> tuple[Any, ...]:
    if isinstance(value, _PLAIN):
        return (value,)
    held: Iterable[Any] = ()
    if isinstance(value, Mapping):
        held = [x for pair in value.items() for x in pair]
    elif isinstance(value, (list, tuple, set, frozenset)):
        held = value
    elif not isinstance(value, _WITHOUT_SETTINGS):
        held = [x for pair in getattr(value, "__dict__", {}).items() for x in pair]
    return id(value), *(x if isinstance(x, _PLAIN) else id(x) for x in held)


def _place_of_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """Which argument is the one tensor, of hidden states [batch, tokens, ...]; None where there is not just that."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    others = [(key, value) for key, value in given if not isinstance(value, _CONSTANTS)]
    if len(others) != 1:
        return None
    ((key, value),) = others
    fits = isinstance(value, Tensor) and value.ndim >= 3 and value.is_floating_point() and value.numel() > 0
    return key if fits else None


def _apart(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str
) -> tuple[Tensor, Run]:
    """(the hidden states at `key`, `forward` with the other arguments). What is returned second does not hold them:
    backward keeps it."""
    if isinstance(key, int):
        before, after = args[:key], args[key + 1 :]
        return args[key], lambda given: forward(*before, given, *after, **kwargs)
    others = {name: value for name, value in kwargs.items() if name != key}
    return kwargs[key], lambda given: forward(*args, **others, **{key: given})


def in_parts(module: nn.Module, run: Run, hidden: Tensor, part: int) -> Tensor:
    """`run(hidden)`, the forward of `module` with its weights bound, over `part` tokens at a time."""
    if not torch.is_grad_enabled():
        return _forward_in_parts(run, hidden, part)
    places = [(m, name) for m in module.modules() for name, p in m._parameters.items() if p is not None]
    weights = [owner._parameters[name] for owner, name in places]
    record = _Record(run, part, Repetition(module, places, hidden.device))
    return _InParts.apply(record, hidden, *weights)  # type: ignore[no-any-return]


def _forward_in_parts(run: Run, hidden: Tensor, part: int) -> Tensor:
    result: Tensor | None = None
    for rows in _parts(hidden, part):
        found = run(_part(hidden, rows).requires_grad_(hidden.requires_grad)).detach()
        if result is None:
            result = found.new_empty((*hidden.shape[:2], *found.shape[2:]))
        result[:, rows] = found
    assert result is not None
    return result


def _parts(hidden: Tensor, part: int) -> list[slice]:
    return [slice(start, start + part) for start in range(0, hidden.shape[1], part)]


def _part(hidden: Tensor, rows: slice) -> Tensor:
    """Of its own, and contiguous: modules view the whole sequences so, of however many there are."""
    return hidden[:, rows].detach().contiguous()


class Repetition:
    """What a backward needs of a forward that it repeats, beside what ran: where the weights of `module` go (`places`),
    attributes and autocast as they were."""

    def __init__(self, module: nn.Module, places: list[Place], device: torch.device) -> None:
        self._places = places
        self._attributes = WrittenAttributes(module, type(module).__name__)
        self._found: Attributes = self._attributes.worth_keeping(self._attributes.snapshot())
        self._autocast = AutocastState(torch.device("cpu") if device.type == "meta" else device)

    def repeating(self, leaves: list[Tensor]) -> AbstractContextManager[Any]:
        """With weights, attributes and autocast as they were, and gradients on."""
        stack = ExitStack()
        stack.enter_context(self._autocast.entered())
        stack.enter_context(no_autocast_cache())
        stack.enter_context(self._attributes.replaying(self._found))
        stack.enter_context(bound_at(self._places, leaves))
        stack.enter_context(graph_of_ones_own())
        return stack


@dataclass(frozen=True, slots=True)
class _Record:
    """From which a backward repeats a forward over parts of so many tokens."""

    run: Run
    part: int
    repetition: Repetition


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: _Record, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(hidden, *weights)
        with graph_of_ones_own():
            return _forward_in_parts(record.run, hidden, record.part)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        record: _Record = ctx.record
        hidden, *weights = ctx.saved_tensors
        leaves = [w.detach().requires_grad_(w.requires_grad) for w in weights]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[1] else None
        sums = GradientSums(wanted)
        with record.repetition.repeating(leaves):
            for rows in reversed(_parts(hidden, record.part)):  # autograd would add up gradients in this order
                given = _part(hidden, rows).requires_grad_(hidden_gradient is not None)
                first = [given] if hidden_gradient is not None else []
                found = torch.autograd.grad(
                    record.run(given), [*first, *wanted], gradient[:, rows], allow_unused=True, materialize_grads=False
                )
                if hidden_gradient is not None:
                    hidden_gradient[:, rows] = 0 if found[0] is None else found[0]
                sums.add(found[len(first) :])
        by_leaf = dict(zip(map(id, wanted), sums.rounded(), strict=True))
        return (None, hidden_gradient, *(by_leaf.get(id(leaf)) for leaf in leaves))


class GradientSums:
    """Gradients of weights, added up in fp32 over the parts of a sequence and rounded once."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._weights = weights
        self._sums: list[Tensor | None] = [None] * len(weights)

    def add(self, gradients: Iterable[Tensor | None]) -> None:
        for n, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if (total := self._sums[n]) is None:
                dtype = torch.promote_types(gradient.dtype, torch.float32)
                # of its own: autograd may hand out one tensor as the gradient of two weights
                total = self._sums[n] = torch.zeros_like(gradient, dtype=dtype)
            total.add_(gradient)

    def rounded(self) -> list[Tensor | None]:
        """In the weights' precision; None for one that got no gradient."""
        return [None if s is None else s.to(w.dtype) for s, w in zip(self._sums, self._weights, strict=True)]


def graph_of_ones_own() -> AbstractContextManager[Any]:
    """Gradients on, as in plain PyTorch, since whether a product is folded depends on it; what the graph saves is of no
    interest to those who look at what the unit's saves."""
    stack = ExitStack()
    stack.enter_context(torch.enable_grad())
    stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_memory_of, _as_it_is))
    return stack


def _memory_of(tensor: Tensor) -> Tensor:
    """Not the tensor itself: a result that its own graph holds would never be freed."""
    return tensor.detach()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
