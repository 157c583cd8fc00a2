"""One system in a process of its own: `python -m rivals.worker TASK`, TASK and what it prints last are JSON."""

import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import harness  # noqa: F401 (first: it prepares the environment)
import torch
from harness.models import Model, batch_of

from megatrain.memory.limits import peak_resident_bytes, reset_peak_resident, resident_bytes
from megatrain.optim.compilation import compile_kernels
from megatrain.planner.flops import Shape
from rivals.interface import Batches, Settings
from rivals.systems import SYSTEMS

CHECKED_STEPS = 3  # warm-up, and whose losses are compared


@dataclass(frozen=True, slots=True)
class Task:
    """`steps` timed steps of `system` on `micro_batches` (of the settings) of `sequences` x `seq_len` random tokens."""

    system: str
    model: Model
    settings: Settings
    sequences: int
    seq_len: int
    steps: int

    @property
    def lengths(self) -> list[int]:
        return [self.seq_len] * self.sequences * self.settings.micro_batches

    @property
    def target_tokens(self) -> int:
        return sum(length - 1 for length in self.lengths)

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Task":
        values: dict[str, Any] = json.loads(text)
        model = values.pop("model")
        model |= {"shape": Shape(**model["shape"]), "extra": tuple((k, v) for k, v in model["extra"])}
        return cls(model=Model(**model), settings=Settings(**values.pop("settings")), **values)


@dataclass(frozen=True, slots=True)
class Measured:
    """`losses` of the checked steps; `seconds` of the timed ones, and the CPU seconds of all cores together in them.
    Host bytes above those of the imports."""

    losses: list[float]
    seconds: list[float]
    cpu_seconds: list[float]
    host_peak_bytes: int
    device_peak_bytes: int | None
    recomputed_layers: int | None
    repeats_known: bool


def measure(task: Task) -> Measured:
    """All steps see the same batches, so that losses fall where weights are updated."""
    torch.set_num_threads(task.settings.threads)
    compile_kernels()
    batches: Batches = [
        batch_of(task.model.shape.vocabulary, task.sequences, task.seq_len, number)
        for number in range(task.settings.micro_batches)
    ]
    before = resident_bytes()
    reset_peak_resident()
    run = SYSTEMS[task.system].build(task.model, task.settings)
    losses = [run.step(batches).loss for _ in range(CHECKED_STEPS)]
    seconds, cpu_seconds = [], []
    for _ in range(task.steps):
        started = time.process_time()
        seconds.append(run.step(batches).seconds)
        cpu_seconds.append(time.process_time() - started)
    measured = Measured(
        losses,
        seconds,
        cpu_seconds,
        peak_resident_bytes() - before,
        run.device_peak_bytes(),
        run.recomputed_layers,
        run.repeats_known,
    )
    run.close()
    return measured


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("\n" + json.dumps(asdict(measure(Task.loads(sys.argv[1])))))
