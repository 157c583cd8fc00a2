"""Examples into rows: what fits best, every example once, and an epoch that depends on nothing but its number."""

import numpy as np
import pytest
from numpy.typing import NDArray

from megatrain.data.best_fit import Packing, in_order, pack, shuffled

ROW = 64


def lengths_of(kind: str, count: int = 400) -> NDArray[np.int64]:
    random = np.random.default_rng(7)
    found = {
        "any": random.integers(1, ROW + 1, count),
        "short": np.minimum(random.geometric(0.15, count), ROW),
        "one": np.full(count, ROW // 3),
        "full": np.full(count, ROW),
    }
    return found[kind].astype(np.int64)


KINDS = ["any", "short", "one", "full"]


def filled_by_definition(lengths: NDArray[np.int64]) -> list[int]:
    """Tokens in each row, rising: best-fit decreasing, one at a time, over a plain list."""
    rows: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [tokens for tokens in rows if tokens + length <= ROW]
        if fitting:
            rows[rows.index(max(fitting))] += length
        else:
            rows.append(length)
    return sorted(rows)


def lengths_in(packing: Packing, lengths: NDArray[np.int64]) -> list[list[int]]:
    return [lengths[packing.row(n)].tolist() for n in range(len(packing))]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_best_fit_decreasing(kind: str) -> None:
    lengths = lengths_of(kind)
    packing = pack(lengths, ROW)
    assert sorted(packing.examples.tolist()) == list(range(len(lengths)))
    assert sorted(map(sum, lengths_in(packing, lengths))) == filled_by_definition(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_the_same_rows_with_other_examples(kind: str) -> None:
    lengths = lengths_of(kind)
    packing = pack(lengths, ROW)
    epochs = [shuffled(packing, lengths, 5, epoch) for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(epoch.examples.tolist()) == list(range(len(lengths)))
        assert sorted(lengths_in(epoch, lengths)) == sorted(lengths_in(packing, lengths))
    assert epochs[0].examples.tolist() != epochs[1].examples.tolist()
    again = shuffled(packing, lengths, 5, 1)
    assert again.examples.tolist() == epochs[1].examples.tolist() and again.starts.tolist() == epochs[1].starts.tolist()
    assert shuffled(packing, lengths, 6, 1).examples.tolist() != again.examples.tolist()
    together = [{frozenset(epoch.row(n).tolist()) for n in range(len(epoch))} for epoch in epochs]
    assert (together[0] == together[1]) == (kind == "full")  # who shares a row with whom is drawn, too


def test_unshuffled_rows_follow_their_first_examples() -> None:
    lengths = lengths_of("any")
    found = in_order(pack(lengths, ROW))
    firsts = [int(found.row(n).min()) for n in range(len(found))]
    assert firsts == sorted(firsts)
    assert sorted(lengths_in(found, lengths)) == sorted(lengths_in(pack(lengths, ROW), lengths))


def test_no_examples_give_no_rows() -> None:
    assert len(pack(np.zeros(0, np.int64), ROW)) == 0
