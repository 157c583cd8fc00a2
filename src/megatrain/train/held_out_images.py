"""What is measured on held-out rows with images: decoded anew each time, as for a step of training."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from megatrain.data.images import ImageRows
from megatrain.train.evaluate import Batch, EvalSet


def image_set(rows: ImageRows, micro_batch: int, max_tokens: int | None) -> EvalSet:
    """The first examples of as many tokens (all where that is None), one at least, each whole. Where all text is
    learned, the marks of images in it are not, so what is learned has no length in bytes."""
    ends = np.cumsum([example.tokens for example in rows.examples])
    count = len(ends) if max_tokens is None else max(1, int(np.searchsorted(ends, max_tokens, side="right")))
    whole = count == len(ends) and not rows.learns_everything
    utf8_bytes = sum(example.learned_bytes for example in rows.examples) if whole else None
    return EvalSet(partial(_batches, rows, count, micro_batch), utf8_bytes, rows.sha256(count))


def _batches(rows: ImageRows, count: int, micro_batch: int) -> Iterator[Batch]:
    for first in range(0, count, micro_batch):
        yield rows.in_order(first, min(first + micro_batch, count))
