"""Held-out pairs of answers, measured by the loss that is trained on."""

import dataclasses
import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from megatrain.data.examples import Examples, PreferenceExamples
from megatrain.data.pairs import REFERENCE, Reference, pair_rows
from megatrain.losses import TokenLoss
from megatrain.train.evaluate import Batch, EvalSet
from megatrain.train.reference import pairs_sha256


def first_pairs(pairs: PreferenceExamples, max_tokens: int | None) -> PreferenceExamples:
    """Those of the first `max_tokens`, of both answers together: one pair at least, all where that is None."""
    if max_tokens is None:
        return pairs
    ends = np.cumsum(pairs.chosen.lengths + pairs.rejected.lengths)
    count = max(1, int(np.searchsorted(ends, max_tokens, side="right")))
    return PreferenceExamples(_first(pairs.chosen, count), _first(pairs.rejected, count))


def _first(examples: Examples, count: int) -> Examples:
    end = int(examples.offsets[count])
    return dataclasses.replace(
        examples, tokens=examples.tokens[:end], targets=examples.targets[:end], offsets=examples.offsets[: count + 1]
    )


def pair_set(pairs: PreferenceExamples, reference: Reference, loss: TokenLoss, micro_batch: int) -> EvalSet:
    """Every pair once. Losses with other settings are not compared."""
    digest = hashlib.sha256(f"{pairs_sha256(pairs)} {loss!r}".encode()).hexdigest()
    return EvalSet(partial(_batches, pairs, reference, micro_batch), None, digest, loss)


def _batches(pairs: PreferenceExamples, reference: Reference, micro_batch: int) -> Iterator[Batch]:
    for first in range(0, len(pairs), micro_batch):
        several = range(first, min(first + micro_batch, len(pairs)))
        yield {**pair_rows(pairs, several), REFERENCE: torch.from_numpy(reference[several]).flatten()}
