"""Whether documents may share a row: whether a model, told where they begin, keeps them apart.

It is tried out, not looked up: a small model of the same kind (`reduced.py`) runs on a row of several documents and on
each by itself. What differs but for rounding has leaked, or counts positions in the row. A state that goes on through a
row (of mamba, of linear attention, of a convolution) shows so, whatever it is called.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.errors import CapacityError, ConfigError
from megatrain.model.blockwise_attention import BlockwiseAttention
from megatrain.model.loading import one_line
from megatrain.model.reduced import VOCABULARY, reduced_model
from megatrain.model.root import RootForward
from megatrain.model.token_wise import close

_LENGTHS = (9, 7, 1, 6)  # of the documents; windows of the small model are shorter
_OWN_VARLEN = ("flash_attention", "flex_attention")  # they keep documents apart by themselves, on devices of their own


@dataclass(frozen=True, slots=True)
class SharedRows:
    """`obstacle`: why documents may not share a row, None where they may. `whole_mask`: why attention needs a mask of
    row x row for it, None where it does not."""

    obstacle: str | None
    whole_mask: str | None = None


def judge_shared_rows(config: Any, attention: str | None = None, *, compiled: bool = False) -> SharedRows:
    """Of a model of this configuration. `compiled`: its blocks are, and take tensors alone for masks."""
    tried = None if attention is not None and attention.startswith(_OWN_VARLEN) else attention
    if compiled and attention is not None and attention.startswith("flash_attention"):
        return SharedRows("compiled blocks cannot be told where documents begin for flash attention")
    with torch.random.fork_rng(devices=[]):
        try:
            model = reduced_model(config, tried)
        except ConfigError as error:
            return SharedRows(str(error))
        whole_mask = "compiled blocks take tensors for masks" if compiled else None
        blockwise = None if compiled else BlockwiseAttention(model, None)
        root = RootForward(model, flush=lambda: None, forward_pass=lambda _: nullcontext())
        try:
            with torch.no_grad():
                obstacle = _obstacle(model, root)
        except (CapacityError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever the model's own code raises on arguments that it does not know
            obstacle = f"{type(model).__name__}: {one_line(error)}"
        finally:
            if blockwise is not None:
                whole_mask = blockwise.whole_documents
                blockwise.remove()
        return SharedRows(obstacle, whole_mask)


def _obstacle(model: nn.Module, root: RootForward) -> str | None:
    documents = _documents(seed=0)
    apart = torch.cat([root(input_ids=ids[None], use_cache=False).logits for ids in documents], dim=1)
    if not bool(torch.isfinite(apart).all()):
        return f"{type(model).__name__} gives results that are not finite on random weights"
    together = root(**_row(documents)).logits
    if together.shape == apart.shape and close(together, apart):
        return None
    leak = _first_leak(model, lambda ids: root(**_row(ids)), documents)
    if leak is not None:
        return f"{leak} carries a document's state into the next one of its row"
    return f"{type(model).__name__} computes something else of a document in a row of several"


def _documents(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY // 2, (length,), generator=generator) for length in _LENGTHS]


def _row(documents: list[Tensor]) -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(len(ids)) for ids in documents])
    return {"input_ids": torch.cat(documents)[None], "position_ids": positions[None]}


def _first_leak(model: nn.Module, run: Callable[[list[Tensor]], Any], documents: list[Tensor]) -> str | None:
    """The innermost class of the model's own that makes of another first document something else of what follows it,
    which it is given as before."""
    runs: list[list[tuple[str, list[Tensor], list[Tensor]]]] = []

    def what_follows(values: Any) -> list[Tensor]:
        """The first document."""
        tokens, first = sum(_LENGTHS), _LENGTHS[0]
        tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim == 3]
        return [t[:, first:].clone() for t in tensors if t.shape[1] == tokens]

    def note(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not type(module).__module__.startswith("torch."):
            results = result if isinstance(result, tuple) else (result,)
            before = what_follows((*args, *kwargs.values()))
            runs[-1].append((type(module).__name__, before, what_follows(results)))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        for given in (documents, [_documents(seed=1)[0], *documents[1:]]):
            runs.append([])
            run(given)
    finally:
        for hook in hooks:
            hook.remove()
    for one, other in zip(runs[0], runs[1], strict=False):
        if _same(one[1], other[1]) and not _same(one[2], other[2]):
            return one[0]
    return None


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(close(a, b) for a, b in zip(one, other, strict=True))
