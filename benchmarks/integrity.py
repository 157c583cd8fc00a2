"""What `engine.integrity` costs: the same training at each level, as ratios in one run, and the rate of the checksum.

    python benchmarks/integrity.py                 on the GPU, or on the host where there is none
    python benchmarks/integrity.py --device lagged copies without delays; all of the device's work is the host's
    python benchmarks/integrity.py --tiny          a dry run; its numbers mean nothing

Two lengths of a step: a short one, in which updates and copies are most of the time and checksums have little to hide
behind, and a long one. A checksum only reads: its rate is beside that of numpy's sum of the same words.

Expected, written down before the first run: the host's checksum at the rate of reading memory from a few threads on;
`sampled` within 2% of `off`; on the host `full` between 0.75x and 0.9x in the short step, as the update's memory
traffic nearly doubles, and above 0.95x in the long one; on a GPU, whose host works beside the next forward, `full`
above 0.9x in the short step and within 2% in the long one.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import harness  # noqa: F401 (first: it prepares the environment)
import numpy as np
import torch
from harness.machine import describe_machine
from harness.models import MODELS, TINY_MODELS, Model, shape_of
from harness.percentiles import Spread
from harness.results import Results
from rivals.beside import record_beside
from rivals.contest import Outcome, run_rounds
from rivals.interface import Settings
from rivals.systems import OURS
from rivals.worker import Task
from sweeps import add_common_options, complete

from megatrain.memory.arena import allocate
from megatrain.memory.checksum import device_sums, host_sums
from megatrain.memory.checksum_book import LEVELS
from megatrain.optim.workers import Workers

PART = "integrity"
OFF = LEVELS[0]


@dataclass(frozen=True, slots=True)
class Size:
    """`lengths`: (sequences, tokens of each) of a short step and a long one. `checksum_bytes`: what its rate is of."""

    model: Model
    lengths: tuple[tuple[int, int], ...]
    steps: int
    checksum_bytes: int


HOST = Size(Model("llama", shape_of(6, 384, 1056, 6, 6, 64, 1024), tied=False), ((1, 32), (4, 256)), 5, 1 << 28)
GPU = Size(MODELS["1b"], ((1, 1024), (8, 1024)), 5, 1 << 30)
TINY = Size(TINY_MODELS["8b"], ((1, 16),), 1, 1 << 20)


def tasks_of(size: Size, sequences: int, seq_len: int, options: argparse.Namespace) -> dict[str, Task]:
    settings = Settings(options.precision, options.device, "torch", options.threads)
    return {
        level: Task(
            OURS,
            size.model,
            replace(settings, engine={"integrity": level}),
            sequences,
            seq_len,
            options.steps or size.steps,
        )
        for level in LEVELS
    }


def measure_levels(results: Results, size: Size, options: argparse.Namespace) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for sequences, seq_len in size.lengths:
        tasks = tasks_of(size, sequences, seq_len, options)
        outcomes = run_rounds(tasks, options.rounds, options.budget / len(size.lengths), print)
        record_beside(results, PART, outcomes, tasks[OFF], OFF)
    return outcomes


def measure_checksum(results: Results, size: Size, options: argparse.Namespace) -> None:
    """GB/s of words that are read once from memory. In turns, so that what else runs disturbs all alike."""
    memory = allocate(size.checksum_bytes)
    memory.view(torch.int32).random_()
    words, there = memory.numpy().view(np.int64), memory
    cases: dict[str, Callable[[], object]] = {"numpy's sum, one thread": lambda: int(words.sum())}
    with Workers(1) as one, Workers(max(2, options.threads)) as more:
        cases["one thread"] = lambda: host_sums(one, memory)
        cases[f"{more.threads} threads"] = lambda: host_sums(more, memory)
        if options.device.startswith("cuda"):
            there = memory.to(options.device)
        cases[f"torch on {there.device.type}"] = lambda: device_sums(there).tolist()
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(1 + max(3, options.rounds)):
            for name, run in cases.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    print(f"\nchecksum of {size.checksum_bytes / 1e6:.0f} MB")
    for name, found in seconds.items():
        rate = Spread.of(size.checksum_bytes / 1e9 / s for s in found[1:])  # the first one compiles
        results.record(PART, f"checksum: {name}", rate=(rate, "GB/s"))
        print(f"  {name:<24} {rate.p50:8.2f} GB/s ({rate.p20:.2f}-{rate.p80:.2f})")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add_common_options(parser)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    options = complete(parser.parse_args(argv))
    results = Results(options.results, describe_machine(options.device, options.commit))
    size = TINY if options.tiny else GPU if options.device.startswith("cuda") else HOST
    measure_checksum(results, size, options)
    outcomes = measure_levels(results, size, options)
    return 0 if outcomes[OFF].rounds else 1


if __name__ == "__main__":
    sys.exit(main())
