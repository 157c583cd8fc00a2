"""MegaTrain beside other systems: the same model, data, optimizer and precision, each system in a process of its own.

    python benchmarks/compare.py                                        what this machine can, within --budget seconds
    python benchmarks/compare.py --systems megatrain,torch --device cuda --model 1b --seq-len 1024 --sequences 8
    python benchmarks/compare.py --tiny                                 a dry run; its numbers mean nothing

ZeRO-3 is measured where DeepSpeed is installed (DS_BUILD_OPS=0 pip install --no-build-isolation 'deepspeed>=0.19.8'; it
needs a C++ compiler and ninja), the original MegaTrain and SlideFormer where their checkouts are on PYTHONPATH.

Tokens are target tokens, attention is counted causally, of experts those that a token passes; model operations leave
out what is computed twice, hardware operations include it. Times are p20/p50/p80 over the steps of all rounds; ratios
compare the systems round by round. The first losses of every system are held against ours: beyond the bound
(rivals/contest.py) a row is marked "other arithmetic", and its speed is no comparison. Peak host memory is above what
Python, torch and transformers take.

Expected on two cores in fp32, written down before the first run: MegaTrain 1.1x to 1.2x of plain PyTorch with
checkpointing, since kept graphs save a unit of four; 0.95x to 1x recomputing all; FSDP2 and ZeRO-3 with nothing to
offload to 0.8x to 0.95x, what their gathering and copying cost on a host. All losses the same within 1e-5.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import harness  # noqa: F401 (first: it prepares the environment)
import torch
from harness.machine import describe_machine, usable_cores
from harness.models import NAMED_MODELS
from harness.rates import StepWork, count_step
from harness.results import RESULTS, Results, Value
from rivals.contest import LOSS_BOUNDS, Outcome, largest_loss_difference, run_rounds, speed_ratio
from rivals.interface import Settings
from rivals.systems import BASELINE, OURS, SYSTEMS
from rivals.worker import Task

PART = "rivals"


def workload_name(task: Task) -> str:
    on = "cuda" if task.settings.on_gpu else task.settings.device
    name = next(name for name, model in NAMED_MODELS.items() if model == task.model)
    micro = f"{task.settings.micro_batches} x " if task.settings.micro_batches > 1 else ""
    kernels = f", {task.settings.kernels} kernels" if task.settings.kernels != "torch" else ""
    return f"{name}, {micro}{task.sequences} x {task.seq_len} tokens, {task.settings.precision} on {on}{kernels}"


def compare(
    results: Results, tasks: dict[str, Task], rounds: int, budget_seconds: float, say: object = print
) -> dict[str, Outcome]:
    """Run all that is available, write and print every row."""
    assert callable(say)
    outcomes, possible = {}, {}
    for name, task in tasks.items():
        reason = SYSTEMS[name].available(task.settings)
        if reason is None:
            possible[name] = task
        else:
            outcomes[name] = Outcome(task, failure=reason)
    outcomes |= run_rounds(possible, rounds, budget_seconds, say)
    first = next(iter(tasks.values()))
    work, workload = count_step(first.model, first.lengths), workload_name(first)
    say(f"\n{workload}: {work.parameters:,} parameters, {work.active_parameters:,} of matrices that a token passes")
    for name in tasks:
        say(report(results, workload, name, outcomes, work))
    return outcomes


def report(results: Results, workload: str, name: str, outcomes: dict[str, Outcome], work: StepWork) -> str:
    """Write the rows of one system; returns a line for people."""
    outcome, case = outcomes[name], f"{workload}: {name}"
    if not outcome.rounds:
        results.not_measured(PART, case, outcome.failure or "no round was run")
        return f"  {name:<24} not measured: {outcome.failure}"
    metrics = _metrics(outcome, outcomes, work)
    results.record(PART, case, **metrics)
    verdict = arithmetic(outcome, outcomes.get(OURS))
    results.note(PART, case, "arithmetic", verdict)
    speed, ratio = metrics["target_tokens_per_second"][0], metrics.get(f"speed_of_{BASELINE}")
    beside = "" if ratio is None else f"  {_middle(ratio):5.2f}x {BASELINE}"
    return (
        f"  {name:<24} {outcome.seconds.p50:8.3f} s/step {_middle((speed, '')):10,.0f} target tokens/s"
        f"  host {outcome.host_peak_bytes / 1e9:6.2f} GB{beside}  {verdict}"
    )


def arithmetic(outcome: Outcome, ours: Outcome | None) -> str:
    if ours is None or not ours.rounds:
        return "not checked: MegaTrain was not measured beside it"
    bound = LOSS_BOUNDS[outcome.task.settings.precision]
    agrees = largest_loss_difference(outcome, ours) <= bound
    return f"agrees within {bound:.0e}" if agrees else "other arithmetic"


def _metrics(outcome: Outcome, outcomes: dict[str, Outcome], work: StepWork) -> dict[str, Value]:
    measured = outcome.rounds[0]
    metrics = work.metrics(
        outcome.seconds,
        outcome.task.target_tokens,
        recomputed_layers=measured.recomputed_layers,
        repeats_known=measured.repeats_known,
    )
    metrics |= {
        "cpu_seconds_per_step": (outcome.cpu_seconds, "s"),
        "parameters": (work.parameters, ""),
        "active_parameters": (work.active_parameters, ""),
        "host_peak": (outcome.host_peak_bytes / 1e9, "GB"),
        "first_loss": (outcome.losses[0], ""),
        "last_checked_loss": (outcome.losses[-1], ""),
        "rounds": (len(outcome.rounds), ""),
    }
    if outcome.device_peak_bytes is not None:
        metrics["device_peak"] = (outcome.device_peak_bytes / 1e9, "GB")
    for other, found in outcomes.items():
        if found.rounds and (outcome.task.system == OURS or other in (OURS, BASELINE)):
            metrics[f"speed_of_{other}"] = (speed_ratio(outcome, found), "")
    if OURS in outcomes and outcomes[OURS].rounds:
        metrics["loss_difference"] = (largest_loss_difference(outcome, outcomes[OURS]), "relative")
    return metrics


def _middle(value: Value) -> float:
    return getattr(value[0], "p50", value[0])


def tasks_of(options: argparse.Namespace) -> dict[str, Task]:
    settings = Settings(
        options.precision, options.device, options.kernels, threads=options.threads, micro_batches=options.micro_batches
    )
    model = NAMED_MODELS[options.model]
    return {
        name: Task(name, model, settings, options.sequences, options.seq_len, options.steps) for name in options.systems
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--systems", default=",".join(SYSTEMS), help=f"separated by commas (default: {','.join(SYSTEMS)})")
    add(
        "--device", default="cuda" if on_gpu else "cpu", help="cpu, cuda or cuda:NUMBER (default: cuda if there is one)"
    )
    add("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on the host")
    add("--kernels", default="torch", choices=("torch", "liger"), help="for every system (default: torch)")
    add("--model", choices=[*NAMED_MODELS], help="default: 1b on a GPU, 21m on the host")
    add("--seq-len", type=int, help="default: 1024 on a GPU, 256 on the host")
    add("--sequences", type=int, help="of a micro-batch (default: 8 on a GPU, 1 on the host)")
    add("--micro-batches", type=int, default=1, help="of a step (default: 1)")
    add("--threads", type=int, default=usable_cores(), help="of the host (default: all cores)")
    add("--steps", type=int, default=4, help="timed steps of each round (default: 4)")
    add("--rounds", type=int, default=3, help="default: 3")
    add("--budget", type=float, default=540.0, metavar="SECONDS", help="default: 540")
    add("--tiny", action="store_true", help="sizes for a dry run")
    add("--results", type=Path, help="default: benchmarks/results.csv; of a dry run none")
    add("--commit", default="", help="written to the results (default: git's answer)")
    options = parser.parse_args(argv)
    options.systems = [name for name in options.systems.split(",") if name]
    unknown = [name for name in options.systems if name not in SYSTEMS]
    if unknown or not options.systems:
        parser.error(f"--systems: there is no {', '.join(unknown) or 'empty list'}; there are {', '.join(SYSTEMS)}")
    if options.results is None and not options.tiny:
        options.results = RESULTS
    _fill_in_defaults(options)
    return options


def _fill_in_defaults(options: argparse.Namespace) -> None:
    on_gpu = options.device.startswith("cuda")
    sizes = ("tiny", 16, 2) if options.tiny else ("1b", 1024, 8) if on_gpu else ("21m", 256, 1)
    for name, value in zip(("model", "seq_len", "sequences"), sizes, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.precision is None:
        options.precision = "bf16" if on_gpu else "fp32"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    machine = describe_machine(options.device, options.commit)
    print("  ".join(f"{name}: {value}" for name, value in machine.items() if value))
    outcomes = compare(Results(options.results, machine), tasks_of(options), options.rounds, options.budget)
    return 0 if any(outcome.rounds for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
