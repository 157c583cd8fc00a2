"""How well a model predicts text it has not seen."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatrain.data.examples import Examples
from megatrain.data.packing import TokenStream
from megatrain.data.rows import SeparateRows
from megatrain.engine.targets import count_targets
from megatrain.train.interrupt import StopOnInterrupt

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine

_IGNORED = -100
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean over `target_tokens` in nats; `utf8_bytes` the length of the text they encode (None: they are
    not all of it); `seconds` that measuring took."""

    loss: float
    target_tokens: int
    utf8_bytes: int | None
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs per byte of the text, a measure that does not depend on the tokenizer."""
        if self.utf8_bytes is None:
            return None
        return self.loss * self.target_tokens / math.log(2) / self.utf8_bytes


@dataclass(frozen=True)
class EvalSet:
    """What is measured: `batches` gives its micro-batches, anew each time. `utf8_bytes`: of the texts, None where a
    part of them is left out. `sha256` of the tokens: losses of the same ones can be compared."""

    batches: Callable[[], Iterator[Batch]]
    utf8_bytes: int | None
    sha256: str


def eval_set(
    held_out: TokenStream | Examples, *, seq_len: int, micro_batch: int, max_tokens: int | None = None
) -> EvalSet:
    """Of a text every token, of examples every target, each example by itself; or of the first `max_tokens`."""
    make = _example_set if isinstance(held_out, Examples) else _stream_set
    return make(held_out, seq_len, micro_batch, max_tokens)  # type: ignore[arg-type]


def _stream_set(stream: TokenStream, seq_len: int, micro_batch: int, max_tokens: int | None) -> EvalSet:
    """Every token of `stream` predicted once, in windows of `seq_len`; nothing is carried over between windows.

    Windows overlap by one token, so that each token but the first (an end-of-text, which encodes no bytes) is
    a target exactly once: the bits cover all bytes of the text, and its end-of-text tokens too.
    """
    whole = max_tokens is None or max_tokens >= len(stream.tokens) - 1
    tokens = stream.tokens if whole else stream.tokens[: (max_tokens or 0) + 1]
    digest = hashlib.sha256(f"{seq_len} ".encode() + tokens.tobytes()).hexdigest()
    batches = partial(_windows, tokens, seq_len, micro_batch)
    return EvalSet(batches, stream.utf8_bytes if whole else None, digest)


def _example_set(examples: Examples, seq_len: int, micro_batch: int, max_tokens: int | None) -> EvalSet:
    """As many whole examples as there are tokens, one at least."""
    most = len(examples.tokens) if max_tokens is None else max_tokens
    count = max(1, int(np.searchsorted(examples.offsets, most, side="right")) - 1)
    whole, end = count == len(examples), int(examples.offsets[count])
    digest = hashlib.sha256(f"{seq_len} ".encode())
    for part in (examples.tokens[:end], examples.targets[:end], examples.offsets[: count + 1]):
        digest.update(np.ascontiguousarray(part).tobytes())
    batches = partial(_rows, examples, count, seq_len, micro_batch)
    return EvalSet(batches, examples.utf8_bytes if whole else None, digest.hexdigest())


def evaluate(
    engine: "Engine", batches: Iterable[Batch], *, utf8_bytes: int | None = None, stop: StopOnInterrupt | None = None
) -> Evaluation | None:
    """The loss over all targets of `batches`, for a model in evaluation mode (see `undisturbed`). Logits exist for as
    many tokens at a time as in training.

    None where `stop` is requested before the end: the measure of a part would not be that of the whole.
    """
    started, nats, targets = time.perf_counter(), 0.0, 0
    for batch in batches:
        if stop is not None and stop.requested:
            return None
        nats -= float(engine.log_probabilities(batch).double().sum())  # 0 where there is no target
        targets += count_targets(batch["labels"], engine.shifts_labels)
    loss = nats / targets if targets else math.nan
    return Evaluation(loss, targets, utf8_bytes, time.perf_counter() - started)


def _windows(tokens: np.ndarray, seq_len: int, micro_batch: int) -> Iterator[Batch]:
    """input_ids and labels, int64 [micro_batch or fewer, seq_len]; the last window is filled up."""
    starts = range(0, len(tokens) - 1, seq_len - 1)
    for first in range(0, len(starts), micro_batch):
        rows = starts[first : first + micro_batch]
        ids = torch.zeros(len(rows), seq_len, dtype=torch.int64)
        labels = torch.full_like(ids, _IGNORED)
        for row, start in enumerate(rows):
            window = torch.from_numpy(tokens[start : start + seq_len].astype(np.int64))
            ids[row, : len(window)] = window
            labels[row, : len(window)] = window
        yield {"input_ids": ids, "labels": labels}


def _rows(examples: Examples, count: int, seq_len: int, micro_batch: int) -> Iterator[Batch]:
    """The first `count` examples, filled up to the longest of `micro_batch` of them."""
    rows = SeparateRows(examples, seq_len, shuffle=False, seed=0)
    for first in range(0, count, micro_batch):
        yield rows.batch([(0, row) for row in range(first, min(first + micro_batch, count))])
