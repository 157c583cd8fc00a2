"""metrics.jsonl: one line per logged step, on disk as soon as it is written."""

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from megatrain.errors import ConfigError
from megatrain.private_files import private

_log = logging.getLogger(__name__)


class StepStats(Protocol):
    """What the loop reads of the engine's account of a step."""

    @property
    def loss(self) -> float | None: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def target_tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def h2d_bytes(self) -> int: ...
    @property
    def d2h_bytes(self) -> int: ...
    @property
    def optimizer_exposed_seconds(self) -> float: ...
    @property
    def weights_exposed_seconds(self) -> float: ...
    @property
    def inputs_exposed_seconds(self) -> float: ...
    @property
    def gradients_exposed_seconds(self) -> float: ...
    @property
    def device_peak_bytes(self) -> int: ...
    @property
    def host_peak_bytes(self) -> int: ...
    @property
    def loss_values(self) -> Mapping[str, float]: ...


def metrics_line(step: int, lr: float, stats: StepStats) -> dict[str, Any]:
    """A line's fields: `step` counts from 1, loss is in nats per target token (or as the loss has it, which adds what
    it reports by its own names), times are in seconds."""
    return {
        "step": step,
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "lr": lr,
        "target_tokens": stats.target_tokens,
        "seconds": stats.seconds,
        "tokens_per_second": stats.target_tokens / stats.seconds if stats.seconds > 0 else 0.0,
        "h2d_bytes": stats.h2d_bytes,
        "d2h_bytes": stats.d2h_bytes,
        "optimizer_exposed_seconds": stats.optimizer_exposed_seconds,
        "weights_exposed_seconds": stats.weights_exposed_seconds,
        "inputs_exposed_seconds": stats.inputs_exposed_seconds,
        "gradients_exposed_seconds": stats.gradients_exposed_seconds,
        "device_peak_bytes": stats.device_peak_bytes,
        "host_peak_bytes": stats.host_peak_bytes,
        **stats.loss_values,
    }


class MetricsFile:
    """Appends lines to `path`; each is written at once, so that a run that is killed keeps all of them.

    A line that cannot be written (a full disk) is left out, and the first one is said: training, which may have taken
    days, is worth more than an account of it. `lost` counts them. Raises ConfigError where the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.lost = 0
        self._path = path
        try:
            self._file = open(path, "ab", buffering=0, opener=private)  # noqa: SIM115 (for as long as this object)
        except OSError as error:
            raise ConfigError(f"output: cannot write to {str(path)!r}: {error.strerror}") from None

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. A value that is not finite becomes null: JSON has no infinity."""
        finite = {name: _finite(value) for name, value in line.items()}
        try:
            self._append((json.dumps(finite, allow_nan=False) + "\n").encode())
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                reason = f"{error.strerror}; training goes on without its lines until they can be written"
                _log.warning("output: cannot write to %r: %s", str(self._path), reason)

    def _append(self, data: bytes) -> None:
        """All of `data` or nothing."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value - value != 0.0 else value
