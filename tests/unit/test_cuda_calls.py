"""Which calls of CUDA the device makes, on a made-up runtime: order and memory as they would be asked for."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatrain.device.cuda import CudaDevice
from megatrain.memory.arena import allocate
from megatrain.model.micro_batches import HandOver


class FakeCuda:
    """Streams are names, the current one by thread. `log` holds the calls."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
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
        self.name, self._cuda = name, cuda

    def wait_stream(self, other: "FakeStream") -> None:
        self._cuda.log.append(("wait_stream", self.name, other.name))

    def wait_event(self, event: Any) -> None:
        self._cuda.log.append(("wait_event", self.name, event.name))


class FakeEvent:
    def __init__(self, **_options: Any) -> None:
        self.name = ""

    def record(self, stream: FakeStream) -> None:
        self.name = f"after {stream.name}"

    def synchronize(self) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    names = iter(["up", "down", *"abcdef"])
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda _device=None: (2**30, 2**30),
        "memory_reserved": lambda _device=None: 0,
        "synchronize": lambda _device=None: fake.log.append(("synchronize",)),
        "Stream": lambda _device=None: FakeStream(next(names), fake),
        "Event": FakeEvent,
        "current_stream": fake.current_stream,
        "stream": fake.stream,
        "device": fake.device,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda address, n_bytes, _flags: fake.log.append(("register", address, n_bytes)) or 0,
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
