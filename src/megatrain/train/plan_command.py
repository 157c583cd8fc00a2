"""`megatrain plan`: what a model needs on a machine, where it goes and how long a step takes."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatrain.config import Config, override, parse_config
from megatrain.config_kinds import BYTES, SEQUENCE_LENGTH, whole
from megatrain.engine import setup
from megatrain.errors import ConfigError
from megatrain.planner.durations import Measured
from megatrain.planner.hardware import Hardware, load_hardware
from megatrain.planner.placement import PROCESS_BYTES
from megatrain.planner.plan import ALL_THE_NVME, Plan, make_plan
from megatrain.planner.report import plan_json, print_plan, write_timeline
from megatrain.planner.workload import Workload
from megatrain.sizes import parse_count
from megatrain.train.build import given_tokenizer, planned_vocabulary
from megatrain.train.model_settings import ModelSettings, read_model_settings
from megatrain.train.planning import free_disk_bytes, measured_here, plan_settings, usable_here, workload_of
from megatrain.train.run_folder import model_folder
from megatrain.yaml_file import read_yaml

_SEQ_LEN = 4096  # where nothing says another one
_TOKENS_PER_STEP = 32 * 1024
_KEYS = {"seq_len": "data", "tokens_per_step": "train", "device_memory": "engine", "moments": "optimizer"}
_SIZES = ("host_memory", "device_memory", "nvme")
_KINDS = dict.fromkeys(_SIZES, BYTES) | {"seq_len": SEQUENCE_LENGTH, "tokens_per_step": whole(1)}


def plan_command(known: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> bool:
    """Print the plan; returns whether it fits. Raises ConfigError."""
    options = _options(known)
    settings = _settings(known.what)
    override(settings, overrides)
    is_run = _section(settings, "data").get("train") is not None  # planned as `train` would carry it out
    _take_options(settings, options)
    found = _model(settings)
    chooses_micro_batch = not is_run and "micro_batch" not in _section(settings, "engine")
    if not is_run:
        _take_defaults(settings, found.config)
    config = parse_config(settings, for_training=False)
    plan = plan_here_or_there(
        config,
        found,
        name=_name(known.what, found),
        hardware_name=known.hardware,
        options=options,
        chooses_micro_batch=chooses_micro_batch,
    )
    if known.timeline is not None:
        _write(plan, Path(known.timeline))
    if known.json:
        print(json.dumps(plan_json(plan, options.get("tokens")), indent=2))
    else:
        print_plan(plan, options.get("tokens"), sys.stdout)
    return plan.fits


def _options(known: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, read."""
    found: dict[str, Any] = {}
    for name, kind in _KINDS.items():
        text = getattr(known, name)
        if text is None:
            continue
        try:
            found[name] = kind.parse(_number(text) if name in ("seq_len", "tokens_per_step") else text)
        except (ValueError, TypeError):
            raise ConfigError(f"--{name.replace('_', '-')}: {text!r} is wrong; expected {kind.expected}") from None
    if known.moments is not None:
        found["moments"] = known.moments
    if known.tokens is not None:
        try:
            found["tokens"] = parse_count(known.tokens)
        except ValueError as error:
            raise ConfigError(f"--tokens: {error}") from None
    return found


def _number(text: str) -> int:
    return parse_count(text)


def _settings(what: str) -> dict[str, Any]:
    """The settings that `what` means: a run's YAML file, or a model by its configuration, folder or hub id."""
    path = Path(what).expanduser()
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        content = read_yaml(path)
        return {"model": {"config": what}} if "model_type" in content else content
    if path.is_file():
        return {"model": {"config": what}}
    return {"model": {"path": what}}


def _section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the settings, made where there is none. What is no section is left for the check of all settings."""
    if settings.get(name) is None:
        settings[name] = {}
    return settings[name] if isinstance(settings[name], dict) else {}


def _take_options(settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Options that are another way to say what a key says."""
    for name, section in _KEYS.items():
        if name in options:
            _section(settings, section)[name] = options[name]


def _model(settings: dict[str, Any]) -> ModelSettings:
    """The model's configuration, with the vocabulary of its tokenizer where that is known without text."""
    config = parse_config({"model": settings.get("model")}, for_training=False)
    found = read_model_settings(config)
    if config.model.tokenizer is not None:
        found.fit(planned_vocabulary(config, given_tokenizer(config)))
    return found


def _take_defaults(settings: dict[str, Any], model_config: Any) -> None:
    """A sequence length and tokens per step where neither a file nor an option gave them: a plan's own defaults."""
    data, train, engine = (_section(settings, name) for name in ("data", "train", "engine"))
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    data.setdefault("seq_len", min(_SEQ_LEN, longest) if isinstance(longest, int) and longest > 1 else _SEQ_LEN)
    if train.get("tokens_per_step") is None:
        together = parse_config(
            {"model": settings["model"], "data": data, "engine": engine}, for_training=False
        ).tokens_per_step
        train["tokens_per_step"] = max(1, _TOKENS_PER_STEP // together) * together


def plan_here_or_there(
    config: Config,
    found: ModelSettings,
    *,
    name: str,
    hardware_name: str | None,
    options: Mapping[str, Any],
    chooses_micro_batch: bool,
) -> Plan:
    """The plan for the hardware of that name, or, where there is none, for this machine, whose units are timed.
    `options`: bytes of host_memory and nvme that may be used, in place of the settings'. `chooses_micro_batch`: the
    planner does, and not the settings."""
    hardware = None if hardware_name is None else load_hardware(hardware_name)
    _refuse_other_device(config.engine.device, hardware_name, hardware)
    precision = _precision(config, hardware)
    chooses_micro_batch &= hardware is not None  # units are timed with the micro-batch that is set

    def workload_at(seq_len: int) -> Workload:
        return workload_of(config, found.config, precision, seq_len=seq_len, name=name)

    workload = workload_at(config.data.seq_len)
    measured: Measured | None = None
    device_memory = config.engine.device_memory
    nvme = ALL_THE_NVME if config.engine.nvme is not None else 0
    if hardware is None:
        nvme = free_disk_bytes(config.engine.nvme)
        hardware, measured = measured_here(config, workload, setup.make_device(config.engine.device, precision))
        device_memory = usable_here(config, hardware)
    settings = plan_settings(
        config,
        micro_batch=None if chooses_micro_batch else config.sequences_together,
        device_memory=device_memory,
        host_memory=options.get("host_memory", _host_memory(config, hardware)),
        nvme=options.get("nvme", nvme),
    )
    return make_plan(workload, hardware, settings, measured=measured, at_length=workload_at)


def _refuse_other_device(device: str, name: str | None, hardware: Hardware | None) -> None:
    """`engine.device` is of this machine, and another one's profile is of a device with or without its own memory."""
    if hardware is None or device == "auto":
        return
    if device == "lagged" or (device == "cpu") != hardware.computes_in_host_memory:
        raise ConfigError(
            f"engine.device is {device!r}, which is not what computes in --hardware {name}; give --engine.device auto,"
            " or leave out --hardware to plan for this machine"
        )


def _host_memory(config: Config, hardware: Hardware) -> int | None:
    """engine.host_memory is for the engine's own; the process holds some besides."""
    most = config.engine.host_memory
    return None if most is None else min(hardware.host_memory, most + PROCESS_BYTES)


def _precision(config: Config, hardware: Hardware | None) -> str:
    """On other hardware `auto` is bf16: all that there are profiles for compute it natively."""
    if hardware is None:
        return setup.resolve_precision(config.engine.precision, setup.make_device(config.engine.device))
    return "bf16" if config.engine.precision == "auto" else config.engine.precision


def _name(what: str, found: ModelSettings) -> str:
    named = Path(model_folder(what)).stem if found.entries else what
    return named or str(found.config.model_type)


def _write(plan: Plan, path: Path) -> None:
    try:
        write_timeline(plan, path)
    except OSError as error:
        raise ConfigError(f"--timeline: cannot write {str(path)!r}: {error.strerror}; give another file") from None
