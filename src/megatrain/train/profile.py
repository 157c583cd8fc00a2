"""`--profile N`: some steps of a run as a timeline."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from megatrain.train.metrics import StepStats

if TYPE_CHECKING:
    from megatrain.train.method import UnderLoss

_log = logging.getLogger(__name__)
_FIRST_STEP = 2  # from 0: the first ones record the order of units and measure what graphs hold


class ProfiledEngine:
    """The engine, with a trace of `count` steps written to `path` (for ui.perfetto.dev) when they are done.

    The third step is the first, or an earlier one where there are not so many (`total_steps`).
    """

    def __init__(self, engine: "UnderLoss", count: int, total_steps: int, path: Path) -> None:
        self._engine = engine
        self._first = max(0, min(_FIRST_STEP, total_steps - count))
        self._last = min(self._first + count, total_steps) - 1
        self.path = path
        self._step = 0
        self.written = False

    def train_step(self, batches: Sequence[dict[str, Tensor]], lr: float | None = None) -> StepStats:
        if self._step == self._first:
            self._engine.start_trace()
        stats = self._engine.train_step(batches, lr=lr)
        if self._step == self._last:
            self.finish()
        self._step += 1
        return stats

    def finish(self) -> None:
        """Write what there is: the run may end before the last step of the profile. No run fails for want of it."""
        if self._engine.device.trace is None:
            return
        try:
            self._engine.write_trace(self.path)
            self.written = True
        except OSError as error:
            _log.warning("output: cannot write %r: %s", str(self.path), error.strerror)
