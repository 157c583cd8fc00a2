"""Whether a module acts on each token by itself, so that a sequence may pass it in parts.

Its operations are followed by shapes (`token_dims`): none may mix tokens, choose by values (a router), draw random
numbers (dropout), or meet anything else that has a row for each token. They must be the same, with the same numbers,
for the whole sequence and for its parts: a scale that depends on the length would differ. Then results on a few random
tokens are compared: whole and in two parts, and with one token made NaN, which may reach no other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.errors import CapacityError
from megatrain.model.foreign import refuse_foreign_tensors
from megatrain.model.side_effects import CapturedOutputs, RandomState
from megatrain.model.token_dims import MixesTokensError, TokenDims, Trail

_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069, 1087, 1091, 1093, 1097, 1103, 1109)
_TOKENS, _CUT = 8, 3  # of the probe, and where its two parts meet
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of the largest result; half precision: 3e-2
_PRODUCTS_AND_NORMS = ("mm", "addmm", "bmm", "baddbmm", "native_layer_norm", "_fused_rms_norm", "_softmax", "glu")
_MEMORY = ("_to_copy", "_unsafe_view", "cat", "copy_", "fill_", "zero_", "scalar_tensor")
_NEW = [form.format(kind) for kind in ("empty", "zeros", "ones", "full") for form in ("{}", "{}_like", "new_{}")]
_ALLOWED = frozenset((*_PRODUCTS_AND_NORMS, *_MEMORY, *_NEW))

Run = Callable[[Tensor], Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`obstacle`: why a sequence has to pass as a whole; None where parts do. `token_bytes`: what the module's graph
    holds for a token beside its input and its output."""

    obstacle: str | None
    token_bytes: float = 0.0


def judge(module: nn.Module, run: Run, like: Tensor, part: int) -> Verdict:
    """Try `run`, which is the forward of `module` with its weights bound, on an input of the kind of `like`
    [batch, tokens, ...], of which parts of `part` tokens are to be made. Nothing is left changed."""
    random = RandomState(like.device) if not like.is_meta else None
    attributes = _Attributes(module)
    try:
        _require_the_same_for_each_token(module, run, like, part)
        return _judge(module, run, like, attributes)
    except (CapacityError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever the model's own code raises on a stand-in
        return Verdict(f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        attributes.put_back()
        if random is not None:
            random.restore()


def _require_the_same_for_each_token(module: nn.Module, run: Run, like: Tensor, part: int) -> None:
    """Raises MixesTokensError. On the meta device, where lengths cost nothing."""
    weights = [*module.parameters(), *module.buffers()]
    sizes = {n for t in (like, *weights) for n in t.shape}
    length = next(n for n in _PRIMES if n not in sizes and not any(size % n == 0 for size in sizes if size))
    whole = like.shape[1]
    lengths = [length, *dict.fromkeys((whole, min(part, whole), whole % part or part))]
    shapes = [*((1, tokens) for tokens in lengths), *([(like.shape[0], length)] if like.shape[0] > 1 else [])]
    # what these graphs save is of no interest to those who look at what the unit's saves
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
    with _on_meta(module), torch.enable_grad(), unseen, _RefusesHooks():
        trails = []
        for number, shape in enumerate(shapes):
            probe = torch.empty((*shape, *like.shape[2:]), dtype=like.dtype, device="meta").requires_grad_()
            if number == 0:
                with TokenDims(probe) as watch:
                    result = run(probe)
                if not isinstance(result, Tensor) or watch.dim_of(result) != 1:
                    raise MixesTokensError("it does not return one tensor of tokens")
                _refuse_own_backwards(result)
            with Trail() as trail:
                run(probe)
            trails.append(trail.steps)
    for tokens, steps in zip(lengths[1:], trails[1 : len(lengths)], strict=True):
        if not _same_steps(trails[0], length, steps, tokens):
            raise MixesTokensError(f"it does something else over {tokens:,} tokens than over {length:,}")
    for steps in trails[len(lengths) :]:  # its numbers are those of parts, too, which have as many sequences
        if [name for name, _ in steps] != [name for name, _ in trails[0]]:
            raise MixesTokensError("it does something else with several sequences than with one")


def _refuse_own_backwards(result: Tensor) -> None:
    """Raise MixesTokensError for an autograd function written in Python, whose backward nothing is known of: it may mix
    the gradients of tokens. Liger's do not."""
    seen: set[Any] = set()
    waiting = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [other for other, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            written_in = getattr(type(node), "_forward_cls", type(node)).__module__
            if not written_in.startswith("liger_kernel."):
                raise MixesTokensError(f"{type(node).__name__} of {written_in} has a backward of its own")


class _RefusesHooks(TorchFunctionMode):
    """Raises MixesTokensError where a forward hooks the gradient of what it computes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook):
            raise MixesTokensError("it hooks a gradient, which would be one of a part")
        return func(*args, **(kwargs or {}))


def _same_steps(one: list[Any], length: int, other: list[Any], other_length: int) -> bool:
    """Operations and their numbers, but for the lengths themselves."""
    if len(one) != len(other):
        return False
    for (name, numbers), (other_name, other_numbers) in zip(one, other, strict=True):
        if name != other_name or len(numbers) != len(other_numbers):
            return False
        for a, b in zip(numbers, other_numbers, strict=True):
            if a != b and not (a == length and b == other_length) and not (a != a and b != b):
                return False
    return True


@contextmanager
def _on_meta(module: nn.Module) -> Iterator[None]:
    """Weights and buffers without their values."""
    holders: list[dict[str, Any]] = [h for m in module.modules() for h in (m._parameters, m._buffers)]
    before = [(holder, dict(holder)) for holder in holders]
    try:
        for holder, tensors in before:
            for name, tensor in tensors.items():
                if tensor is not None:
                    holder[name] = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
        yield
    finally:
        for holder, tensors in before:
            holder.clear()
            holder.update(tensors)


def _judge(module: nn.Module, run: Run, like: Tensor, attributes: "_Attributes") -> Verdict:
    weights: list[Tensor] = list(module.parameters())
    probe = random_like((1, _TOKENS, *like.shape[2:]), like).requires_grad_()
    with CapturedOutputs().collecting() as captured, _Watched([probe, *weights, *module.buffers()]):
        whole, saved = _run_saving(run, probe, weights)
    if any(captured.values()):
        return Verdict("its outputs are captured by hooks")
    if not isinstance(whole, Tensor) or whole.shape[:2] != probe.shape[:2] or not whole.requires_grad:
        return Verdict("it does not return one tensor with as many tokens")
    refuse_foreign_tensors(type(module).__name__, [whole], [probe, *weights])
    if attributes.changed:
        return Verdict("it leaves something on its modules")
    first, saved_by_first = _run_saving(run, probe.detach()[:, :_CUT].requires_grad_(), weights)
    if not like.is_meta and (obstacle := _mixes_tokens(run, probe.detach(), whole.detach(), first.detach())):
        return Verdict(obstacle)
    return Verdict(None, (saved - saved_by_first) / (_TOKENS - _CUT))


def _mixes_tokens(run: Run, probe: Tensor, whole: Tensor, first: Tensor) -> str | None:
    with torch.no_grad():
        parts = torch.cat([first, run(probe[:, _CUT:])], dim=1)
        probe[:, _CUT] = float("nan")
        others = [n for n in range(_TOKENS) if n != _CUT]
        undisturbed = run(probe)[:, others]
    if not bool(torch.isfinite(whole).all()):
        return "its results on random tokens are not finite"
    if not close(parts, whole):
        return "its results on parts of a sequence differ from those on the whole"
    return None if close(undisturbed, whole[:, others]) else "a token has an effect on the results of others"


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding."""
    tolerance = _TOLERANCE.get(expected.dtype, 3e-2) * float(expected.abs().max())
    return bool(((found - expected).abs() <= tolerance).all())


def random_like(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The same numbers each time, where and in what precision `like` is."""
    if like.is_meta:
        return like.new_empty(shape)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu").to(like.device, like.dtype)


def _run_saving(run: Run, given: Tensor, weights: list[Tensor]) -> tuple[Any, int]:
    """(result, bytes that its graph holds beside what is given and what comes out)."""
    storages = []

    def pack(tensor: Tensor) -> Tensor:
        storages.append(tensor.untyped_storage())
        return tensor.detach()  # a result that its own graph holds would never be freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run(given)
    apart = {t.untyped_storage()._cdata for t in (given, *weights, result) if isinstance(t, Tensor)}
    return result, sum({s._cdata: s.nbytes() for s in storages if s._cdata not in apart}.values())


class _Watched(TorchDispatchMode):
    """Raises ValueError for an operation of which nothing is known, and for one that writes into any of `kept`."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self._kept = {t.untyped_storage()._cdata for t in kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = set(func.tags)
        known = func.is_view or {torch.Tag.pointwise, torch.Tag.reduction} & tags
        known = known or func._schema.name.removeprefix("aten::") in _ALLOWED
        if not known or {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output} & tags:
            raise ValueError(f"{func} may mix tokens, or choose among them")
        if func._schema.is_mutable and self._kept & {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}:
            raise ValueError(f"{func} writes into an argument, a weight or a buffer")
        return func(*args, **(kwargs or {}))


class _Attributes:
    """What the modules inside have as attributes and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._before = [(h, dict(h)) for m in module.modules() for h in (m.__dict__, m._buffers)]

    @property
    def changed(self) -> bool:
        return any(_differ(holder, before) for holder, before in self._before)

    def put_back(self) -> None:
        for holder, before in self._before:
            if _differ(holder, before):
                holder.clear()
                holder.update(before)


def _differ(holder: dict[str, Any], before: dict[str, Any]) -> bool:
    return holder.keys() != before.keys() or any(holder[name] is not value for name, value in before.items())
