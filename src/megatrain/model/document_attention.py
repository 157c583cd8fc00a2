"""Attention of transformers models over rows of several documents, one document after the other.

Each document is attention with the mask that it would have by itself, for most models none at all but `is_causal`: no
mask of row x row exists, no product of two documents is computed, and the arithmetic is that of the document alone.
Windows and chunks of attention begin anew with it.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.model.deferred_masks import DocumentsMask
from megatrain.model.token_wise import close, random_like

States = tuple[Tensor, Tensor, Tensor]  # queries, keys and values: [batch, heads, tokens, width]
Others = dict[str, Any]  # what an attention function is called with beside module, states and mask

_LENGTHS = (5, 3)  # of the probe's documents


def over_documents(
    attend: Callable[..., Any], module: nn.Module, states: States, mask: DocumentsMask, others: Others
) -> Tensor:
    """[batch, tokens, heads, width]: what `attend` gives for each document."""
    rows = []
    for number, lengths in enumerate(mask.lengths):
        documents = zip(*(state[number : number + 1].split(lengths, dim=2) for state in states), strict=True)
        found = [attend(module, *parts, mask.of_document(parts[0].shape[2]), **others)[0] for parts in documents]
        rows.append(torch.cat(found, dim=1))
    return torch.cat(rows)


def try_out_documents(
    function: Callable[..., Any], module: nn.Module, states: States, mask: DocumentsMask, others: Others
) -> str | None:
    """Why documents cannot go one by one: `function` gives them something else than a row with the whole mask does, on
    random tokens. None where it does not."""
    tokens, device = sum(_LENGTHS), states[0].device
    query, key, value = (random_like((1, s.shape[1], tokens, s.shape[3]), s) for s in states)
    probes = (query, key.flip(2), value.flip(3))
    if query.is_meta:
        return None
    numbers = torch.repeat_interleave(torch.arange(len(_LENGTHS)), torch.tensor(_LENGTHS))[None].to(device)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS])[None].to(device)
    apart: Any = sys.modules["transformers.masking_utils"].packed_sequence_compatibility_function  # type: ignore[attr-defined]

    def run(parts: Any, mask_function: Any, skip: bool) -> Any:
        lengths = {"batch_size": 1, "q_length": parts[0].shape[2], "kv_length": parts[0].shape[2]}
        made = mask.like(mask_function=mask_function, allow_is_causal_skip=skip, **lengths)
        return function(module, *parts, made, **others)[0]

    expected = run(probes, apart(mask.of_one, positions, numbers), False)
    documents = zip(*(probe.split(_LENGTHS, dim=2) for probe in probes), strict=True)
    found = [run(parts, mask.of_one, True) for parts in documents]
    name = getattr(function, "__name__", type(function).__name__)
    if not isinstance(expected, Tensor) or expected.ndim != 4 or expected.shape[:2] != (1, tokens):
        return f"{name} does not return a tensor [batch, tokens, heads, width]"
    if not close(torch.cat(found, dim=1), expected):
        return f"{name} gives other results for a document than for a row of them"
    return None
