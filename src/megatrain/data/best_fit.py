"""Examples of differing lengths into rows of one length: best-fit decreasing.

The longest example goes first, each into the row where it leaves the least room, or into a new one. Which lengths share
a row depends on the lengths alone; which examples of a length go there is drawn anew for each epoch.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Row n holds examples[starts[n] : starts[n + 1]], each example of all being in one row."""

    examples: Numbers
    starts: Numbers

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> Numbers:
        return self.examples[self.starts[number] : self.starts[number + 1]]


def pack(lengths: Numbers, row_tokens: int) -> Packing:
    """Rows of `row_tokens` at most; no length may be more. Among examples of one length the first comes first."""
    slots = np.argsort(-lengths, kind="stable")
    row_of_slot = _rows_of(lengths[slots], row_tokens)
    return _grouped(slots, row_of_slot)


def shuffled(packing: Packing, lengths: Numbers, seed: int, epoch: int) -> Packing:
    """As many rows of the same lengths, but which example of a length is where, and the order of rows, are drawn from
    seed and epoch."""
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    drawn = random.permutation(len(lengths))
    drawn = drawn[np.argsort(-lengths[drawn], kind="stable")]
    by_length = np.argsort(-lengths[packing.examples], kind="stable")
    examples = np.empty_like(packing.examples)
    examples[by_length] = drawn
    return _reordered(Packing(examples, packing.starts), random.permutation(len(packing)))


def in_order(packing: Packing) -> Packing:
    """The same rows in the order of the first example of each."""
    firsts = np.minimum.reduceat(packing.examples, packing.starts[:-1])
    return _reordered(packing, np.argsort(firsts, kind="stable"))


def _rows_of(lengths: Numbers, row_tokens: int) -> Numbers:
    """The row of each of `lengths`, which fall."""
    rows: list[int] = []
    times: list[int] = []  # how many of a length go into that row
    with_room: dict[int, list[int]] = {}  # rows by their room
    rooms: list[int] = []  # that there are, rising
    count = 0
    distinct, repeats = np.unique(-lengths, return_counts=True)
    for length, left in zip((-distinct).tolist(), repeats.tolist(), strict=True):
        while left:
            place = bisect_left(rooms, length)
            if place == len(rooms):
                room, row, count = row_tokens, count, count + 1
            else:
                room = rooms[place]
                row = with_room[room].pop()
                if not with_room[room]:
                    del rooms[place]
            fitting = min(left, room // length)  # with one in it, the row fits the next of that length best
            rows.append(row)
            times.append(fitting)
            left, room = left - fitting, room - fitting * length
            if room:
                if not with_room.setdefault(room, []):
                    insort(rooms, room)
                with_room[room].append(row)
    return np.repeat(np.array(rows, np.int64), times)


def _grouped(slots: Numbers, row_of_slot: Numbers) -> Packing:
    sizes = np.bincount(row_of_slot) if len(row_of_slot) else np.zeros(0, np.int64)
    return Packing(slots[np.argsort(row_of_slot, kind="stable")], _starts(sizes))


def _reordered(packing: Packing, order: Numbers) -> Packing:
    sizes = np.diff(packing.starts)[order]
    starts = _starts(sizes)
    steps = np.arange(len(packing.examples)) - np.repeat(starts[:-1], sizes)
    return Packing(packing.examples[np.repeat(packing.starts[:-1][order], sizes) + steps], starts)


def _starts(sizes: Numbers) -> Numbers:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
