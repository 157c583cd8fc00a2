"""An NVIDIA GPU. Copies run on two streams of their own, ordered against computation by CUDA events.

Computation is what the calling thread gives to its current stream. It is not waited for, but in `let_go`, so that the
host does not run far ahead of memory that is on its way out. The host's own threads wait in `CudaEvent.wait`.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from megatrain.device.base import After
from megatrain.device.page_locked import PageLockedMemory
from megatrain.device.trace import Mark, Trace
from megatrain.device.waits import Waits
from megatrain.errors import CapacityError, ConfigError
from megatrain.sizes import format_bytes

_LEAVING_SHARE = 16  # inputs on their way to the host hold at most this fraction of the device's memory
USABLE_SHARE = 0.95  # of what is free: libraries take some past PyTorch's allocator, and no allocator packs perfectly


_LIMITED_BY: dict[torch.device, object] = {}  # what set the limit of PyTorch's allocator that is in force


class CudaEvent:
    def __init__(self, stream: Any) -> None:
        self.event = torch.cuda.Event(blocking=True)  # a waiting thread leaves its core to the optimizer
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class CudaStream:
    """A stream of copies in one direction."""

    def __init__(self, track: str, device: torch.device, locked: PageLockedMemory) -> None:
        self.n_bytes = 0
        self.trace: Trace | None = None
        self._track = track
        self._device = device
        self._locked = locked
        self._issuing = threading.Lock()  # fetches and inputs are issued by different threads
        self.stream = torch.cuda.Stream(device)

    def copy(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: After, *, computed: bool = False, label: str = ""
    ) -> CudaEvent:
        trace = self.trace
        with self._issuing, torch.no_grad():
            start = _timed(self.stream) if trace is not None else None
            for name, event in after:
                assert isinstance(event, CudaEvent)
                self.stream.wait_event(event.event)
                start = self._waited(trace, name, start)
            if computed:
                self.stream.wait_stream(torch.cuda.current_stream(self._device))
                start = self._waited(trace, "computed", start)
            with torch.cuda.stream(self.stream):
                for whole in pairs:
                    for target, source in self._locked.split(*whole):
                        target.copy_(source, non_blocking=True)
                        self.n_bytes += source.nbytes
            if trace is not None:
                trace.add(self._track, label, start, _timed(self.stream))
            return CudaEvent(self.stream)

    def _waited(self, trace: Trace | None, name: str, since: Any) -> Any:
        """Note a wait of this stream that began at `since` and ends here; returns here."""
        if trace is None:
            return None
        now = _timed(self.stream)
        trace.add(f"waits of {self._track}", name, since, now)
        return now

    def wait_for_computation(self) -> None:
        """Later copies begin after what computation has been given so far."""
        self.stream.wait_stream(torch.cuda.current_stream(self._device))


class CudaDevice:
    """GPU number `index`. `memory_bytes` is enforced by PyTorch's allocator, for the whole process until `close`: what
    goes beyond it is out of memory. CUDA's context and libraries take some hundred MB besides."""

    name = "cuda"
    pools_host_memory = True

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
        self._limit = object() if memory_bytes is not None else None
        if self._limit is not None:
            _LIMITED_BY[self.torch_device] = self._limit
        # what PyTorch's allocator holds in this process is ours, too; `peak_bytes` counts it
        usable = int((free + torch.cuda.memory_reserved(self.torch_device)) * USABLE_SHARE)
        self.memory_bytes: int | None = memory_bytes if memory_bytes is not None else usable
        self._leaving: deque[tuple[CudaEvent, int]] = deque()
        self._leaving_bytes = 0
        self._host_memory_used = self._host_memory_kept = False
        self._locked = PageLockedMemory(self.torch_device)
        weakref.finalize(self, _give_back, self._locked, self._limit, self.torch_device).atexit = False
        self.up = CudaStream("up", self.torch_device, self._locked)
        self.down = CudaStream("down", self.torch_device, self._locked)
        self.waits = Waits(self.mark)
        self._base = self.mark()
        self._base.synchronize()
        self._base_seconds = time.perf_counter()
        self._next_base: Any = None

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
        if self._next_base is not None and self._next_base.query():
            self._base_seconds += self._base.elapsed_time(self._next_base) / 1000
            self._base, self._next_base = self._next_base, None
        return self._base_seconds + float(self._base.elapsed_time(mark)) / 1000

    def computing(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.torch_device)  # a thread begins on GPU 0

    def same_order(self) -> AbstractContextManager[Any]:
        # a thread begins in the default stream; entering a stream enters its device, too
        return torch.cuda.stream(torch.cuda.current_stream(self.torch_device))  # type: ignore[no-any-return]

    def native_bf16(self) -> bool:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch_device)

    def start_step(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        if self._next_base is None:  # CUDA counts from a base in fp32 milliseconds: after an hour in quarters of one
            self._next_base = self.mark()
        if self._host_memory_kept and not self._host_memory_used:  # inputs stay on the device now
            self._host_memory_kept = False
            _free_host_memory()
        self._host_memory_used = False

    @property
    def h2d_bytes(self) -> int:
        return self.up.n_bytes

    @property
    def d2h_bytes(self) -> int:
        return self.down.n_bytes

    # -- memory ---------------------------------------------------------------------------------------------

    def allocate(self, n_bytes: int, what: str) -> Tensor:
        try:
            memory = torch.empty(n_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.torch_device)
            ours = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
            most = self.memory_bytes if self._limit is not None and self.memory_bytes is not None else total
            held = torch.cuda.memory_allocated(self.torch_device)
            free = max(0, min(free + ours, most - held))
            raise CapacityError(
                f"engine.device_memory is {format_bytes(most)}; {what} need {format_bytes(n_bytes)} beside"
                f" {format_bytes(held)}: {format_bytes(max(0, n_bytes - free))} missing on {self.torch_device}"
            ) from error
        # it may have been another tensor's, which computation still reads; copies know nothing of that
        self.up.wait_for_computation()
        self.down.wait_for_computation()
        return memory

    def hold(self, n_bytes: int) -> None:
        pass  # PyTorch's allocator counts by itself

    def host_memory(self, like: Tensor) -> Tensor:
        self._host_memory_used = self._host_memory_kept = True
        # strides of `like`; where it overlaps itself (`expand`) or has gaps, those of a dense copy
        return torch.empty_like(like, device="cpu", pin_memory=True)

    def host_memory_bytes(self, n_bytes: int) -> int:
        return 1 << (n_bytes - 1).bit_length() if n_bytes else 0  # PyTorch's allocator of page-locked memory rounds up

    def memory_for(self, host: Tensor) -> Tensor:
        return torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device=self.torch_device)

    def let_go(self, tensor: Tensor, copied: Any) -> None:
        tensor.record_stream(self.down.stream)  # the allocator waits for what this stream has been given so far
        self._leaving.append((copied, tensor.nbytes))
        self._leaving_bytes += tensor.nbytes
        most = (self.memory_bytes or 0) // _LEAVING_SHARE
        # without a wait the host would go through the whole forward while all inputs are still here
        while len(self._leaving) > 1 and (self._leaving_bytes > most or self._leaving[0][0].event.query()):
            oldest, left_bytes = self._leaving.popleft()
            self._leaving_bytes -= left_bytes
            with self.waits.during("inputs_saved"):
                self.host_wait("inputs_saved", oldest.wait)

    def pin(self, buffer: Tensor) -> None:
        self._locked.lock(buffer)

    def unpin(self, buffer: Tensor) -> None:
        self._locked.unlock(buffer)

    @property
    def pinned_bytes(self) -> int:
        return self._locked.n_bytes

    # -- order ----------------------------------------------------------------------------------------------

    def compute(self, run: Callable[[], None], after: After, label: str = "") -> CudaEvent:
        for name, event in after:
            with self.waits.during(name):
                self.wait(name, event)
        start = self.mark() if self.trace is not None else None
        run()
        if self.trace is not None and start is not None:
            self.trace.add("queued compute", label, start, self.mark())
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
        try:
            self.drain()
        finally:
            _give_back(self._locked, self._limit, self.torch_device)
            self._leaving.clear()
            self._leaving_bytes = 0
            if self._host_memory_kept:
                _free_host_memory()

    def _now(self) -> CudaEvent:
        return CudaEvent(torch.cuda.current_stream(self.torch_device))


def _timed(stream: Any) -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _give_back(locked: PageLockedMemory, limit: object | None, device: torch.device) -> None:
    """Unlock memory, and lift the limit if it is still the device's own."""
    if limit is not None and _LIMITED_BY.get(device) is limit:
        del _LIMITED_BY[device]
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    locked.unlock_all()


def _free_host_memory() -> None:
    """Page-locked memory that PyTorch keeps for reuse."""
    getattr(torch._C, "_host_emptyCache", lambda: None)()
