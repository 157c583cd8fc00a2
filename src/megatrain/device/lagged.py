"""A device for tests: the host in the role of a device with little memory and late copies.

Every race that a GPU could have can happen here, and more often: copies run on threads of their own, each after a
random delay, as late and as interleaved as the named waits allow; what a freed slot held turns into NaN. Memory has a
hard cap on all that the engine places there; what a unit allocates while it runs is the host's, and not counted. Values
are computed on the host, so a step is bit-equal to the same step on the `cpu` device, or wrong.
"""

import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from megatrain.device.base import WAITS, After, Event
from megatrain.device.cpu import CpuDevice
from megatrain.device.trace import Mark, Trace
from megatrain.device.waits import Waits
from megatrain.errors import CapacityError, ConfigError
from megatrain.sizes import format_bytes

_OUR_REFERENCES = 2  # to the memory of a tensor that is let go: the tensor's own, and the one that looks


class LaggedEvent:
    """`wait` raises what went wrong before it happened, as a device that has failed does."""

    def __init__(self) -> None:
        self._happened = threading.Event()
        self._error: BaseException | None = None

    def wait(self) -> None:
        self.settle()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Return when it has happened, or what should have come before it has failed."""
        self._happened.wait()

    def set(self, error: BaseException | None = None) -> None:
        self._error = error
        self._happened.set()


class LaggedStream:
    """One thread that carries out what it is given, in order, each after a random delay."""

    def __init__(self, name: str, device: "LaggedDevice", longest_delay_seconds: float, seed: int) -> None:
        self.n_bytes = 0
        self._longest_delay_seconds = longest_delay_seconds
        self._track = name
        self._device = device
        self._random = random.Random(seed)
        self._tasks: SimpleQueue[tuple[Callable[[], None], After, str, LaggedEvent] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"megatrain-lagged-{name}", daemon=True)
        self._started = self._closed = False
        self._last: LaggedEvent | None = None

    def copy(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: After, *, computed: bool = False, label: str = ""
    ) -> LaggedEvent:
        self.n_bytes += sum(source.nbytes for _, source in pairs)
        if computed:
            after = [*after, *self._device.computed_so_far()]
        return self.submit(lambda: _copy(pairs), after, label)

    def submit(self, run: Callable[[], None], after: After, label: str) -> LaggedEvent:
        if self._closed:
            raise RuntimeError("this device is closed (by the engine that it was given to); make another one")
        if not self._started:
            self._started = True
            self._thread.start()
        self._last = LaggedEvent()
        self._tasks.put((run, after, label, self._last))
        return self._last

    @property
    def last(self) -> LaggedEvent | None:
        """When all that was submitted is done."""
        return self._last

    def wait_for_last(self) -> None:
        """Return when all that was submitted is done, or has failed."""
        if self._last is not None:
            self._last.settle()

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            run, after, label, done = task
            failure: BaseException | None = None
            try:
                for name, event in after:
                    if self._device.keeps(name):
                        start = time.perf_counter()
                        event.wait()
                        self._waited(name, start, time.perf_counter())
                with self._span(label):
                    time.sleep(self._random.random() * self._longest_delay_seconds)
                    run()
            except BaseException as error:
                failure = error
                self._device.failed(error)
            del task, run, after
            done.set(failure)
            del done, failure

    def _waited(self, name: str, start: float, end: float) -> None:
        if self is self._device.queue:
            self._device.waits.add(f"waits of {self._track}", name, start, end)
        elif self._device.trace is not None:
            self._device.trace.add(f"waits of {self._track}", name, start, end)

    @contextmanager
    def _span(self, label: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._device.trace is not None:
            self._device.trace.add(self._track, label, start, time.perf_counter())

    def close(self) -> None:
        if self._started and not self._closed:
            self._tasks.put(None)
            self._thread.join()
        self._closed = True


class LaggedDevice:
    """See the module.

    slow:    a stream ('up', 'down' or 'compute') that takes ten times as long as the others.
    without: names of waits to leave out, for tests that show what each is for.
    """

    name = "lagged"
    torch_device = torch.device("cpu")
    pools_host_memory = False

    def __init__(
        self,
        precision: str = "auto",
        memory_bytes: int | None = None,
        *,
        seed: int = 0,
        longest_delay_seconds: float = 0.002,
        slow: str = "",
        without: Collection[str] = (),
    ) -> None:
        unknown = set(without) - set(WAITS)
        if unknown:
            raise ConfigError(f"without: {', '.join(sorted(unknown))} is no wait; there are {', '.join(WAITS)}")
        self.memory_bytes = memory_bytes
        self.trace: Trace | None = None
        self._without = frozenset(without)
        self._host = CpuDevice(precision)
        self.pinned: dict[int, Tensor] = {}  # by address
        self._held_bytes = 0
        self._peak_bytes = 0
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self.waits = Waits(self.mark)
        delay = {name: longest_delay_seconds * (10 if name == slow else 1) for name in ("up", "down", "compute")}
        self.up = LaggedStream("up", self, delay["up"], seed)
        self.down = LaggedStream("down", self, delay["down"], seed + 1)
        self.queue = LaggedStream("queued compute", self, delay["compute"], seed + 2)

    # -- as every device ------------------------------------------------------------------------------------

    def mark(self) -> Mark:
        return self._host.mark()

    def seconds(self, mark: Mark) -> float:
        return self._host.seconds(mark)

    def computing(self) -> AbstractContextManager[Any]:
        self.queue.wait_for_last()  # what was given to `compute` comes before what is computed from here on
        return self._host.computing()

    def same_order(self) -> AbstractContextManager[Any]:
        return self._host.same_order()

    def native_bf16(self) -> bool:
        return self._host.native_bf16()

    def peak_bytes(self) -> int:
        return self._peak_bytes

    @property
    def h2d_bytes(self) -> int:
        return self.up.n_bytes

    @property
    def d2h_bytes(self) -> int:
        return self.down.n_bytes

    # -- memory ---------------------------------------------------------------------------------------------

    def allocate(self, n_bytes: int, what: str) -> Tensor:
        self._count(n_bytes, what)
        return torch.full((n_bytes,), 0xFF, dtype=torch.uint8, device="cpu")

    def hold(self, n_bytes: int) -> None:
        if n_bytes > 0:
            self.queue.wait_for_last()  # what computation before this gives back can be had
        self._count(n_bytes, "what computation leaves")

    def _count(self, n_bytes: int, what: str) -> None:
        with self._lock:
            held = self._held_bytes + n_bytes
            if self.memory_bytes is not None and held > self.memory_bytes:
                raise CapacityError(
                    f"engine.device_memory is {format_bytes(self.memory_bytes)}; {what} needs {format_bytes(n_bytes)}"
                    f" beside {format_bytes(self._held_bytes)}: {format_bytes(held - self.memory_bytes)} missing"
                )
            self._held_bytes = held
            self._peak_bytes = max(self._peak_bytes, held)

    def host_memory(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device="cpu")  # dense where `like` overlaps itself

    def host_memory_bytes(self, n_bytes: int) -> int:
        return n_bytes

    def memory_for(self, host: Tensor) -> Tensor:
        memory = torch.empty_strided(host.size(), host.stride(), dtype=host.dtype, device="cpu")
        self.queue.submit(lambda: _spoil(memory), (), "reuse memory")  # the last that another tensor does to it
        return memory

    def let_go(self, tensor: Tensor, copied: Event) -> None:
        with self.waits.during("inputs_saved"):
            self.host_wait("inputs_saved", copied.wait)
        if torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= _OUR_REFERENCES:
            _spoil(tensor)

    def pin(self, buffer: Tensor) -> None:
        """Noted and held, as a driver does; tests look whether copies touch other memory."""
        assert buffer.data_ptr() not in self.pinned, "pinned already"
        if buffer.nbytes:
            self.pinned[buffer.data_ptr()] = buffer

    def unpin(self, buffer: Tensor) -> None:
        if buffer.nbytes:
            del self.pinned[buffer.data_ptr()]

    @property
    def pinned_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.pinned.values())

    # -- order ----------------------------------------------------------------------------------------------

    def keeps(self, name: str) -> bool:
        assert name in WAITS, name
        return name not in self._without

    def computed_so_far(self) -> After:
        """What units compute is over when they return; what is queued may not be."""
        last = self.queue.last
        return [] if last is None else [("computed", last)]

    def compute(self, run: Callable[[], None], after: After, label: str = "") -> Event:
        return self.queue.submit(run, after, label)

    def release(self, buffer: Tensor) -> Event:
        return self.queue.submit(lambda: _fill_with_nan(buffer), (), "release")

    def wait(self, name: str, event: Event) -> None:
        self.host_wait(name, event.wait)

    def host_wait(self, name: str, wait: Callable[[], None]) -> None:
        if self.keeps(name):
            wait()

    def start_step(self) -> None:
        self._peak_bytes = self._held_bytes

    def failed(self, error: BaseException) -> None:
        self._error = self._error or error

    def drain(self) -> None:
        for stream in (self.up, self.queue, self.down):
            stream.wait_for_last()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        for stream in (self.up, self.queue, self.down):
            stream.close()
        self.pinned.clear()


def _spoil(tensor: Tensor) -> None:
    _fill_with_nan(torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage()))


def _fill_with_nan(memory: Tensor) -> None:
    memory.fill_(0xFF)  # of uint8; NaN in bf16 and in fp32


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)
