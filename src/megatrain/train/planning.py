"""From a run's settings to its plan."""

import math
from typing import Any

from megatrain.config import Config
from megatrain.engine import setup
from megatrain.optim.adamw import AdamW
from megatrain.planner.choose import Settings
from megatrain.planner.durations import Measured
from megatrain.planner.hardware import Hardware
from megatrain.planner.measure import measure_units
from megatrain.planner.plan import Plan, make_plan
from megatrain.planner.probe import probe
from megatrain.planner.workload import Workload, build_workload


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
        name=name,
    )


def plan_settings(config: Config, **others: Any) -> Settings:
    """What the settings of a run say to the planner; `others` are Settings' own."""
    sequences = max(1, math.ceil(config.tokens_per_step / config.data.seq_len))
    given: dict[str, Any] = {
        "sequences": sequences,
        "micro_batch": config.engine.micro_batch,
        "slots": config.engine.slots,
        "clip_scope": config.train.clip_scope if config.train.clip_norm is not None else "none",
        "keep_graphs": config.engine.keep_graphs,
        "device_memory": config.engine.device_memory,
    }
    return Settings(**(given | others))


def measured_here(config: Config, workload: Workload, micro_batch: int) -> tuple[Hardware, Measured]:
    """This machine's figures, and the model's units timed on it. Takes some seconds."""
    device = setup.make_device(config.engine.device, workload.precision)
    hardware = probe(device, workload.precision, config.engine.threads)
    return hardware, measure_units(workload, device, micro_batch, hardware.product_rate)


def plan_run(config: Config, workload: Workload, process_bytes: int) -> Plan:
    """The plan of a run on this machine, of what the engine can carry out. `process_bytes`: that the process holds."""
    hardware, measured = measured_here(config, workload, config.engine.micro_batch)
    settings = plan_settings(config, process_bytes=process_bytes, executable_only=True)
    return make_plan(workload, hardware, settings, measured=measured)
