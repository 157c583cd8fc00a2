"""Everything that a run's folder holds of what happened, read so that no damaged file hides the others."""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from megatrain.checkpoint.folders import list_checkpoints, step_of
from megatrain.config import Config, parse_config
from megatrain.errors import ConfigError, IntegrityError, MegaTrainError
from megatrain.report.metrics import Metrics, read_metrics
from megatrain.trust.ledger import LEDGER_NAME, Entry, History, Ledger, read_ledger
from megatrain.trust.manifest import Manifest, read_manifest
from megatrain.yaml_file import read_yaml

_MOST_JSON_BYTES = 256 << 20
_MOST_SAMPLE_LINES = 10_000
_Read = TypeVar("_Read")


@dataclass
class Checkpoint:
    name: str
    step: int
    manifest: Manifest | None
    """None where it cannot be read."""

    @property
    def bytes(self) -> int | None:
        return None if self.manifest is None else sum(record.bytes for record in self.manifest.files.values())


@dataclass
class Run:
    """`notes`: what of it could not be read, one line each. `at_step`: as it was then; None: as it is."""

    name: str
    metrics: Metrics
    config_text: str | None = None
    config: Config | None = None
    plan: dict[str, Any] | None = None
    trace: list[dict[str, Any]] | None = None
    ledger: Ledger | None = None
    checkpoints: list[Checkpoint] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    at_step: int | None = None

    @cached_property
    def history(self) -> History | None:
        return None if self.ledger is None else History(self.ledger.entries)

    @property
    def settings(self) -> Entry | None:
        """The ledger's last `start` or `resume`: settings, data, code and machine as they were then."""
        history = self.history
        return history.beginnings[-1][1] if history is not None and history.beginnings else None

    @property
    def had_enough(self) -> bool:
        """Ended by an evaluation that saw no improvement any more."""
        evaluations = self.metrics.evaluations
        return bool(evaluations) and evaluations[-1].get("enough") is True

    @property
    def total_steps(self) -> int | None:
        """That were meant to be done; None where nothing that can be read says so."""
        planned = None if self.config is None else self.config.planned_steps
        told = (self.plan or {}).get("total_steps")  # by the data
        return told if planned is None and type(told) is int and told > 0 else planned

    @property
    def last_step(self) -> int:
        """That was done, also where metrics.jsonl has no line of it."""
        if self.at_step is not None:
            return self.at_step
        return max(self.metrics.last_step, 0 if self.history is None else self.history.last_step)

    @property
    def loss_unit(self) -> str:
        """What the loss that was trained on is a mean over."""
        if self.config is not None and self.config.train.method == "dpo":
            return "per pair of answers"
        return "nats per target token"

    def up_to(self, step: int) -> "Run":
        """The run as it was after that step."""
        return dataclasses.replace(
            self, name=f"{self.name}, step {step:,}", metrics=self.metrics.up_to(step), at_step=step
        )


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Raises ConfigError where `folder` holds no run."""
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise ConfigError(f"{str(folder)!r} is no folder; expected a run's folder")
    known = [name for name in ("config.yaml", "metrics.jsonl", LEDGER_NAME) if (root / name).is_file()]
    if not known:
        raise ConfigError(f"{str(folder)!r} holds no config.yaml, metrics.jsonl or {LEDGER_NAME}; expected a run's")
    notes: list[str] = []
    run = Run(root.resolve().name, Metrics(), notes=notes)
    run.metrics = _try(notes, "metrics.jsonl", lambda: read_metrics(root / "metrics.jsonl")) or Metrics()
    run.config_text = _try(notes, "config.yaml", lambda: _text(root / "config.yaml"))
    if run.config_text is not None:
        run.config = _try(notes, "config.yaml", lambda: _config(root / "config.yaml"))
    run.plan = _try(notes, "plan.json", lambda: _object(root / "plan.json"))
    run.trace = _try(notes, "trace.json", lambda: _events(root / "trace.json"))
    if os.path.lexists(root / LEDGER_NAME):
        run.ledger = _try(notes, LEDGER_NAME, lambda: read_ledger(root / LEDGER_NAME))
    for path in list_checkpoints(root / "checkpoints"):
        manifest = _try(notes, f"checkpoints/{path.name}", lambda path=path: read_manifest(path))  # type: ignore[misc]
        run.checkpoints.append(Checkpoint(path.name, step_of(path) or 0, manifest))
    run.samples = _try(notes, "samples.jsonl", lambda: _samples(root / "samples.jsonl")) or []
    return run


def _try(notes: list[str], name: str, read: Callable[[], _Read]) -> _Read | None:
    """None where there is no such file, and with a note where it cannot be read."""
    try:
        return read()
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.append(f"{name} cannot be read: {error.strerror}")
    except (MegaTrainError, IntegrityError) as error:
        notes.append(f"{name}: {error}")
    except (ValueError, RecursionError) as error:
        notes.append(f"{name} is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _config(path: Path) -> Config:
    return parse_config(read_yaml(path), for_training=False)


def _json(path: Path) -> Any:
    if path.stat().st_size > _MOST_JSON_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes")
    return json.loads(path.read_bytes())


def _object(path: Path) -> dict[str, Any]:
    content = _json(path)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _events(path: Path) -> list[dict[str, Any]]:
    events = _object(path).get("traceEvents")
    if not isinstance(events, list):
        raise ValueError("it holds no traceEvents")
    return [event for event in events if isinstance(event, dict)]


def _samples(path: Path) -> list[dict[str, Any]]:
    """Those that can be read, the last ones."""
    found: list[dict[str, Any]] = []
    with open(path, "rb") as stream:
        for raw in stream:
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                found.append(line)
    return found[-_MOST_SAMPLE_LINES:]
