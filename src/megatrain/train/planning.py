"""From a run's settings to its plan, and from the plan to what the run came to."""

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatrain.config import Config
from megatrain.device.base import ComputeDevice, streams
from megatrain.engine import setup
from megatrain.errors import CapacityError
from megatrain.memory.arena import trim_freed_memory
from megatrain.memory.limits import host_memory_limits, resident_bytes
from megatrain.optim.adamw import AdamW
from megatrain.planner.choose import Settings
from megatrain.planner.durations import Measured
from megatrain.planner.hardware import Hardware
from megatrain.planner.measure import measure_units
from megatrain.planner.placement import DEVICE, HOST
from megatrain.planner.plan import Plan, make_plan
from megatrain.planner.probe import describe_machine, probe
from megatrain.planner.report import plan_json
from megatrain.planner.workload import Workload, build_workload
from megatrain.private_files import private
from megatrain.sizes import format_bytes, format_seconds
from megatrain.train.loop import TrainingEngine
from megatrain.train.metrics import StepStats

_UNSETTLED_STEPS = 3  # the first ones record the order of units, measure graphs and warm caches


def workload_of(
    config: Config, model_config: Any, precision: str, optimizer: AdamW | None = None, *, seq_len: int, name: str = ""
) -> Workload:
    """The model of a run, in shapes alone. Raises ConfigError."""
    return build_workload(
        model_config,
        precision=precision,
        seq_len=seq_len,
        optimizer=optimizer,
        attention=config.model.attn_implementation,
        sequence_chunk_tokens=config.engine.sequence_chunk_tokens or "auto",
        name=name,
        freeze=config.model.freeze or (),
    )


def plan_settings(config: Config, **others: Any) -> Settings:
    """What the settings of a run say to the planner; `others` are Settings' own."""
    engine = config.engine
    given: dict[str, Any] = {
        "sequences": max(1, math.ceil(config.tokens_per_step / config.data.seq_len)),
        "micro_batch": config.sequences_together,
        "slots": engine.slots,
        "resident": engine.resident_units if isinstance(engine.resident_units, int) else None,
        "clip_scope": config.train.clip_scope if config.train.clip_norm is not None else "none",
        "keep_graphs": engine.keep_graphs,
        "device_memory": engine.device_memory,
        "moments": config.optimizer.moments,
        "chunked": setup.resolve_sequence_chunks(engine.sequence_chunk_tokens, engine.compile) is not None,
        "emulated": engine.device == "lagged",
    }
    return Settings(**(given | others))


class RunPlanner:
    """Plans a run on this machine, with what the engine can carry out."""

    def __init__(self, config: Config, model_config: Any, optimizer: AdamW) -> None:
        engine = config.engine
        precision = setup.resolve_precision(engine.precision, setup.make_device(engine.device))
        self._config = config
        self.device: ComputeDevice = setup.make_device(engine.device, precision)
        self._workload = workload_of(config, model_config, precision, optimizer, seq_len=config.data.seq_len)

    def require_fit(self) -> None:
        """Raise CapacityError, naming the missing bytes, where the run does not fit into what is free now."""
        self._plan(describe_machine(self.device), None)

    def plan(self) -> Plan:
        """The plan with measured times. Takes some seconds. Raises CapacityError as `require_fit` does."""
        hardware, measured = measured_here(self._config, self._workload, self.device)
        return self._plan(hardware, measured)

    def _host_limit(self, free_bytes: int, held_bytes: int) -> int:
        """engine.host_memory is for the engine's own; what the process holds besides is not counted in it, nor what a
        lagged device takes of the host."""
        engine = self._config.engine
        if engine.host_memory is None:
            return free_bytes
        emulated = (engine.device_memory or free_bytes) if engine.device == "lagged" else 0
        return min(free_bytes, engine.host_memory + held_bytes + emulated)

    def _resident_units(self) -> int | None:
        """None: as many as are of use. A device whose memory has no limit leaves nothing over."""
        asked = self._config.engine.resident_units
        if isinstance(asked, int):
            setup.require_own_memory(asked, self.device.name, there_is=streams(self.device))
            return asked
        limit = self._config.engine.device_memory
        limit = self.device.memory_bytes if limit is None and streams(self.device) else limit
        return 0 if limit is None else None

    def _plan(self, hardware: Hardware, measured: Measured | None) -> Plan:
        trim_freed_memory()  # as the engine does when it has been built
        held = resident_bytes()
        # what this process holds already is not free any more, and counts in its peak
        hardware = replace(hardware, host_memory=host_memory_limits().free_bytes + held)
        settings = plan_settings(
            self._config,
            device_memory=usable_here(self._config, hardware),
            host_memory=self._host_limit(hardware.host_memory, held),
            nvme=free_disk_bytes(self._config.engine.nvme),
            process_bytes=held,
            resident=self._resident_units(),
        )
        found = make_plan(self._workload, hardware, settings, measured=measured)
        if not found.fits:
            raise CapacityError(found.refusal())
        return found


def free_disk_bytes(folder: str | None) -> int:
    """Of the disk below `folder`; 0 where none is given."""
    if folder is None:
        return 0
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def usable_here(config: Config, hardware: Hardware) -> int | None:
    """Device memory that a run on this machine may use: as it is set, or what the device itself says. The lagged one
    says nothing."""
    return config.engine.device_memory or (None if config.engine.device == "lagged" else hardware.device_memory)


def measured_here(config: Config, workload: Workload, device: ComputeDevice) -> tuple[Hardware, Measured]:
    """This machine's figures, and the model's units timed on it. Takes some seconds."""
    hardware = probe(device, workload.precision, setup.optimizer_threads(config.engine.threads, device))
    return hardware, measure_units(workload, device, config.sequences_together, hardware.product_rate)


class WatchedEngine:
    """The engine, noting what its steps took."""

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine
        self._steps: list[StepStats] = []

    def wrap(self, engine: TrainingEngine) -> None:
        """From here on let `engine`, which stands around the one before, carry out the steps."""
        self._engine = engine

    def train_step(self, batches: Sequence[dict[str, Tensor]], lr: float | None = None) -> StepStats:
        stats = self._engine.train_step(batches, lr=lr)
        self._steps.append(stats)
        return stats

    def outcome(self, plan: Plan) -> dict[str, dict[str, float]]:
        """Predicted and measured, by what was predicted; what could not be measured is left out."""
        found: dict[str, dict[str, float]] = {}
        if not self._steps:
            return found
        settled = self._steps[_UNSETTLED_STEPS:] or self._steps[-1:]
        seconds = statistics.median(s.seconds for s in settled)
        found["step_seconds"] = {"predicted": plan.simulation.step_seconds, "measured": seconds}
        host = max(s.host_peak_bytes for s in self._steps)
        found["host_peak_bytes"] = {"predicted": plan.used_bytes(HOST), "measured": host}
        device = max(s.device_peak_bytes for s in self._steps)
        if device:
            found["device_peak_bytes"] = {"predicted": plan.used_bytes(DEVICE), "measured": device}
        return found


def outcome_lines(outcome: dict[str, dict[str, float]]) -> list[str]:
    """Measured against predicted, for people."""
    names = {"step_seconds": "step", "host_peak_bytes": "host peak", "device_peak_bytes": "device peak"}
    lines = []
    for key, values in outcome.items():
        show = format_seconds if key.endswith("seconds") else format_bytes
        off = values["measured"] / values["predicted"] - 1 if values["predicted"] else 0.0
        lines.append(
            f"{names[key]}: predicted {show(values['predicted'])}, measured {show(values['measured'])} ({off:+.0%})"
        )
    return lines


def write_plan(path: Path, plan: Plan, total_steps: int, outcome: dict[str, dict[str, float]] | None = None) -> None:
    """plan.json of a run's folder, for so many steps; with what was measured once that is known."""
    content = plan_json(plan) | {"total_steps": total_steps, "outcome": outcome}
    with open(path, "w", encoding="utf-8", opener=private) as stream:
        stream.write(json.dumps(content, indent=2) + "\n")
