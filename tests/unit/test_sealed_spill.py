"""State on disk, sealed: nothing of it shows there, and nothing but what was written last passes for it."""

import random
from pathlib import Path

import pytest
import torch
from test_spill import MIB, PIECES, add_one, pattern

from megatrain.errors import IntegrityError
from megatrain.memory import sealed_spill
from megatrain.memory.arena import allocate
from megatrain.memory.pieces import Piece
from megatrain.memory.sealed_spill import SealedSpillFile
from megatrain.memory.spill_file import BLOCK_BYTES, SpillFile
from megatrain.memory.spilled_states import SpilledStates
from megatrain.trust.encryption import ProcessCipher

NOT_WHAT_WAS_WRITTEN = r"engine.nvme: what .* gives back at byte 0 is not what was written there; training cannot go on"


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_spill, "STRETCH_BYTES", 4 * BLOCK_BYTES)


def disk_of(folder: Path, n_bytes: int = MIB) -> tuple[SpillFile, SealedSpillFile]:
    """(what lies on the disk, the same through the cipher)."""
    file = SpillFile(folder, n_bytes)
    return file, SealedSpillFile(file, ProcessCipher())


def raw_bytes(file: SpillFile, offset: int = 0, n_bytes: int | None = None) -> torch.Tensor:
    found = allocate(file.n_bytes if n_bytes is None else n_bytes)
    file.read(offset, found)
    return found


def test_what_is_written_is_read(tmp_path: Path) -> None:
    _, sealed = disk_of(tmp_path)
    first, second = pattern(9 * BLOCK_BYTES, 1), pattern(2 * BLOCK_BYTES, 2)
    sealed.write(0, first)
    sealed.write(9 * BLOCK_BYTES, second)
    back = allocate(9 * BLOCK_BYTES)
    for _ in range(2):
        sealed.read(0, back)
        assert torch.equal(back, first)
        sealed.read(9 * BLOCK_BYTES, back[: 2 * BLOCK_BYTES])
        assert torch.equal(back[: 2 * BLOCK_BYTES], second)
        first.add_(1)
        sealed.write(0, first)
    sealed.close()


def test_nothing_of_it_shows_on_the_disk(tmp_path: Path) -> None:
    file, sealed = disk_of(tmp_path)
    plain = pattern(8 * BLOCK_BYTES, 3)
    sealed.write(0, plain)
    disk = raw_bytes(file).numpy().tobytes()
    content = plain.numpy().tobytes()
    assert all(content[i : i + 8] not in disk for i in range(0, len(content), 512))
    zeros = allocate(BLOCK_BYTES)
    sealed.write(0, zeros)
    once = raw_bytes(file, 0, BLOCK_BYTES)
    sealed.write(0, zeros)  # the same content, at the same place
    assert once.any() and not torch.equal(raw_bytes(file, 0, BLOCK_BYTES), once)


def test_what_never_was_written_is_zero_whatever_the_disk_holds(tmp_path: Path) -> None:
    file, sealed = disk_of(tmp_path)
    file.write(0, pattern(8 * BLOCK_BYTES, 4))
    back = pattern(8 * BLOCK_BYTES, 5)
    sealed.read(0, back)
    assert not back.any()


def test_whatever_is_changed_on_the_disk_is_noticed(tmp_path: Path) -> None:
    """A bit, an earlier content of the same place, the content of another place."""
    file, sealed = disk_of(tmp_path)
    sealed.write(0, pattern(BLOCK_BYTES, 6))
    earlier = raw_bytes(file, 0, BLOCK_BYTES)
    sealed.write(0, pattern(BLOCK_BYTES, 7))
    sealed.write(BLOCK_BYTES, pattern(BLOCK_BYTES, 7))
    right, elsewhere = raw_bytes(file, 0, BLOCK_BYTES), raw_bytes(file, BLOCK_BYTES, BLOCK_BYTES)
    flipped = right.clone()
    flipped[1234] ^= 16
    back = allocate(BLOCK_BYTES)
    for wrong in (flipped, earlier, elsewhere, allocate(BLOCK_BYTES)):
        memory = allocate(BLOCK_BYTES)
        memory.copy_(wrong)
        file.write(0, memory)
        with pytest.raises(IntegrityError, match=NOT_WHAT_WAS_WRITTEN):
            sealed.read(0, back)
    file.write(0, right)
    sealed.read(0, back)
    assert torch.equal(back, pattern(BLOCK_BYTES, 7))


class Counted(ProcessCipher):
    """Keeps the numbers that it has sealed with."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def seal(self, plain: memoryview, sealed: memoryview) -> int:
        self.numbers.append(super().seal(plain, sealed))
        return self.numbers[-1]


def test_many_updates_of_pieces(tmp_path: Path) -> None:
    """Each is as its last update left it; no number is used twice, however often a piece is written."""
    order, cipher = random.Random(7), Counted()
    sizes: dict[Piece, int] = {piece: order.randrange(1, 10) * 10_000 for piece in PIECES}
    file = SealedSpillFile(SpillFile(tmp_path, sum(-(-n // BLOCK_BYTES) * BLOCK_BYTES for n in sizes.values())), cipher)
    states = SpilledStates(file, sizes)
    counts = dict.fromkeys(sizes, 0)
    for _ in range(20):
        announced = order.sample(PIECES, order.randrange(len(sizes) + 1))
        states.expect(announced)
        for piece in announced:
            add_one(states, piece)
            counts[piece] += 1
    for piece in sizes:
        assert (states.take(piece) == counts[piece] % 256).all(), piece
        states.give_back(piece, changed=False)
    states.flush()
    states.close()
    assert len(cipher.numbers) == len(set(cipher.numbers)) > sum(counts.values()) > 50


def test_a_changed_disk_stops_who_takes_the_piece(tmp_path: Path) -> None:
    file, sealed = disk_of(tmp_path)
    states = SpilledStates(sealed, dict.fromkeys(PIECES, BLOCK_BYTES))
    add_one(states, PIECES[0])
    states.flush()
    file.write(0, pattern(BLOCK_BYTES, 8))
    with pytest.raises(IntegrityError, match=NOT_WHAT_WAS_WRITTEN):
        states.take(PIECES[0])
    states.close()
