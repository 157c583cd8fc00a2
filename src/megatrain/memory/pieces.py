"""Optimizer state in pieces: what of a slab is in host memory at a time, where the whole does not stay there.

A piece begins at a multiple of PIECE_ELEMENTS: a multiple of 64, so that no block of moments of one byte is cut, and of
4096, so that each array in a piece begins at a page where there is one of 2 or 4 bytes per element. AdamW takes every
element alike (docs/decisions/0003), so a slab that is updated piece by piece has the bits of one updated as a whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatrain.memory.layout import Place, SlabLayout
from megatrain.memory.slab_state import elements_bytes
from megatrain.memory.spill_file import round_up

PIECE_ELEMENTS = 1 << 23  # 84 MB with moments in fp32: a transfer of some ten milliseconds


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of the `slab`-th slab of a unit, of those that carry state."""

    unit: int
    slab: int
    start: int
    stop: int

    def overlap(self, place: Place) -> tuple[slice, slice] | None:
        """The elements of a parameter that lie in the piece: where in the piece, and where in the parameter."""
        start, stop = max(self.start, place.start), min(self.stop, place.start + place.count)
        if start >= stop:
            return None
        return slice(start - self.start, stop - self.start), slice(start - place.start, stop - place.start)


def whole(unit: int, slabs: Iterable[SlabLayout]) -> list[Piece]:
    """Each slab's state as one piece."""
    return [Piece(unit, number, 0, slab.state_count) for number, slab in enumerate(slabs)]


def cut(unit: int, slabs: Iterable[SlabLayout]) -> list[Piece]:
    """Pieces of PIECE_ELEMENTS and, at the end of each slab, of what is left."""
    return [
        Piece(unit, number, start, min(start + PIECE_ELEMENTS, slab.state_count))
        for number, slab in enumerate(slabs)
        for start in range(0, slab.state_count, PIECE_ELEMENTS)
    ]


def disk_bytes(slabs: Iterable[SlabLayout], moments: str) -> int:
    """That the pieces of a unit take: each whole blocks of the disk."""
    return sum(n * count for n, count in _sizes(slabs, moments))


def buffer_bytes(slabs: Iterable[SlabLayout], moments: str) -> int:
    """That the largest piece of `slabs` takes in memory."""
    return max((n for n, count in _sizes(slabs, moments) if count), default=0)


def _sizes(slabs: Iterable[SlabLayout], moments: str) -> Iterator[tuple[int, int]]:
    """(bytes of a piece, how many of that size there are)."""
    for slab in slabs:
        full, rest = divmod(slab.state_count, PIECE_ELEMENTS)
        yield round_up(elements_bytes(PIECE_ELEMENTS, slab.dtype, moments)), full
        yield round_up(elements_bytes(rest, slab.dtype, moments)), 1
