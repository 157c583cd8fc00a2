"""What only the optimizer reads of a slab, in one stretch of memory: remainders of the masters, and both moments.

    fp32   remainder 2 (bf16 slabs) | exp_avg 4 | exp_avg_sq 4
    int8   remainder 2 (bf16 slabs) | exp_avg 1 | exp_avg_sq 1 | scales of blocks of 64: 4 + 4

bytes per element. One stretch can be read from a disk, or written there, in one go; so can a piece of a slab
(`memory/pieces.py`), which is laid out like a slab of as many elements.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.memory.layout import SlabLayout
from megatrain.optim.int8_moments import BLOCK, blocks

# what a parameter's moments are called, and hold: of each element, or of each block
MOMENTS: Mapping[str, Mapping[str, torch.dtype]] = {
    "fp32": {"exp_avg": torch.float32, "exp_avg_sq": torch.float32},
    "int8": {
        "exp_avg": torch.int8,
        "exp_avg_sq": torch.uint8,
        "exp_avg_scale": torch.float32,
        "exp_avg_sq_scale": torch.float32,
    },
}


@dataclass(frozen=True, slots=True)
class SlabState:
    """Views of the stretch, 1-D. remainder int16 (n), None for fp32 slabs; moments by name, as MOMENTS has them."""

    remainder: Tensor | None
    moments: dict[str, Tensor]

    @classmethod
    def within(cls, memory: Tensor, count: int, dtype: str, moments: str) -> "SlabState":
        """Of `count` elements of a slab of `dtype`: the first bytes of `memory` (uint8), whatever they hold."""
        parts, start = {}, 0
        for name, kind, length in _sections(count, dtype, moments):
            n_bytes = length * kind.itemsize
            parts[name] = memory[start : start + n_bytes].view(kind)
            start += n_bytes
        return cls(parts.pop("remainder", None), parts)

    def parts(self) -> dict[str, Tensor]:
        """All of it by name, in the order in which it lies."""
        return ({} if self.remainder is None else {"remainder": self.remainder}) | self.moments

    def moments_of(self, elements: slice) -> dict[str, Tensor]:
        """By name, 1-D views. `elements` begin a block."""
        return {name: part[where(name, elements)] for name, part in self.moments.items()}

    def parts_of(self, elements: slice) -> dict[str, Tensor]:
        """Likewise, and the remainder where there is one."""
        remainder = {} if self.remainder is None else {"remainder": self.remainder[elements]}
        return remainder | self.moments_of(elements)


def where(name: str, elements: slice) -> slice:
    """Of the moment `name`, what belongs to `elements`: a scale belongs to a block."""
    return slice(elements.start // BLOCK, blocks(elements.stop)) if name.endswith("scale") else elements


def empty_state(count: int, dtype: str, moments: str, device: str = "cpu") -> dict[str, Tensor]:
    """Moments and remainder by name, 1-D, of a parameter of `count` elements; whatever they hold."""
    sections = _sections(count, dtype, moments)
    return {name: torch.empty(length, dtype=kind, device=device) for name, kind, length in sections}


def moment_bytes(layout: SlabLayout, moments: str) -> int:
    """Of one of the two."""
    n = layout.state_count
    return 4 * n if moments == "fp32" else n + 4 * blocks(n)


def state_bytes(layout: SlabLayout, moments: str) -> int:
    return elements_bytes(layout.state_count, layout.dtype, moments)


def elements_bytes(count: int, dtype: str, moments: str) -> int:
    """Of `count` elements' state in a slab of `dtype`."""
    return sum(length * kind.itemsize for _, kind, length in _sections(count, dtype, moments))


def unit_state_bytes(slabs: Iterable[SlabLayout], moments: str) -> int:
    """Of a unit: its slabs' one behind the other."""
    return sum(state_bytes(layout, moments) for layout in slabs)


def _sections(count: int, dtype: str, moments: str) -> Iterator[tuple[str, torch.dtype, int]]:
    """(name, dtype, elements), in the order in which they lie."""
    if dtype == "bf16":
        yield "remainder", torch.int16, count
    for name, kind in MOMENTS[moments].items():
        yield name, kind, where(name, slice(0, count)).stop
