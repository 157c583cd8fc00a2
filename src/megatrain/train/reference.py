"""Log-probabilities of all answers under the weights that training begins with, which preference losses refer to.

They are found once, before the first step, so that no second model is needed. Checkpoints hold them, since later
weights cannot tell them any more, and what they are is part of a run's facts.
"""

import hashlib
import io
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatrain.data.examples import PreferenceExamples
from megatrain.data.pairs import Reference, by_length, pair_rows
from megatrain.errors import ConfigError

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine

FILES = {"data.train": "reference.npy", "data.eval": "reference-eval.npy"}
FACTS = {"data.train": "reference", "data.eval": "reference_eval"}
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Scored:
    """Pairs and what the first weights make of them. `key`: data.train or data.eval."""

    key: str
    pairs: PreferenceExamples
    reference: Reference

    @property
    def files(self) -> dict[str, bytes]:
        """What each checkpoint holds of it."""
        return {FILES[self.key]: to_bytes(self.reference)}

    @property
    def facts(self) -> dict[str, Any]:
        """What the facts of a run say of it."""
        digest = hashlib.sha256(to_bytes(self.reference)).hexdigest()
        return {FACTS[self.key]: {"pairs": len(self.pairs), "of": pairs_sha256(self.pairs), "sha256": digest}}


def score(
    engine: "Engine",
    key: str,
    pairs: PreferenceExamples,
    micro_batch: int,
    checkpoint: Path | None,
    facts: Mapping[str, Any],
) -> Scored:
    """As the checkpoint holds it that the run goes on from (`facts`: its manifest's), else by the engine's weights,
    which are then the first ones. Raises ConfigError where the checkpoint has none, or of other pairs."""
    if checkpoint is not None:
        return Scored(key, pairs, read_reference(checkpoint, key, facts, pairs))
    return Scored(key, pairs, score_pairs(engine, pairs, micro_batch))


def pairs_sha256(pairs: PreferenceExamples) -> str:
    """Of their tokens and targets."""
    digest = hashlib.sha256()
    for side in (pairs.chosen, pairs.rejected):
        for part in (side.tokens, side.targets, side.offsets):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


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


def read_reference(checkpoint: Path, key: str, facts: Mapping[str, Any], pairs: PreferenceExamples) -> Reference:
    """That of a checkpoint whose manifest says `facts`. Raises ConfigError where it has none, or not of these pairs."""
    path = checkpoint / FILES[key]
    recorded = facts.get(FACTS[key])
    ways_out = ["give model.path " + repr(str(checkpoint)) + " for a new run"]
    if key == "data.eval":
        ways_out.append("or go on without data.eval")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {str(path)!r}: {error.strerror}; it holds what the first weights of the run have made of "
            f"{key}, which no later ones can tell; {', '.join(ways_out)}"
        ) from None
    if not isinstance(recorded, Mapping) or hashlib.sha256(content).hexdigest() != recorded.get("sha256"):
        raise ConfigError(f"{str(path)!r} is not what the run has recorded")
    if recorded.get("of") != pairs_sha256(pairs):
        raise ConfigError(
            f"{str(path)!r} is of other pairs than {key} makes now: its rows or how they become tokens has changed, "
            "and what the first weights made of these no later ones can tell; "
            f"give {key} as it was, {', '.join(ways_out)}"
        )
    try:
        found = np.load(io.BytesIO(content))
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(f"{str(path)!r} is no file of numpy's: {error}") from None
    if not isinstance(found, np.ndarray) or found.dtype != np.dtype("<f4") or found.shape != (len(pairs), 2):
        shape = list(getattr(found, "shape", ()))
        raise ConfigError(f"{str(path)!r} holds numbers of shape {shape}, and {key} makes {len(pairs)} pairs")
    return found
