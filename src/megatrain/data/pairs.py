"""Pairs of answers as a model is given them: a chosen row, then the rejected one, pair by pair."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain.data.examples import NO_TARGET, PreferenceExamples, numbers_in
from megatrain.data.rows import PADDING, Place, examples_at

REFERENCE = "reference_log_probabilities"  # as megatrain.losses has it
Reference = NDArray[np.float32]  # [pairs, 2]: log-probabilities of the chosen and the rejected answer


class PairRows:
    """A pair to a row of the epoch, of which a model is given two: rows 0, 2, ... of a batch are chosen, the one behind
    each rejected. `reference` goes with each of them, under the name that `losses.DPO` knows."""

    def __init__(self, pairs: PreferenceExamples, reference: Reference, *, shuffle: bool, seed: int) -> None:
        self.count, self.tokens = epoch_of(pairs)
        self.kind = f"{self.count:,} pairs of answers"
        self._pairs, self._reference = pairs, torch.from_numpy(reference)
        self._shuffle, self._seed = shuffle, seed

    def batch(self, places: Sequence[Place]) -> dict[str, Tensor]:
        several = examples_at(self._pairs.chosen, places, self.count, shuffle=self._shuffle, seed=self._seed)
        return {**pair_rows(self._pairs, several), REFERENCE: self._reference[several].flatten()}


def epoch_of(pairs: PreferenceExamples) -> tuple[int, int]:
    """(pairs, tokens) of an epoch, the first."""
    numbers = numbers_in(pairs.chosen, 0)
    return len(numbers), int((pairs.chosen.lengths[numbers] + pairs.rejected.lengths[numbers]).sum())


def pair_rows(pairs: PreferenceExamples, several: Sequence[int]) -> dict[str, Tensor]:
    """input_ids and labels, int64 [2 * pairs, tokens], padded on the right to the longest, and where rows differ in
    length an attention_mask."""
    rows = [(side, number) for number in several for side in (pairs.chosen, pairs.rejected)]
    tokens = [side.tokens_of(number) for side, number in rows]
    lengths = np.array([len(row) for row in tokens])
    ids = np.full((len(rows), lengths.max()), PADDING, np.int64)
    labels = np.full_like(ids, NO_TARGET)
    for row, (side, number) in enumerate(rows):
        ids[row, : lengths[row]] = tokens[row]
        labels[row, : lengths[row]] = side.labels_of(number)
    found = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    if lengths.min() < lengths.max():
        found["attention_mask"] = torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))
    return found


def by_length(pairs: PreferenceExamples) -> NDArray[np.int64]:
    """All pairs, the longest first, so that those that pass the model together need little padding and what does not
    fit is known at once."""
    return np.argsort(-np.maximum(pairs.chosen.lengths, pairs.rejected.lengths), kind="stable")
