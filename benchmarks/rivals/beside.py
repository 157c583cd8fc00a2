"""The same system under several settings: what each gives of the speed without it."""

from collections.abc import Mapping

from harness.rates import count_step
from harness.results import Results

from rivals.contest import Outcome, speed_ratio
from rivals.worker import Task


def record_beside(results: Results, part: str, outcomes: Mapping[str, Outcome], task: Task, off: str) -> None:
    """Record and print `outcomes` by setting, each beside that of `off`, whose `task` says what was computed."""
    work, beside = count_step(task.model, task.lengths), outcomes[off]
    device = task.settings.device.partition(":")[0]
    setting = (
        f"{work.parameters / 1e6:.0f}M, {task.sequences} x {task.seq_len} tokens, {task.settings.precision} on {device}"
    )
    print(f"\n{setting}; beside {off}")
    for name, outcome in outcomes.items():
        case = f"{setting}: {name}"
        if not outcome.rounds or not beside.rounds:
            why = outcome.failure or "no round was run"
            results.not_measured(part, case, why)
            print(f"  {name:<8} not measured: {why}")
            continue
        ratio = speed_ratio(outcome, beside)
        results.record(part, case, seconds_per_step=(outcome.seconds, "s"), speed_of_off=(ratio, ""))
        equal = "same losses" if outcome.losses == beside.losses else "other losses"
        results.note(part, case, "losses", equal)
        spread = f"{ratio.p50:.3f}x ({ratio.p20:.3f}-{ratio.p80:.3f})"
        print(f"  {name:<8} {outcome.seconds.p50:8.3f} s/step  {spread}  {equal}")
