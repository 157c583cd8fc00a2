"""Pairs of answers as a model is given them: a chosen row, then the rejected one, pair by pair."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain.data.batches import _order
from megatrain.data.examples import NO_TARGET, PreferenceExamples
from megatrain.data.padded import PADDING

REFERENCE = "reference_log_probabilities"  # as megatrain.losses has it
Reference = NDArray[np.float32]  # [pairs, 2]: log-probabilities of the chosen and the rejected answer


class PairBatches:
    """The micro-batches of every optimizer step over `pairs`: rows 0, 2, ... are chosen, the one behind each rejected.

    Step s takes the pairs s*n to (s+1)*n - 1 of an endless row of epochs, n = pairs_per_step; with `shuffle` each epoch
    is in an order of its own, drawn from seed and epoch. Nothing is remembered between steps, so that training can
    begin at any of them. `reference` goes with each row, under the name that `losses.DPO` knows.
    """

    def __init__(
        self,
        pairs: PreferenceExamples,
        reference: Reference,
        *,
        micro_batch: int,
        pairs_per_step: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        self._pairs, self._reference = pairs, torch.from_numpy(reference)
        self._micro_batch, self._pairs_per_step = micro_batch, pairs_per_step
        self._shuffle, self._seed = shuffle, seed

    def of_step(self, step: int) -> list[dict[str, Tensor]]:
        """input_ids, labels and what the loss needs of a step, from 0; so many pairs each as there are in a
        micro-batch, two rows to a pair."""
        first = step * self._pairs_per_step
        chosen = [self._pair(position) for position in range(first, first + self._pairs_per_step)]
        batches = []
        for start in range(0, len(chosen), self._micro_batch):
            several = chosen[start : start + self._micro_batch]
            batches.append({**pair_rows(self._pairs, several), REFERENCE: self._reference[several].flatten()})
        return batches

    def _pair(self, position: int) -> int:
        epoch, place = divmod(position, len(self._pairs))
        return int(_order(len(self._pairs), self._seed, epoch)[place]) if self._shuffle else place


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
