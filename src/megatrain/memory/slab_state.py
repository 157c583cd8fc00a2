"""What only the optimizer reads of a slab, in one stretch of memory: remainders of the masters, and both moments.

    fp32   remainder 2 (bf16 slabs) | exp_avg 4 | exp_avg_sq 4
    int8   remainder 2 (bf16 slabs) | exp_avg 1 | exp_avg_sq 1 | scales of blocks of 64: 4 + 4

bytes per element. One stretch can be read from a disk, or written there, in one go.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatrain.memory.layout import Place, SlabLayout
from megatrain.optim.int8_moments import BLOCK, Int8Moments, blocks


@dataclass(frozen=True, slots=True)
class Fp32Moments:
    """Both moments of n elements, float32 (n)."""

    exp_avg: np.ndarray
    exp_avg_sq: np.ndarray


@dataclass(frozen=True, slots=True)
class SlabState:
    """Views of the stretch. remainder int16 (state_count), None for fp32 slabs."""

    remainder: np.ndarray | None
    moments: Fp32Moments | Int8Moments

    @classmethod
    def within(cls, memory: Tensor, layout: SlabLayout, moments: str) -> "SlabState":
        """Of the first `state_bytes(layout, moments)` bytes of `memory` (uint8), whatever they hold."""
        parts, start = [], 0
        for dtype, count in _sections(layout, moments):
            n_bytes = count * np.dtype(dtype).itemsize
            parts.append(memory[start : start + n_bytes].numpy().view(dtype))
            start += n_bytes
        remainder = parts.pop(0) if layout.dtype == "bf16" else None
        return cls(remainder, Fp32Moments(*parts) if moments == "fp32" else Int8Moments(*parts))

    def of_place(self, place: Place) -> dict[str, Tensor]:
        """A parameter's moments by name, views: in its shape, scales of its blocks 1-D."""
        elements, shared = slice(place.start, place.start + place.count), blocks(place.count)
        held: dict[str, Any] = {
            "exp_avg": self.moments.exp_avg[elements],
            "exp_avg_sq": self.moments.exp_avg_sq[elements],
        }
        named = {name: torch.from_numpy(array).view(place.shape) for name, array in held.items()}
        if isinstance(self.moments, Int8Moments):
            scales = slice(place.start // BLOCK, place.start // BLOCK + shared)
            named["exp_avg_scale"] = torch.from_numpy(self.moments.exp_avg_scale[scales])
            named["exp_avg_sq_scale"] = torch.from_numpy(self.moments.exp_avg_sq_scale[scales])
        return named


def moment_bytes(layout: SlabLayout, moments: str) -> int:
    """Of one of the two."""
    n = layout.state_count
    return 4 * n if moments == "fp32" else n + 4 * blocks(n)


def state_bytes(layout: SlabLayout, moments: str) -> int:
    return layout.remainder_bytes + 2 * moment_bytes(layout, moments)


def unit_state_bytes(slabs: Iterable[SlabLayout], moments: str) -> int:
    """Of a unit: its slabs' one behind the other."""
    return sum(state_bytes(layout, moments) for layout in slabs)


def _sections(layout: SlabLayout, moments: str) -> list[tuple[Any, int]]:
    n = layout.state_count
    remainder: list[tuple[Any, int]] = [(np.int16, n)] if layout.dtype == "bf16" else []
    if moments == "fp32":
        return [*remainder, (np.float32, n), (np.float32, n)]
    return [*remainder, (np.int8, n), (np.uint8, n), (np.float32, blocks(n)), (np.float32, blocks(n))]
