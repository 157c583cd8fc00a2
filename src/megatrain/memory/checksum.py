"""A checksum of memory that the host and a compute device work out alike, whatever the order of their additions.

Memory is taken as signed words of 32 bits; what is left at its end is filled up with zeros. Both sums are modulo 2^64:

    plain    of all words
    placed   of each word times its number, which counts from `first`

A change of one word changes the plain sum, by less than 2^32. A change of two that leaves the plain sum as it is takes
from one what it gives to the other, and moves the placed sum by that times their distance: less than 2^64 up to 16 GiB.
So no flipped bit, no two, and no exchange of two words can go unseen; what changes more words does by chance, one time
in 2^64 or less. Sums of parts that are numbered on add up to those of the whole.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from megatrain.optim.workers import Workers, kernel

Sums = tuple[int, int]  # (plain, placed), as int64 holds them

WORD_BYTES = 4
SUMS_BYTES = 16
# words per partial sum: few enough that no sum inside a block leaves 64 bits and its numbers fit into 32
BLOCK = 1 << 14
PIECE = 1 << 20  # words that a device widens at a time: 8 MB
COLUMNS = 1 << 10


def host_sums(workers: Workers, memory: Tensor, first: int = 0) -> Sums:
    """Of host memory: a 1-D, contiguous tensor that begins at a whole word. The word that it begins with has the number
    `first`."""
    flat = memory.detach().view(torch.uint8)
    whole = flat.numel() // WORD_BYTES * WORD_BYTES
    words = flat[:whole].numpy().view(np.int32)
    partials = np.zeros((-(-words.size // BLOCK), 2), np.int64)
    workers.run(_sum_blocks, words.size, words, partials, align=BLOCK)
    plain, placed = (int(total) for total in partials.sum(0))
    if whole < flat.numel():
        last = int.from_bytes(flat[whole:].numpy().tobytes().ljust(WORD_BYTES, b"\0"), "little", signed=True)
        plain, placed = plain + last, placed + last * words.size
    return _as_int64(plain), _as_int64(placed + first * plain)


@kernel
def _sum_blocks(start: int, stop: int, words: Any, partials: Any) -> None:
    for begin in range(start, stop, BLOCK):
        block = words[begin : min(begin + BLOCK, stop)]
        plain, placed = np.int64(0), np.int64(0)
        for i in range(block.size):
            word = np.int64(block[i])
            plain += word
            placed += np.int64(np.int32(i)) * word
        partials[begin // BLOCK, 0] = plain
        partials[begin // BLOCK, 1] = placed + begin * plain


def device_sums(memory: Tensor, first: int = 0) -> Tensor:
    """The same on any device: int64 (2), where the memory is. Nothing waits for the device here. The placed sum is that
    of rows and columns, so that words are only read and nothing is as large as they are."""
    flat = memory.detach().view(torch.uint8)
    rest = -flat.numel() % WORD_BYTES
    if rest:
        tail = flat.numel() + rest - WORD_BYTES
        parts = [
            (flat[:tail].view(torch.int32), 0),
            (pad(flat[tail:], (0, rest)).view(torch.int32), tail // WORD_BYTES),
        ]
    else:
        parts = [(flat.view(torch.int32), 0)]
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for words, number in parts:
        for start in range(0, words.numel(), PIECE):
            total += _piece_sums(words[start : start + PIECE], first + number + start)
    return total


def _piece_sums(words: Tensor, first: int) -> Tensor:
    table = words.long()
    if table.numel() % COLUMNS:
        table = pad(table, (0, -table.numel() % COLUMNS))
    table = table.view(-1, COLUMNS)
    by_row, by_column = table.sum(1), table.sum(0)
    plain = by_column.sum()
    placed = (by_row * _count(by_row)).sum() * COLUMNS + (by_column * _count(by_column)).sum() + plain * first
    return torch.stack((plain, placed))


def _count(like: Tensor) -> Tensor:
    return torch.arange(like.numel(), device=like.device)


def numbered(sums: Sums, first: int) -> Sums:
    """What `sums`, counted from 0, are when the first word has the number `first`."""
    return sums[0], _as_int64(sums[1] + first * sums[0])


def added(parts: Iterable[Sums]) -> Sums:
    """Of memory in parts, each numbered as it lies in the whole."""
    plain, placed = 0, 0
    for part in parts:
        plain, placed = plain + part[0], placed + part[1]
    return _as_int64(plain), _as_int64(placed)


def _as_int64(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
