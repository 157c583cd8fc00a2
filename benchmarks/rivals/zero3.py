"""DeepSpeed ZeRO-3 with parameters and optimizer on the host, with and without SuperOffload, one rank.

Measured from 0.19.8 on: before that, pageable buffers and a blocking gradient copy made offloading slower than it
need be (DeepSpeed #8207). With clipping, SuperOffload's speculative updates are off, by DeepSpeed's own choice.
"""

import os
import socket
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from harness.models import Model

from megatrain.doctor.facts import release
from rivals.interface import (
    BETAS,
    CLIP_NORM,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Batches,
    CudaPeak,
    Settings,
    StepResult,
    timed,
)
from rivals.plain_loop import add_up_gradients, contract_model, decay_groups, kernels_missing

OLDEST = (0, 19, 8)


class Zero3Run:
    recomputed_layers = None
    repeats_known = True

    def __init__(self, model: Model, settings: Settings, super_offload: bool) -> None:
        _alone(settings)
        import deepspeed

        self._device = settings.torch_device
        self._peak = CudaPeak(settings)
        made: Any = contract_model(model, settings)
        self._engine, *_ = deepspeed.initialize(
            model=made,
            model_parameters=decay_groups(made.parameters()),
            config=zero3_config(settings, super_offload),
        )

    def step(self, batches: Batches) -> StepResult:
        return timed(self._device, lambda: self._step(batches))

    def _step(self, batches: Batches) -> float:
        # the losses are shares of the whole step's mean already
        return add_up_gradients(
            self._engine,
            batches,
            self._device,
            backward=lambda loss: self._engine.backward(loss, scale_wrt_gas=False),
            after=self._engine.step,
        )

    def device_peak_bytes(self) -> int | None:
        return self._peak.bytes()

    def close(self) -> None:
        self._engine.destroy()


class Zero3:
    def __init__(self, name: str, *, super_offload: bool) -> None:
        self.name = name
        self._super_offload = super_offload

    def available(self, settings: Settings) -> str | None:
        if settings.device == "lagged":
            return "lagged is a device of MegaTrain's tests"
        if find_spec("deepspeed") is None:
            return "deepspeed is not installed"
        if release(version("deepspeed")) < OLDEST:
            return f"deepspeed is {version('deepspeed')}; 0.19.8 or newer is compared with"
        if self._super_offload and not settings.on_gpu:
            return "SuperOffload needs a CUDA device"
        return kernels_missing(settings)

    def build(self, model: Model, settings: Settings) -> Zero3Run:
        return Zero3Run(model, settings, self._super_offload)


def zero3_config(settings: Settings, super_offload: bool) -> dict[str, Any]:
    pinned = {"device": "cpu", "pin_memory": settings.on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,  # a number that DeepSpeed wants and that nothing here depends on
        "gradient_accumulation_steps": settings.micro_batches,
        "gradient_clipping": CLIP_NORM,
        "bf16": {"enabled": settings.precision == "bf16"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "betas": [*BETAS], "eps": EPS, "weight_decay": WEIGHT_DECAY},
        },
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "offload_param": pinned,
            "offload_optimizer": pinned | ({"super_offload": True} if super_offload else {}),
        },
        "steps_per_print": 10**9,
    }


def _alone(settings: Settings) -> None:
    """One rank, on a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(settings.torch_device.index or 0)}
    if not settings.on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
