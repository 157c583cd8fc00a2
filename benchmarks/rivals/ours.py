"""MegaTrain's engine, and the same engine without one of its parts."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from harness.models import Model, random_model
from harness.traces import kept_layers

from megatrain.device.lagged import LaggedDevice
from megatrain.engine import weight_stream
from megatrain.engine.engine import Engine
from megatrain.optim.adamw import AdamW
from megatrain.schedule.operations import Kind, Operation, Schedule
from rivals.interface import (
    BETAS,
    CLIP_NORM,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Batches,
    Settings,
    StepResult,
    timed,
)
from rivals.plain_loop import kernels_missing

_OWN = (
    "longest_delay_seconds",
    "synchronous_updates",
    "prefetch",
    "inputs_leave",
    "deterministic",
)  # of this adapter; the rest is the engine's


class EngineRun:
    repeats_known = True

    def __init__(self, model: Model, settings: Settings) -> None:
        chosen = dict(settings.engine)
        own = {name: chosen.pop(name) for name in _OWN if name in chosen}
        self._synchronous = own.get("synchronous_updates", False)
        if not own.get("prefetch", True):
            weight_stream.build_schedule = _build_late_schedule
        if own.get("inputs_leave", False):
            weight_stream.WeightStream._inputs_must_leave = lambda *_: True
        if own.get("deterministic", False):
            torch.use_deterministic_algorithms(True)  # for good: a system has a process of its own
            torch.utils.deterministic.fill_uninitialized_memory = False  # as train.deterministic has it
        self._layers, self._device_peak = model.shape.layers, 0
        self._device = settings.torch_device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.engine = Engine(
                random_model(model, settings.dtype),
                AdamW(lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY),
                _device(settings, own.get("longest_delay_seconds", 0.0)),
                settings.precision,
                clip_norm=CLIP_NORM,
                threads=settings.threads,
                **({"kernels": settings.kernels} | chosen),
            )
        self._streams = settings.device != "cpu"

    @property
    def recomputed_layers(self) -> int:
        return self._layers - kept_layers(self.engine)

    def step(self, batches: Batches) -> StepResult:
        return timed(self._device, lambda: self._step(batches))

    def _step(self, batches: Batches) -> float:
        stats = self.engine.train_step(batches)
        if self._synchronous:
            self.engine.flush()
        self._device_peak = max(self._device_peak, stats.device_peak_bytes)
        return stats.loss or 0.0

    def device_peak_bytes(self) -> int | None:
        return self._device_peak if self._streams else None

    def close(self) -> None:
        self.engine.close()


class Ours:
    def __init__(self, name: str, **engine: Any) -> None:
        self.name = name
        self._engine = engine

    def available(self, settings: Settings) -> str | None:
        return kernels_missing(settings)

    def build(self, model: Model, settings: Settings) -> EngineRun:
        return EngineRun(model, replace(settings, engine=self._engine | dict(settings.engine)))


def _device(settings: Settings, longest_delay_seconds: float) -> Any:
    if settings.device == "lagged":
        return LaggedDevice(settings.precision, longest_delay_seconds=longest_delay_seconds)
    if settings.on_gpu:
        from megatrain.device.cuda import CudaDevice

        return CudaDevice(settings.torch_device.index or 0)
    return settings.device


def _build_late_schedule(*arguments: Any, **options: Any) -> Schedule:
    return fetch_late(_build_schedule(*arguments, **options))


_build_schedule = weight_stream.build_schedule


def fetch_late(schedule: Schedule) -> Schedule:
    """The same copies into the same slots, each only when the unit that needs it is about to run."""
    waiting: list[Operation] = []
    operations: list[Operation] = []
    for operation in schedule.operations:
        if operation.kind in (Kind.RELEASE, Kind.FETCH):  # a release comes right before the fetch that it is for
            waiting.append(operation)
            continue
        while operation.kind is Kind.COMPUTE and _next_fetch(waiting) <= operation.visit:
            while waiting[0].kind is Kind.RELEASE:
                operations.append(waiting.pop(0))
            operations.append(waiting.pop(0))
        operations.append(operation)
    return replace(schedule, operations=(*operations, *waiting))


def _next_fetch(waiting: list[Operation]) -> float:
    return next((op.visit for op in waiting if op.kind is Kind.FETCH), float("inf"))
