"""How well a model predicts text it has not seen, or does what it is trained for."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatrain.data.examples import Examples
from megatrain.data.packing import TokenStream
from megatrain.data.rows import SeparateRows
from megatrain.engine.targets import count_targets, target_mask
from megatrain.engine.token_loss import evaluate_loss, split_batch
from megatrain.losses import TokenLoss
from megatrain.model.root import moved_arguments
from megatrain.train.interrupt import StopOnInterrupt

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine

_IGNORED = -100
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """`loss` is the mean over `target_tokens` in nats; `utf8_bytes` the length of the text they encode (None: they are
    not all of it); `seconds` that measuring took. Under a loss of pairs it is the mean over `pairs`, and `values` are
    means of what that loss reports."""

    loss: float
    target_tokens: int
    utf8_bytes: int | None
    seconds: float = 0.0
    pairs: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float | None:
        if self.pairs is not None:
            return None
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
    part of them is left out. `sha256` of the tokens: losses of the same ones can be compared. `loss`: None for that of
    each target token."""

    batches: Callable[[], Iterator[Batch]]
    utf8_bytes: int | None
    sha256: str
    loss: TokenLoss | None = None


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


def evaluate(engine: "Engine", one: EvalSet, stop: StopOnInterrupt | None = None) -> Evaluation | None:
    """The loss over all of a set, for a model in evaluation mode (see `undisturbed`). Logits exist for as many tokens
    at a time as in training.

    None where `stop` is requested before the end: the measure of a part would not be that of the whole.
    """
    started, total, targets, units = time.perf_counter(), 0.0, 0, 0.0
    values: Counter[str] = Counter()
    for batch in one.batches():
        if stop is not None and stop.requested:
            return None
        targets += count_targets(batch["labels"], engine.shifts_labels)
        if one.loss is None:
            total -= float(engine.log_probabilities(batch).double().sum())  # 0 where there is no target
        else:
            summed, reported = _under(one.loss, engine, batch)
            total, units = total + summed, units + one.loss.units(batch)
            values.update(reported)
    seconds = time.perf_counter() - started
    if one.loss is None:
        return Evaluation(total / targets if targets else math.nan, targets, one.utf8_bytes, seconds)
    means = {name: value / units for name, value in values.items()}
    return Evaluation(total / units, targets, one.utf8_bytes, seconds, round(units), means)


def _under(loss: TokenLoss, engine: "Engine", batch: Batch) -> tuple[float, dict[str, float]]:
    """The sum of `loss` over the units of a batch, and of what it reports."""
    given, own = split_batch(loss, batch)
    found = engine.log_probabilities(given)
    entries = moved_arguments({**given, **own}, found.device)
    targets = target_mask(entries["labels"], shifted=engine.shifts_labels)
    with torch.enable_grad():
        sums, reported = evaluate_loss(loss, found.requires_grad_(), targets, entries)
    return float(sums.detach()), {name: float(value) for name, value in reported.items()}


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
