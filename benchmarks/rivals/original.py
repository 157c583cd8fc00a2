"""The MegaTrain of arXiv 2604.05091, where its package `infinity` is on the path. It updates bf16 weights in place,
without fp32 masters, and divides each micro-batch by its own tokens."""

from importlib.util import find_spec
from typing import Any

import torch
from harness.models import Model, random_model
from torch import nn

from rivals.interface import BETAS, CLIP_NORM, EPS, LEARNING_RATE, Batches, CudaPeak, Settings, StepResult, timed
from rivals.plain_loop import decay_groups


class OriginalRun:
    recomputed_layers = None
    repeats_known = False  # more than once: it depends on its own settings

    def __init__(self, model: Model, settings: Settings) -> None:
        from infinity import CPUMasterModel
        from infinity.config import CPUMasterConfig

        self._device = settings.torch_device
        self._peak = CudaPeak(settings)
        config = CPUMasterConfig(
            device=self._device.index or 0,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            dataset_name="none: batches are handed over",
            learning_rate=LEARNING_RATE,
            max_grad_norm=CLIP_NORM,
        )
        self._model: Any = CPUMasterModel(random_model(model), config)
        groups = decay_groups(self._model.get_parameters())
        self._optimizer = _adamw(groups)

    def step(self, batches: Batches) -> StepResult:
        return timed(self._device, lambda: self._step(batches))

    def _step(self, batches: Batches) -> float:
        losses = []
        for batch in batches:
            ids = batch["input_ids"]
            loss, *_ = self._model.forward_and_backward(ids, torch.ones_like(ids), batch["labels"])
            losses.append(float(loss))
        nn.utils.clip_grad_norm_(self._model.get_parameters(), CLIP_NORM)
        self._optimizer.step()
        self._model._sync_params_to_gpu()
        self._model.zero_grad()
        self._optimizer.zero_grad()
        return sum(losses) / len(losses)

    def device_peak_bytes(self) -> int | None:
        return self._peak.bytes()

    def close(self) -> None:
        self._model.cleanup()


class Original:
    name = "megatrain-original"

    def available(self, settings: Settings) -> str | None:
        if find_spec("infinity") is None:
            return "its package infinity is not on the path"
        if not settings.on_gpu:
            return "it needs a CUDA device"
        if settings.precision != "bf16":
            return "it trains in bf16 only"
        if settings.kernels != "torch":
            return "it has no setting for kernels"
        return None

    def build(self, model: Model, settings: Settings) -> OriginalRun:
        return OriginalRun(model, settings)


def _adamw(groups: list[dict[str, Any]]) -> Any:
    """DeepSpeed's host optimizer where it is installed, as its own script has it."""
    hyper: dict[str, Any] = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPS}
    if find_spec("deepspeed") is None:
        return torch.optim.AdamW(groups, **hyper)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, adamw_mode=True, **hyper)
