"""Tasks in processes of their own, turn by turn, and what came of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from harness import BENCHMARKS, SOURCES
from harness.percentiles import Spread

from rivals.worker import Measured, Task

# of the losses of the checked steps, relative: what two ways of adding up differ by, far below what a step changes
LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 5e-4}


@dataclass(slots=True)
class Outcome:
    """All rounds of one task. `failure`: why there is none, or no further one."""

    task: Task
    rounds: list[Measured] = field(default_factory=list)
    failure: str | None = None

    @property
    def seconds(self) -> Spread:
        """Of all steps of all rounds."""
        return Spread.of(s for measured in self.rounds for s in measured.seconds)

    @property
    def cpu_seconds(self) -> Spread:
        """As `seconds`, of all cores together: what other processes take does not count."""
        return Spread.of(s for measured in self.rounds for s in measured.cpu_seconds)

    @property
    def host_peak_bytes(self) -> int:
        return max(measured.host_peak_bytes for measured in self.rounds)

    @property
    def device_peak_bytes(self) -> int | None:
        peaks = [m.device_peak_bytes for m in self.rounds if m.device_peak_bytes is not None]
        return max(peaks, default=None)

    @property
    def losses(self) -> list[float]:
        return self.rounds[0].losses


def speed_ratio(outcome: Outcome, other: Outcome) -> Spread:
    """How many times as fast `outcome` is. Rounds are compared one by one, each with what ran beside it in time."""
    pairs = zip(outcome.rounds, other.rounds, strict=False)
    return Spread.of(Spread.of(b.seconds).p50 / Spread.of(a.seconds).p50 for a, b in pairs)


def largest_loss_difference(outcome: Outcome, ours: Outcome) -> float:
    """Relative to ours."""
    return max(abs(a - b) / abs(b) for a, b in zip(outcome.losses, ours.losses, strict=True))


def run_rounds(
    tasks: Mapping[str, Task], rounds: int, budget_seconds: float, say: Callable[[str], None]
) -> dict[str, Outcome]:
    """Every round runs every task once, each round beginning with another one, as long as there is time for a round
    that takes as long as the last. What fails is not tried again."""
    outcomes = {name: Outcome(task) for name, task in tasks.items()}
    deadline = time.perf_counter() + budget_seconds
    last_round_seconds = 0.0
    for number in range(rounds):
        began = time.perf_counter()
        if number and began + last_round_seconds > deadline:
            say(f"round {number + 1} of {rounds} left out: there is no time for it")
            break
        for name in _rotated([*tasks], number):
            outcome = outcomes[name]
            if outcome.failure is not None:
                continue
            found = run_apart(outcome.task, deadline - time.perf_counter())
            if isinstance(found, Measured):
                outcome.rounds.append(found)
                say(f"round {number + 1}  {name:<28} {Spread.of(found.seconds).p50:8.3f} s a step")
            else:
                outcome.failure = found
                say(f"round {number + 1}  {name:<28} {found}")
        last_round_seconds = time.perf_counter() - began
    return outcomes


def _rotated(names: Sequence[str], by: int) -> list[str]:
    first = by % len(names)
    return [*names[first:], *names[:first]]


def run_apart(task: Task, seconds: float) -> Measured | str:
    """In a process of its own, ended after `seconds`; why, where nothing was measured."""
    if seconds <= 0:
        return "there was no time left"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(SOURCES), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(task.settings.threads),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "rivals.worker", task.dumps()],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # some systems start compilers, which have to end with it
    )
    try:
        printed, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    finally:  # also where the user has had enough
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        return _why(errors, process.returncode)
    return Measured(**json.loads(printed.strip().splitlines()[-1]))


def _why(errors: str, code: int) -> str:
    """The line of a traceback that says most."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.partition(" ")[0] or "Error:" in line]
    return f"failed: {(named or lines or [f'exit code {code}'])[-1][:200]}"
