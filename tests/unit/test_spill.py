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
from megatrain.memory import spill_file
from megatrain.memory.arena import allocate
from megatrain.memory.spill_file import BLOCK_BYTES, SpillFile
from megatrain.memory.spilled_states import BUFFERS, SpilledStates, buffer_bytes, file_bytes

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


def test_nothing_of_it_has_a_name_and_nobody_else_may_open_it(tmp_path: Path) -> None:
    file = SpillFile(tmp_path, MIB)
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


def make(tmp_path: Path, sizes: dict[int, int]) -> SpilledStates:
    return SpilledStates(SpillFile(tmp_path, file_bytes(sizes)), sizes)


def add_one(states: SpilledStates, unit: int) -> None:
    states.take(unit).add_(1)
    states.give_back(unit)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_updates(tmp_path: Path, seed: int) -> None:
    """Announced or not, in the order announced or another: each unit's state is as its last update left it."""
    order = random.Random(seed)
    sizes = {unit: order.randrange(1, 5) * 10_000 for unit in range(9)}
    states = make(tmp_path, sizes)
    counts = dict.fromkeys(sizes, 0)
    for _ in range(30):
        announced = order.sample(sorted(sizes), order.randrange(len(sizes) + 1))
        if order.random() < 0.8:
            states.expect(announced)
        if order.random() < 0.4:
            order.shuffle(announced)
        for unit in announced[: order.randrange(len(announced) + 1)] if order.random() < 0.3 else announced:
            if order.random() < 0.2:
                time.sleep(order.random() / 500)
            add_one(states, unit)
            counts[unit] += 1
    for unit, n_bytes in sizes.items():
        state = states.take(unit)
        assert len(state) >= n_bytes and (state == counts[unit] % 256).all(), unit
        states.give_back(unit)
    states.flush()
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


def on(disk: Recording, units: int) -> SpilledStates:
    return SpilledStates(disk, dict.fromkeys(range(units), BLOCK_BYTES))  # type: ignore[arg-type]


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_units_are_read_ahead_and_written_behind() -> None:
    disk = Recording()
    states = on(disk, 6)
    states.expect(range(6))
    wait_until(lambda: len(disk.calls) == BUFFERS)  # before anyone asks: as many as there are buffers
    states.take(0)
    disk.gate.clear()
    states.give_back(0)  # does not wait for the disk
    states.take(1)
    disk.gate.set()
    wait_until(lambda: ("read", 3) in disk.calls)  # while unit 1 is being updated
    assert disk.calls.index(("write", 0)) < disk.calls.index(("read", 3))
    states.give_back(1)
    states.flush()
    states.close()
    assert disk.calls[-1] == ("close", 0)


def test_a_unit_is_not_read_before_its_last_state_is_written() -> None:
    disk = Recording()
    states = on(disk, 2)
    states.take(0)
    disk.gate.clear()
    states.give_back(0)
    states.expect([0])
    threading.Timer(0.05, disk.gate.set).start()
    states.take(0)
    assert disk.calls == [("read", 0), ("write", 0), ("read", 0)]


def update_all(states: SpilledStates, units: Iterable[int]) -> None:
    for unit in units:
        states.take(unit)
        states.give_back(unit)
    states.flush()


@pytest.mark.parametrize("what", ["read", "write"])
def test_a_failed_transfer_stops_everybody(what: str) -> None:
    disk = Recording()
    states = on(disk, 6)
    states.take(0)
    disk.failing = what
    states.give_back(0)
    states.expect(range(1, 6))
    with pytest.raises(IntegrityError, match=f"{what} failed"):
        update_all(states, range(1, 6))
    with pytest.raises(IntegrityError, match=f"{what} failed"):
        states.take(0)
    with pytest.raises(IntegrityError, match=f"{what} failed"):
        states.flush()
    states.close()


def test_closing_with_reads_outstanding() -> None:
    states = on(Recording(), 6)
    states.expect([*range(6), *range(6)])
    states.take(0)
    states.close()


def test_bytes_are_counted_in_whole_blocks() -> None:
    sizes = {0: 1, 1: BLOCK_BYTES, 2: BLOCK_BYTES + 1}
    assert file_bytes(sizes) == 4 * BLOCK_BYTES and buffer_bytes(sizes) == 2 * BLOCK_BYTES
    assert buffer_bytes({}) == file_bytes({}) == 0
