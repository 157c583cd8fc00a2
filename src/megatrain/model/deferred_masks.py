"""Attention masks of transformers that are not made as a whole, but for some queries and the keys these reach.

transformers makes masks by functions of (batch, head, query, key), one after the other for all queries and keys: a
tensor of sequence x sequence. Here such a call is kept instead, and made for the part of the mask that is asked for, by
the same function with the same arguments. Any other use of a deferred mask than attention over blocks of queries makes
it as a whole, with one warning, and goes on with the tensor.
"""

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from megatrain.model.sequence_chunks import ChunkTokens, part_tokens

MaskFunction = Callable[..., Any]
Offsets = tuple[float, float]  # of the keys that a query may attend to: (first, last) position less its own


class DeferredMask:
    """The mask [batch, 1, queries, keys] that `make(**arguments)` would be. Its own tensors are never written.

    additive: whether it is a float to be added to products of queries and keys, which then exist; else a boolean.
    part:     as many elements as (part x part) are what a block may take.
    owner:    what had it deferred.
    """

    def __init__(
        self, make: MaskFunction, arguments: dict[str, Any], part: int, owner: "DeferredMasks", *, additive: bool
    ) -> None:
        self.additive, self.part, self.owner = additive, part, owner
        self.shape = torch.Size([arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"]])
        self.ndim = len(self.shape)
        self.device = torch.device(arguments["device"])
        self.dtype: torch.dtype = arguments["dtype"] if additive else torch.bool
        self._make, self._arguments = make, arguments
        self._offsets = offsets_of(arguments["mask_function"])
        self._whole: Tensor | None = None
        self._lonely: bool | None = None

    def like(self, **changed: Any) -> Any:
        """A mask made in the same way, with some arguments changed, whatever it looks like."""
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return self._make(**(self._arguments | skips | changed))

    def of(self, queries: slice, keys: slice) -> Tensor:
        lengths = {"q_length": queries.stop - queries.start, "kv_length": keys.stop - keys.start}
        found: Tensor = self.like(q_offset=queries.start, kv_offset=keys.start, **lengths)
        return found

    def blocks(self, heads: int) -> list[tuple[slice, slice]]:
        """(queries, the keys that they reach) of each block of queries. `heads`: of the products, where they exist."""
        batch, _, queries, keys = self.shape
        first, last = self._offsets
        reached = min(keys, last - first + 1)  # by one query
        size = self._block_tokens(batch * (heads if self.additive else 1), int(reached))
        starts = range(0, queries, size)
        rows = [slice(start, min(start + size, queries)) for start in starts]
        return [(r, slice(int(max(0, r.start + first)), int(min(keys, r.stop + last)))) for r in rows]

    def _block_tokens(self, copies: int, reached: int) -> int:
        """As many queries as each reaches keys, or more if that is few, so that no more than half of a block's products
        are in vain; fewer where the block would take more than is allowed."""
        fitting = self.part**2 // (copies * (reached + self.part))
        return min(self.part, max(reached, _FEW), max(fitting, _FEWEST))

    def may_leave_out_a_query(self) -> bool:
        """Whether a query that predicts a token may have no key at all: padding before a token, or a mask function of
        the model's own."""
        if self._lonely is None:
            padding = self._arguments.get("attention_mask")
            before = padding is not None and bool((~padding[:, :-1].bool() & padding[:, 1:].bool()).any())
            self._lonely = before or bool(self._arguments.get("use_vmap"))
        return self._lonely

    def whole(self, why: str) -> Tensor:
        """As the model's own code would have had it."""
        if self._whole is None:
            self._whole = self._make(**self._arguments)
            self._warn(why)
        return self._whole

    def _warn(self, why: str) -> None:
        if not self.owner.warned:
            self.owner.warned = True
            queries, keys = self.shape[2:]
            warnings.warn(f"an attention mask of {queries} x {keys} positions exists as a whole: {why}", stacklevel=4)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.whole(f"the model reads its {name}"), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        why = f"{getattr(func, '__name__', func)} takes it"
        return func(*_made(args, why), **_made(kwargs or {}, why))


_FEW, _FEWEST = 256, 64  # queries of a block, for products to be fast, and if there is little room
_OPERATORS = "add radd sub rsub mul rmul truediv and rand or ror xor rxor invert neg eq ne lt le gt ge getitem len iter"


def _operator(name: str) -> Callable[..., Any]:
    def operate(self: DeferredMask, *others: Any) -> Any:
        return getattr(self.whole(f"the model's own code uses {name}"), name)(*_made(others, name))

    return operate


for _name in _OPERATORS.split():
    setattr(DeferredMask, f"__{_name}__", _operator(f"__{_name}__"))
DeferredMask.__hash__ = object.__hash__  # type: ignore[method-assign]


def _made(node: Any, why: str) -> Any:
    if isinstance(node, DeferredMask):
        return node.whole(why)
    if isinstance(node, (tuple, list)):
        return type(node)(_made(value, why) for value in node)
    return {name: _made(value, why) for name, value in node.items()} if isinstance(node, dict) else node


# -- which keys a query may attend to -----------------------------------------------------------------------------


def offsets_of(function: Any) -> Offsets:
    """Of transformers' own mask functions, told by their code, and what they are put together of; of any other
    function, all keys."""
    makers = _makers()
    kind = makers.get(function.__code__) if isinstance(function, FunctionType) else None
    if kind is None:
        return -math.inf, math.inf
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    inside = dict(zip(function.__code__.co_freevars, cells, strict=True))
    if kind == "causal_mask_function":
        return -math.inf, 0
    if kind == "sliding_window_overlay":
        return 1 - inside["sliding_window"], math.inf
    if kind == "sliding_window_bidirectional_overlay":
        return -inside["sliding_window"], inside["sliding_window"]
    if kind == "chunked_overlay":
        return 1 - inside["chunk_size"], inside["chunk_size"] - 1
    if kind == "remap_positions_for_packed_sequence":  # positions in one sequence of several
        return offsets_of(inside["mask_function"])
    found = [offsets_of(each) for each in inside["mask_functions"]]
    first, last = zip(*found, strict=True)
    return (max(first), min(last)) if kind == "and_masks" else (min(first), max(last))


@cache
def _makers() -> dict[Any, str]:
    """By the code of a mask function, what made it."""
    masking = sys.modules["transformers.masking_utils"]
    arguments = {
        "and_masks": (),
        "or_masks": (),
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "chunked_overlay": (1, None),
        "remap_positions_for_packed_sequence": (None, None),
    }
    known = {getattr(masking, name): given for name, given in arguments.items() if hasattr(masking, name)}
    return {masking.causal_mask_function.__code__: "causal_mask_function"} | {
        make(*given).__code__: make.__name__ for make, given in known.items()
    }


# -- in place of transformers' mask functions -----------------------------------------------------------------------


class DeferredMasks:
    """Masks for models of these configurations are deferred where sequences run in parts, until `remove`.

    obstacle: why they have to be tensors, of a model that can do with nothing else.
    """

    def __init__(self, configurations: Iterable[Any], setting: ChunkTokens, obstacle: str | None = None) -> None:
        self.configurations = {id(c): c for c in configurations}
        self.setting, self.obstacle = setting, obstacle
        self.verdicts: dict[Any, Any] = {}  # of kinds of attention: whether they can run over blocks
        self.warned = False
        self.on_meta: dict[int, Any] = {}  # the last attention over blocks on the meta device, by id of its module
        with _changing:
            _open.append(self)
            if len(_open) == 1:
                _stand_in()

    def remove(self) -> None:
        with _changing:
            if self in _open:
                _open.remove(self)
                if not _open:
                    _give_back()


_changing = threading.Lock()
_open: list[DeferredMasks] = []
_stood_in: list[tuple[Any, str, Any, Any]] = []  # (interface, name, what stands in, what the instance had of its own)


def _stand_in() -> None:
    masking = sys.modules["transformers.masking_utils"]
    interface = masking.ALL_MASK_ATTENTION_FUNCTIONS
    for name, make in list(interface.items()):
        if make in (masking.sdpa_mask, masking.eager_mask):
            own = interface._local_mapping.get(name)
            interface[name] = value = _deferring(make, additive=make is masking.eager_mask)
            _stood_in.append((interface, name, value, own))


def _give_back() -> None:
    while _stood_in:
        interface, name, value, own = _stood_in.pop()
        if interface._local_mapping.get(name) is not value:
            continue
        if own is None:
            del interface[name]
        else:
            interface[name] = own


class _NeededError(Exception):
    """A mask would be made."""


def _deferring(make: MaskFunction, *, additive: bool) -> MaskFunction:
    def mask(**arguments: Any) -> Any:
        if isinstance(arguments.get("attention_mask"), DeferredMask):
            return arguments["attention_mask"]  # handed on by an outer model, as masks of four dimensions are
        owner = next((each for each in _open if id(arguments.get("config")) in each.configurations), None)
        part = _part_of(arguments, owner.setting) if owner is not None else None
        if owner is None or part is None or not _needs_mask(make, arguments):
            return make(**arguments)
        mask = DeferredMask(make, arguments, part, owner, additive=additive)
        return mask if owner.obstacle is None else mask.whole(owner.obstacle)

    return mask


def _part_of(arguments: dict[str, Any], setting: ChunkTokens) -> int | None:
    """Tokens of a part where a mask may be deferred: one of a sequence with itself, which runs in parts."""
    tokens, offsets = arguments.get("q_length"), [arguments.get(name, 0) for name in ("q_offset", "kv_offset")]
    if not isinstance(tokens, int) or arguments.get("kv_length") != tokens:
        return None
    if any(not isinstance(offset, int) or offset != 0 for offset in offsets):  # of caches, or tensors
        return None
    return part_tokens(setting, tokens)


def _needs_mask(make: MaskFunction, arguments: dict[str, Any]) -> bool:
    """Whether `make` would look at its mask function at all: attention without padding may need none."""

    def needed(*_: Any) -> Any:
        raise _NeededError

    try:
        make(**(arguments | {"mask_function": needed}))
    except _NeededError:
        return True
    return False
