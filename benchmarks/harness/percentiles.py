"""What is reported of repeated measurements."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Spread:
    """A fifth of the measurements lies below `p20`, a fifth above `p80`; `p50` is the median."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Between two measurements by linear interpolation."""
        p20, p50, p80 = np.quantile([*values], (0.2, 0.5, 0.8))
        return cls(float(p20), float(p50), float(p80))

    def rates(self, amount: float) -> "Spread":
        """Of seconds, the rates at which `amount` was done: the slow fifth of times is the low fifth of rates."""
        return Spread(amount / self.p80, amount / self.p50, amount / self.p20)
