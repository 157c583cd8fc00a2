"""Exact host allocations, and giving memory back to the system at once.

Neither torch's nor glibc's allocator suits state that fills most of a machine: both round, both keep freed
blocks, and neither aligns to pages, which pinning needs. A buffer from `allocate` is its own anonymous
mapping: page-aligned, rounded up to whole pages and no further, resident from the start, left out of core dumps
(docs/decisions/0014), and unmapped when its last tensor dies.
"""

import contextlib
import ctypes
import ctypes.util
import mmap
import platform
from collections.abc import Callable
from typing import Any

import torch

PAGE_BYTES = mmap.PAGESIZE

# mallopt's parameter numbers, from glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3
_MADV_DONTNEED = 4


def round_up_to_page(n_bytes: int) -> int:
    """`n_bytes` rounded up to whole pages."""
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES


def allocate(n_bytes: int) -> torch.Tensor:
    """A zeroed, page-aligned host buffer of its own: uint8 of shape (n_bytes rounded up to a page,).

    Every page has been written, so that a machine with too little memory fails here and not in the middle of
    a step. Writing releases the GIL: several threads can allocate at once. The memory returns to the system
    when the last tensor that views it dies.

    Raises ValueError for a negative size and MemoryError where the mapping is refused.
    """
    if n_bytes < 0:
        raise ValueError(f"cannot allocate {n_bytes} bytes")
    size = round_up_to_page(n_bytes)
    if size == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    try:
        mapping = _map_private(size)
    except (OSError, ValueError) as error:
        raise MemoryError(f"the system refused a mapping of {size} bytes: {error}") from error
    # the tensor keeps the buffer, which keeps the mapping: there is no other owner
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    ctypes.memset(buffer.data_ptr(), 0, size)  # ctypes lets go of the GIL during the call
    return buffer


def allocate_elements(count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` zeroed elements, 1-D, in a buffer of their own as `allocate` makes it."""
    n_bytes = count * dtype.itemsize
    return allocate(n_bytes)[:n_bytes].view(dtype)


def discard_pages(tensor: torch.Tensor) -> int:
    """Drop the resident pages of a CPU tensor whose content is no longer needed; returns the bytes dropped.

    For weights that are views of a mapped file: all weights of a shard are views of one mapping, so dropping
    a single tensor object frees nothing, but its pages can go. Only pages that lie wholly inside the tensor
    are touched. THE CONTENT IS LOST where the memory is not an unmodified file mapping, so no other tensor
    may share it. Returns 0 on tensors that are not dense, on other devices, and on systems without `madvise`.
    """
    call = _libc_function("madvise", [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int])
    if call is None or platform.system() != "Linux" or tensor.device.type != "cpu" or not _is_dense(tensor):
        return 0
    start = round_up_to_page(tensor.data_ptr())
    end = (tensor.data_ptr() + tensor.nbytes) // PAGE_BYTES * PAGE_BYTES
    if end <= start or call(start, end - start, _MADV_DONTNEED) != 0:
        return 0
    return end - start


def trim_freed_memory() -> bool:
    """Give the C heap's free pages back to the system. False where the C library cannot (it is not glibc)."""
    call = _libc_function("malloc_trim", [ctypes.c_size_t])
    if call is None:
        return False
    call(0)
    return True


def keep_large_allocations_out_of_heap(threshold_bytes: int = 1 << 20) -> bool:
    """Make every C allocation of `threshold_bytes` or more a mapping of its own, gone when it is freed.

    glibc raises its threshold (up to 32 MiB) each time such a block is freed, after which tensors of many MiB
    come from the heap and stay there when freed; setting it by hand fixes it for the life of the process.
    Returns False, and changes nothing, where the C library is not glibc.
    """
    if _libc_function("malloc_trim", [ctypes.c_size_t]) is None:  # only glibc has it; musl ignores mallopt
        return False
    call = _libc_function("mallopt", [ctypes.c_int, ctypes.c_int])
    if call is None:
        return False
    return bool(call(_M_MMAP_THRESHOLD, threshold_bytes)) and bool(call(_M_TRIM_THRESHOLD, threshold_bytes))


def reuse_freed_memory() -> bool:
    """The opposite, for training: blocks of less than 32 MiB come from one heap and are used again.

    Activations come and go by the hundred in each step; as mappings of their own they would be faulted in and zeroed
    every time (measured: a step took 1.4 times as long). Larger blocks, the gradients and logits of a big head, still
    go at once. Threads share the one heap (`share_one_heap`). Returns False, and changes nothing, where the C library
    is not glibc.
    """
    if not keep_large_allocations_out_of_heap(32 << 20):
        return False
    call = _libc_function("mallopt", [ctypes.c_int, ctypes.c_int])
    return call is not None and bool(call(_M_TRIM_THRESHOLD, 1 << 30)) and share_one_heap()


def share_one_heap() -> bool:
    """Let threads that start from here on allocate from the heaps that are there now, and from no new ones.

    Of the micro-batches' threads only one runs at a time, and can use what the one before has freed. A heap that some
    earlier thread was given stays, and goes to the next thread: a command says this before it starts any. Returns
    False, and changes nothing, where the C library is not glibc.
    """
    if _libc_function("malloc_trim", [ctypes.c_size_t]) is None:
        return False
    call = _libc_function("mallopt", [ctypes.c_int, ctypes.c_int])
    return call is not None and bool(call(_M_ARENA_MAX, 1))


def _map_private(size: int) -> mmap.mmap:
    """An anonymous mapping of `size` bytes that no other process shares, and no core dump holds."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTDUMP"):
        with contextlib.suppress(OSError):  # a kernel that does not know it: no reason not to train
            mapping.madvise(mmap.MADV_DONTDUMP)
    return mapping


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one stretch of memory without gaps, in any order of dimensions."""
    if tensor.layout is not torch.strided:
        return False
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and span == tensor.numel()


def _libc_function(name: str, argument_types: list[Any]) -> Callable[..., int] | None:
    """A function of the C library that is loaded in this process; None where it has no such function."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = argument_types
    function.restype = ctypes.c_int
    result: Callable[..., int] = function
    return result
