"""Rows of examples: what a model is given, that no example predicts the next, and that a step is the same however it is
cut into micro-batches."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from megatrain.data.batches import StepBatches, batch_sha256
from megatrain.data.examples import NO_TARGET, Examples
from megatrain.data.packing import TokenStream
from megatrain.data.rows import PackedRows, Rows, SeparateRows, documents_as_examples

SEQ_LEN = 16


def examples(count: int = 30, longest: int = SEQ_LEN, seed: int = 0) -> Examples:
    """Every token tells its example and its place; the first third of each is no target."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([100 * n + np.arange(1, length + 1) for n, length in enumerate(lengths)])
    targets = np.concatenate([np.arange(length) >= length // 3 for length in lengths])
    return Examples(tokens.astype(np.uint32), targets, offsets, 0)


def packed(shuffle: bool = True, seed: int = 5) -> PackedRows:
    return PackedRows(examples(), SEQ_LEN, shuffle=shuffle, seed=seed)


def separate(shuffle: bool = True, seed: int = 5, masked: bool = False) -> SeparateRows:
    return SeparateRows(examples(), SEQ_LEN, shuffle=shuffle, seed=seed, masked=masked)


def steps_of(rows: Rows, micro_batch: int = 2, rows_per_step: int = 4) -> StepBatches:
    return StepBatches(rows, micro_batch=micro_batch, rows_per_step=rows_per_step)


def documents_in(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each document of a batch of packed rows."""
    found = []
    for row in range(len(batch["input_ids"])):
        starts = [*torch.nonzero(batch["position_ids"][row] == 0).view(-1).tolist(), SEQ_LEN]
        for start, stop in pairwise(starts):
            found.append({name: tensor[row, start:stop] for name, tensor in batch.items()})
    return found


def test_packed_rows_hold_whole_examples_with_positions_and_targets_of_their_own() -> None:
    given, rows = examples(), packed()
    seen = []
    for place in range(rows.count):
        batch = rows.batch([(0, place)])
        assert {t.shape for t in batch.values()} == {(1, SEQ_LEN)} and {t.dtype for t in batch.values()} == {
            torch.int64
        }
        for document in documents_in(batch):
            assert document["position_ids"].tolist() == list(range(len(document["position_ids"])))
            assert int(document["labels"][0]) == NO_TARGET  # which the example before it would predict
            if int(document["input_ids"][0]) == 0:
                assert set(document["labels"].tolist()) == {NO_TARGET}
                continue
            number = int(document["input_ids"][0]) // 100
            assert document["input_ids"].tolist() == given.tokens_of(number).tolist()
            assert document["labels"][1:].tolist() == given.labels_of(number)[1:].tolist()
            seen.append(number)
    assert sorted(seen) == list(range(len(given)))
    assert rows.tokens == len(given.tokens) and rows.fill == rows.tokens / (rows.count * SEQ_LEN)
    assert rows.kind == f"30 examples, best-fit packed into {rows.count} rows, {rows.fill:.1%} full"


@pytest.mark.parametrize("make", [packed, separate])
def test_each_epoch_has_every_row_once_in_an_order_of_its_own(make: type) -> None:
    rows = make()
    epochs = [[rows.batch([(epoch, n)])["input_ids"][0].tolist() for n in range(rows.count)] for epoch in (0, 1)]
    tokens = [sorted(token for row in epoch for token in row) for epoch in epochs]
    assert tokens[0] == tokens[1] and epochs[0] != epochs[1]
    again = make().batch([(1, 3)])["input_ids"][0].tolist()  # asked for first
    assert again == epochs[1][3]
    assert make(seed=6).batch([(1, 3)])["input_ids"][0].tolist() != again
    unshuffled = [make(shuffle=False).batch([(epoch, 2)])["input_ids"].tolist() for epoch in (0, 1)]
    assert unshuffled[0] == unshuffled[1]


def test_separate_rows_are_padded_to_the_longest_of_their_micro_batch() -> None:
    given, rows = examples(), separate(shuffle=False)
    batch = rows.batch([(0, 3), (0, 4), (0, 5)])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (3, max(given.lengths[3:6]))
    for row, number in enumerate((3, 4, 5)):
        length = int(given.lengths[number])
        assert batch["input_ids"][row].tolist()[:length] == given.tokens_of(number).tolist()
        assert batch["labels"][row].tolist()[:length] == given.labels_of(number).tolist()
        assert set(batch["labels"][row].tolist()[length:]) <= {NO_TARGET}


def test_a_mask_is_given_where_it_is_asked_for_and_there_is_padding() -> None:
    lengths = examples().lengths.tolist()
    places = [(0, lengths.index(min(lengths))), (0, lengths.index(max(lengths)))]
    batch = separate(shuffle=False, masked=True).batch(places)
    assert batch["attention_mask"].sum(dim=1).tolist() == [min(lengths), max(lengths)]
    assert "attention_mask" not in separate(shuffle=False, masked=True).batch(places[:1])


def test_longer_examples_are_cut() -> None:
    given = examples(longest=3 * SEQ_LEN)
    assert int((given.lengths > SEQ_LEN).sum()) > 5
    for kind in (PackedRows, SeparateRows):
        rows = kind(given, SEQ_LEN, shuffle=False, seed=0)
        assert rows.tokens == np.minimum(given.lengths, SEQ_LEN).sum()
        ids = [rows.batch([(0, n)])["input_ids"] for n in range(rows.count)]
        kept = sorted(token for row in ids for token in row.view(-1).tolist() if token)
        assert kept == sorted(t for n in range(len(given)) for t in given.tokens_of(n)[:SEQ_LEN].tolist())


@pytest.mark.parametrize("make", [packed, separate, lambda: separate(masked=True)])
def test_the_hash_of_a_step_does_not_depend_on_how_its_rows_are_cut(make: type) -> None:
    for step in range(3):
        hashes = {batch_sha256(steps_of(make(), micro_batch).of_step(step)) for micro_batch in (1, 2, 4)}
        assert len(hashes) == 1
    assert batch_sha256(steps_of(make()).of_step(0)) != batch_sha256(steps_of(make()).of_step(1))


@pytest.mark.parametrize("name", ["input_ids", "labels", "position_ids"])
def test_the_hash_of_a_step_depends_on_every_token(name: str) -> None:
    step = steps_of(packed()).of_step(0)
    before = batch_sha256(step)
    last = int(torch.nonzero(step[1]["labels"][1] != NO_TARGET)[-1])
    for place in (0, last):
        step[1][name][1, place] += 1
        assert batch_sha256(step) != before
        step[1][name][1, place] -= 1
    assert batch_sha256(step) == before


def test_a_mask_that_says_something_else_counts() -> None:
    ids = torch.arange(1, 9).view(1, 8)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    without = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    assert batch_sha256([batch]) == batch_sha256([without])
    hole = batch | {"attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)}
    assert batch_sha256([hole]) != batch_sha256([without])


def test_documents_of_a_text_become_examples_in_pieces() -> None:
    tokens = np.array([1, 5, 6, 1, 7, 1, *range(10, 20), 1], np.uint16)
    found = documents_as_examples(TokenStream(tokens, 33), 1, 4)
    pieces = [found.tokens_of(n).tolist() for n in range(len(found))]
    assert pieces == [[5, 6, 1], [7, 1], [10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 1]]
    assert found.targets.all() and found.utf8_bytes == 33
    assert len(documents_as_examples(TokenStream(tokens[:1], 0), 1, 4)) == 0
