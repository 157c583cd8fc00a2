"""Host memory that is registered with CUDA's driver, page-locked, and kept out of forked processes: a child that wrote
to it would leave the device copying to pages that are no longer ours.

Memory is registered piece by piece, so that no call of the driver takes long or needs all of a large buffer at once.
No copy goes over the seam of two pieces: the driver does not promise to take it for one stretch of memory.
"""

import ctypes
import mmap
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor

from megatrain.errors import CapacityError, IntegrityError
from megatrain.sizes import format_bytes

PIECE_BYTES = 256 * 1024**2  # whole pages

_HOST_REGISTER_DEFAULT = 0
_ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered


class PageLockedMemory:
    """Buffers are held here until they are unlocked: the driver goes on copying to and from the pages that it has
    locked, and a new mapping at an address that was unmapped before would never see what is copied."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[int, Tensor] = {}  # by address
        self._seams: list[int] = []  # addresses at which a piece follows another one, in order

    @property
    def n_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in list(self._buffers.values()))

    def lock(self, buffer: Tensor) -> None:
        """Raises CapacityError or IntegrityError, with nothing of `buffer` locked."""
        if not buffer.nbytes:
            return
        _advise(buffer, "MADV_DONTFORK")
        pieces = list(_pieces(buffer))
        for number, (address, n_bytes) in enumerate(pieces):
            with torch.cuda.device(self._device):
                code = int(torch.cuda.cudart().cudaHostRegister(address, n_bytes, _HOST_REGISTER_DEFAULT))
            if code:
                self._forget_error()
                self._unregister([address for address, _ in pieces[:number]])
                _advise(buffer, "MADV_DOFORK")
                raise self._refusal(code, buffer.nbytes)
        self._buffers[buffer.data_ptr()] = buffer
        for address, _ in pieces[1:]:
            insort(self._seams, address)

    def unlock(self, buffer: Tensor) -> None:
        """No copy from or to it is under way."""
        if not buffer.nbytes:
            return
        del self._buffers[buffer.data_ptr()]
        addresses = [address for address, _ in _pieces(buffer)]
        self._seams = [seam for seam in self._seams if seam not in addresses[1:]]
        self._unregister(addresses)
        _advise(buffer, "MADV_DOFORK")

    def unlock_all(self) -> None:
        """Once no copy is under way."""
        if not self._buffers:
            return
        with suppress(RuntimeError):  # of a device that has failed: the process goes on without it
            torch.cuda.synchronize(self._device)
        while self._buffers:
            self.unlock(next(reversed(self._buffers.values())))

    def split(self, target: Tensor, source: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(target, source) of a copy, in parts of which each lies in one piece."""
        host = source if source.device.type == "cpu" else target
        start, end = host.data_ptr(), host.data_ptr() + host.nbytes
        seams = self._seams[bisect_right(self._seams, start) : bisect_left(self._seams, end)]
        if not seams:
            return [(target, source)]
        cuts = [0, *((seam - start) // host.element_size() for seam in seams), host.numel()]
        sizes = [stop - begin for begin, stop in pairwise(cuts)]
        return list(zip(target.view(-1).split(sizes), source.view(-1).split(sizes), strict=True))

    def _unregister(self, addresses: list[int]) -> None:
        with torch.cuda.device(self._device):
            for address in addresses:
                if int(torch.cuda.cudart().cudaHostUnregister(address)):
                    self._forget_error()

    def _forget_error(self) -> None:
        """CUDA reports a failed call once more at the next kernel: let that be this one."""
        with suppress(RuntimeError):
            torch.ones(1, device=self._device)

    def _refusal(self, code: int, n_bytes: int) -> Exception:
        if code == _ALREADY_REGISTERED:
            return IntegrityError(
                f"{format_bytes(n_bytes)} of the engine's host memory is page-locked already; something else"
                " registered it, or unmapped memory at its address that it had registered"
            )
        return CapacityError(
            f"{format_bytes(n_bytes)} of host memory could not be page-locked (CUDA error {code}) after"
            f" {len(self._buffers)} buffers of {format_bytes(self.n_bytes)}; raise"
            " the limit (`ulimit -l unlimited`; in WSL2 half of the memory is the most)"
        )


def _pieces(buffer: Tensor) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the parts that are registered by themselves."""
    for start in range(0, buffer.nbytes, PIECE_BYTES):
        yield buffer.data_ptr() + start, min(PIECE_BYTES, buffer.nbytes - start)


def _advise(buffer: Tensor, name: str) -> None:
    """madvise, on every page that the buffer touches: a driver locks whole pages. The buffer is a mapping of its own
    (`memory.arena`)."""
    advice = getattr(mmap, name, None)
    start = buffer.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = -(-(buffer.data_ptr() + buffer.nbytes - start) // mmap.PAGESIZE) * mmap.PAGESIZE
    if advice is not None:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
