"""TFLOP/s of bf16 products: the peak that models are compared with."""

from typing import Any

import torch
from gpu_parts.bench import Bench, release
from torch import Tensor


def run_matmul(bench: Bench) -> float:
    """bf16 products; returns the fastest rate in TFLOP/s."""
    sizes = [(32, 32, 32), (48, 32, 64)] if bench.tiny else [(n, n, n) for n in (4096, 8192, 16384)]
    if not bench.tiny:
        sizes.append((8192, 4096, 14336))  # a micro-batch through an MLP of 8B
    device = bench.make_device()
    table = bench.table("Products in bf16", "rows x inner x columns", "TFLOP/s")
    rates = []
    for rows, inner, columns in sizes:
        a = torch.randn(rows, inner, dtype=torch.bfloat16, device=bench.torch_device)
        b = torch.randn(inner, columns, dtype=torch.bfloat16, device=bench.torch_device)
        flops = 2 * rows * inner * columns
        repeat = 3 if bench.tiny else max(10, int(0.7e15 // flops))  # about a second: clocks settle under load
        rate = matmul_rate(device, a, b, flops, repeat)
        rates.append(rate)
        name = f"{rows} x {inner} x {columns}"
        table.add_row(name, f"{rate:.4g}")
        bench.record("matmul", name, rate=(rate, "TFLOP/s"))
    device.close()
    bench.peak_tflops = max(rates)
    bench.console.print(table)
    release(bench)
    return bench.peak_tflops


def matmul_rate(device: Any, a: Tensor, b: Tensor, flops: int, repeat: int) -> float:
    """TFLOP/s over `repeat` products in a row, after a few that do not count."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    with device.computing():
        for count in (2, repeat):
            start = device.mark()
            for _ in range(count):
                torch.matmul(a, b, out=out)
            end = device.mark()
    seconds = float(device.seconds(end) - device.seconds(start))
    return flops * repeat / max(1e-9, seconds) / 1e12
