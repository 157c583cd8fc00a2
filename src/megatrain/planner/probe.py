"""What this machine offers: its limits, and short measurements of what a step asks of it."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatrain.device.base import ComputeDevice, streams
from megatrain.memory.arena import allocate_elements
from megatrain.memory.limits import host_memory_limits
from megatrain.memory.store import bits
from megatrain.optim.adamw_kernels import Segment, adamw
from megatrain.optim.compilation import compile_kernels
from megatrain.optim.workers import Workers
from megatrain.planner.hardware import FIGURES, Hardware

_MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}  # of square products
_ADAMW_ELEMENTS = 4 << 20
_COPY_BYTES = 64 << 20
_GUESSED_RATE = 1e11
_GUESSED_BANDWIDTH = 10e9
_GUESSED_NVME = 3e9


def describe_machine(device: ComputeDevice) -> Hardware:
    """This machine with `device`: its memories as they are now; rates are guesses that nobody has measured."""
    limits = host_memory_limits()
    return Hardware(
        name="this machine",
        description=_describe(device),
        device_memory=(device.memory_bytes or limits.free_bytes) if streams(device) else None,
        matmul_flops=_GUESSED_RATE,
        matmul_flops_fp32=_GUESSED_RATE,
        matmul_efficiency=1.0,
        attention_efficiency=0.5,
        device_bandwidth=_GUESSED_BANDWIDTH,
        h2d_bandwidth=_GUESSED_BANDWIDTH,
        d2h_bandwidth=_GUESSED_BANDWIDTH,
        host_memory=limits.free_bytes,
        host_bandwidth=_GUESSED_BANDWIDTH,
        cores=os.cpu_count() or 1,
        nvme_read=_GUESSED_NVME,
        nvme_write=_GUESSED_NVME,
        watts=0.0,
        dollars_per_hour=0.0,
        sources=dict.fromkeys(FIGURES, "a guess")
        | {
            "device_memory": "what may be used of the device's",
            "matmul_efficiency": "what was measured is what is reached",
            "host_memory": "free now, within the control group's limit",
            "cores": "of this machine",
            "watts": "not known",
            "dollars_per_hour": "not known",
        },
    )


def probe(device: ComputeDevice, precision: str, threads: int | None = None) -> Hardware:
    """As `describe_machine`, with measured rates. Takes a second or two."""
    measured = {
        "matmul_flops": _matmul_rate(device, precision),
        "device_bandwidth": _copy_bandwidth(device.torch_device),
        "host_bandwidth": _adamw_bandwidth(precision, threads or torch.get_num_threads()),
    }
    if device.torch_device.type == "cuda":
        measured["h2d_bandwidth"], measured["d2h_bandwidth"] = _link(device.torch_device)
    measured["matmul_flops_fp32"] = measured["matmul_flops"]  # of the precision that was asked for
    found = describe_machine(device)
    sources = {**found.sources, **dict.fromkeys(measured, "measured here, now")}
    return replace(found, **measured, sources=sources)  # type: ignore[arg-type]


def best_seconds(run: Callable[[], object], device: torch.device, *, rounds: int = 3) -> float:
    """Of `rounds` runs after one to warm up: the shortest, since what disturbs only makes longer."""
    run()
    times = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul_rate(device: ComputeDevice, precision: str) -> float:
    """Operations per second of large products, as the device computes them."""
    where = device.torch_device
    size = _MATMUL_SIZE.get(where.type, 1024)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(size, size, dtype=torch.float32).to(where, dtype) for _ in range(2))
    with torch.no_grad(), device.computing():
        seconds = best_seconds(lambda: one @ other, where)
    return 2 * size**3 / seconds


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy within the device's memory."""
    source = torch.ones(_COPY_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def _link(device: torch.device) -> tuple[float, float]:
    """Bytes per second to a GPU and from it, in page-locked memory."""
    there = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    here = torch.empty(_COPY_BYTES, dtype=torch.uint8).pin_memory()
    up = best_seconds(lambda: there.copy_(here, non_blocking=True), device)
    down = best_seconds(lambda: here.copy_(there, non_blocking=True), device)
    return _COPY_BYTES / up, _COPY_BYTES / down


def _adamw_bandwidth(precision: str, threads: int) -> float:
    """Bytes per second of the host's update: weight, remainder and moments read and written, the gradient read."""
    compile_kernels()
    count, split = _ADAMW_ELEMENTS, precision == "bf16"
    dtype = torch.bfloat16 if split else torch.float32
    weight, gradient = allocate_elements(count, dtype), allocate_elements(count, dtype)
    remainder = np.zeros(count, np.int16) if split else None
    exp_avg, exp_avg_sq = np.zeros(count, np.float32), np.zeros(count, np.float32)
    segment = Segment(start=0, stop=count, step=1, lr=1e-6, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    workers = Workers(threads)
    try:
        seconds = best_seconds(
            lambda: adamw(workers, bits(weight), remainder, exp_avg, exp_avg_sq, bits(gradient), [segment]),
            torch.device("cpu"),
        )
    finally:
        workers.close()
    per_element = 2 * (4 + 8) + dtype.itemsize  # the master and both moments twice, the gradient once
    return count * per_element / seconds


def _describe(device: ComputeDevice) -> str:
    cores = os.cpu_count() or 1
    if device.torch_device.type == "cuda":
        return f"this machine ({torch.cuda.get_device_name(device.torch_device)}, {cores} cores)"
    return f"this machine ({_processor()}, {cores} cores, no GPU in use)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "its processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "its processor")
