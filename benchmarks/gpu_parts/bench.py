"""What the parts share: options, clock, device and results of one call."""

import argparse
import gc
import time
from dataclasses import dataclass
from typing import Any

import torch
from harness.results import Results, Value
from rich.console import Console
from rich.table import Table

from megatrain.device.cuda import CudaDevice
from megatrain.device.lagged import LaggedDevice


def device_index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


@dataclass(slots=True)
class Bench:
    """Options, clock and results of one call."""

    options: argparse.Namespace
    console: Console
    results: Results
    deadline: float
    peak_tflops: float | None = None
    failed: bool = False

    @property
    def tiny(self) -> bool:
        return bool(self.options.tiny)

    @property
    def torch_device(self) -> torch.device:
        on_host = self.options.device == "lagged"
        return torch.device("cpu") if on_host else torch.device("cuda", device_index(self.options.device))

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def make_device(self, precision: str = "bf16") -> Any:
        if self.options.device == "lagged":
            return LaggedDevice(precision, longest_delay_seconds=0.0)
        return CudaDevice(device_index(self.options.device), self.options.device_memory)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def record(self, part: str, case: str, **metrics: Value) -> None:
        self.results.record(part, case, **metrics)

    def table(self, title: str, *columns: str) -> Table:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        return table


def release(bench: Bench) -> None:
    gc.collect()
    if bench.torch_device.type == "cuda":
        torch.cuda.empty_cache()
