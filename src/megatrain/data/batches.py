"""Which rows a step trains on: a pure function of the seed and the step's number."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatrain.data.examples import NO_TARGET
from megatrain.data.rows import PADDING, PackedRows, Place, Rows


class StepBatches:
    """The micro-batches of every optimizer step over `rows`.

    Step s takes the rows s*n to (s+1)*n - 1 of an endless row of epochs, n = rows_per_step. Nothing is remembered
    between steps, so that training can begin at any of them.
    """

    def __init__(self, rows: Rows, *, micro_batch: int, rows_per_step: int) -> None:
        self.rows = rows
        self.micro_batch = micro_batch
        self.rows_per_step = rows_per_step

    def of_step(self, step: int) -> list[dict[str, Tensor]]:
        """What the model is given in a step, from 0: of `micro_batch` rows each."""
        first = step * self.rows_per_step
        places = [self._place(position) for position in range(first, first + self.rows_per_step)]
        return [
            self.rows.batch(places[start : start + self.micro_batch])
            for start in range(0, len(places), self.micro_batch)
        ]

    def _place(self, position: int) -> Place:
        return self.rows.place(position) if isinstance(self.rows, PackedRows) else divmod(position, self.rows.count)


def batch_sha256(batches: Sequence[Mapping[str, Tensor]]) -> str:
    """Of all that a step is given: row by row, each tensor's name, dtype, shape and bytes. Into how many micro-batches
    the rows are cut makes no difference, nor how far they are padded for that."""
    digest = hashlib.sha256()
    for batch in batches:
        for row in range(max((len(tensor) for tensor in batch.values() if tensor.ndim), default=1)):
            there = {name: tensor for name, tensor in sorted(batch.items()) if not tensor.ndim or row < len(tensor)}
            parts = {
                name: (tensor[row] if tensor.ndim else tensor) for name, tensor in there.items()
            }  # images: any number
            for name, part in _without_padding(parts).items():
                part = part.detach().to("cpu").contiguous()
                digest.update(f"{name} {part.dtype} {list(part.shape)}\n".encode())
                digest.update(part.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_padding(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of one row, what has an element for each token up to the last that is no padding. A mask that leaves out padding
    alone says no more, and would not be there if the row were by itself."""
    ids, labels, mask = (row.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if ids is None or labels is None or ids.ndim != 1 or labels.shape != ids.shape:
        return dict(row)
    kept = torch.nonzero((ids != PADDING) | (labels != NO_TARGET))
    length = int(kept[-1]) + 1 if len(kept) else 0
    says_more = mask is not None and (mask.shape != ids.shape or not bool(mask[:length].all()))
    parts = {name: part for name, part in row.items() if name != "attention_mask" or says_more}
    return {name: part[:length] if part.shape == ids.shape else part for name, part in parts.items()}
