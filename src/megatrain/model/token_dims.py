"""Follows the token dimension of a tensor through a module's operations, by shapes alone.

An operation is let through only where it is known to act on every token by itself: products with something that has no
tokens, operations element by element, reductions, norms and views of other dimensions. Whatever has as many rows as
there are tokens and does not come from the tensor (a table of positions, a mask) is refused too: a part of a sequence
would get other rows of it.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SAME_SHAPE = frozenset({"clone", "_to_copy", "alias", "detach", "contiguous", "lift_fresh"})
_NEW = frozenset(form.format(k) for form in ("{}", "{}_like", "new_{}") for k in ("empty", "zeros", "ones", "full"))
_OF_NUMBERS = _NEW | {"scalar_tensor"}


class MixesTokensError(ValueError):
    """An operation that may mix tokens, or of which nothing is known."""


class TokenDims(TorchDispatchMode):
    """Watches operations on `tensor`, whose dimension 1 has a length that no other dimension in sight has."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.length = tensor.shape[1]
        self._dims: dict[int, int] = {id(tensor): 1}
        self._alive: list[Tensor] = [tensor]  # an id is one's own while it lives

    def dim_of(self, tensor: Any) -> int | None:
        """Where `tensor` has its tokens; None where it has none."""
        return self._dims.get(id(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in _flat((args, kwargs)) if isinstance(t, Tensor)]
        followed = [t for t in tensors if id(t) in self._dims]
        name = func._schema.name.removeprefix("aten::")
        result = func(*args, **kwargs)
        if not followed:
            if name not in _OF_NUMBERS:
                self._refuse_rows(tensors, name)
            return result
        if func._schema.is_mutable and not (followed and args and id(args[0]) in self._dims):
            raise MixesTokensError(f"{name} writes into something that is no result of its own")
        rule = _RULES.get(name) or self._rule_by_tag(func, name)
        dims = rule(self, name, args, kwargs, result)
        for output in [o for o in _flat(result) if isinstance(o, Tensor)]:
            if dims is None or dims >= output.ndim or output.shape[dims] != self.length:
                raise MixesTokensError(f"{name} leaves no dimension of tokens")
            self._dims[id(output)] = dims
            self._alive.append(output)
        return result

    def _rule_by_tag(self, func: Any, name: str) -> Callable[..., int | None]:
        if {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output} & set(func.tags):
            raise MixesTokensError(f"{name} depends on chance, or on values")
        if torch.Tag.pointwise in func.tags:
            return _pointwise
        if torch.Tag.reduction in func.tags:
            return _reduction
        raise MixesTokensError(f"{name} may mix tokens, or choose among them")

    def _refuse_rows(self, tensors: list[Tensor], name: str) -> None:
        """Of what does not come from the tensor: nothing may be as long as it."""
        if any(self.length in t.shape for t in tensors):
            raise MixesTokensError(f"{name} works on something else that has a row for each token")


class Trail(TorchDispatchMode):
    """`steps`: operations and the numbers among their arguments, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        numbers = [n for n in _flat((args, kwargs or {})) if isinstance(n, (bool, int, float, complex))]
        self.steps.append((str(func), numbers))
        return func(*args, **(kwargs or {}))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [one for item in value for one in _flat(item)]
    if isinstance(value, dict):
        return _flat(list(value.values()))
    return [value]


def _pointwise(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Aligned from the right, as in broadcasting; all that have tokens have them in one place, others one row there."""
    tensors = [t for t in _flat((args, kwargs)) if isinstance(t, Tensor)]
    places = {watch.dim_of(t) - t.ndim for t in tensors if watch.dim_of(t) is not None}  # type: ignore[operator]
    if len(places) != 1:
        raise MixesTokensError(f"{name} meets tokens with each other")
    (place,) = places
    for tensor in tensors:
        if watch.dim_of(tensor) is None and tensor.ndim >= -place and tensor.shape[place] != 1:
            raise MixesTokensError(f"{name} works on something else that has a row for each token")
    return int(result.ndim + place)


def _own(watch: TokenDims, tensor: Any, name: str) -> int:
    dim = watch.dim_of(tensor)
    if dim is None:
        raise MixesTokensError(f"{name} has tokens where they are mixed")
    return dim


def _without(watch: TokenDims, name: str, *others: Any) -> None:
    if any(isinstance(t, Tensor) and watch.dim_of(t) is not None for t in others):
        raise MixesTokensError(f"{name} meets tokens with each other")
    watch._refuse_rows([t for t in others if isinstance(t, Tensor)], name)


def _argument(args: Any, kwargs: Any, place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _reduction(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Any) -> int:
    dim, given = _own(watch, args[0], name), _argument(args, kwargs, 1, "dim")
    if given is None or given == []:
        raise MixesTokensError(f"{name} reduces over tokens")
    reduced = {d % args[0].ndim for d in (given if isinstance(given, (list, tuple)) else [given])}
    if dim in reduced:
        raise MixesTokensError(f"{name} reduces over tokens")
    outputs = [o for o in _flat(result) if isinstance(o, Tensor)]
    return dim if outputs[0].ndim == args[0].ndim else dim - sum(d < dim for d in reduced)


def _same(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Any) -> int:
    return _own(watch, args[0], name)


def _view(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Tensor) -> int:
    """Tokens keep a dimension of their own, with as much behind it as before: then the same elements are in each."""
    dim = _own(watch, args[0], name)
    behind = prod(args[0].shape[dim + 1 :])
    for place, size in enumerate(result.shape):
        if size == watch.length and prod(result.shape[place + 1 :]) == behind:
            return place
    raise MixesTokensError(f"{name} takes tokens apart or joins them")


def _permuted(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Any) -> int:
    dim, ndim = _own(watch, args[0], name), args[0].ndim
    if name == "permute":
        return [int(d) % ndim for d in args[1]].index(dim)
    one, other = (0, 1) if name == "t" else (int(args[1]) % ndim, int(args[2]) % ndim)
    return {one: other, other: one}.get(dim, dim)


def _other_dim(place: int, default: Any = None) -> Callable[..., int]:
    """Operations along one dimension, argument number `place`, which is not that of tokens."""

    def rule(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Any) -> int:
        dim, along = _own(watch, args[0], name), _argument(args, kwargs, place, "dim", default)
        if along % args[0].ndim == dim:
            raise MixesTokensError(f"{name} goes along tokens")
        return dim - 1 if name == "select" and along % args[0].ndim < dim else dim

    return rule


def _slice(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Tensor) -> int:
    dim, along = _own(watch, args[0], name), _argument(args, kwargs, 1, "dim", 0)
    if along % args[0].ndim == dim and (result.shape != args[0].shape or _argument(args, kwargs, 4, "step", 1) != 1):
        raise MixesTokensError(f"{name} chooses among tokens")
    return dim


def _unsqueezed(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Tensor) -> int:
    dim = _own(watch, args[0], name)
    return dim + int(args[1] % result.ndim <= dim)


def _squeezed(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Tensor) -> int:
    dim, given = _own(watch, args[0], name), _argument(args, kwargs, 1, "dim")
    dims = range(args[0].ndim) if given is None else (given if isinstance(given, (list, tuple)) else [given])
    return dim - sum(int(args[0].shape[d] == 1 and d % args[0].ndim < dim) for d in dims)


def _expanded(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Tensor) -> int:
    return _own(watch, args[0], name) + result.ndim - int(args[0].ndim)


def _joined(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Tensor) -> int:
    dims, along = {watch.dim_of(t) for t in args[0]}, _argument(args, kwargs, 1, "dim", 0) % args[0][0].ndim
    if len(dims) != 1 or None in dims or along in dims:
        raise MixesTokensError(f"{name} joins tokens with something else")
    (dim,) = dims
    assert dim is not None
    return dim


def _product(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Any) -> int:
    """Rows of the first factor; or, of batches of matrices, one for each token."""
    *added, one, other = args[:3] if name in ("addmm", "baddbmm") else args[:2]
    _without(watch, name, *added)
    dim = _own(watch, one, name)
    if name in ("bmm", "baddbmm") and dim == 0:
        if watch.dim_of(other) not in (0, None) or (watch.dim_of(other) is None and other.shape[0] != 1):
            raise MixesTokensError(f"{name} meets tokens with each other")
        return 0
    _without(watch, name, other)
    if dim != one.ndim - 2:
        raise MixesTokensError(f"{name} adds up over tokens")
    return dim


def _norm(watch: TokenDims, name: str, args: Any, kwargs: Any, result: Any) -> int:
    dim = _own(watch, args[0], name)
    _without(watch, name, *args[1:])
    if dim >= args[0].ndim - len(args[1]):
        raise MixesTokensError(f"{name} reduces over tokens")
    return dim


_RULES: dict[str, Callable[..., int | None]] = (
    dict.fromkeys(_SAME_SHAPE, _same)
    | dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view)
    | dict.fromkeys(("permute", "transpose", "t"), _permuted)
    | dict.fromkeys(("_softmax", "_log_softmax", "select"), _other_dim(1))
    | dict.fromkeys(("glu",), _other_dim(1, -1))
    | dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split"), _other_dim(2, 0))
    | dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product)
    | dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _norm)
    | {"slice": _slice, "unsqueeze": _unsqueezed, "squeeze": _squeezed, "expand": _expanded, "cat": _joined}
)
