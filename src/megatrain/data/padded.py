"""Examples one to a row, filled up on the right: the plainest batches of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatrain.data.batches import _order
from megatrain.data.examples import NO_TARGET, Examples

PADDING = 0  # the token that fills rows up: what stands after all of an example changes nothing of a causal model


def padded(examples: Examples, rows: Sequence[int]) -> dict[str, Tensor]:
    """input_ids and labels of some examples, int64 [rows, tokens of the longest]."""
    ids = torch.full((len(rows), max(int(examples.offsets[row + 1] - examples.offsets[row]) for row in rows)), PADDING)
    labels = torch.full_like(ids, NO_TARGET)
    for place, row in enumerate(rows):
        tokens = torch.from_numpy(examples.tokens_of(row))
        ids[place, : len(tokens)] = tokens
        labels[place, : len(tokens)] = torch.from_numpy(examples.labels_of(row))
    return {"input_ids": ids, "labels": labels}


class PaddedBatches:
    """As StepBatches, of examples: `sequences_per_step` of them in each step."""

    def __init__(
        self, examples: Examples, *, micro_batch: int, sequences_per_step: int, shuffle: bool, seed: int
    ) -> None:
        self.examples = examples
        self.micro_batch, self.sequences_per_step = micro_batch, sequences_per_step
        self.shuffle, self.seed = shuffle, seed

    def of_step(self, step: int) -> list[dict[str, Tensor]]:
        """The micro-batches of a step, from 0."""
        first = step * self.sequences_per_step
        rows = [self._row(position) for position in range(first, first + self.sequences_per_step)]
        starts = range(0, len(rows), self.micro_batch)
        return [padded(self.examples, rows[start : start + self.micro_batch]) for start in starts]

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self.examples))
        return int(_order(len(self.examples), self.seed, epoch)[place]) if self.shuffle else place
