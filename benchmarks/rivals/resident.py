"""Plain PyTorch with everything on the device, blocks checkpointed."""

import torch
from harness.models import Model
from torch import nn

from rivals.interface import BETAS, CLIP_NORM, Batches, CudaPeak, Settings, StepResult, timed
from rivals.plain_loop import ADAMW, add_up_gradients, contract_model, decay_groups, kernels_missing


class ResidentRun:
    """In bf16 the model holds bf16 weights, and fp32 masters are copied into them after each update."""

    recomputed_layers = None
    repeats_known = True

    def __init__(self, model: Model, settings: Settings) -> None:
        self._device = settings.torch_device
        self._peak = CudaPeak(settings)
        self._model = contract_model(model, settings).to(self._device)
        weights = list(self._model.parameters())
        exact = settings.precision == "fp32"
        self._masters = [(w, w if exact else nn.Parameter(w.detach().float())) for w in weights]
        groups = decay_groups(master for _, master in self._masters)
        self._optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True, **ADAMW)

    def step(self, batches: Batches) -> StepResult:
        return timed(self._device, lambda: self._step(batches))

    def _step(self, batches: Batches) -> float:
        loss = add_up_gradients(self._model, batches, self._device, after=self._add_to_masters)
        nn.utils.clip_grad_norm_([master for _, master in self._masters], CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in self._masters:
                if weight is not master:
                    weight.copy_(master)
        return loss

    def _add_to_masters(self) -> None:
        for weight, master in self._masters:
            if weight is not master and weight.grad is not None:
                gradient, weight.grad = weight.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def device_peak_bytes(self) -> int | None:
        return self._peak.bytes()

    def close(self) -> None:
        del self._model, self._masters, self._optimizer


class Resident:
    name = "torch"

    def available(self, settings: Settings) -> str | None:
        if settings.device == "lagged":
            return "lagged is a device of MegaTrain's tests"
        return kernels_missing(settings)

    def build(self, model: Model, settings: Settings) -> ResidentRun:
        return ResidentRun(model, settings)
