"""What a run enters in its ledger."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatrain.config import Config, to_yaml
from megatrain.data.batches import batch_sha256
from megatrain.train.evaluate import Evaluation
from megatrain.train.metrics import StepStats
from megatrain.train.resume import Resumed
from megatrain.train.run_folder import RunFolder
from megatrain.trust.hashing import FileRecord, hash_files, list_content
from megatrain.trust.ledger import LedgerWriter, head_recorded, number

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine


def describe_engine(engine: "Engine") -> dict[str, Any]:
    """What settings leave open and bits depend on."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "device": engine.device.name,
        "kernels": str(engine.kernels),
        "precision": engine.precision,
        "threads": torch.get_num_threads(),
    }


def step_fields(batches: Sequence[Mapping[str, Tensor]], lr: float, stats: StepStats) -> dict[str, Any]:
    """What is recorded of a step beside its number, to the last bit."""
    return {
        "batch_sha256": batch_sha256(batches),
        "grad_norm": number(stats.grad_norm),
        "loss": number(float("nan") if stats.loss is None else stats.loss),
        "lr": number(lr),
        "target_tokens": stats.target_tokens,
    }


def begin_ledger(
    folder: RunFolder, config: Config, engine: "Engine", facts: Mapping[str, Any], resumed: Resumed | None
) -> LedgerWriter:
    """Begun, or gone on with. Raises ConfigError where the one that is there is not that of the checkpoint."""
    own = resumed is not None and resumed.folder.resolve().parent == folder.checkpoints.resolve()
    ledger = LedgerWriter(folder.ledger, head_recorded(resumed.manifest.facts) if own and resumed is not None else None)
    settings = {"config": to_yaml(config), "engine": describe_engine(engine), "facts": facts}
    if resumed is None:
        ledger.append("start", **settings, units=engine.unit_hashes())
    else:
        checkpoint, digest = str(resumed.folder.resolve()), resumed.manifest.sha256
        ledger.append("resume", **settings, step=resumed.step, checkpoint=checkpoint, manifest_sha256=digest)
    return ledger


def record_step(
    ledger: LedgerWriter, step: int, batches: Sequence[Mapping[str, Tensor]], lr: float, stats: StepStats
) -> None:
    ledger.append("step", step=step, **step_fields(batches, lr, stats))


def record_evaluation(ledger: LedgerWriter, step: int, results: Mapping[str, Evaluation]) -> None:
    """What was found, to the last bit; nothing that is audited depends on it."""
    found = {n: {"loss": number(one.loss), "target_tokens": one.target_tokens} for n, one in results.items()}
    ledger.append("evaluation", step=step, results=found)


def end_ledger(ledger: LedgerWriter, folder: RunFolder, engine: "Engine", steps: int, *, saved: bool) -> None:
    """`saved`: the model is in the run's folder."""
    names = list_content(folder.model).files if saved else ()
    hashed = hash_files(folder.model / name for name in names)
    records = {name: hashed[folder.model / name] for name in names}
    files = {name: record.sha256 for name, record in records.items() if isinstance(record, FileRecord)}
    ledger.append("end", step=steps, files=files, units=engine.unit_hashes())
    with contextlib.suppress(OSError):  # what it is an account of is on disk
        ledger.sync()
