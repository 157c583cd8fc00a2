"""What a system has to offer to be measured beside others, and the contract that all of them are held to.

The contract: the same weights, batches, kernels and AdamW (Loshchilov & Hutter) with the global norm clipped at 1; the
loss is the mean over the target tokens of all micro-batches. Precision `bf16` computes in bf16 from fp32 masters with
fp32 moments and gradients added up in fp32; `fp32` is fp32 throughout. Blocks are checkpointed. Whether a system keeps
to it shows in its first losses (contest.py), not in what it says of itself.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from harness.models import Model
from torch import Tensor

BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.95), 1e-8, 0.1, 1.0
LEARNING_RATE = 3e-4  # large enough that a missing update shows in the next loss

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Settings:
    """device: cpu, cuda, cuda:NUMBER or lagged. micro_batches: of one step. engine: settings of ours alone."""

    precision: str
    device: str = "cpu"
    kernels: str = "torch"
    threads: int = 1
    micro_batches: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device if self.on_gpu else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of computation."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass(frozen=True, slots=True)
class StepResult:
    """`loss` before the update. `seconds` until the device is done."""

    seconds: float
    loss: float


class Run(Protocol):
    """A model under training. `recomputed_layers`: whose forward runs again in backward; None: all. `repeats_known`:
    False where the system does not say what it computes twice."""

    recomputed_layers: int | None
    repeats_known: bool

    def step(self, batches: Batches) -> StepResult: ...

    def device_peak_bytes(self) -> int | None:
        """None where the device is the host."""

    def close(self) -> None: ...


class System(Protocol):
    name: str

    def available(self, settings: Settings) -> str | None:
        """None, or why it cannot be measured here."""

    def build(self, model: Model, settings: Settings) -> Run:
        """With the weights that `random_model` makes in the precision of computation."""


class CudaPeak:
    """Peak memory of a run that allocates by torch."""

    def __init__(self, settings: Settings) -> None:
        self._device = settings.torch_device
        if settings.on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)

    def bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None


def timed(device: torch.device, step: Callable[[], float]) -> StepResult:
    _synchronize(device)
    started = time.perf_counter()
    loss = step()
    _synchronize(device)
    return StepResult(time.perf_counter() - started, loss)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
