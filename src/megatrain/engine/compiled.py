"""`engine.compile: blocks`: one compiled graph per kind of block, not one per layer.

The layers of a model run the same code over different weights. What is compiled is the forward of their class, called
with the module: PyTorch takes weights as inputs of the graph, so all layers share it, whatever slot theirs lie in.
"""

import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from megatrain.errors import ConfigError
from megatrain.model.block import UnitForward
from megatrain.model.trees import copy_whole_caches

COMPILE = ("off", "blocks")


def check_compile(setting: str, device: torch.device) -> None:
    """Raise ConfigError for a wrong setting, or where what it needs is missing."""
    if setting not in COMPILE:
        raise ConfigError(f"engine.compile is {setting!r}; it must be one of {', '.join(COMPILE)}")
    if setting != "blocks":
        return
    if device.type == "cpu" and not _found("CXX", "g++", "clang++"):
        raise ConfigError("engine.compile is 'blocks', which needs a C++ compiler on the cpu; install g++, or use off")
    if device.type == "cuda" and find_spec("triton") is None:
        raise ConfigError("engine.compile is 'blocks', which needs triton on cuda; install triton, or use off")
    if device.type == "cuda" and not _found("CC", "gcc", "clang"):
        raise ConfigError(
            "engine.compile is 'blocks', which needs a C compiler on cuda, for triton; install gcc, or use off"
        )


def compile_blocks(blocks: list[UnitForward]) -> None:
    """Compile the forward of every class of which the model has several units."""
    count = Counter(type(block.unit.module) for block in blocks)
    compiled: dict[type, Callable[..., Any]] = {}
    for block in blocks:
        kind = type(block.unit.module)
        if count[kind] > 1:
            if kind not in compiled:
                compiled[kind] = torch.compile(kind.forward)
            block.forward = functools.partial(_run, compiled[kind], block.unit.module)


def _run(compiled: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    copy_whole_caches((*args, *kwargs.values()))
    return compiled(module, *args, **kwargs)


def _found(variable: str, *names: str) -> bool:
    """Whether there is a compiler: what the environment variable says, or one of these."""
    return any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)
