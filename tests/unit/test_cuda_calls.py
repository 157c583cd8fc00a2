"""Which calls of CUDA the device makes, on a made-up runtime: order and memory as they would be asked for."""

import ctypes
import itertools
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatrain.device.cuda import CudaDevice
from megatrain.device.trace import Trace
from megatrain.errors import CapacityError, IntegrityError
from megatrain.memory.arena import allocate
from megatrain.model.micro_batches import HandOver


class FakeCuda:
    """Streams are names, the current one by thread. `log` holds the calls."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.events = 0  # recorded so far
        self.refused = 0  # the error code of cudaHostRegister
        self._local = threading.local()

    def current_stream(self, _device: Any = None) -> "FakeStream":
        return getattr(self._local, "stream", FakeStream("default", self))

    @contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        before, self._local.stream = self.current_stream(), stream
        yield
        self._local.stream = before

    @contextmanager
    def device(self, _device: Any) -> Iterator[None]:
        yield


class FakeStream:
    def __init__(self, name: str, cuda: FakeCuda) -> None:
        self.name, self.cuda = name, cuda

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.log.append(("wait_stream", self.name, other.name))

    def wait_event(self, event: Any) -> None:
        self.cuda.log.append(("wait_event", self.name, event.name))


class FakeEvent:
    def __init__(self, **_options: Any) -> None:
        self.name = ""

    def record(self, stream: FakeStream) -> None:
        self.name, self._cuda = f"after {stream.name}", stream.cuda
        self.number = stream.cuda.events = stream.cuda.events + 1
        stream.cuda.log.append(("record", stream.name))

    def synchronize(self) -> None:
        self._cuda.log.append(("synchronize", self.name))

    def query(self) -> bool:
        return False

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 250.0 * (other.number - self.number)  # milliseconds


class FakeTensor:
    """On the device: notes the stream of what is done with it."""

    def __init__(self, cuda: FakeCuda, n_bytes: int = 64) -> None:
        self._cuda, self.nbytes = cuda, n_bytes
        self.device = torch.device("cuda")

    def copy_(self, _source: Any, non_blocking: bool = False) -> None:
        self._cuda.log.append(("copy", self._cuda.current_stream().name, non_blocking))

    def record_stream(self, stream: "FakeStream") -> None:
        self._cuda.log.append(("record_stream", stream.name))


def calls_of(cuda: FakeCuda, run: Callable[[], Any]) -> list[tuple[Any, ...]]:
    cuda.log.clear()
    run()
    return cuda.log[:]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    names = itertools.cycle(["up", "down"])
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda _device=None: (2**30, 2**30),
        "memory_reserved": lambda _device=None: 0,
        "set_per_process_memory_fraction": lambda share, _device: fake.log.append(("fraction", share)),
        "synchronize": lambda _device=None: fake.log.append(("synchronize",)),
        "Stream": lambda _device=None: FakeStream(next(names), fake),
        "Event": FakeEvent,
        "current_stream": fake.current_stream,
        "stream": fake.stream,
        "device": fake.device,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda address, n_bytes, _flags: (
                fake.log.append(("register", address, n_bytes)) or fake.refused
            ),
            cudaHostUnregister=lambda address: fake.log.append(("unregister", address)) or 0,
        ),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_micro_batches_compute_in_the_callers_stream(cuda: FakeCuda) -> None:
    device = CudaDevice()
    hand_over = HandOver(torch.device("cpu"), device.same_order)

    def look() -> list[str]:
        seen = []
        for stop in range(3):
            hand_over.boundary((0, stop))
            with device.computing():
                seen.append(torch.cuda.current_stream().name)
        return seen

    for name in ("the caller's", "another"):
        with torch.cuda.stream(FakeStream(name, cuda)):
            assert hand_over.run([look] * 3) == [[name] * 3] * 3
    assert hand_over.run([look] * 3) == [["default"] * 3] * 3
    hand_over.close()


@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("computed", [False, True])
def test_a_copy_is_ordered_before_it_is_issued(name: str, computed: bool, cuda: FakeCuda) -> None:
    device = CudaDevice()
    stream = getattr(device, name)
    free = device.release(torch.empty(0))
    target: Any = FakeTensor(cuda)
    pairs = [(target, torch.zeros(4)), (target, torch.zeros(2))]
    calls = calls_of(cuda, lambda: stream.copy(pairs, [("slot_free", free)], computed=computed))
    assert calls == [
        ("wait_event", name, "after default"),
        *([("wait_stream", name, "default")] if computed else []),
        ("copy", name, True),
        ("copy", name, True),
        ("record", name),
    ]
    assert stream.n_bytes == 24


@pytest.mark.parametrize("name", ["up", "down"])
def test_a_trace_names_what_a_copy_waited_for(name: str, cuda: FakeCuda) -> None:
    device = CudaDevice()
    device.trace = Trace()
    saved = device.release(torch.empty(0))
    getattr(device, name).copy([], [("inputs_saved", saved)], computed=True, label="inputs")
    spans = [(track, label, end.number - start.number) for track, label, start, end in device.trace._spans]
    assert spans == [(f"waits of {name}", "inputs_saved", 1), (f"waits of {name}", "computed", 1), (name, "inputs", 1)]


def test_computation_waits_in_the_stream_of_the_thread_that_asks(cuda: FakeCuda) -> None:
    device = CudaDevice()
    landed = device.down.copy([], ())
    waited = ("wait_event", "default", "after down")
    assert calls_of(cuda, lambda: device.wait("weights_arrived", landed)) == [waited]
    device.waits.counting = True
    run = lambda: device.compute(lambda: cuda.log.append(("run",)), [("staging_free", landed)])  # noqa: E731
    assert calls_of(cuda, run) == [
        ("record", "default"),
        waited,
        ("record", "default"),
        ("run",),
        ("record", "default"),
    ]
    assert device.waits.take(device.seconds, None) == {"staging_free": 0.25}
    assert calls_of(cuda, lambda: device.release(torch.empty(0))) == [("record", "default")]


def test_copies_begin_after_computation_that_had_the_memory_before(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CudaDevice()
    monkeypatch.setattr(torch, "empty", lambda *_shape, **_options: cuda.log.append(("empty",)))
    assert calls_of(cuda, lambda: device.allocate(64, "weight slots")) == [
        ("empty",),
        ("wait_stream", "up", "default"),
        ("wait_stream", "down", "default"),
    ]


def test_memory_of_inputs_is_kept_until_they_are_copied_and_the_host_waits_where_they_are_many(cuda: FakeCuda) -> None:
    device = CudaDevice(memory_bytes=16 * 100)  # 100 bytes may be on their way
    saved = device.down.copy([], ())
    leaving: Any = FakeTensor(cuda, n_bytes=60)
    assert calls_of(cuda, lambda: device.let_go(leaving, saved)) == [("record_stream", "down")]
    assert calls_of(cuda, lambda: device.let_go(leaving, saved)) == [
        ("record_stream", "down"),
        ("synchronize", "after down"),
    ]
    named: list[str] = []
    device.host_wait = lambda name, wait: named.append(name)  # type: ignore[method-assign]
    device.let_go(leaving, saved)
    assert named == ["inputs_saved"]
    device.close()


def test_a_limit_is_the_allocators_until_the_device_is_closed_or_another_sets_one(cuda: FakeCuda) -> None:
    limits = lambda: [share for kind, *share in cuda.log if kind == "fraction"]  # noqa: E731
    first = CudaDevice(memory_bytes=2**28)
    assert limits() == [[0.25]]
    second = CudaDevice(memory_bytes=2**29)
    first.close()
    assert limits() == [[0.25], [0.5]]
    second.close()
    assert limits() == [[0.25], [0.5], [1.0]]
    CudaDevice().close()
    assert len(limits()) == 3


@pytest.fixture
def advice(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """madvise is noted among CUDA's calls, in whole pages."""
    noted = lambda start, n_bytes, what: cuda.log.append(("advise", start.value, n_bytes.value, what.value))  # noqa: E731
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(madvise=noted))


@pytest.mark.usefixtures("advice")
def test_memory_that_is_registered_is_kept_out_of_forked_processes(cuda: FakeCuda) -> None:
    buffer = allocate(3 * mmap.PAGESIZE)
    device, pages = CudaDevice(), (buffer.data_ptr(), buffer.nbytes)
    assert calls_of(cuda, lambda: device.pin(buffer[:-100])) == [
        ("advise", *pages, mmap.MADV_DONTFORK),
        ("register", pages[0], pages[1] - 100),
    ]
    assert calls_of(cuda, lambda: device.unpin(buffer[:-100])) == [
        ("unregister", pages[0]),
        ("advise", *pages, mmap.MADV_DOFORK),
    ]


@pytest.mark.usefixtures("advice")
@pytest.mark.parametrize(
    ("code", "error", "said"), [(2, CapacityError, "ulimit -l"), (712, IntegrityError, "page-locked already")]
)
def test_memory_that_cannot_be_registered_is_an_error_and_left_as_it_was(
    code: int, error: type[Exception], said: str, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, buffer, cuda.refused = CudaDevice(), allocate(mmap.PAGESIZE), code
    monkeypatch.setattr(torch, "ones", lambda *_shape, **_options: cuda.log.append(("kernel",)))
    cuda.log.clear()
    with pytest.raises(error, match=said):
        device.pin(buffer)
    pages = (buffer.data_ptr(), buffer.nbytes)
    assert cuda.log == [
        ("advise", *pages, mmap.MADV_DONTFORK),
        ("register", *pages),
        ("kernel",),  # it takes the error that CUDA reports once more
        ("advise", *pages, mmap.MADV_DOFORK),
    ]
    assert device.pinned_bytes == 0


def test_large_memory_is_registered_in_pieces_and_no_copy_goes_over_a_seam(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = mmap.PAGESIZE
    monkeypatch.setattr("megatrain.device.page_locked.PIECE_BYTES", 2 * page)
    device, buffer = CudaDevice(), allocate(5 * page)
    start = buffer.data_ptr()
    other = allocate(2 * page)  # of one piece
    pieces = [("register", start, 2 * page), ("register", start + 2 * page, 2 * page)]
    assert calls_of(cuda, lambda: device.pin(buffer)) == [*pieces, ("register", start + 4 * page, page)]
    device.pin(other)
    assert device.pinned_bytes == 7 * page

    target = torch.zeros(5 * page // 2, dtype=torch.bfloat16)
    source = buffer.view(torch.bfloat16).fill_(1.5)
    for first, last, parts in [(0, 5, 3), (0, 2, 1), (2, 4, 1), (1, 3, 2), (4, 5, 1)]:
        span = slice(first * page // 2, last * page // 2)
        target.zero_()
        copies = device._locked.split(target[span], source[span])
        assert len(copies) == parts
        device.up.copy([(target[span], source[span])], ())
        assert (target[span] == 1.5).all() and target.sum() == 1.5 * target[span].numel()
    assert len(device._locked.split(target[: page // 2], other.view(torch.bfloat16)[: page // 2])) == 1

    seen: list[int] = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, _other, **_options: seen.append(self.numel()))
    device.up.copy([(target, source)], ())
    device.down.copy([(source, torch.empty_like(source, device="meta"))], ())
    assert seen == 2 * [page, page, page // 2]
    unregistered = [("unregister", start + n * page) for n in (0, 2, 4)]
    assert calls_of(cuda, lambda: device.unpin(buffer)) == unregistered
    assert len(device._locked.split(target, source)) == 1
    device.close()


def test_pieces_are_given_back_where_a_later_one_is_refused(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    page = mmap.PAGESIZE
    monkeypatch.setattr("megatrain.device.page_locked.PIECE_BYTES", page)
    monkeypatch.setattr(torch, "ones", lambda *_shape, **_options: None)
    device, buffer = CudaDevice(), allocate(3 * page)
    start = buffer.data_ptr()
    register = torch.cuda.cudart().cudaHostRegister
    refusing = SimpleNamespace(
        cudaHostRegister=lambda address, *rest: 2 if address == start + 2 * page else register(address, *rest),
        cudaHostUnregister=torch.cuda.cudart().cudaHostUnregister,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with pytest.raises(CapacityError, match="page-locked"):
        device.pin(buffer)
    assert [call[:2] for call in cuda.log if "register" in call[0]] == [
        ("register", start),
        ("register", start + page),
        ("unregister", start),
        ("unregister", start + page),
    ]
    assert device.pinned_bytes == 0 and len(device._locked.split(buffer, buffer)) == 1


def test_memory_is_registered_until_it_is_unpinned(cuda: FakeCuda) -> None:
    device = CudaDevice()
    one, other = allocate(4096), allocate(8192)
    for buffer in (one, other):
        device.pin(buffer)
    assert device.pinned_bytes == 4096 + 8192
    device.unpin(one)
    assert device.pinned_bytes == 8192
    device.close()
    calls = [call for call in cuda.log if "register" in call[0]]
    assert calls == [
        ("register", one.data_ptr(), 4096),
        ("register", other.data_ptr(), 8192),
        ("unregister", one.data_ptr()),
        ("unregister", other.data_ptr()),
    ]
    assert cuda.log.index(("synchronize",)) < cuda.log.index(calls[-1])
