"""What `train.deterministic` costs: the same training with and without it, as a ratio in one run.

    python benchmarks/determinism.py               on the GPU, or on the host where there is none
    python benchmarks/determinism.py --tiny        a dry run; its numbers mean nothing

Both in the workspace of cuBLAS that deterministic products need (harness/__init__.py): a run without the setting may
have a larger one. On the host sums have one order in any case; there the ratio shows what torch's switches take.

Expected, written down before the first run: within 1% on the host; on a GPU above 0.9x, as attention's backward adds
up keys and values in a fixed order.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import harness  # noqa: F401 (first: it prepares the environment)
import torch
from harness.machine import describe_machine
from harness.models import MODELS, TINY_MODELS, Model, shape_of
from harness.results import Results
from rivals.beside import record_beside
from rivals.contest import Outcome, run_rounds
from rivals.interface import Settings
from rivals.systems import OURS
from rivals.worker import Task
from sweeps import add_common_options, complete

PART = "determinism"
OFF, ON = "off", "on"


@dataclass(frozen=True, slots=True)
class Size:
    model: Model
    sequences: int
    seq_len: int
    steps: int


HOST = Size(Model("llama", shape_of(6, 384, 1056, 6, 6, 64, 1024), tied=False), 4, 256, 5)
GPU = Size(MODELS["1b"], 8, 1024, 5)
TINY = Size(TINY_MODELS["8b"], 1, 16, 1)


def tasks_of(size: Size, options: argparse.Namespace) -> dict[str, Task]:
    settings = Settings(options.precision, options.device, "torch", options.threads)
    steps = options.steps or size.steps
    return {
        name: Task(OURS, size.model, replace(settings, engine=engine), size.sequences, size.seq_len, steps)
        for name, engine in ((OFF, {}), (ON, {"deterministic": True}))
    }


def measure(results: Results, size: Size, options: argparse.Namespace) -> dict[str, Outcome]:
    tasks = tasks_of(size, options)
    outcomes = run_rounds(tasks, options.rounds, options.budget, print)
    record_beside(results, PART, outcomes, tasks[OFF], OFF)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add_common_options(parser)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    options = complete(parser.parse_args(argv))
    results = Results(options.results, describe_machine(options.device, options.commit))
    size = TINY if options.tiny else GPU if options.device.startswith("cuda") else HOST
    outcomes = measure(results, size, options)
    return 0 if all(outcome.rounds for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
