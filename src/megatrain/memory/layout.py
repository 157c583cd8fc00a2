"""Where each parameter lies in its unit's flat buffers. Pure arithmetic, no tensors.

A unit has at most two *slabs*, one per weight dtype. Inside a slab trainable parameters come first, in runs of
equal optimizer group, so that one pass of the optimizer sees few segments; frozen ones follow, without state:

    bf16 slab   weight 2 bytes | remainder 2 | exp_avg 4 | exp_avg_sq 4 | gradient 2 (kept for exact clipping)
    fp32 slab   weight 4 bytes |             | exp_avg 4 | exp_avg_sq 4 | gradient 4
"""

import math
from dataclasses import dataclass

ALIGNMENT_BYTES = 64  # a cache line, and the widest vector register
OPERAND_BYTES = 256  # what GPU libraries take operands to be aligned to, for their fastest kernels
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


def lay_out(requests: list[Request], *, whole_blocks: bool = False) -> list[SlabLayout]:
    """Place `requests` of one unit: one slab per dtype present, bf16 first; every start is cache-line aligned, and
    those of parameters of 256 bytes or more as a GPU wants them: in a slot they lie as here. `whole_blocks`: all as
    those; no two parameters then share a block of 64 elements."""
    slabs = []
    for dtype in ("bf16", "fp32"):
        chosen = [r for r in requests if r.dtype == dtype]
        if chosen:
            slabs.append(_lay_out_slab(dtype, chosen, whole_blocks))
    return slabs


def _lay_out_slab(dtype: str, requests: list[Request], whole_blocks: bool) -> SlabLayout:
    operand = OPERAND_BYTES // BYTES[dtype]
    line = operand if whole_blocks else ALIGNMENT_BYTES // BYTES[dtype]
    places, end, state_count = [], 0, 0
    for r in sorted(requests, key=lambda r: (not r.trainable, r.group)):  # stable: tree order inside a run
        count = math.prod(r.shape)
        start = _round_up(end, operand if count >= operand else line)
        places.append(Place(r.slot, r.shape, start, count, r.group, r.trainable))
        end = _round_up(start + count, line)
        if r.trainable:
            state_count = end
    return SlabLayout(dtype, tuple(places), _round_up(end, operand), state_count)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
