"""How much of what the hardware could compute a run used."""

from dataclasses import dataclass
from typing import Any

from megatrain.planner.hardware import load_hardware
from megatrain.report.folder import Run
from megatrain.report.metrics import number
from megatrain.report.numbers import rate

# the names that CUDA gives devices whose data sheet a profile quotes
_PROFILES = {
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}
FORMULA = (
    "2 operations per weight of a matrix and token, and 2 × heads × (width of a key + width of a value) per attended "
    "pair of positions, half of them with a causal mask; backward counts twice the forward; norms, activations, "
    "look-ups and repetitions (recomputation) count nothing"
)


@dataclass(frozen=True)
class Efficiency:
    """`step_flops`: the model's operations in a full step. `peak`: of the device by its data sheet, per second, None
    where it is not known; `reached`: of a large product on it when the run was planned."""

    step_flops: float
    tokens_per_step: int
    peak: float | None
    reached: float | None
    device: str

    @property
    def explained(self) -> str:
        """In words, with the formula."""
        text = f"Operations of the model in a full step of {self.tokens_per_step:,} tokens: {self.step_flops:.4g} "
        text += f"({FORMULA}), divided by the step's time. "
        if self.peak is not None:
            return text + f"MFU is the share of {rate(self.peak)}, the data sheet's dense peak of {self.device}."
        text += f"The peak of {self.device or 'the device'} is not known, so there is no MFU"
        if self.reached is not None:
            text += f"; a large product reached {rate(self.reached)} there when the run was planned"
        return text + "."


def efficiency_of(run: Run) -> Efficiency | None:
    """None without a plan, which counted the operations."""
    plan: dict[str, Any] = run.plan or {}
    flops, tokens = number(plan.get("model_flops")), number(plan.get("tokens_per_step"))
    if not flops > 0 or not tokens > 0:
        return None
    settings = run.settings
    device = str(settings["facts"]["hardware"].get("device", "")) if settings is not None else ""
    reached = number(plan.get("matmul_flops"))
    return Efficiency(
        flops, int(tokens), _peak(device, str(plan.get("precision"))), reached if reached > 0 else None, device
    )


def _peak(device: str, precision: str) -> float | None:
    name = _PROFILES.get(device)
    if name is None or precision not in ("bf16", "fp32"):
        return None
    return load_hardware(name).in_precision(precision).matmul_flops
