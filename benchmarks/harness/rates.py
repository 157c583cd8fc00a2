"""How much a step computed, and how fast: one way to count for all that is measured.

Attention is counted with its causal mask, of experts those that a token passes, and what is computed twice (layers in
backward, the scores inside fused attention) in `hardware` alone (megatrain/planner/flops.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from harness.models import Model, config_of
from harness.percentiles import Spread
from harness.results import Value
from megatrain.planner.flops import StepFlops, flops_of_units
from megatrain.planner.workload import build_workload


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step of a model over sequences. `active_parameters`: elements of matrices that one token passes."""

    parameters: int
    active_parameters: int
    layers: int
    flops: StepFlops  # with all layers computed again in backward
    flops_kept: StepFlops  # with none

    def hardware_flops(self, recomputed_layers: int | None) -> float:
        """None: all layers are computed again. They are alike, so each counts the same."""
        again = self.layers if recomputed_layers is None else recomputed_layers
        both = self.flops_kept.hardware, self.flops.hardware
        return both[0] + (both[1] - both[0]) * again / max(1, self.layers)

    def metrics(
        self, seconds: Spread, target_tokens: int, *, recomputed_layers: int | None = None, repeats_known: bool = True
    ) -> dict[str, Value]:
        """repeats_known: False leaves `hardware_rate` out, of systems that do not say what they compute twice."""
        found: dict[str, Value] = {
            "seconds_per_step": (seconds, "s"),
            "target_tokens_per_second": (seconds.rates(target_tokens), "1/s"),
            "model_rate": (seconds.rates(self.flops.model / 1e12), "TFLOP/s"),
        }
        if repeats_known:
            found["hardware_rate"] = (seconds.rates(self.hardware_flops(recomputed_layers) / 1e12), "TFLOP/s")
        return found


def count_step(model: Model, lengths: Sequence[int]) -> StepWork:
    """Of sequences of one length."""
    workload = build_workload(config_of(model), precision="bf16", seq_len=lengths[0])
    layers = {u.index for u in workload.units if ".layers." in u.name}
    return StepWork(
        workload.parameters,
        workload.active_parameters,
        len(layers),
        flops_of_units([(u.flops, u.index in layers) for u in workload.units], lengths),
        flops_of_units([(u.flops, False) for u in workload.units], lengths),
    )
