"""Attention masks of transformers that are not made as a whole, but for some queries and the keys these reach.

transformers makes masks by functions of (batch, head, query, key), one after the other for all queries and keys: a
tensor of sequence x sequence. Here such a call is kept instead, and made for the part of the mask that is asked for, by
the same function with the same arguments. Any other use of a deferred mask than attention over blocks of queries makes
it as a whole, with one warning, and goes on with the tensor.

A mask that keeps the documents of a row apart is kept, too, however short the row: attention then takes each document
by itself, with the mask that it would have alone. So is the mask of a model whose own code does not look where the
positions that it is given begin anew (`documents_at`).
"""

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatrain.errors import UnsupportedModelError
from megatrain.model.mask_functions import documents_of, offsets_of
from megatrain.model.sequence_chunks import LONG_TOKENS, ChunkTokens, part_tokens

MaskFunction = Callable[..., Any]


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


class DocumentsMask(DeferredMask):
    """Of rows of several documents, each of which attends to itself alone.

    lengths: tokens of the documents, by row.
    part:    of a document, as of a sequence by itself; None where its mask may exist as a whole.
    """

    def __init__(
        self,
        make: MaskFunction,
        arguments: dict[str, Any],
        documents: tuple[Any, Tensor],
        part: int | None,
        owner: "DeferredMasks",
        *,
        additive: bool,
    ) -> None:
        super().__init__(make, arguments, part or arguments["q_length"], owner, additive=additive)
        self.of_one, numbers = documents
        self.lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in numbers]
        self._in_parts = part is not None
        self._by_length: dict[int, Any] = {}

    def of_document(self, tokens: int) -> Any:
        """What the model's own code would have had for a document of so many tokens by itself."""
        if tokens not in self._by_length:
            one = {"batch_size": 1, "q_length": tokens, "kv_length": tokens, "mask_function": self.of_one}
            given = self._arguments | one | {"allow_is_causal_skip": True}
            if self._in_parts and _needs_mask(self._make, given):
                self._by_length[tokens] = DeferredMask(self._make, given, self.part, self.owner, additive=self.additive)
            else:
                self._by_length[tokens] = self._make(**given)
        return self._by_length[tokens]

    def whole(self, why: str) -> Tensor:
        """Raises UnsupportedModelError where it would be large."""
        tokens = self.shape[2]
        if tokens > LONG_TOKENS:
            raise UnsupportedModelError(
                f"documents that share a row of {tokens:,} tokens would need a mask of {tokens:,} x {tokens:,}: {why};"
                f" use rows of {LONG_TOKENS:,} tokens at most, or one document to a row"
            )
        return super().whole(why)

    def _warn(self, why: str) -> None:
        """Such a mask is small: nobody is told, but the owner knows."""
        self.owner.whole_documents = why


class VarlenMask(DocumentsMask):
    """Of rows of several documents, for flash attention, which makes no masks and is told where documents begin.

    transformers finds that out from position_ids, but only of a single row."""

    def borders(self) -> dict[str, Any]:
        """Arguments of transformers' flash attention over all rows, one after the other."""
        lengths = [length for row in self.lengths for length in row]
        starts = torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)
        longest = max(lengths)
        found = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        return self._by_length.setdefault(0, found)  # type: ignore[no-any-return]

    def whole(self, why: str) -> Tensor:
        raise UnsupportedModelError(
            f"documents that share a row cannot be told to flash attention: {why}; use another attn_implementation, or"
            " one document to a row"
        )


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


# -- in place of transformers' mask functions -----------------------------------------------------------------------


class DeferredMasks:
    """Masks for models of these configurations are deferred where sequences run in parts, or rows hold several
    documents, until `remove`.

    obstacle: why they have to be tensors, of a model that can do with nothing else.
    """

    def __init__(self, configurations: Iterable[Any], setting: ChunkTokens, obstacle: str | None = None) -> None:
        self.configurations = {id(c): c for c in configurations}
        self.setting, self.obstacle = setting, obstacle
        self.verdicts: dict[Any, Any] = {}  # of kinds of attention: whether they can run over blocks
        self.warned = False
        self.whole_documents: str | None = None  # why a row of several documents had its mask as a whole
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


class _Rows(threading.local):
    """What the calling thread's model is given."""

    positions: Tensor | None = None


_rows = _Rows()


@contextmanager
def documents_at(positions: Tensor) -> Iterator[None]:
    """Masks of transformers keep documents apart which begin where `positions` [batch, tokens] begin anew."""
    before, _rows.positions = _rows.positions, positions
    try:
        yield
    finally:
        _rows.positions = before


def _keeping_documents_apart(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a causal mask over the rows that the model is given, if they do not say so already."""
    positions, function = _rows.positions, arguments.get("mask_function")
    rows, tokens = arguments["batch_size"], arguments["q_length"]
    if positions is None or positions.ndim != 2 or positions.shape[1] != tokens or positions.shape[0] not in (1, rows):
        return arguments
    no_others = arguments.get("attention_mask") is None and not arguments.get("use_vmap")
    if not no_others or documents_of(function) is not None or offsets_of(function)[1] != 0:
        return arguments
    masking: Any = sys.modules["transformers.masking_utils"]
    positions = positions.expand(rows, -1)
    numbers = masking.find_packed_sequence_indices(positions)
    if numbers is None:
        return arguments
    apart = masking.packed_sequence_compatibility_function(function, positions, numbers)
    return arguments | {"mask_function": apart, "allow_is_causal_skip": False}


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
        elif make is masking.flash_attention_mask:
            own = interface._local_mapping.get(name)
            interface[name] = value = _telling_documents(make)
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
        if owner is None or not _is_of_a_sequence_with_itself(arguments):
            return make(**arguments)
        part = part_tokens(owner.setting, arguments["q_length"])
        arguments = _keeping_documents_apart(arguments)
        # functions of the model's own take positions in the row, and not in the document
        documents = None if arguments.get("use_vmap") else documents_of(arguments.get("mask_function"))
        mask: DeferredMask
        if documents is not None:
            mask = DocumentsMask(make, arguments, documents, part, owner, additive=additive)
        elif part is not None and _needs_mask(make, arguments):
            mask = DeferredMask(make, arguments, part, owner, additive=additive)
        else:
            return make(**arguments)
        return mask if owner.obstacle is None else mask.whole(owner.obstacle)

    return mask


def _telling_documents(make: MaskFunction) -> MaskFunction:
    def mask(**arguments: Any) -> Any:
        if isinstance(arguments.get("attention_mask"), DeferredMask):
            return arguments["attention_mask"]
        owner = next((each for each in _open if id(arguments.get("config")) in each.configurations), None)
        if owner is None or not _is_of_a_sequence_with_itself(arguments):
            return make(**arguments)
        given = _keeping_documents_apart(arguments)
        documents = documents_of(given.get("mask_function"))
        if documents is None:
            return make(**arguments)
        mask = VarlenMask(make, given, documents, None, owner, additive=False)
        return mask if owner.obstacle is None else mask.whole(owner.obstacle)

    return mask


def _is_of_a_sequence_with_itself(arguments: dict[str, Any]) -> bool:
    tokens, offsets = arguments.get("q_length"), [arguments.get(name, 0) for name in ("q_offset", "kv_offset")]
    if not isinstance(tokens, int) or arguments.get("kv_length") != tokens:
        return False
    return all(isinstance(offset, int) and offset == 0 for offset in offsets)  # else of caches, or tensors


def _needs_mask(make: MaskFunction, arguments: dict[str, Any]) -> bool:
    """Whether `make` would look at its mask function at all: attention without padding may need none."""

    def needed(*_: Any) -> Any:
        raise _NeededError

    try:
        make(**(arguments | {"mask_function": needed}))
    except _NeededError:
        return True
    return False
