"""GB/s of copies up and down, from page-locked and from pageable memory; of page-locking itself."""

import time
from typing import Any

from gpu_parts.bench import Bench, release
from torch import Tensor

from megatrain.memory.arena import allocate
from megatrain.sizes import format_bytes


def run_link(bench: Bench) -> None:
    """Copies of 64 MiB to 1 GiB, up, down and both at once, from page-locked and pageable memory; page-locking."""
    sizes = [1 << 16, 1 << 18] if bench.tiny else [64 << 20, 256 << 20, 1 << 30]
    device = bench.make_device()
    largest = max(sizes)
    hosts = {name: (allocate(largest), allocate(largest)) for name in ("page-locked", "pageable")}
    for host in hosts["page-locked"]:
        started = time.perf_counter()
        device.pin(host)
        rate = largest / (time.perf_counter() - started) / 1e9
        bench.record("link", f"page-locking {format_bytes(largest)}", rate=(rate, "GB/s"))
        bench.say(f"page-locking {format_bytes(largest)}: {rate:.1f} GB/s")
    above, below = device.allocate(largest, "the benchmark's"), device.allocate(largest, "the benchmark's")
    table = bench.table("Link, GB/s", "memory, bytes", "up", "down", "both: up + down")
    for name, (source, target) in hosts.items():
        for size in sizes:
            repeat = 3 if bench.tiny else max(4, (2 << 30) // size)
            ups = (device.up, [(above[:size], source[:size])])
            downs = (device.down, [(target[:size], below[:size])])
            rates = [copy_rate(streams, size, repeat) for streams in ([ups], [downs], [ups, downs])]
            table.add_row(f"{name}, {format_bytes(size)}", *[f"{rate:.1f}" for rate in rates])
            units = dict(zip(("up", "down", "both"), [(rate, "GB/s") for rate in rates], strict=True))
            bench.record("link", f"{name} {format_bytes(size)}", **units)
    started = time.perf_counter()
    device.close()
    seconds = time.perf_counter() - started
    bench.record("link", "unlocking", seconds=(seconds, "s"), bytes=(2 * largest / 1e9, "GB"))
    bench.console.print(table)
    del above, below, hosts
    release(bench)


def copy_rate(streams: list[tuple[Any, list[tuple[Tensor, Tensor]]]], n_bytes: int, repeat: int) -> float:
    """GB/s of all `streams` together, after one round that does not count."""
    for timed in (False, True):
        started = time.perf_counter()
        events = [stream.copy(pairs, ()) for _ in range(repeat if timed else 1) for stream, pairs in streams]
        for event in events:
            event.wait()
    return repeat * len(streams) * n_bytes / (time.perf_counter() - started) / 1e9
