"""Which models and sizes of step there is time and memory for."""

from collections.abc import Sequence
from dataclasses import dataclass

from harness.models import Model, planned_bytes

from megatrain.planner.flops import Shape, step_flops
from megatrain.sizes import format_bytes

MICRO_BATCH_TOKENS = 8 * 1024
WARM_UP_STEPS = 2  # the first records the order of units, the second allocates for the schedule made of it
_MARGIN_BYTES = 3 * 10**9  # of host memory, for libraries and what a step allocates besides its plan
ASSUMED_SHARE = 0.4  # of the matmul peak, until the first case has been timed
_SETUP_BYTES_PER_SECOND = 1.2e9  # of state: allocating, zeroing, page-locking


@dataclass(frozen=True, slots=True)
class Case:
    """One model at one size of step."""

    model: str
    seq_len: int
    tokens: int

    @property
    def label(self) -> str:
        return f"{self.model}, {_thousands(self.seq_len)} x {self.tokens // self.seq_len}"

    @property
    def lengths(self) -> list[int]:
        return [self.seq_len] * (self.tokens // self.seq_len)


def _thousands(number: int) -> str:
    return f"{number // 1024}k" if number % 1024 == 0 else str(number)


def choose_cases(
    cases: Sequence[Case], seconds: dict[Case, float], setup_seconds: dict[str, float], available: float
) -> tuple[list[Case], list[Case]]:
    """(cases that fit into `available` seconds in their order, those dropped): the longest go first, and with the last
    case of a model its setup."""
    kept, dropped = list(cases), []
    while kept and _total(kept, seconds, setup_seconds) > available:
        longest = max(kept, key=lambda case: seconds[case])
        kept.remove(longest)
        dropped.append(longest)
    return kept, dropped


def _total(cases: Sequence[Case], seconds: dict[Case, float], setup_seconds: dict[str, float]) -> float:
    return sum(seconds[c] for c in cases) + sum(setup_seconds[m] for m in {c.model for c in cases})


def choose_scope(plans: dict[str, int], inputs_bytes: int, free_bytes: int) -> tuple[str | None, str]:
    """(clip_scope, why): 'global' if it fits, else 'unit', else None. `plans`: host bytes by scope, without the inputs
    that wait on the host."""
    missing = []
    for scope in ("global", "unit"):
        needed = plans[scope] + inputs_bytes + _MARGIN_BYTES
        if needed <= free_bytes:
            return scope, f"{format_bytes(needed)} of host memory"
        missing.append(f"{format_bytes(needed)} with clip_scope {scope}")
    return None, f"host memory: {format_bytes(free_bytes)} can be had, it needs {' or '.join(missing)}"


def inputs_on_host_bytes(shape: Shape, case: Case) -> int:
    """Of every layer's input in bf16, as PyTorch allocates page-locked memory: a power of two for each tensor."""
    rows = max(1, min(MICRO_BATCH_TOKENS, case.tokens) // case.seq_len)
    one = rows * case.seq_len * shape.hidden * 2
    return shape.layers * (case.tokens // (rows * case.seq_len)) * (1 << (one - 1).bit_length())


class Timing:
    """How long cases will take: at an assumed rate until one has been timed, then at the rate of the last."""

    def __init__(self, peak_tflops: float, known: dict[str, Model], steps: int) -> None:
        self._rate = ASSUMED_SHARE * peak_tflops * 1e12
        self._known = known
        self._steps = WARM_UP_STEPS + steps + 1  # the traced one

    def seconds(self, case: Case) -> float:
        return self._steps * step_flops(self._known[case.model].shape, case.lengths).hardware / self._rate

    def setup_seconds(self, model: str) -> float:
        return planned_bytes(self._known[model])["global"] / _SETUP_BYTES_PER_SECOND

    def learn(self, case: Case, seconds: float) -> None:
        """`seconds` of the whole case, warm-up included."""
        self._rate *= max(0.1, self.seconds(case) / seconds)
