"""Log-probabilities of all answers under the weights that training begins with, which preference losses refer to.

They are found once, before the first step, so that no second model is needed. Checkpoints hold them, since later
weights cannot tell them any more, and what they are is part of a run's facts.
"""

import hashlib
import io
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatrain.data.examples import PreferenceExamples
from megatrain.data.pairs import Reference, by_length, pair_rows
from megatrain.errors import ConfigError

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine

REFERENCE_NAME = "reference.npy"
_SECONDS_BETWEEN_LINES = 10.0


def reference_of(
    engine: "Engine", examples: object, micro_batch: int, checkpoint: Path | None, facts: Mapping[str, Any]
) -> Reference | None:
    """For pairs: from the checkpoint that the run goes on from (`facts`: its manifest's), else by the engine's weights,
    which are then the first ones. None for other examples."""
    if not isinstance(examples, PreferenceExamples):
        return None
    if checkpoint is not None:
        return read_reference(checkpoint, facts, len(examples))
    return score_pairs(engine, examples, micro_batch)


def score_pairs(engine: "Engine", pairs: PreferenceExamples, micro_batch: int) -> Reference:
    """By the engine's weights as they are, without dropout."""
    training, found = engine.model.training, np.empty((len(pairs), 2), np.float32)
    order, said = by_length(pairs), time.monotonic()
    engine.model.eval()
    try:
        for start in range(0, len(order), micro_batch):
            several = order[start : start + micro_batch].tolist()
            sums = engine.log_probabilities(pair_rows(pairs, several)).sum(-1)
            found[several] = sums.cpu().view(-1, 2).numpy()
            if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"scored {start + len(several):,} of {len(order):,} pairs", file=sys.stderr, flush=True)
    finally:
        engine.model.train(training)
    return found


def to_bytes(reference: Reference) -> bytes:
    """As a file of numpy's."""
    stream = io.BytesIO()
    np.save(stream, reference.astype("<f4"))
    return stream.getvalue()


def facts_of(reference: Reference | None) -> dict[str, Any]:
    """What the facts of a run say of it."""
    if reference is None:
        return {}
    return {"reference": {"pairs": len(reference), "sha256": hashlib.sha256(to_bytes(reference)).hexdigest()}}


def files_of(reference: Reference | None) -> dict[str, bytes]:
    """What each checkpoint holds of it."""
    return {} if reference is None else {REFERENCE_NAME: to_bytes(reference)}


def read_reference(checkpoint: Path, facts: Mapping[str, Any], pairs: int) -> Reference:
    """That of a checkpoint whose manifest says `facts`. Raises ConfigError where it has none, or not of these pairs."""
    path = checkpoint / REFERENCE_NAME
    recorded = facts.get("reference")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {str(path)!r}: {error.strerror}; it holds what the first weights of the run have made of "
            f"data.train, which no later ones can tell. Give model.path {str(checkpoint)!r} for a new run"
        ) from None
    if not isinstance(recorded, Mapping) or hashlib.sha256(content).hexdigest() != recorded.get("sha256"):
        raise ConfigError(f"{str(path)!r} is not what the run has recorded")
    try:
        found = np.load(io.BytesIO(content))
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(f"{str(path)!r} is no file of numpy's: {error}") from None
    if not isinstance(found, np.ndarray) or found.dtype != np.dtype("<f4") or found.shape != (pairs, 2):
        shape = list(getattr(found, "shape", ()))
        raise ConfigError(
            f"{str(path)!r} holds numbers of shape {shape}, and data.train makes {pairs} pairs: its rows or"
            " how they become tokens has changed"
        )
    return found
