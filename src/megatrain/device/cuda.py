"""An NVIDIA GPU. Copies run on two streams of their own, ordered against computation by CUDA events.

No call here blocks the host but `CudaEvent.wait`, which only the host's own threads use. Computation is what the
calling thread gives to its current stream.
"""

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatrain.device.base import After
from megatrain.device.trace import Mark, Trace
from megatrain.errors import CapacityError, ConfigError
from megatrain.sizes import format_bytes

_HOST_REGISTER_DEFAULT = 0
_ALREADY_REGISTERED = 712  # cudaErrorHostMemoryAlreadyRegistered


class CudaEvent:
    def __init__(self, stream: Any) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class CudaStream:
    """A stream of copies in one direction."""

    def __init__(self, track: str, device: torch.device) -> None:
        self.n_bytes = 0
        self.trace: Trace | None = None
        self._track = track
        self._device = device
        self.stream = torch.cuda.Stream(device)

    def copy(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: After, *, computed: bool = False, label: str = ""
    ) -> CudaEvent:
        for _, event in after:
            assert isinstance(event, CudaEvent)
            self.stream.wait_event(event.event)
        if computed:
            self.stream.wait_stream(torch.cuda.current_stream(self._device))
        start = _timed(self.stream) if self.trace is not None else None
        with torch.no_grad(), torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                self.n_bytes += source.nbytes
        if self.trace is not None:
            self.trace.add(self._track, label, start, _timed(self.stream))
        return CudaEvent(self.stream)


class CudaDevice:
    """GPU number `index`. `memory_bytes` is enforced by PyTorch's allocator: what goes beyond it is out of memory."""

    name = "cuda"

    def __init__(self, index: int = 0, memory_bytes: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("engine.device is 'cuda', and there is no CUDA device that PyTorch can use")
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"engine.device is 'cuda:{index}'; this machine has {torch.cuda.device_count()} device(s)"
            )
        self.torch_device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(self.torch_device)
        if memory_bytes is not None:
            if memory_bytes > total:
                raise ConfigError(
                    f"engine.device_memory is {format_bytes(memory_bytes)}; the device has {format_bytes(total)}"
                )
            torch.cuda.set_per_process_memory_fraction(memory_bytes / total, self.torch_device)
        self.memory_bytes: int | None = memory_bytes if memory_bytes is not None else free
        self._registered: list[int] = []
        self.up = CudaStream("up", self.torch_device)
        self.down = CudaStream("down", self.torch_device)
        self._base = _timed(torch.cuda.current_stream(self.torch_device))
        self._base.synchronize()
        self._base_seconds = time.perf_counter()

    @property
    def trace(self) -> Trace | None:
        return self.up.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self.up.trace = self.down.trace = trace

    def mark(self) -> Mark:
        return _timed(torch.cuda.current_stream(self.torch_device))

    def seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            return mark  # a host thread's
        mark.synchronize()
        return self._base_seconds + float(self._base.elapsed_time(mark)) / 1000

    def computing(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def native_bf16(self) -> bool:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch_device)

    def start_step(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    @property
    def h2d_bytes(self) -> int:
        return self.up.n_bytes

    @property
    def d2h_bytes(self) -> int:
        return self.down.n_bytes

    # -- memory ---------------------------------------------------------------------------------------------

    def allocate(self, n_bytes: int, what: str) -> Tensor:
        try:
            return torch.empty(n_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            free, _ = torch.cuda.mem_get_info(self.torch_device)
            raise CapacityError(
                f"engine.device_memory: {what} need {format_bytes(n_bytes)} and {format_bytes(free)} are free on"
                f" {self.torch_device}"
            ) from error

    def hold(self, n_bytes: int) -> None:
        pass  # PyTorch's allocator counts by itself

    def host_memory(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, pin_memory=True)

    def let_go(self, tensor: Tensor, copied: Any) -> None:
        tensor.record_stream(self.down.stream)  # the allocator waits for what this stream has been given so far

    def pin(self, buffer: Tensor) -> None:
        """Register host memory with the driver, page-locked, and keep it out of forked processes: a child that wrote
        to it would leave the device copying to pages that are no longer ours."""
        address, n_bytes = buffer.data_ptr(), buffer.nbytes
        if not n_bytes:
            return
        _keep_out_of_forks(address, n_bytes)
        code = int(torch.cuda.cudart().cudaHostRegister(address, n_bytes, _HOST_REGISTER_DEFAULT))
        if code == _ALREADY_REGISTERED:
            return
        if code:
            raise CapacityError(
                f"{format_bytes(n_bytes)} of host memory could not be page-locked (CUDA error {code}) after"
                f" {len(self._registered)} buffers; raise the limit (`ulimit -l unlimited`; in WSL2 half of the memory"
                " is the most)"
            )
        self._registered.append(address)

    # -- order ----------------------------------------------------------------------------------------------

    def compute(self, run: Callable[[], None], after: After) -> CudaEvent:
        for name, event in after:
            self.wait(name, event)
        run()
        return self._now()

    def release(self, buffer: Tensor) -> CudaEvent:
        return self._now()

    def wait(self, name: str, event: Any) -> None:
        torch.cuda.current_stream(self.torch_device).wait_event(event.event)

    def host_wait(self, name: str, wait: Callable[[], None]) -> None:
        wait()

    def drain(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def close(self) -> None:
        self.drain()
        for address in self._registered:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._registered.clear()

    def _now(self) -> CudaEvent:
        return CudaEvent(torch.cuda.current_stream(self.torch_device))


def _timed(stream: Any) -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _keep_out_of_forks(address: int, n_bytes: int) -> None:
    advice = getattr(mmap, "MADV_DONTFORK", None)
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if advice is not None and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(advice))
