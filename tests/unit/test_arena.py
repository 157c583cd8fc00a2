"""Exact host allocations: alignment, resident size, return to the system."""

import gc
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatrain.memory import arena
from megatrain.memory.arena import PAGE_BYTES, allocate, allocate_elements
from megatrain.memory.limits import resident_bytes

linux_only = pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


@pytest.mark.parametrize("n_bytes", [1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 10_000_019])
def test_page_aligned_and_rounded_to_a_page_only(n_bytes: int) -> None:
    buffer = allocate(n_bytes)
    assert buffer.dtype == torch.uint8
    assert buffer.data_ptr() % PAGE_BYTES == 0
    assert n_bytes <= buffer.numel() < n_bytes + PAGE_BYTES
    assert not buffer.any()
    buffer[:n_bytes].fill_(7)
    assert int(buffer[n_bytes - 1]) == 7


def test_edges() -> None:
    assert allocate(0).numel() == 0
    with pytest.raises(ValueError, match="-1 bytes"):
        allocate(-1)
    with pytest.raises(MemoryError, match="refused"):
        allocate(1 << 60)


def test_elements_are_exact_and_of_their_dtype() -> None:
    for dtype in (torch.int16, torch.bfloat16, torch.float32):
        elements = allocate_elements(1003, dtype)
        assert elements.shape == (1003,) and elements.dtype == dtype and not elements.any()
        assert elements.data_ptr() % PAGE_BYTES == 0
    assert allocate_elements(0, torch.float32).shape == (0,)


@linux_only
def test_resident_at_once_and_returned_with_the_last_view() -> None:
    n_bytes = 96 << 20
    allocate(PAGE_BYTES).view(torch.bfloat16)[1:].fill_(1.0)  # what the first call loads is not the buffer's
    gc.collect()
    before = resident_bytes()
    view = allocate(n_bytes)[: n_bytes // 2].view(torch.bfloat16).view(-1, 1024)[3:]
    grown = resident_bytes() - before
    assert abs(grown - n_bytes) < 256 * PAGE_BYTES
    view.fill_(1.0)  # the buffer itself is gone, the view keeps the mapping
    del view
    assert abs(resident_bytes() - before) < 256 * PAGE_BYTES


def vm_flags(address: int, smaps: str | None = None) -> set[str]:
    """Of the mapping in which `address` lies, as the kernel tells them; `smaps`: as it has told them before."""
    inside = False
    for line in (smaps or Path("/proc/self/smaps").read_text()).splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"no mapping at {address:x}")


@linux_only
def test_left_out_of_core_dumps() -> None:
    """Also after its pages were given back; memory of other kinds is in them, as ever."""
    for n_bytes in (1, 3 * PAGE_BYTES, 40 << 20):
        buffer = allocate(n_bytes)
        arena.discard_pages(buffer)
        assert "dd" in vm_flags(buffer.data_ptr())
        assert "dd" in vm_flags(buffer.data_ptr() + buffer.nbytes - 1)
    assert "dd" not in vm_flags(torch.zeros(1 << 22).data_ptr())


@linux_only
def test_discard_pages_of_a_file_mapping(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (32 << 12))  # 32 MiB
    mapped = torch.from_file(str(path), shared=False, size=32 << 20, dtype=torch.uint8)
    part = mapped[5 : 16 << 20].view(-1)
    total = int(mapped.to(torch.int64).sum())
    before = resident_bytes()
    dropped = arena.discard_pages(part)
    assert (16 << 20) - 2 * PAGE_BYTES <= dropped < 16 << 20
    assert before - resident_bytes() > 15 << 20
    assert int(mapped.to(torch.int64).sum()) == total  # read again from the file


def test_discard_leaves_others_alone() -> None:
    assert arena.discard_pages(torch.ones(64, 4096)[:, ::2]) == 0
    assert arena.discard_pages(torch.ones(10)) == 0
    assert arena.discard_pages(torch.empty(1 << 20, device="meta")) == 0
    block = allocate(3 * PAGE_BYTES).fill_(9)
    assert arena.discard_pages(block[1 : 2 * PAGE_BYTES]) == PAGE_BYTES
    assert int(block[0]) == int(block[2 * PAGE_BYTES]) == 9


HEAP = """
import torch
from megatrain.memory import arena
from megatrain.memory.limits import resident_bytes
if {fixed}:
    assert arena.keep_large_allocations_out_of_heap()
first = torch.ones(30 << 20, dtype=torch.uint8)   # freeing it raises glibc's own threshold to 30 MiB
del first
blocks = [torch.ones(8 << 20, dtype=torch.uint8) for _ in range(16)]
last = torch.ones(8 << 20, dtype=torch.uint8)     # on top of the heap: what is below cannot be returned
before = resident_bytes()
blocks = None
kept = (16 * (8 << 20)) - (before - resident_bytes())
if not {fixed}:
    assert arena.trim_freed_memory()
trimmed = (16 * (8 << 20)) - (before - resident_bytes())
print(kept >> 20, trimmed >> 20)
"""


@linux_only
@glibc_only
@pytest.mark.parametrize("fixed", [True, False])
def test_freed_tensors_leave_the_process(fixed: bool) -> None:
    code = HEAP.format(fixed=fixed)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept_mib, trimmed_mib = map(int, run.stdout.split())
    if fixed:
        assert kept_mib <= 1  # returned at once
    else:
        assert kept_mib > 64  # the reason for the fixed threshold
    assert trimmed_mib <= 1
