"""The checksum: the same on host and device, of parts and of the whole, and another one for whatever has changed."""

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatrain.memory import checksum
from megatrain.memory.checksum import BLOCK, WORD_BYTES, added, device_sums, host_sums, numbered
from megatrain.optim.workers import Workers

SIZES = [0, 1, 3, 4, 5, 8, 4093, 4096, 4 * BLOCK, 4 * BLOCK + 4, 12 * BLOCK + 7, 1 << 20]


@pytest.fixture(scope="module")
def workers() -> Workers:
    return Workers(2)


def noise(n_bytes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def by_hand(memory: Tensor, first: int = 0) -> tuple[int, int]:
    """Word by word, as the definition has it."""
    raw = memory.numpy().tobytes()
    raw += bytes(-len(raw) % WORD_BYTES)
    words = [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4)]
    sums = (sum(words), sum((first + i) * word for i, word in enumerate(words)))
    plain, placed = ((s + 2**63) % 2**64 - 2**63 for s in sums)
    return plain, placed


@pytest.mark.parametrize("first", [0, 7, 2**33 + 5])
@pytest.mark.parametrize("n_bytes", SIZES)
def test_host_and_device_have_the_sums_of_the_definition(
    workers: Workers, n_bytes: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum, "PIECE", 3 * checksum.COLUMNS)  # several pieces, the last one not whole
    memory = noise(n_bytes)
    expected = by_hand(memory, first)
    assert host_sums(workers, memory, first) == expected
    assert tuple(device_sums(memory, first).tolist()) == expected
    assert numbered(host_sums(workers, memory), first) == expected


def test_largest_words_in_one_block(workers: Workers) -> None:
    """No sum inside a block leaves 64 bits."""
    for value in (0x7F, 0x80, 0xFF):
        memory = torch.full((8 * BLOCK,), value, dtype=torch.uint8)
        memory[3::4] = value
        assert host_sums(workers, memory) == by_hand(memory) == tuple(device_sums(memory).tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int16, torch.int8])
def test_of_any_dtype_by_its_bits(workers: Workers, dtype: torch.dtype) -> None:
    values = noise(4096, 3).view(dtype)  # NaN among them
    assert host_sums(workers, values) == by_hand(values.view(torch.uint8)) == tuple(device_sums(values).tolist())


def test_parts_add_up_to_the_whole(workers: Workers) -> None:
    memory, cuts = noise(9 * BLOCK + 2), [0, 4, 4 * 1000, 8 * BLOCK, 9 * BLOCK + 2]
    parts = [host_sums(workers, memory[a:b], a // WORD_BYTES) for a, b in pairwise(cuts)]
    assert added(parts) == host_sums(workers, memory)


def test_any_flipped_bit_is_another_sum(workers: Workers) -> None:
    """Also two of them, which cancel each other in the plain sum."""
    memory, chance = noise(4 * BLOCK + 3), random.Random(0)
    right = host_sums(workers, memory)
    for _ in range(300):
        where = [chance.randrange(8 * memory.numel()) for _ in range(chance.choice([1, 2]))]
        changed = memory.clone()
        for bit in where:
            changed[bit // 8] ^= 1 << bit % 8
        if not torch.equal(changed, memory):
            assert host_sums(workers, changed) != right


def test_exchanged_words_are_another_sum(workers: Workers) -> None:
    """Also such as differ in their highest bit alone, at a distance that is a power of two."""
    memory = torch.zeros(1 << 16, dtype=torch.int32)
    memory[0], memory[1 << 15] = -(2**31), 0
    other = memory.clone()
    other[0], other[1 << 15] = memory[1 << 15], memory[0]
    assert host_sums(workers, memory) != host_sums(workers, other)
    assert host_sums(workers, memory)[0] == host_sums(workers, other)[0]
