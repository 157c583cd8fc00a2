"""SlideFormer (arXiv 2603.16428), where its checkout is on the path. It updates each layer inside backward, so it clips
nothing and takes one micro-batch a step."""

import tempfile
from importlib.util import find_spec
from typing import Any

import torch
from harness.models import Model

from rivals.interface import EPS, LEARNING_RATE, WEIGHT_DECAY, Batches, CudaPeak, Settings, StepResult, timed
from rivals.plain_loop import contract_model, kernels_missing


class SlideFormerRun:
    recomputed_layers = None
    repeats_known = True

    def __init__(self, model: Model, settings: Settings) -> None:
        from offload_transformer import SlideFormerOffloader

        self._device = settings.torch_device
        self._peak = CudaPeak(settings)
        self._folder = tempfile.TemporaryDirectory()
        made: Any = contract_model(model, settings)
        made.gradient_checkpointing_disable()  # it checkpoints by itself
        self._model: Any = SlideFormerOffloader(
            model=made,
            device=self._device,
            dtype=torch.bfloat16,
            offload_dir=self._folder.name,
            enable_timing=False,
            enable_memory_stats=False,
            optimizer_kwargs={
                "lr": LEARNING_RATE,
                "bias_correction": True,
                "weight_decay": WEIGHT_DECAY,
                "eps": EPS,
                "fp32_optimizer_state": True,
                "num_layer": model.shape.layers + 2,  # and the embedding and the head
                "nvme_offload_fraction": 0.0,
                "offload_dir": self._folder.name,
                "prefetch": True,
            },
        )
        self._model.train()

    def step(self, batches: Batches) -> StepResult:
        return timed(self._device, lambda: self._step(batches))

    def _step(self, batches: Batches) -> float:
        (batch,) = batches
        inputs = {name: value.to(self._device) for name, value in batch.items()}
        loss = self._model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).loss.item()
        self._model.wait_for_completion()
        return float(loss)

    def device_peak_bytes(self) -> int | None:
        return self._peak.bytes()

    def close(self) -> None:
        self._folder.cleanup()


class SlideFormer:
    name = "slideformer"

    def available(self, settings: Settings) -> str | None:
        if find_spec("offload_transformer") is None:
            return "its checkout is not on the path"
        if not settings.on_gpu:
            return "it needs a CUDA device"
        if settings.precision != "bf16":
            return "it trains in bf16 or fp16 only"
        if settings.micro_batches > 1:
            return "it updates in every backward: one micro-batch a step"
        return kernels_missing(settings)

    def build(self, model: Model, settings: Settings) -> SlideFormerRun:
        return SlideFormerRun(model, settings)
