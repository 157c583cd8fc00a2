"""Which sequences a step trains on: a pure function of the seed and the step's number."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain.data.packing import Tokens


class StepBatches:
    """The micro-batches of every optimizer step over `sequences`, [count, seq_len].

    Step s takes the sequences s*n to (s+1)*n - 1 of an endless row of epochs, n = sequences_per_step; with
    `shuffle` each epoch is in an order of its own, drawn from seed and epoch, else in the text's. Nothing is
    remembered between steps, so that training can begin at any of them.
    """

    def __init__(
        self, sequences: Tokens, *, micro_batch: int, sequences_per_step: int, shuffle: bool, seed: int
    ) -> None:
        self.sequences = sequences
        self.micro_batch = micro_batch
        self.sequences_per_step = sequences_per_step
        self.shuffle = shuffle
        self.seed = seed

    def of_step(self, step: int) -> list[dict[str, Tensor]]:
        """input_ids and labels (equal: models shift them) of a step, from 0; int64 [micro_batch, seq_len]."""
        first = step * self.sequences_per_step
        rows = [self._row(position) for position in range(first, first + self.sequences_per_step)]
        batches = []
        for start in range(0, len(rows), self.micro_batch):
            ids = torch.from_numpy(self.sequences[rows[start : start + self.micro_batch]].astype(np.int64))
            batches.append({"input_ids": ids, "labels": ids.clone()})
        return batches

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self.sequences))
        return int(_order(len(self.sequences), self.seed, epoch)[place]) if self.shuffle else place


@lru_cache(maxsize=2)  # a step may span two epochs
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def batch_sha256(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Of all that a step is given: row by row, each tensor's name, dtype, shape and bytes. Into how many micro-batches
    the rows are cut makes no difference."""
    digest = hashlib.sha256()
    for batch in batches:
        for row in range(max((len(tensor) for tensor in batch.values() if tensor.ndim), default=1)):
            for name, tensor in sorted(batch.items()):
                if tensor.ndim and row >= len(tensor):
                    continue  # of images there are more or fewer than rows
                part = (tensor[row] if tensor.ndim else tensor).detach().to("cpu").contiguous()
                digest.update(f"{name} {part.dtype} {list(part.shape)}\n".encode())
                digest.update(part.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
