"""What the engine reaches on a GPU, beside what the machine could reach.

    python benchmarks/gpu.py                           every part, within --budget seconds
    python benchmarks/gpu.py --only link,adamw         some parts; each can be a call of its own
    python benchmarks/gpu.py --only models --models 8b
    python benchmarks/gpu.py --only models --models 8b --kernels torch,liger      both, and the ratio of their speeds
    python benchmarks/gpu.py --device lagged --tiny    a dry run of the same code on the host; its numbers mean nothing

Parts, in this order:

    check    training on the device against plain PyTorch on it, with deterministic kernels; where it fails, nothing
             else is run and the exit code is 1
    link     GB/s of copies up and down, from page-locked and from pageable memory; of page-locking itself
    matmul   TFLOP/s of bf16 products: the peak that models are compared with
    adamw    the host optimizer by number of threads, alone and while copies run both ways
    models   training steps of models with random weights, by tokens per sequence and per step
    long     one step of four layers of 7B over one sequence of 512k tokens, beside the plan of its memory; the other
             parts leave no time for it within the default --budget: --only long --budget 1800

Every number is appended to benchmarks/results.csv as soon as it is there. GB is 10^9 bytes. Tokens are target tokens.
Model operations are those a step takes without repetition, hardware operations include what is computed again
(benchmarks/harness/rates.py). The parts are in benchmarks/gpu_parts.

Expected on an H200 whose link carries 55 GB/s, written down before the first run:
  - from 32k tokens per step on, hardware operations at 70% or more of the matmul peak, for 3B and 8B;
  - below, the copies show: at 8k tokens per step 8B's weights alone take 2 x 16 GB / 55 GB/s = 0.6 s;
  - page-locked copies reach the link's speed from 64 MiB on, pageable ones a third of it at most;
  - the long step: about 110 s, three quarters of it attention, and a peak within 10% of the plan's.
Not measured yet.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness  # noqa: F401 (first: it prepares the environment)
import torch
from gpu_parts.adamw import run_adamw
from gpu_parts.bench import Bench, release
from gpu_parts.check import run_check
from gpu_parts.link import run_link
from gpu_parts.long import run_long
from gpu_parts.matmul import run_matmul
from gpu_parts.training import run_models
from harness.machine import describe_machine, usable_cores
from harness.models import MODELS
from harness.results import RESULTS, Results
from rich.console import Console

from megatrain.optim.compilation import compile_kernels

PARTS = ("check", "link", "matmul", "adamw", "models", "long")


RUN: dict[str, Callable[[Bench], Any]] = {
    "check": run_check,
    "link": run_link,
    "matmul": run_matmul,
    "adamw": run_adamw,
    "models": run_models,
    "long": run_long,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--only", default=",".join(PARTS), help=f"parts, separated by commas (default: {','.join(PARTS)})")
    add("--device", default="cuda", help="cuda, cuda:NUMBER, or lagged for a dry run (default: cuda)")
    add("--device-memory", type=_gib, metavar="GIB", help="cap of the GPU's memory in GiB (default: none)")
    add("--tiny", action="store_true", help="sizes for a dry run")
    add("--budget", type=float, default=540.0, metavar="SECONDS", help="of this call (default: 540)")
    add("--models", default="", help=f"of {', '.join(MODELS)} (default: 1b,3b,8b)")
    add("--sequences", type=_numbers, default=[1, 8], metavar="K", help="1024s of tokens per sequence (default: 1,8)")
    add("--tokens", type=_numbers, default=[8, 32, 64], metavar="K", help="1024s of tokens per step (default: 8,32,64)")
    add("--steps", type=int, default=3, help="timed steps of each case (default: 3)")
    add("--clip", default="auto", choices=("auto", "global", "unit"), help="clip_scope (default: as memory allows)")
    add("--threads", type=int, default=max(1, usable_cores() - 2), help="of the optimizer (default: all cores but two)")
    add("--slots", type=int, help="weight slots of a size (default: the engine's)")
    add("--keep-graphs", default="auto", help="auto, off or a number of units (default: auto)")
    add("--compile", default="off", choices=("off", "blocks"), help="the engine's setting (default: off)")
    add("--kernels", default="torch", help="of torch and liger, separated by commas (default: torch)")
    add("--results", type=Path, help="default: benchmarks/results.csv; of a dry run none")
    add("--commit", default="", help="written to the results (default: git's answer)")
    options = parser.parse_args(argv)
    options.only = [part for part in options.only.split(",") if part]
    unknown = [part for part in options.only if part not in PARTS]
    if unknown:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.kernels = [kernels for kernels in options.kernels.split(",") if kernels]
    if not options.kernels or not {"torch", "liger"}.issuperset(options.kernels):
        parser.error("--kernels: torch, liger, or both, separated by a comma")
    if options.device != "lagged" and options.device.partition(":")[0] != "cuda":
        parser.error("--device: cuda, cuda:NUMBER or lagged")
    if options.keep_graphs.isdecimal():
        options.keep_graphs = int(options.keep_graphs)
    if options.results is None and options.device != "lagged":
        options.results = RESULTS
    return options


def _numbers(text: str) -> list[int]:
    return sorted(int(word) for word in text.split(","))


def _gib(text: str) -> int:
    return int(float(text) * 1024**3)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = parse(argv)
    if options.device != "lagged" and not torch.cuda.is_available():
        print("there is no CUDA device that PyTorch can use; --device lagged --tiny is a dry run", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 190)
    machine = describe_machine(options.device, options.commit)
    bench = Bench(options, console, Results(options.results, machine), started + options.budget)
    bench.say("  ".join(f"{name}: {value}" for name, value in machine.items() if value))
    if bench.torch_device.type == "cuda":
        torch.cuda.set_device(bench.torch_device)
    compile_kernels()
    for part in [part for part in PARTS if part in options.only]:
        if bench.left() <= 0:
            bench.say(f"{part}: dropped; --budget is spent")
            continue
        began = time.perf_counter()
        bench.say(f"\n== {part}")
        try:
            RUN[part](bench)
        except Exception:  # what the other parts measure is worth having
            bench.failed = True
            bench.say(traceback.format_exc())
            release(bench)
        bench.say(f"{part}: {time.perf_counter() - began:.0f} s, {bench.left():.0f} s of --budget left")
        if part == "check" and bench.failed:
            break
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
