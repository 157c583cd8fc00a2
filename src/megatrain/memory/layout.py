"""Where each parameter lies in its unit's flat buffers. Pure arithmetic, no tensors.

A unit has at most two *slabs*, one per weight dtype. Inside a slab trainable parameters come first, in runs of
equal optimizer group, so that one pass of the optimizer sees few segments; frozen ones follow, without state:

    bf16 slab   weight 2 bytes | remainder 2 | exp_avg 4 | exp_avg_sq 4 | gradient 2 (kept for exact clipping)
    fp32 slab   weight 4 bytes |             | exp_avg 4 | exp_avg_sq 4 | gradient 4
"""

import math
from dataclasses import dataclass

ALIGNMENT_BYTES = 256  # of a parameter: what GPU kernels want of pointers, and whole blocks of 64 elements (moments)
BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Request:
    """A parameter to place: its slot index, shape, weight dtype ('bf16' | 'fp32'), group, and whether it trains."""

    slot: int
    shape: tuple[int, ...]
    dtype: str
    group: int
    trainable: bool


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter's element range [start, start + count) in its slab."""

    slot: int
    shape: tuple[int, ...]
    start: int
    count: int
    group: int
    trainable: bool


@dataclass(frozen=True, slots=True)
class SlabLayout:
    """One dtype's parameters of a unit. The first `state_count` elements carry optimizer state."""

    dtype: str
    places: tuple[Place, ...]
    count: int
    state_count: int

    @property
    def weight_bytes(self) -> int:
        return self.count * BYTES[self.dtype]

    @property
    def remainder_bytes(self) -> int:
        return self.state_count * 2 if self.dtype == "bf16" else 0

    @property
    def moment_bytes(self) -> int:
        """Bytes of one of the two moments, fp32."""
        return self.state_count * 4

    @property
    def gradient_bytes(self) -> int:
        return self.state_count * BYTES[self.dtype]


def lay_out(requests: list[Request]) -> list[SlabLayout]:
    """Place `requests` of one unit: one slab per dtype present, bf16 first; every start is aligned."""
    slabs = []
    for dtype in ("bf16", "fp32"):
        chosen = [r for r in requests if r.dtype == dtype]
        if chosen:
            slabs.append(_lay_out_slab(dtype, chosen))
    return slabs


def _lay_out_slab(dtype: str, requests: list[Request]) -> SlabLayout:
    step = ALIGNMENT_BYTES // BYTES[dtype]
    places, start, state_count = [], 0, 0
    for r in sorted(requests, key=lambda r: (not r.trainable, r.group)):  # stable: tree order inside a run
        count = math.prod(r.shape)
        places.append(Place(r.slot, r.shape, start, count, r.group, r.trainable))
        start += -(-count // step) * step
        if r.trainable:
            state_count = start
    return SlabLayout(dtype, tuple(places), start, state_count)
