"""The host optimizer by number of threads, alone and while copies run both ways."""

import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_parts.bench import Bench, release
from harness.machine import usable_cores
from torch import Tensor

from megatrain.memory.arena import allocate, allocate_elements
from megatrain.optim.adamw_kernels import Segment, adamw
from megatrain.optim.gradient_kernels import square_sum
from megatrain.optim.workers import Workers

_LR = 1e-6


class Traffic:
    """Copies that go on up and down, two of each under way, until the end of the block."""

    def __init__(self, device: Any, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.copies = {"up": 0, "down": 0}
        self._stop = threading.Event()
        hosts = [allocate(n_bytes) for _ in range(2)]
        for host in hosts:
            device.pin(host)
        above, below = (device.allocate(n_bytes, "the benchmark's") for _ in range(2))
        work = {"up": (device.up, [(above, hosts[0])]), "down": (device.down, [(hosts[1], below)])}
        self._threads = [threading.Thread(target=self._serve, args=(way, *work[way])) for way in work]

    def _serve(self, way: str, stream: Any, pairs: list[tuple[Tensor, Tensor]]) -> None:
        under_way = [stream.copy(pairs, ()) for _ in range(2)]
        while not self._stop.is_set():
            under_way.append(stream.copy(pairs, ()))
            under_way.pop(0).wait()
            self.copies[way] += 1
        for event in under_way:
            event.wait()

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def measured(self, run: Callable[[], float]) -> tuple[float, dict[str, float]]:
        """(what `run` returns, GB/s of the copies during it)."""
        before, started = dict(self.copies), time.perf_counter()
        result = run()
        seconds = time.perf_counter() - started
        return result, {way: (n - before[way]) * self.n_bytes / seconds / 1e9 for way, n in self.copies.items()}


def run_adamw(bench: Bench) -> None:
    """AdamW with split masters, 26 bytes read and written per parameter, and sums of squares of bf16 gradients."""
    parameters = 1 << 16 if bench.tiny else 1 << 27
    device = bench.make_device()
    weight, gradient = (allocate_elements(parameters, torch.bfloat16) for _ in range(2))
    noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for array in (weight, gradient):
        array.view(-1, noise.numel()).copy_(noise)
    moments = [allocate_elements(parameters, torch.float32).numpy() for _ in range(2)]
    bits = [array.view(torch.uint16).numpy() for array in (weight, gradient)]
    remainder = np.asarray(allocate_elements(parameters, torch.int16).numpy())
    segments = [Segment(0, parameters, _LR, 0.9, 0.95, 1e-8, 0.1, 10)]
    threads = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= usable_cores()]
    table = bench.table(
        "Host AdamW, split master",
        *("threads", "G parameters/s", "GB/s", "while copying", "GB/s", "copies up GB/s", "down", "squares GB/s"),
    )
    traffic_bytes = 1 << 16 if bench.tiny else 256 << 20
    for count in threads:
        with Workers(count) as workers:
            update = partial(adamw, workers, bits[0], remainder, moments[0], moments[1], bits[1], segments)
            alone = _rate(update, parameters)
            squares = _rate(partial(square_sum, workers, bits[1]), parameters)
            with Traffic(device, traffic_bytes) as traffic:
                time.sleep(0.05)
                beside, copies = traffic.measured(partial(_rate, update, parameters))
        table.add_row(
            str(count),
            *(f"{alone / 1e9:.2f}", f"{26 * alone / 1e9:.0f}", f"{beside / 1e9:.2f}", f"{26 * beside / 1e9:.0f}"),
            *(f"{copies['up']:.1f}", f"{copies['down']:.1f}", f"{2 * squares / 1e9:.0f}"),
        )
        bench.record(
            "adamw",
            f"{count} threads",
            alone=(alone / 1e9, "G parameters/s"),
            beside_copies=(beside / 1e9, "G parameters/s"),
            copies_up=(copies["up"], "GB/s"),
            copies_down=(copies["down"], "GB/s"),
            squares=(2 * squares / 1e9, "GB/s"),
        )
    device.close()
    bench.console.print(table)
    release(bench)


def _rate(run: Callable[[], Any], parameters: int, rounds: int = 4) -> float:
    """Parameters per second: the median of `rounds`, after one that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return parameters / statistics.median(seconds[1:])
