"""fp32 = bf16 + 16-bit remainder: exact for every pattern, and the weight a proper rounding."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatrain.optim.split_master import merge, split
from megatrain.optim.workers import Workers

EDGE_LOWS = [0x0000, 0x0001, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as pool:
        yield pool


def encode(workers: Workers, patterns: NDArray[np.uint32]) -> tuple[NDArray[np.uint16], NDArray[np.int16]]:
    weight, remainder = np.empty(patterns.size, np.uint16), np.empty(patterns.size, np.int16)
    split(workers, patterns.view(np.float32), weight, remainder)
    return weight, remainder


def decode(workers: Workers, weight: NDArray[np.uint16], remainder: NDArray[np.int16]) -> NDArray[np.uint32]:
    master = np.empty(weight.size, np.float32)
    merge(workers, weight, remainder, master)
    return master.view(np.uint32)


def edge_patterns() -> NDArray[np.uint32]:
    """Every upper half (NaN, inf, denormals, both signs) with the low halves next to a rounding edge."""
    highs = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    return (highs[:, None] + np.array(EDGE_LOWS, np.uint32)).reshape(-1)


def test_edge_and_strided_patterns_come_back(workers: Workers) -> None:
    strided = np.arange(0, 1 << 32, 1021, dtype=np.uint64).astype(np.uint32)
    for patterns in (edge_patterns(), strided):
        assert np.array_equal(decode(workers, *encode(workers, patterns)), patterns)


@pytest.mark.long
def test_all_patterns_come_back(workers: Workers) -> None:
    low = np.arange(1 << 24, dtype=np.uint32)
    for high in range(256):
        patterns = low + np.uint32(high << 24)
        assert np.array_equal(decode(workers, *encode(workers, patterns)), patterns), hex(high)


def test_every_stored_pair_is_one_master(workers: Workers) -> None:
    """A decoded pair encodes to the same pair again: no two pairs stand for one master."""
    remainders = np.array([-32768, -32767, -1, 0, 1, 32766, 32767], np.int16)
    weight = np.repeat(np.arange(1 << 16, dtype=np.uint16), remainders.size)
    remainder = np.tile(remainders, 1 << 16)
    again = encode(workers, decode(workers, weight, remainder))
    assert np.array_equal(again[0], weight) and np.array_equal(again[1], remainder)


def test_bytes_of_the_format(workers: Workers) -> None:
    """Pins the encoding, which saved state depends on."""
    table = {
        0x3F800000: (0x3F80, 0),  # 1.0
        0x3F807FFF: (0x3F80, 32767),
        0x3F808000: (0x3F81, -32768),  # a tie goes away from zero, though 0x3f80 is even
        0xBF818001: (0xBF82, -32767),
        0x7F7F8000: (0x7F80, -32768),  # finite, yet its weight is infinite
        0x7F800000: (0x7F80, 0),
        0x80000000: (0x8000, 0),  # -0.0
        0x00000001: (0x0000, 1),  # the smallest denormal
        0xFFFF8000: (0x0000, -32768),  # a NaN whose rounding wraps around
    }
    weight, remainder = encode(workers, np.array(list(table), np.uint32))
    assert list(zip(weight.tolist(), remainder.tolist(), strict=True)) == list(table.values())


def test_weight_is_torchs_rounding_but_for_ties(workers: Workers) -> None:
    patterns = edge_patterns()
    magnitude = patterns & np.uint32(0x7FFFFFFF)
    patterns = patterns[magnitude <= 0x7F800000]
    weight, remainder = encode(workers, patterns)
    cast = torch.from_numpy(patterns.view(np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()
    ties = (patterns & 0xFFFF) == 0x8000
    assert np.array_equal(weight[~ties], cast[~ties])
    away = (patterns[ties] >> np.uint32(16)) + np.uint32(1)
    assert np.array_equal(weight[ties], away.astype(np.uint16))
    assert (remainder[ties] == -32768).all()


@pytest.mark.parametrize("length", [0, 1, 65537, 131072 + 3])
def test_lengths(workers: Workers, length: int) -> None:
    patterns = np.random.default_rng(length).integers(0, 1 << 32, length, dtype=np.uint32)
    assert np.array_equal(decode(workers, *encode(workers, patterns)), patterns)


def test_wrong_arrays_are_refused(workers: Workers) -> None:
    master, weight, remainder = np.zeros(8, np.float32), np.zeros(8, np.uint16), np.zeros(8, np.int16)
    with pytest.raises(TypeError, match="remainder is uint16"):
        split(workers, master, weight, weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight has shape"):
        split(workers, master, weight[:4], remainder)
    with pytest.raises(ValueError, match="remainder has shape"):
        merge(workers, weight, np.zeros(16, np.int16)[::2], master)
