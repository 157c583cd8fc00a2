"""Examples in numbers, and as the pieces that a person reads: text that is a target, and text that is none."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.data.examples import NO_TARGET, Examples

_PERCENTS = (50, 90, 99, 100)
_AT_A_TIME = 1 << 24  # tokens


@dataclass(frozen=True)
class Statistics:
    """lengths: the number of tokens that so many percent of examples do not exceed, by percent. vocabulary: how many
    of the tokenizer's tokens occur. fill: the part of rows of seq_len that one example each would fill."""

    examples: int
    tokens: int
    target_tokens: int
    lengths: dict[int, int]
    vocabulary: int
    vocabulary_size: int
    fill: float

    @property
    def target_share(self) -> float:
        return self.target_tokens / max(1, self.tokens)


def statistics_of(examples: Examples, seq_len: int, vocabulary_size: int) -> Statistics:
    """Of all examples."""
    lengths = examples.lengths
    known = np.zeros(vocabulary_size, bool)
    for start in range(0, len(examples.tokens), _AT_A_TIME):
        known[examples.tokens[start : start + _AT_A_TIME]] = True
    percentiles = np.percentile(lengths, _PERCENTS, method="inverted_cdf") if len(lengths) else np.zeros(4)
    return Statistics(
        examples=len(examples),
        tokens=len(examples.tokens),
        target_tokens=examples.target_tokens,
        lengths={percent: int(length) for percent, length in zip(_PERCENTS, percentiles, strict=True)},
        vocabulary=int(known.sum()),
        vocabulary_size=vocabulary_size,
        fill=len(examples.tokens) / max(1, len(examples) * seq_len),
    )


def pieces_of(tokens: NDArray[np.int64], labels: NDArray[np.int64], tokenizer: Any) -> list[tuple[str, bool]]:
    """An example's text as the model sees it, special tokens too, in stretches: (text, whether it is a target)."""
    learned = labels != NO_TARGET
    edges = np.flatnonzero(np.diff(learned.astype(np.int8))) + 1
    stretches = zip([0, *edges.tolist()], [*edges.tolist(), len(tokens)], strict=True)
    return [
        (_decoded(tokens[start:stop], tokenizer), bool(learned[start])) for start, stop in stretches if start < stop
    ]


def _decoded(tokens: NDArray[np.int64], tokenizer: Any) -> str:
    text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
