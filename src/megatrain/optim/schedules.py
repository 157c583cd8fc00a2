"""Learning rates: pure functions of the step."""

import math

WSD_DECAY_SHARE = 0.2  # of all steps, at the end


def learning_rate(
    step: int, *, peak: float, name: str, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
) -> float:
    """The learning rate of step `step`, from 0, of `total_steps`.

    During warm-up it rises linearly and reaches `peak` in the last warm-up step. Then the shape `name` runs:
    constant; linear or cosine from `peak` down to `peak * min_ratio`, which the step after the last would
    have; or wsd, constant and then linear over the last fifth of all steps. Raises ValueError for others.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = _progress(step, warmup_steps, total_steps)
    if name == "constant":
        share = 1.0
    elif name == "linear":
        share = 1.0 - done
    elif name == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * done))
    elif name == "wsd":
        decay_start = max(warmup_steps, total_steps - math.ceil(total_steps * WSD_DECAY_SHARE))
        share = 1.0 - _progress(step, decay_start, total_steps)
    else:
        raise ValueError(f"{name!r} is no schedule; expected constant, linear, cosine or wsd")
    return peak * (min_ratio + (1.0 - min_ratio) * share)


def _progress(step: int, start: int, total_steps: int) -> float:
    """0 up to step `start`, then rising evenly to 1 at `total_steps`."""
    return min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
