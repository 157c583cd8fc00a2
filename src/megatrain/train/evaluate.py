"""How well a model predicts text it has not seen."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatrain.data.examples import Examples
from megatrain.data.packing import TokenStream
from megatrain.data.padded import padded
from megatrain.train.interrupt import StopOnInterrupt

_IGNORED = -100


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean over `target_tokens` in nats; `utf8_bytes` the length of the text they encode."""

    loss: float
    target_tokens: int
    utf8_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs per byte of the text, a measure that does not depend on the tokenizer."""
        return self.loss * self.target_tokens / math.log(2) / self.utf8_bytes


def evaluate(
    model: Any,
    stream: TokenStream | Examples,
    *,
    seq_len: int,
    micro_batch: int,
    stop: StopOnInterrupt | None = None,
) -> Evaluation | None:
    """Predict every token of `stream` once, in windows of `seq_len`; nothing is carried over between windows. Of
    examples, every target, each example by itself.

    None where `stop` is requested before the end: the measure of a part would not be that of the whole.
    Windows overlap by one token, so that each token but the first (an end-of-text, which encodes no bytes) is
    a target exactly once: the bits cover all bytes of the text, and its end-of-text tokens too.
    """
    training = model.training
    model.eval()
    nats, targets = 0.0, 0
    try:
        with torch.no_grad():
            for ids, labels in _batches(stream, seq_len, micro_batch):
                if stop is not None and stop.requested:
                    return None
                logits = model(input_ids=ids, use_cache=False).logits
                nats += _summed_loss(logits, labels.to(logits.device))
                targets += int((labels[:, 1:] != _IGNORED).sum())
    finally:
        model.train(training)
    return Evaluation(nats / targets, targets, stream.utf8_bytes)


def _batches(stream: TokenStream | Examples, seq_len: int, micro_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    return _rows(stream, micro_batch) if isinstance(stream, Examples) else _windows(stream, seq_len, micro_batch)


def _windows(stream: TokenStream, seq_len: int, micro_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """input_ids and labels, int64 [micro_batch or fewer, seq_len]; the last window is filled up."""
    starts = range(0, len(stream.tokens) - 1, seq_len - 1)
    for first in range(0, len(starts), micro_batch):
        rows = starts[first : first + micro_batch]
        ids = torch.zeros(len(rows), seq_len, dtype=torch.int64)
        labels = torch.full_like(ids, _IGNORED)
        for row, start in enumerate(rows):
            window = torch.from_numpy(stream.tokens[start : start + seq_len].astype(np.int64))
            ids[row, : len(window)] = window
            labels[row, : len(window)] = window
        yield ids, labels


def _rows(examples: Examples, micro_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """input_ids and labels of each example, filled up to the longest of `micro_batch` examples."""
    for first in range(0, len(examples), micro_batch):
        batch = padded(examples, range(first, min(first + micro_batch, len(examples))))
        yield batch["input_ids"], batch["labels"]


def _summed_loss(logits: Tensor, labels: Tensor) -> float:
    """Cross-entropy in nats, summed over targets; one sequence at a time, to hold fp32 logits of no more."""
    total = 0.0
    for scores, wanted in zip(logits, labels, strict=True):
        total += torch.nn.functional.cross_entropy(
            scores[:-1].float(), wanted[1:], ignore_index=_IGNORED, reduction="sum"
        ).item()
    return total
