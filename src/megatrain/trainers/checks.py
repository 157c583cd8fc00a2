"""What a streamed model cannot be trained with, each said in one line before anything is prepared."""

from collections.abc import Mapping
from typing import Any

import torch

from megatrain.engine.engine import Engine
from megatrain.engine.registry import engine_of
from megatrain.errors import ConfigError

_ADAMW = ("adamw_torch", "adamw_torch_fused")  # what the engine's AdamW is

# settings of TrainingArguments and TRL's configs, and what to do about them where they are set
_REFUSED = {
    "fp16": "gradients are not scaled here; use bf16=True, or an Engine with precision='bf16'",
    "fp16_full_eval": "the engine's weights cannot be cast; leave it out",
    "bf16_full_eval": "the engine's weights cannot be cast; leave it out, or use an Engine with precision='bf16'",
    "deepspeed": "the engine streams the weights itself; leave it out",
    "fsdp": "the engine streams the weights itself; leave it out",
    "torch_compile": "use Engine(compile='blocks')",
    "auto_find_batch_size": "set per_device_train_batch_size; units' inputs leave for the host where memory is short",
    "use_liger_kernel": "use Engine(kernels='liger')",
    "optim_args": "the optimizer is the engine's AdamW; leave it out",
    "optim_target_modules": "the optimizer is the engine's AdamW; leave it out",
    "activation_offloading": "units' inputs leave for the host by themselves where memory is short; leave it out",
    "cast_lm_head_to_fp32": "the engine's weights cannot be cast; leave it out, or use an Engine with precision='fp32'",
    "use_vllm": "weights are not handed to vLLM yet; generation runs through the streamed model",
    "use_transformers_continuous_batching": "it casts the model; leave it out",
}


def find_engine(model: object, engine: Engine | None) -> Engine:
    """The engine that runs `model`. Raises ConfigError where there is none, or another."""
    if isinstance(model, Engine):
        raise ConfigError("model is an Engine; pass engine.model")
    if isinstance(model, str):
        raise ConfigError(f"model is {model!r}; pass engine.model, of mt.Engine.from_pretrained({model!r})")
    found = engine_of(model)
    if hasattr(model, "peft_config"):
        raise ConfigError("model is a PeftModel; a streamed model trains all its weights: pass engine.model")
    if found is None:
        raise ConfigError(f"model is a {type(model).__name__} that no open Engine runs; pass engine.model")
    if engine is not None and engine is not found:
        raise ConfigError("engine is not the one that runs this model; leave it out, or pass engine.model")
    if found.is_frozen:
        raise ConfigError("model is run by Engine.frozen, which trains nothing; make an Engine of it")
    return found


def check_call(given: Mapping[str, Any], engine: Engine) -> None:
    """Raise ConfigError for arguments of a trainer's constructor that a streamed model cannot follow."""
    for name in ("model_init", "peft_config", "optimizer_cls_and_kwargs", "quantization_config"):
        if given.get(name) is not None:
            raise ConfigError(f"{name} is set; the model is the engine's, and all its weights train with its AdamW")
    optimizer = (given.get("optimizers") or (None, None))[0]
    if optimizer is not None and optimizer is not engine.optimizer:
        raise ConfigError(f"optimizers holds a {type(optimizer).__name__}; pass (engine.optimizer, scheduler) or none")


def check_args(args: Any, engine: Engine) -> None:
    """Raise ConfigError for settings that a streamed model cannot follow."""
    for name, instead in _REFUSED.items():
        value = getattr(args, name, None)
        if value:
            raise ConfigError(f"{name} is {value!r}: {instead}")
    name = str(getattr(args.optim, "value", args.optim))
    if name not in _ADAMW:
        raise ConfigError(f"optim is {name!r}; the engine's own is {' or '.join(_ADAMW)}")
    if args.world_size > 1:
        raise ConfigError(
            f"there are {args.world_size} processes; a streamed model is trained by one: use plain python"
        )
    if args.n_gpu > 1:
        raise ConfigError(f"{args.n_gpu} GPUs are visible; show the engine's alone, by CUDA_VISIBLE_DEVICES")
    _check_device(args.device, engine.device.torch_device)


def _check_device(trainer: torch.device, engine: torch.device) -> None:
    if trainer.type != engine.type or (trainer.index or 0) != (engine.index or 0):
        right = "use_cpu=True" if engine.type == "cpu" else f"an Engine with device='{trainer}'"
        raise ConfigError(f"the trainer's device is {trainer}, and the engine computes on {engine}; use {right}")
