"""What a user should know of a run while there is time to do something about it, each said once or rarely."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatrain.memory.limits import HostLimits, host_memory_limits, swapped_bytes
from megatrain.sizes import format_bytes
from megatrain.train.metrics import StepStats


@dataclass(frozen=True)
class Step:
    """One that is done: its number from 1, what it was given (positions that could have been targets), what came of
    it."""

    number: int
    positions: int
    lr: float
    stats: StepStats


class Watcher(Protocol):
    """Sees each step in turn, and says what there is to say, with a `prefix` before it."""

    @property
    def prefix(self) -> str: ...
    def see(self, step: Step) -> Iterator[str]: ...


class Watch:
    """Shows each step to `watchers` and gives what they say to `tell`."""

    def __init__(self, watchers: Sequence[Watcher], tell: Callable[[str], None]) -> None:
        self._watchers, self._tell = watchers, tell

    def see(self, number: int, batches: Sequence[Mapping[str, Tensor]], lr: float, stats: StepStats) -> None:
        step = Step(number, sum(batch["labels"].numel() for batch in batches), lr, stats)
        for watcher in self._watchers:
            for said in watcher.see(step):
                self._tell(watcher.prefix + said)


def all_watchers(
    *, warmup_steps: int, passes_per_step: float, first_step: int, streaming: bool, device_memory: int | None
) -> list[Watcher]:
    """Those below, for a run that goes on after `first_step`."""
    of_training: list[Watcher] = [Spikes(warmup_steps), Skipped(), NothingLearned(), FewTargets()]
    of_machine: list[Watcher] = [MemoryPressure(device_memory)]
    if streaming:  # where device and host are one, nothing can be hidden behind anything
        of_machine.append(ExposedWaits())
    return [*of_training, Epochs(passes_per_step, first_step), *of_machine]


class _Warning:
    prefix = "warning: "


# -- training ---------------------------------------------------------------------------------------------------------


class Spikes(_Warning):
    """The loss or the gradient's norm is far above what it was.

    Far: by so many times the spread of the last steps (their median absolute deviation, in place of the standard
    deviation, for which one spike would hide the next), and by a factor that matters. Norms are compared by their
    logarithm, whose noise is the same above and below; fifty times the usual norm is far in any case. Warm-up counts
    for nothing: losses fall there, and norms jump.
    """

    _WINDOW, _ENOUGH = 50, 30
    _FAR_NORM = 50.0
    _QUIET_STEPS, _MOST = 100, 5  # between two warnings; in all
    _DEVIATION = 1.4826  # of a normal distribution, standard deviations per median absolute one
    _DEVIATIONS: Mapping[str, float] = {"loss": 15.0, "grad_norm": 10.0}
    _FACTORS: Mapping[str, float] = {"loss": 1.3, "grad_norm": 4.0}
    _NAMES: Mapping[str, str] = {"loss": "the loss", "grad_norm": "the gradient's norm"}

    def __init__(self, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self._last = {name: deque[float](maxlen=self._WINDOW) for name in self._NAMES}
        self._said_at = {name: -math.inf for name in self._NAMES}
        self._times_said = 0

    def see(self, step: Step) -> Iterator[str]:
        if step.number <= self._warmup_steps:
            return
        for name, last in self._last.items():
            value = getattr(step.stats, name)
            if value is None or not math.isfinite(value) or value <= 0:
                continue
            shown = math.log(value) if name == "grad_norm" else value
            if self._is_spike(name, value, shown, last) and self._may_say(name, step.number):
                usual = statistics.median(last)
                usual = math.exp(usual) if name == "grad_norm" else usual
                yield (
                    f"step {step.number}: {self._NAMES[name]} is {value:.3g}, and was about {usual:.3g} in the "
                    f"{len(last)} steps before. If it does not come back by itself, go on from an earlier checkpoint "
                    "with a lower optimizer.lr or other data in that place"
                )
            last.append(shown)

    def _is_spike(self, name: str, value: float, shown: float, last: deque[float]) -> bool:
        if len(last) < self._ENOUGH:
            return False
        usual = statistics.median(last)
        spread = self._DEVIATION * statistics.median(abs(one - usual) for one in last)
        before = math.exp(usual) if name == "grad_norm" else usual
        far = self._DEVIATIONS[name] * spread
        if name == "grad_norm":
            far = min(far, math.log(self._FAR_NORM))
        return value > self._FACTORS[name] * before and shown - usual > far

    def _may_say(self, name: str, step: int) -> bool:
        if step - self._said_at[name] < self._QUIET_STEPS or self._times_said == self._MOST:
            return False
        self._said_at[name] = step
        self._times_said += 1
        return True


class Skipped(_Warning):
    """A first gradient that is not finite; how many there were is said at the end."""

    def __init__(self) -> None:
        self._said = False

    def see(self, step: Step) -> Iterator[str]:
        if step.stats.skipped and not self._said:
            self._said = True
            yield (
                f"step {step.number}: the gradient is not finite, and the step changed nothing. Some are no harm; "
                "if there are many, lower optimizer.lr"
            )


class NothingLearned(_Warning):
    """Steps in a row with a learning rate of 0."""

    _STEPS = 3

    def __init__(self) -> None:
        self._in_a_row = 0

    def see(self, step: Step) -> Iterator[str]:
        self._in_a_row = self._in_a_row + 1 if step.lr == 0 else 0
        if self._in_a_row == self._STEPS:
            yield (
                f"step {step.number}: the learning rate is 0 for {self._STEPS} steps now, in which nothing is learned; "
                "see optimizer.lr and schedule.min_lr_ratio"
            )


class FewTargets(_Warning):
    """Hardly any of the tokens are learned from."""

    _STEPS, _SHARE = 20, 0.05

    def __init__(self) -> None:
        self._targets = self._positions = self._steps = 0

    def see(self, step: Step) -> Iterator[str]:
        if self._steps == self._STEPS:
            return
        self._steps += 1
        self._targets += step.stats.target_tokens
        self._positions += step.positions
        share = self._targets / max(1, self._positions)
        if self._steps == self._STEPS and share < self._SHARE:
            yield (
                f"{share:.1%} of the tokens of the first {self._STEPS} steps are targets; the others are computed and "
                "teach nothing. Pack examples, or see whether the right turns are targets"
            )


class Epochs:
    """The data begin anew. `passes_per_step`: over all of them."""

    prefix = ""
    _WORN = 4  # passes up to which a text that is repeated teaches almost as much as a new one (Muennighoff 2023)

    def __init__(self, passes_per_step: float, first_step: int = 0) -> None:
        self._passes_per_step = passes_per_step
        self._epoch = self._after(first_step)

    def _after(self, steps: int) -> int:
        """Of the last row that these steps have seen."""
        return math.floor(max(0.0, steps * self._passes_per_step - 1e-9))

    def see(self, step: Step) -> Iterator[str]:
        before, self._epoch = self._epoch, self._after(step.number)
        if self._epoch == before or not self._is_told(before, self._epoch):
            return
        hint = ""
        if before < self._WORN <= self._epoch:
            hint = "; what has been seen so often teaches less each time, and may be learned by heart: see the loss on "
            hint += "data.eval, or give more data or fewer steps"
        yield f"step {step.number}: epoch {self._epoch + 1} of the data begins{hint}"

    def _is_told(self, before: int, now: int) -> bool:
        """The first ones, and then every tenth, hundredth, ... of its size."""
        round_to = 10 ** max(0, len(str(now)) - 1)
        return now <= self._WORN or now // round_to != before // round_to


# -- the machine ------------------------------------------------------------------------------------------------------


class ExposedWaits(_Warning):
    """Computation on a streaming device stands still for a large part of each step."""

    _UNSETTLED, _STEPS, _SHARE = 3, 20, 0.2
    _LEVERS: Mapping[str, tuple[str, str]] = {
        "weights": (
            "weights on their way to the device",
            "raise train.tokens_per_step (weights come twice a step, however many tokens it has), or give "
            "engine.resident_units or engine.slots more of the device's memory",
        ),
        "optimizer": (
            "the host's optimizer",
            "raise train.tokens_per_step, or engine.threads where cores are idle, or engine.resident_units: those are "
            "updated on the device",
        ),
        "gradients": ("gradients on their way to the host", "raise train.tokens_per_step: they leave once a step"),
        "inputs": (
            "inputs of layers that wait on the host",
            "lower engine.resident_units or engine.slots so that they can stay, or lower train.tokens_per_step",
        ),
    }

    def __init__(self) -> None:
        self._shares: dict[str, list[float]] = {name: [] for name in self._LEVERS}

    def see(self, step: Step) -> Iterator[str]:
        if step.number <= self._UNSETTLED or step.stats.seconds <= 0:
            return
        for name, waited in self._waits(step.stats).items():
            shares = self._shares[name]
            if len(shares) == self._STEPS:
                continue
            shares.append(waited / step.stats.seconds)
            if len(shares) == self._STEPS and (share := statistics.median(shares)) > self._SHARE:
                what, lever = self._LEVERS[name]
                yield f"computation waits for {what} in {share:.0%} of a step's time: {lever}"

    @staticmethod
    def _waits(stats: StepStats) -> dict[str, float]:
        return {
            "weights": max(0.0, stats.weights_exposed_seconds - stats.optimizer_exposed_seconds),
            "optimizer": stats.optimizer_exposed_seconds,
            "gradients": stats.gradients_exposed_seconds,
            "inputs": stats.inputs_exposed_seconds,
        }


class MemoryPressure(_Warning):
    """Host memory runs out, or is on a disk already; each is said once. `device_memory`: bytes that the device may
    use, None where nothing streams to it."""

    _SECONDS = 10.0  # between two looks
    _SHARE, _MOST_BYTES = 0.05, 4 << 30  # of what may be used, but on large machines not more than that
    _SWAPPED_BYTES = 256 << 20
    _DEVICE_SHARE = 0.98

    def __init__(
        self,
        device_memory: int | None,
        *,
        limits: Callable[[], HostLimits] = host_memory_limits,
        swapped: Callable[[], int] = swapped_bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device_memory, self._limits, self._swapped, self._clock = device_memory, limits, swapped, clock
        self._looked_at = -math.inf
        self._said: set[str] = set()

    def see(self, step: Step) -> Iterator[str]:
        if self._device_memory is not None and self._once("device", self._device_is_full(step)):
            yield (
                f"device memory: {format_bytes(step.stats.device_peak_bytes)} of "
                f"{format_bytes(self._device_memory)} were in use in step {step.number}; a longer batch may not fit. "
                "Lower engine.micro_batch or engine.resident_units"
            )
        if self._clock() - self._looked_at < self._SECONDS:
            return
        self._looked_at = self._clock()
        limits, swapped = self._limits(), self._swapped()
        whole = min(limits.total_bytes, limits.cgroup_limit_bytes or limits.total_bytes)
        if self._once("host", limits.free_bytes < min(self._SHARE * whole, self._MOST_BYTES)):
            group = " of its control group" if whole < limits.total_bytes else ""
            yield (
                f"host memory: {format_bytes(limits.free_bytes)} of {format_bytes(whole)}{group} are free; where none "
                "is left the system ends the run. End other programs, or go on with engine.nvme or a smaller batch"
            )
        if self._once("swap", swapped > self._SWAPPED_BYTES):
            yield (
                f"host memory: {format_bytes(swapped)} of this run lie in swap, and each step reads them from a disk. "
                "End other programs, or go on with engine.nvme, which is made for that"
            )

    def _device_is_full(self, step: Step) -> bool:
        return step.stats.device_peak_bytes > self._DEVICE_SHARE * (self._device_memory or math.inf)

    def _once(self, what: str, found: bool) -> bool:
        if not found or what in self._said:
            return False
        self._said.add(what)
        return True
