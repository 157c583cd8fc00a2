"""Warnings while a run goes on: each comes when it should, and not for ordinary noise."""

import math
import random
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.engine.step import StepStats
from megatrain.memory.limits import HostLimits, swapped_bytes
from megatrain.train.watch import (
    Epochs,
    ExposedWaits,
    FewTargets,
    MemoryPressure,
    NothingLearned,
    Skipped,
    Spikes,
    Step,
    Watch,
    Watcher,
    all_watchers,
)

GIB = 1 << 30


def stats(**changes: Any) -> StepStats:
    exposed = {f"{name}_exposed_seconds": 0.0 for name in ("optimizer", "weights", "inputs", "gradients")}
    counts = dict.fromkeys(("h2d_bytes", "d2h_bytes", "device_peak_bytes", "host_peak_bytes"), 0)
    plain = {
        "loss": 2.0,
        "grad_norm": 1.0,
        "target_tokens": 100,
        "seconds": 1.0,
        "skipped": False,
        "weight_passes": 2.0,
    }
    return StepStats(**{**plain, **exposed, **counts, **changes})


def said(watcher: Watcher, steps: Iterable[StepStats], lr: float = 1e-3) -> list[str]:
    return [text for number, one in enumerate(steps, start=1) for text in watcher.see(Step(number, 100, lr, one))]


# -- spikes -----------------------------------------------------------------------------------------------------------


def noise(kind: str, draw: random.Random) -> Iterator[StepStats]:
    """The losses and norms of a run in which nothing is the matter."""
    loss, norm = 8.0, 1.0
    for step in range(1000):
        if kind == "falling":
            loss = 2 + 6 * math.exp(-step / 150) + draw.gauss(0, 0.1)
            norm = math.exp(draw.gauss(0, 0.4))
        elif kind == "random walk":
            loss = max(0.5, loss + draw.gauss(0, 0.05))
            norm = min(50.0, max(0.02, norm * math.exp(draw.gauss(0, 0.2))))
        elif kind == "heavy tails":
            loss = 3 + 0.2 * draw.expovariate(1)
            norm = math.exp(draw.gauss(0, 1))
        elif kind == "one value":
            loss, norm = 2.0 + 1e-6 * draw.random(), 1.0
        yield stats(loss=loss, grad_norm=norm)


@pytest.mark.parametrize(("kind", "most"), [("falling", 0), ("random walk", 0), ("heavy tails", 4), ("one value", 0)])
def test_ordinary_noise_is_no_spike(kind: str, most: int) -> None:
    """Of 8,000 steps, in runs with seeds of their own; with heavy tails, one in 2,000 may be far from all others."""
    assert sum(len(said(Spikes(0), noise(kind, random.Random(seed)))) for seed in range(8)) <= most


@pytest.mark.parametrize("kind", ["falling", "random walk", "heavy tails", "one value"])
@pytest.mark.parametrize(("name", "factor"), [("loss", 3.0), ("grad_norm", 100.0)])
def test_a_spike_is_said_once_with_its_numbers(kind: str, name: str, factor: float) -> None:
    for seed in range(3):
        steps = list(noise(kind, random.Random(seed)))[:400]
        usual = statistics.median(getattr(one, name) for one in steps[249:299])
        for number in (299, 300, 301):
            steps[number] = stats(
                **{"loss": steps[number].loss, "grad_norm": steps[number].grad_norm, name: usual * factor}
            )
        found = [text for text in said(Spikes(0), steps) if text.startswith("step 300: ")]
        meant = {"loss": "the loss", "grad_norm": "the gradient's norm"}[name]
        assert len(found) == 1 and found[0].startswith(f"step 300: {meant} is {usual * factor:.3g}, and was about ")
        assert len(said(Spikes(0), steps)) <= 2


def test_spikes_in_warm_up_and_at_the_beginning_are_none() -> None:
    steps = [stats(grad_norm=1000.0 if n in (5, 20, 60) else 1.0 + n % 3) for n in range(120)]
    assert said(Spikes(80), steps) == []
    assert [text.split(":")[0] for text in said(Spikes(0), steps)] == ["step 61"]


def test_a_run_that_spikes_all_the_time_is_told_so_rarely() -> None:
    steps = [stats(loss=50.0 if n % 60 == 59 else 2.0, grad_norm=1.0) for n in range(3000)]
    assert len(said(Spikes(0), steps)) == 5


def test_values_that_are_no_numbers_are_passed_over() -> None:
    values = [None, math.nan, math.inf, 0.0, -1.0]
    assert said(Spikes(0), [stats(loss=values[n % 5], grad_norm=math.inf) for n in range(200)]) == []


# -- other things of training -----------------------------------------------------------------------------------------


def test_the_first_step_that_is_skipped_is_said() -> None:
    found = said(Skipped(), [stats(skipped=n in (4, 5, 9)) for n in range(20)])
    assert len(found) == 1 and found[0].startswith("step 5: the gradient is not finite, and the step changed nothing")


def test_a_learning_rate_of_zero_is_said_after_some_steps() -> None:
    watcher = NothingLearned()
    rates = [1e-3, 0.0, 0.0, 1e-3, 0.0, 0.0, 0.0, 0.0]
    found = [list(watcher.see(Step(n, 100, lr, stats()))) for n, lr in enumerate(rates, start=1)]
    assert [len(one) for one in found] == [0, 0, 0, 0, 0, 0, 1, 0] and "schedule.min_lr_ratio" in found[6][0]


def test_few_targets_are_said_once() -> None:
    assert said(FewTargets(), [stats(target_tokens=6)] * 60) == []
    found = said(FewTargets(), [stats(target_tokens=3)] * 60)
    assert len(found) == 1 and found[0].startswith("3.0% of the tokens of the first 20 steps are targets")


def epochs(passes_per_step: float, steps: int, first_step: int = 0) -> list[str]:
    watcher = Epochs(passes_per_step, first_step)
    return [text for n in range(first_step + 1, steps + 1) for text in watcher.see(Step(n, 1, 1.0, stats()))]


def test_the_data_beginning_anew_is_said() -> None:
    assert epochs(0.01, 99) == []
    assert epochs(0.1, 25) == ["step 11: epoch 2 of the data begins", "step 21: epoch 3 of the data begins"]
    assert epochs(0.1, 25, first_step=11) == ["step 21: epoch 3 of the data begins"]
    assert epochs(0.1, 10) == []  # it ends with the data
    told = epochs(0.5, 2000)
    assert len(told) < 30 and sum("learned by heart" in text for text in told) == 1
    assert told[3].startswith("step 9: epoch 5 of the data begins; what has been seen so often teaches less")
    assert sum("learned by heart" in text for text in epochs(3.0, 9)) == 1  # several in one step


# -- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waits", "lever"),
    [
        ({"weights": 0.3}, "weights on their way to the device in 30% of a step's time: raise train.tokens_per_step"),
        ({"optimizer": 0.25, "weights": 0.25}, "the host's optimizer in 25% of a step's time: raise train.tokens_per"),
        ({"gradients": 0.21}, "gradients on their way to the host in 21% of a step's time"),
        ({"inputs": 0.5}, "inputs of layers that wait on the host in 50%"),
    ],
)
def test_waits_of_computation_are_said_once_with_what_helps(waits: dict[str, float], lever: str) -> None:
    def steps(factor: float) -> list[StepStats]:
        draw = random.Random(1)
        return [
            stats(
                **{
                    f"{name}_exposed_seconds": share * factor * (0.9 + 0.2 * draw.random())
                    for name, share in waits.items()
                }
            )
            for _ in range(99)
        ]

    def shown(factor: float) -> list[str]:
        return said(
            ExposedWaits(), [stats(**{f"{n}_exposed_seconds": 1.0 for n in waits}, seconds=1.0)] * 3 + steps(factor)
        )

    constant = [stats(**{f"{name}_exposed_seconds": share for name, share in waits.items()})] * 99
    (found,) = said(ExposedWaits(), constant)
    assert lever in found
    most = max(waits.values())  # the first steps do not count, nor does noise around less than a fifth
    assert shown(0.15 / most) == [] and len(shown(0.25 / most)) == 1


def test_some_slow_steps_are_no_wait() -> None:
    slow = [stats(weights_exposed_seconds=0.9 if n % 4 == 0 else 0.05) for n in range(99)]
    assert said(ExposedWaits(), slow) == []


def memory(free: int, swap: int = 0, group: int | None = None, device: int | None = None) -> MemoryPressure:
    limits = HostLimits(64 * GIB, free, group, None if group is None else group - free)
    seconds = iter(range(0, 10_000, 4))
    return MemoryPressure(device, limits=lambda: limits, swapped=lambda: swap, clock=lambda: float(next(seconds)))


def test_memory_that_runs_out_is_said_once() -> None:
    assert said(memory(4 * GIB), [stats()] * 50) == []
    (found,) = said(memory(3 * GIB), [stats()] * 50)
    assert found.startswith("host memory: 3.22 GB of 68.72 GB are free")
    (found,) = said(memory(GIB // 4, group=8 * GIB), [stats()] * 50)
    assert found.startswith("host memory: 268.44 MB of 8.59 GB of its control group are free")
    (found,) = said(memory(30 * GIB, swap=GIB), [stats()] * 50)
    assert found.startswith("host memory: 1.07 GB of this run lie in swap")


def test_a_device_that_is_full_is_said_once() -> None:
    assert said(memory(30 * GIB, device=100), [stats(device_peak_bytes=98)] * 5) == []
    (found,) = said(memory(30 * GIB, device=100), [stats(device_peak_bytes=99)] * 5)
    assert found.startswith("device memory: 99 B of 100 B were in use in step 1")


def test_memory_is_not_looked_at_in_each_step() -> None:
    looks: list[int] = []

    def limits() -> HostLimits:
        looks.append(1)
        return HostLimits(GIB, GIB)

    now = iter(range(1000))
    said(MemoryPressure(None, limits=limits, swapped=lambda: 0, clock=lambda: next(now) / 2), [stats()] * 100)
    assert 5 <= len(looks) <= 11


def test_what_lies_in_swap_is_read(tmp_path: Path) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    assert swapped_bytes(tmp_path) == 0
    (tmp_path / "proc" / "self" / "status").write_text("VmRSS:\t 5 kB\nVmSwap:\t 3 kB\n")
    assert swapped_bytes(tmp_path) == 3072


# -- all of them ------------------------------------------------------------------------------------------------------


def test_an_ordinary_run_is_told_nothing() -> None:
    watchers = all_watchers(
        warmup_steps=10, passes_per_step=1e-4, first_step=0, streaming=True, device_memory=100 * GIB
    )
    assert {type(one) for one in watchers} >= {Spikes, Skipped, NothingLearned, FewTargets, Epochs, ExposedWaits}
    watchers = [one for one in watchers if not isinstance(one, MemoryPressure)]  # of this machine
    told: list[str] = []
    watch = Watch(watchers, told.append)
    batches = [{"labels": torch.zeros(2, 50)}]
    for number, one in enumerate(noise("falling", random.Random(0)), start=1):
        watch.see(number, batches, 1e-3, one)
    assert told == []


def test_what_is_said_reaches_the_user() -> None:
    told: list[str] = []
    watch = Watch([Epochs(2.0), Skipped()], told.append)
    watch.see(1, [{"labels": torch.zeros(2, 50)}], 1.0, stats(skipped=True))
    assert told[0] == "step 1: epoch 2 of the data begins" and told[1].startswith("warning: step 1: the gradient")
