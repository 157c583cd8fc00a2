"""metrics.jsonl: one line per logged step, on disk as soon as it is written."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self


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
    def device_peak_bytes(self) -> int: ...
    @property
    def host_peak_bytes(self) -> int: ...


def metrics_line(step: int, lr: float, stats: StepStats) -> dict[str, Any]:
    """A line's fields: `step` counts from 1, loss is in nats per target token, times are in seconds."""
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
        "device_peak_bytes": stats.device_peak_bytes,
        "host_peak_bytes": stats.host_peak_bytes,
    }


class MetricsFile:
    """Appends lines to `path`; each is flushed, so that a run that is killed keeps all of them."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. A value that is not finite becomes null: JSON has no infinity."""
        finite = {name: _finite(value) for name, value in line.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value - value != 0.0 else value
