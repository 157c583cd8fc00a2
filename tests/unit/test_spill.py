"""State on disk: what was given back is what is taken, in any order; the file is private and leaves nothing behind."""

import errno
import os
import random
import stat
import threading
import time
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatrain.errors import CapacityError, ConfigError, IntegrityError
from megatrain.memory import pieces, spill_file
from megatrain.memory.arena import allocate
from megatrain.memory.layout import Request, SlabLayout, lay_out
from megatrain.memory.pieces import Piece, buffer_bytes, cut, disk_bytes
from megatrain.memory.slab_state import elements_bytes, state_bytes
from megatrain.memory.spill_file import BLOCK_BYTES, SpillFile, round_up
from megatrain.memory.spilled_states import BUFFERS, SpilledStates
from megatrain.optim.int8_moments import BLOCK

MIB = 1 << 20


def pattern(n_bytes: int, seed: int) -> Tensor:
    made = allocate(n_bytes)
    made.copy_(torch.randint(0, 256, made.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return made


# -- the file ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = SpillFile(tmp_path, 3 * MIB + 1)
    first, second = pattern(MIB, 1), pattern(2 * MIB, 2)
    file.write(0, first)
    file.write(MIB, second)
    back = allocate(2 * MIB)
    file.read(MIB, back)
    assert torch.equal(back, second)
    file.read(0, back)
    assert torch.equal(back, torch.cat([first, second[:MIB]]))
    unwritten = pattern(BLOCK_BYTES, 3)
    file.read(3 * MIB, unwritten)
    assert not unwritten.any()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_nothing_of_it_has_a_name_and_nobody_else_may_open_it(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    file = SpillFile(tmp_path, MIB)
    os.umask(before)
    assert not list(tmp_path.iterdir())
    status = os.fstat(file._descriptor)
    assert stat.S_IMODE(status.st_mode) == 0o600 and status.st_nlink == 0
    assert status.st_blocks * 512 >= MIB  # reserved, not sparse


def test_without_files_that_have_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot make them: a named one is unlinked at once."""
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    file = SpillFile(tmp_path, MIB)
    assert not list(tmp_path.iterdir())
    assert stat.S_IMODE(os.fstat(file._descriptor).st_mode) == 0o600


def test_a_long_transfer_goes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill_file, "_MOST_BYTES", 3 * BLOCK_BYTES)
    file, data = SpillFile(tmp_path, MIB), pattern(MIB, 1)
    file.write(0, data)
    back = allocate(MIB)
    file.read(0, back)
    assert torch.equal(back, data)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine.nvme is '.*missing'; it must be a folder that exists"):
        SpillFile(tmp_path / "missing", MIB)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a folder that exists"):
        SpillFile(tmp_path / "file", MIB)


def test_a_disk_that_is_too_small_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = namedtuple("disk", "f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda _: disk(1000, 1024))
    with pytest.raises(CapacityError, match=r"engine.nvme: 24.58 kB missing: .* needs 1.05 MB .* has 1.02 MB free"):
        SpillFile(tmp_path, MIB)


def test_a_quota_that_the_disk_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CapacityError, match="quota"):
        SpillFile(tmp_path, MIB)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "short"])
@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_failing_disk_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fault: str
) -> None:
    file, data = SpillFile(tmp_path, MIB), pattern(MIB, 1)

    def fail(*_: Any) -> int:
        if fault == "short":
            return 0
        raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(IntegrityError, match=r"engine.nvme: (reading|writing) optimizer state .* at byte 0: "):
        (file.read if call == "preadv" else file.write)(0, data)


# -- the states -------------------------------------------------------------------------------------------------


def piece(number: int) -> Piece:
    return Piece(number // 4, 0, number, number + 1)


PIECES = [piece(number) for number in range(BUFFERS + 3)]


def make(tmp_path: Path, sizes: dict[Piece, int]) -> SpilledStates:
    return SpilledStates(SpillFile(tmp_path, sum(-(-n // BLOCK_BYTES) * BLOCK_BYTES for n in sizes.values())), sizes)


def add_one(states: SpilledStates, piece: Piece) -> None:
    states.take(piece).add_(1)
    states.give_back(piece)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_updates(tmp_path: Path, seed: int) -> None:
    """Announced or not, in the order announced or another: each piece's state is as its last update left it, also
    after somebody has only read it."""
    order = random.Random(seed)
    sizes = {piece: order.randrange(1, 5) * 10_000 for piece in PIECES}
    states = make(tmp_path, sizes)
    counts = dict.fromkeys(sizes, 0)
    for _ in range(30):
        announced = order.sample(PIECES, order.randrange(len(sizes) + 1))
        if order.random() < 0.8:
            states.expect(announced)
        if order.random() < 0.4:
            order.shuffle(announced)
        for piece in announced[: order.randrange(len(announced) + 1)] if order.random() < 0.3 else announced:
            if order.random() < 0.2:
                time.sleep(order.random() / 500)
            if order.random() < 0.1:
                states.take(piece).fill_(99)  # of no consequence
                states.give_back(piece, changed=False)
            else:
                add_one(states, piece)
                counts[piece] += 1
    for piece, n_bytes in sizes.items():
        state = states.take(piece)
        assert len(state) >= n_bytes and (state == counts[piece] % 256).all(), piece
        states.give_back(piece)
    states.flush()
    states.close()


def test_the_end_of_a_block_holds_nothing_of_other_pieces(tmp_path: Path) -> None:
    """Buffers go round among pieces: what one left there does not reach the blocks of a shorter one."""
    sizes = {piece: (5 * BLOCK_BYTES if number % 2 else 100) for number, piece in enumerate(PIECES)}
    file = SpillFile(tmp_path, sum(map(round_up, sizes.values())))
    states = SpilledStates(file, sizes)
    for _ in range(5):
        states.expect(PIECES[:4])
        for piece in PIECES:
            states.take(piece)[: sizes[piece]].fill_(0xAA)
            states.give_back(piece)
    states.flush()
    disk, offset = allocate(file.n_bytes), 0
    file.read(0, disk)
    for n_bytes in sizes.values():
        assert (disk[offset : offset + n_bytes] == 0xAA).all()
        assert not disk[offset + n_bytes : offset + round_up(n_bytes)].any()
        offset += round_up(n_bytes)
    states.close()


class Recording:
    """A disk that says when it is used, and can be made to wait or to fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failing = ""

    def _use(self, what: str, offset: int) -> None:
        self.gate.wait()
        self.calls.append((what, offset // BLOCK_BYTES))
        if self.failing == what:
            raise IntegrityError(f"{what} failed")

    def read(self, offset: int, target: Tensor) -> None:
        self._use("read", offset)

    def write(self, offset: int, source: Tensor) -> None:
        self._use("write", offset)

    def close(self) -> None:
        self.calls.append(("close", 0))


def on(disk: Recording) -> SpilledStates:
    return SpilledStates(disk, dict.fromkeys(PIECES, BLOCK_BYTES))  # type: ignore[arg-type]


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_pieces_are_read_ahead_and_written_behind() -> None:
    disk = Recording()
    states = on(disk)
    states.expect(PIECES)
    wait_until(lambda: len(disk.calls) == BUFFERS)  # before anyone asks: as many as there are buffers
    states.take(PIECES[0])
    disk.gate.clear()
    states.give_back(PIECES[0])  # does not wait for the disk
    states.take(PIECES[1])
    disk.gate.set()
    wait_until(lambda: ("read", BUFFERS) in disk.calls)  # while the second piece is being updated
    assert disk.calls.index(("write", 0)) < disk.calls.index(("read", BUFFERS))
    states.give_back(PIECES[1])
    states.flush()
    states.close()
    assert disk.calls[-1] == ("close", 0)


def test_a_piece_is_not_read_before_its_last_state_is_written() -> None:
    disk = Recording()
    states = on(disk)
    states.take(PIECES[0])
    disk.gate.clear()
    states.give_back(PIECES[0])
    states.expect(PIECES[:1])
    threading.Timer(0.05, disk.gate.set).start()
    states.take(PIECES[0])
    assert disk.calls == [("read", 0), ("write", 0), ("read", 0)]


def test_what_was_only_read_is_not_written() -> None:
    disk = Recording()
    states = on(disk)
    for piece in PIECES:  # more of them than buffers
        states.take(piece)
        states.give_back(piece, changed=False)
    states.flush()
    assert disk.calls == [("read", number) for number in range(len(PIECES))]


def update_all(states: SpilledStates, pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        states.take(piece)
        states.give_back(piece)
    states.flush()


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_failed_transfer_stops_everybody(what: str) -> None:
    disk = Recording()
    states = on(disk)
    states.take(PIECES[0])
    disk.failing = what
    states.give_back(PIECES[0])
    states.expect(PIECES[1:])
    with pytest.raises(IntegrityError, match=f"{what} failed"):
        update_all(states, PIECES[1:])
    with pytest.raises(IntegrityError, match=f"{what} failed"):
        states.take(PIECES[0])
    with pytest.raises(IntegrityError, match=f"{what} failed"):
        states.flush()
    states.close()


def test_closing_with_reads_outstanding() -> None:
    states = on(Recording())
    states.expect([*PIECES, *PIECES])
    states.take(PIECES[0])
    states.close()


# -- what pieces there are --------------------------------------------------------------------------------------


def layout(dtype: str, *counts: int) -> list[SlabLayout]:
    return lay_out([Request(slot, (n,), dtype, 0, True) for slot, n in enumerate(counts)], whole_blocks=True)


@pytest.mark.parametrize("moments", ["fp32", "int8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_pieces_hold_every_element_once(monkeypatch: pytest.MonkeyPatch, dtype: str, moments: str) -> None:
    """They take what is planned for them, in whole blocks of the disk; none takes more than a buffer."""
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 4096)
    for counts in ((1,), (4096,), (64, 4096), (10_000, 3, 777)):
        slabs = layout(dtype, *counts)
        held = cut(7, slabs)
        elements = [number for piece in held for number in range(piece.start, piece.stop)]
        assert elements == list(range(slabs[0].state_count)) and {(p.unit, p.slab) for p in held} == {(7, 0)}
        assert all(piece.start % BLOCK == 0 for piece in held)
        sizes = [round_up(elements_bytes(piece.stop - piece.start, dtype, moments)) for piece in held]
        assert sum(sizes) == disk_bytes(slabs, moments) and max(sizes) == buffer_bytes(slabs, moments)
        for place in slabs[0].places:
            found = [piece.overlap(place) for piece in held]
            inside = [range(place.count)[there] for _, there in filter(None, found)]
            assert [i for part in inside for i in part] == list(range(place.count))
            starts = [p.start + o[0].start - o[1].start for p, o in zip(held, found, strict=True) if o is not None]
            assert set(starts) == {place.start}


def test_a_piece_is_small_beside_a_large_unit() -> None:
    """An embedding of half a billion parameters goes through half a gigabyte, not through five."""
    table = lay_out([Request(0, (128_256, 4096), "bf16", 0, True)])
    assert BUFFERS * buffer_bytes(table, "fp32") < 600e6 < state_bytes(table[0], "fp32") / 8
    assert buffer_bytes([], "fp32") == disk_bytes([], "fp32") == 0
