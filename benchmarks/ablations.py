"""What each part of the engine is worth: the same model without it, as a ratio in one run.

    python benchmarks/ablations.py                 on the GPU, or on lagged where there is none
    python benchmarks/ablations.py --tiny          a dry run; its numbers mean nothing

    no prefetch          weights are copied when the unit that needs them is about to run, not before
    one slot             weights of one unit of a size on the device at a time
    synchronous clip     all updates are done before the next step begins
    no kept graphs       every unit is computed again in backward
    no fused kernels     the model's own code in place of Liger's kernels

On lagged every copy is late by chance, 10 ms in the mean, whatever its size. Its ratios show that a part hides what it
is there to hide; how much there is to hide is a GPU's affair.

Expected on lagged, written down before the first run: no prefetch and one slot between 0.6x and 0.95x, and about the
same, as both leave each copy in the open; synchronous clip between 0.85x and 1x: an update takes a tenth of a step or
less.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import harness  # noqa: F401 (first: it prepares the environment)
from harness.machine import describe_machine
from harness.models import MODELS, TINY_MODELS, Model, shape_of
from harness.rates import count_step
from harness.results import Results
from rivals.contest import Outcome, run_rounds, speed_ratio
from rivals.interface import Settings
from rivals.systems import OURS
from rivals.worker import Task
from sweeps import add_common_options, complete

PART = "ablation"
WHOLE = "all parts"
VARIANTS: dict[str, Mapping[str, Any]] = {
    WHOLE: {},
    "no prefetch": {"prefetch": False},
    "one slot": {"slots": 1},
    "synchronous clip": {"synchronous_updates": True},
    "no kept graphs": {"keep_graphs": "off"},
    "no fused kernels": {"kernels": "torch"},
}
_OF_STREAMING = ("no prefetch", "one slot", "synchronous clip")


@dataclass(frozen=True, slots=True)
class Size:
    model: Model
    sequences: int
    seq_len: int
    steps: int


HOST = Size(Model("llama", shape_of(6, 384, 1056, 6, 6, 64, 1024), tied=False), 1, 128, 3)
GPU = Size(MODELS["1b"], 8, 1024, 5)
TINY = Size(TINY_MODELS["8b"], 1, 16, 1)


def has_no_meaning(variant: str, device: str, kernels: str) -> str | None:
    """Why leaving this part out changes nothing here."""
    if variant in _OF_STREAMING and device == "cpu":
        return "the host computes in its own memory: nothing is copied, and updates hide behind nothing"
    if variant == "no fused kernels" and kernels != "liger":
        return "Liger's kernels need a CUDA device" if device in ("cpu", "lagged") else "liger-kernel is not installed"
    return None


def tasks_of(size: Size, options: argparse.Namespace) -> tuple[dict[str, Task], dict[str, str]]:
    """(tasks by variant, why there is none for the others)."""
    on_gpu = options.device.startswith("cuda")
    kernels = "liger" if on_gpu and find_spec("liger_kernel") is not None else "torch"
    engine = {"longest_delay_seconds": 0.0 if options.tiny else 0.02} if options.device == "lagged" else {}
    settings = Settings(options.precision, options.device, kernels, options.threads, engine=engine)
    tasks, missing = {}, {}
    for name, changed in VARIANTS.items():
        reason = has_no_meaning(name, options.device, kernels)
        if reason is not None:
            missing[name] = reason
            continue
        own = replace(settings, engine=engine | dict(changed))
        tasks[name] = Task(OURS, size.model, own, size.sequences, size.seq_len, options.steps or size.steps)
    return tasks, missing


def run(results: Results, size: Size, options: argparse.Namespace) -> dict[str, Outcome]:
    tasks, missing = tasks_of(size, options)
    outcomes = run_rounds(tasks, options.rounds, options.budget, print)
    whole, work = outcomes[WHOLE], count_step(size.model, tasks[WHOLE].lengths)
    setting = (
        f"{work.parameters / 1e6:.0f}M, {size.sequences} x {size.seq_len} tokens, {options.precision} on"
        f" {options.device.partition(':')[0]}"
    )
    print(f"\n{setting}; beside {WHOLE}")
    for name in VARIANTS:
        case, outcome = f"{setting}: {name}", outcomes.get(name)
        if outcome is None or not outcome.rounds or not whole.rounds:
            why = missing.get(name) or (outcome.failure if outcome is not None else None) or "no round was run"
            results.not_measured(PART, case, why)
            print(f"  {name:<20} not measured: {why}")
            continue
        ratio = speed_ratio(outcome, whole)
        metrics = work.metrics(
            outcome.seconds, outcome.task.target_tokens, recomputed_layers=outcome.rounds[0].recomputed_layers
        )
        if outcome.device_peak_bytes is not None:
            metrics["device_peak"] = (outcome.device_peak_bytes / 1e9, "GB")
        results.record(PART, case, **metrics, speed_of_all_parts=(ratio, ""))
        equal = "same losses" if outcome.losses == whole.losses else "other losses"
        results.note(PART, case, "losses", equal)
        spread = f"{ratio.p50:.2f}x ({ratio.p20:.2f}-{ratio.p80:.2f})"
        print(f"  {name:<20} {outcome.seconds.p50:8.3f} s/step  {spread}  {equal}")
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add_common_options(parser)
    options = complete(parser.parse_args(argv))
    results = Results(options.results, describe_machine(options.device, options.commit))
    size = TINY if options.tiny else GPU if options.device.startswith("cuda") else HOST
    outcomes = run(results, size, options)
    return 0 if outcomes[WHOLE].rounds else 1


if __name__ == "__main__":
    sys.exit(main())
