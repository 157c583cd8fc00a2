"""How speed and device memory change with depth at one width, and with width at one depth.

    python benchmarks/sweeps.py                            depth and width, on the GPU, or on lagged where there is none
    python benchmarks/sweeps.py --only depth --device cpu
    python benchmarks/sweeps.py --tiny                     a dry run; its numbers mean nothing

Each size is a model with random weights in a process of its own; sizes take turns, round after round, so that ratios
to the first are of one run. Saved inputs wait on the host and nothing keeps its graph, at every size. Speed is model
operations per second: a deeper model does more for each token, so only this can stay the same.

Expected, written down before the first run: over depth the device's peak is the same to 1% (the slots and what one
layer computes), and the speed stays within 10%; over width the peak grows (slots with the square of the width) and the
speed does not fall, as larger products are faster.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import harness  # noqa: F401 (first: it prepares the environment)
import torch
from harness.machine import describe_machine, usable_cores
from harness.models import Model, shape_of
from harness.percentiles import Spread
from harness.rates import StepWork, count_step
from harness.results import RESULTS, Results, Value
from rivals.contest import Outcome, run_rounds, speed_ratio
from rivals.interface import Settings
from rivals.systems import OURS
from rivals.worker import Task

from megatrain.planner.flops import Shape

SWEEPS = ("depth", "width")
HEAD_DIM = 64


@dataclass(frozen=True, slots=True)
class Scale:
    """`base` is the width of the depth sweep and the first of the width sweep, whose depth is `width_layers`."""

    base: Shape
    depths: tuple[int, ...]
    widths: tuple[float, ...]
    width_layers: int
    sequences: int
    seq_len: int
    steps: int


GPU = Scale(shape_of(0, 1536, 4096, 24, 24, HEAD_DIM, 32000), (28, 56, 112, 180), (1.0, 1.5, 2.0, 3.0), 16, 8, 2048, 3)
HOST = Scale(shape_of(0, 128, 352, 2, 2, HEAD_DIM, 1024), (28, 56, 112, 180), (1.0, 1.5, 2.0, 3.0), 8, 1, 128, 2)
TINY = Scale(shape_of(0, 64, 128, 1, 1, HEAD_DIM, 128), (2, 4), (1.0, 2.0), 2, 1, 16, 1)


def models_of(scale: Scale, sweep: str) -> dict[str, Model]:
    """By the name of the case, the first one first."""
    if sweep == "depth":
        return {f"{n} layers": Model("llama", replace(scale.base, layers=n), tied=False) for n in scale.depths}
    return {f"width {f:g}x": Model("llama", _widened(scale, f), tied=False) for f in scale.widths}


def _widened(scale: Scale, factor: float) -> Shape:
    """Heads of one size, more of them."""
    heads = round(scale.base.heads * factor)
    return replace(
        scale.base,
        layers=scale.width_layers,
        hidden=heads * scale.base.head_dim,
        intermediate=round(scale.base.intermediate * factor),
        heads=heads,
        kv_heads=heads,
    )


def run_sweep(results: Results, scale: Scale, sweep: str, options: argparse.Namespace) -> None:
    # what is kept where memory is left would differ from size to size: graphs, and inputs on the device
    engine = {"keep_graphs": "off", "inputs_leave": True}
    settings = Settings(options.precision, options.device, threads=options.threads, engine=engine)
    models = models_of(scale, sweep)
    tasks = {
        name: Task(OURS, model, settings, scale.sequences, scale.seq_len, options.steps or scale.steps)
        for name, model in models.items()
    }
    outcomes = run_rounds(tasks, options.rounds, options.budget, print)
    works = {name: count_step(task.model, task.lengths) for name, task in tasks.items()}
    first = next(iter(tasks))
    fixed = f"hidden {scale.base.hidden}" if sweep == "depth" else f"{scale.width_layers} layers"
    tokens = f"{scale.sequences} x {scale.seq_len} tokens"
    setting = f"{fixed}, {tokens}, {options.precision} on {options.device.partition(':')[0]}"
    print(f"\n{sweep}, {setting}; beside {first}")
    for name, outcome in outcomes.items():
        case = f"{setting}: {name}"
        if not outcome.rounds or not outcomes[first].rounds:
            results.not_measured(sweep, case, outcome.failure or "no round was run")
            print(f"  {name:<12} not measured: {outcome.failure}")
            continue
        metrics = size_metrics(outcome, outcomes[first], works[name], works[first])
        results.record(sweep, case, **metrics)
        print(_line(name, metrics))


def size_metrics(outcome: Outcome, first: Outcome, work: StepWork, first_work: StepWork) -> dict[str, Value]:
    """`rate_of_first`, `device_peak_of_first`: ratios to the sweep's first size; `cpu_rate_of_first` of operations per
    second of the process's own CPU time, where the host is the device and other work makes seconds uncertain."""
    ratio, more = speed_ratio(outcome, first), work.flops.model / first_work.flops.model
    metrics = work.metrics(outcome.seconds, outcome.task.target_tokens)
    metrics |= {
        "parameters": (work.parameters, ""),
        "rate_of_first": (Spread(ratio.p20 * more, ratio.p50 * more, ratio.p80 * more), ""),
        "cpu_seconds_per_step": (outcome.cpu_seconds, "s"),
        "cpu_rate_of_first": (first.cpu_seconds.p50 / outcome.cpu_seconds.p50 * more, ""),
        "host_peak": (outcome.host_peak_bytes / 1e9, "GB"),
    }
    if outcome.device_peak_bytes is not None and first.device_peak_bytes:
        metrics["device_peak"] = (outcome.device_peak_bytes / 1e9, "GB")
        metrics["device_peak_of_first"] = (outcome.device_peak_bytes / first.device_peak_bytes, "")
    return metrics


def _line(name: str, metrics: Mapping[str, Value]) -> str:
    def number(metric: str) -> float:
        value = metrics[metric][0]
        return value.p50 if isinstance(value, Spread) else value

    peak = ""
    if "device_peak" in metrics:
        peak = f"  device {number('device_peak') * 1e3:8.2f} MB ({number('device_peak_of_first'):.3f}x)"
    return (
        f"  {name:<12} {number('parameters') / 1e6:8.1f}M  {number('seconds_per_step'):8.3f} s/step"
        f"  {number('model_rate'):8.4f} TFLOP/s ({number('rate_of_first'):.2f}x, by CPU time"
        f" {number('cpu_rate_of_first'):.2f}x){peak}"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add_common_options(parser)
    parser.add_argument("--only", default=",".join(SWEEPS), help=f"of {', '.join(SWEEPS)} (default: both)")
    options = parser.parse_args(argv)
    options.only = [name for name in options.only.split(",") if name]
    if not options.only or not set(SWEEPS).issuperset(options.only):
        parser.error(f"--only: there are {', '.join(SWEEPS)}")
    return complete(options)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Those of the sweeps and of the ablations."""
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    add("--device", default="cuda" if on_gpu else "lagged", help="cpu, lagged, cuda (default: cuda if there is one)")
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on the host")
    add("--threads", type=int, default=max(1, usable_cores() - 1), help="of the host (default: all cores but one)")
    add("--steps", type=int, help="timed steps of each round")
    add("--rounds", type=int, default=3, help="default: 3")
    add("--budget", type=float, default=540.0, metavar="SECONDS", help="of each comparison (default: 540)")
    add("--tiny", action="store_true", help="sizes for a dry run")
    add("--results", type=Path, help="default: benchmarks/results.csv; of a dry run none")
    add("--commit", default="", help="written to the results (default: git's answer)")


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Defaults that depend on others."""
    if options.precision is None:
        options.precision = "bf16" if options.device.startswith("cuda") else "fp32"
    if options.results is None and not options.tiny:
        options.results = RESULTS
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    results = Results(options.results, describe_machine(options.device, options.commit))
    scale = TINY if options.tiny else GPU if options.device.startswith("cuda") else HOST
    for sweep in options.only:
        run_sweep(results, scale, sweep, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
