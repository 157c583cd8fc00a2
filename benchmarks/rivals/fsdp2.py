"""FSDP2 with parameters, gradients and optimizer on the host (`fully_shard`, CPUOffloadPolicy), one rank."""

from typing import Any

import torch
from harness.models import Model
from torch import distributed, nn

from rivals.interface import BETAS, CLIP_NORM, Batches, CudaPeak, Settings, StepResult, timed
from rivals.plain_loop import ADAMW, add_up_gradients, contract_model, decay_groups, kernels_missing


class Fsdp2Run:
    recomputed_layers = None
    repeats_known = True

    def __init__(self, model: Model, settings: Settings) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        self._device = settings.torch_device
        backend = "cpu:gloo,cuda:nccl" if settings.on_gpu else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        if settings.on_gpu:
            torch.cuda.set_device(self._device)
        self._peak = CudaPeak(settings)
        made: Any = contract_model(model, settings, masters=True)
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if settings.precision == "bf16" else None, reduce_dtype=torch.float32
        )
        sharding: dict[str, Any] = {
            "mesh": init_device_mesh(self._device.type, (1,)),
            "mp_policy": precision,
            "offload_policy": CPUOffloadPolicy(pin_memory=settings.on_gpu),
        }
        for layer in made.model.layers:
            fully_shard(layer, **sharding)
        self._model = fully_shard(made, **sharding)
        for buffer_owner in made.modules():  # buffers are no parameters: FSDP leaves them where they are
            for name, buffer in buffer_owner._buffers.items():
                buffer_owner._buffers[name] = None if buffer is None else buffer.to(self._device)
        groups = decay_groups(made.parameters())
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True, **ADAMW)

    def step(self, batches: Batches) -> StepResult:
        return timed(self._device, lambda: self._step(batches))

    def _step(self, batches: Batches) -> float:
        loss = add_up_gradients(self._model, batches, self._device)
        nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def device_peak_bytes(self) -> int | None:
        return self._peak.bytes()

    def close(self) -> None:
        del self._model, self._optimizer
        distributed.destroy_process_group()


class Fsdp2:
    name = "fsdp2-offload"

    def available(self, settings: Settings) -> str | None:
        if settings.device == "lagged":
            return "lagged is a device of MegaTrain's tests"
        if not distributed.is_available() or not distributed.is_gloo_available():
            return "this PyTorch has no torch.distributed with gloo"
        return kernels_missing(settings)

    def build(self, model: Model, settings: Settings) -> Fsdp2Run:
        return Fsdp2Run(model, settings)
