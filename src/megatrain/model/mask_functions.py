"""What transformers' own mask functions mean, told by their code: which keys a query reaches, and whether a row holds
several documents."""

import math
import sys
from functools import cache
from types import FunctionType
from typing import Any

from torch import Tensor

Offsets = tuple[float, float]  # of the keys that a query may attend to: (first, last) position less its own


def offsets_of(function: Any) -> Offsets:
    """Of transformers' own mask functions and what they are put together of; of any other function, all keys."""
    kind, inside = _look_inside(function)
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
    if kind not in ("and_masks", "or_masks"):
        return -math.inf, math.inf
    found = [offsets_of(each) for each in inside["mask_functions"]]
    first, last = zip(*found, strict=True)
    return (max(first), min(last)) if kind == "and_masks" else (min(first), max(last))


def documents_of(function: Any) -> tuple[Any, Tensor] | None:
    """(the mask function of one document, number of each token's document [batch, tokens]) where rows hold several
    documents apart from each other, as position_ids that begin anew say; None where `function` says anything else."""
    kind, inside = _look_inside(function)
    parts = inside["mask_functions"] if kind == "and_masks" else ()
    kinds = [_look_inside(part) for part in parts]
    if [kind for kind, _ in kinds] != ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"]:
        return None
    (_, packed), (_, remapped) = kinds
    of_one = remapped["mask_function"]
    if offsets_of(of_one)[1] != 0:  # nothing is known of it, or it looks ahead
        return None
    return of_one, packed["packed_sequence_mask"]


def _look_inside(function: Any) -> tuple[str | None, dict[str, Any]]:
    """(what made it, what it was made of); None for a function that transformers did not make."""
    kind = _makers().get(function.__code__) if isinstance(function, FunctionType) else None
    if kind is None:
        return None, {}
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return kind, dict(zip(function.__code__.co_freevars, cells, strict=True))


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
        "packed_sequence_mask_function": (None,),
        "remap_positions_for_packed_sequence": (None, None),
    }
    known = {getattr(masking, name): given for name, given in arguments.items() if hasattr(masking, name)}
    return {masking.causal_mask_function.__code__: "causal_mask_function"} | {
        make(*given).__code__: make.__name__ for make, given in known.items()
    }
