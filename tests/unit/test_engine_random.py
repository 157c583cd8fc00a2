"""Random numbers and autocast: recomputation sees what the forward saw, and nobody outside notices."""

import copy
from typing import Any

import pytest
import torch
from reference import gradient_differences, plain_norm
from test_engine_toys import Block, Net, assert_trains_like_plain, batches_of, make_batch, make_engine
from torch import Tensor, nn

from megatrain.engine.random_streams import stream_seed


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_recomputation_uses_the_masks_of_the_forward(micro_batches: int) -> None:
    assert_trains_like_plain(Net(dropout=0.4), micro_batches=micro_batches, keep_graphs="off")


def test_dropout_under_the_callers_own_generator() -> None:
    model, plain = Net(dropout=0.4), Net(dropout=0.4)
    engine = make_engine(model)
    for one in (plain, model):
        torch.manual_seed(11)
        (one(**make_batch(0)).loss + one(**make_batch(1)).loss).backward()
    engine.step()
    assert gradient_differences(plain, engine) == []


def test_free_loop_draws_as_many_numbers_as_plain() -> None:
    model, plain = Net(dropout=0.4), Net(dropout=0.4)
    make_engine(model)
    after = []
    for one in (plain, model):
        torch.manual_seed(12)
        one(**make_batch(0)).loss.backward()
        after.append(torch.get_rng_state())
    assert torch.equal(after[0], after[1])


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_train_step_leaves_the_global_generator_alone(micro_batches: int) -> None:
    engine = make_engine(Net(dropout=0.4))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    engine.train_step(batches_of(0, micro_batches))
    assert torch.equal(torch.get_rng_state(), before)


def test_taking_a_model_over_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make_engine(Net(dropout=0.4))
    assert torch.equal(torch.get_rng_state(), before)


def test_failed_step_leaves_the_global_generator_alone() -> None:
    engine = make_engine(Net(dropout=0.4))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    bad = make_batch(1)
    bad["input_ids"] = bad["input_ids"] + 1000
    with pytest.raises(IndexError):
        engine.train_step([make_batch(0), bad])
    assert torch.equal(torch.get_rng_state(), before)


class Recorder(Block):
    """Keeps what its dropout let through."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.masks: list[tuple[bool, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.masks.append(tuple((self.drop(torch.ones(16)) > 0).tolist()))
        return super().forward(x)


def masks_of(seed: int, steps: int, micro_batches: int) -> list[tuple[bool, ...]]:
    model = Net(Recorder, count=1)
    engine = make_engine(model, seed=seed, keep_graphs="off")
    model.blocks[0].masks.clear()
    for _ in range(steps):
        engine.train_step([make_batch(0)] * micro_batches)
    return model.blocks[0].masks


def test_streams_differ_by_seed_step_and_micro_batch_and_repeat() -> None:
    masks = masks_of(3, steps=2, micro_batches=3)
    assert len(masks) == 2 * 3 * 2  # forward and recomputation
    assert sorted(masks[:3]) == sorted(masks[3:6])  # the recomputation draws the same
    distinct = set(masks)
    assert len(distinct) == 6
    assert masks_of(3, steps=2, micro_batches=3) == masks
    assert not distinct & set(masks_of(4, steps=2, micro_batches=3))


def test_a_micro_batchs_stream_does_not_depend_on_its_neighbours() -> None:
    alone, together = masks_of(3, 1, 1), masks_of(3, 1, 3)
    assert alone[0] == together[0]


def test_stream_seeds_are_distinct_and_fit_a_generator() -> None:
    seeds = {stream_seed(s, t, m) for s in range(6) for t in range(20) for m in range(6)}
    assert len(seeds) == 6 * 20 * 6
    for seed in (*seeds, stream_seed(-1, 0, 0), stream_seed(2**63, 10**9, 7)):
        assert 0 <= seed < 2**63
    torch.Generator().manual_seed(max(seeds))


# -- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward_inside", [True, False])
def test_autocast_around_the_free_loop(backward_inside: bool) -> None:
    model, plain = Net(count=3), Net(count=3)
    engine = make_engine(model)
    for one in (plain, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = one(**make_batch(0)).loss
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
    engine.step()
    assert gradient_differences(plain, engine) == []
    without = Net(count=3)
    without(**make_batch(0)).loss.backward()
    assert abs(plain_norm(without) - plain_norm(plain)) > 1e-6  # autocast did make a difference


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_autocast_around_train_step(micro_batches: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_trains_like_plain(Net(), micro_batches=micro_batches, steps=1)


def test_autocast_switched_off_inside_a_block() -> None:
    class Exact(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    model, plain = Net(Exact), Net(Exact)
    engine = make_engine(model)
    for one in (plain, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = one(**make_batch(0)).loss
        loss.backward()
    engine.step()
    assert gradient_differences(plain, engine) == []


def tiny_llama(**settings: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | settings)))


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for early in (None, True, False):
        model = tiny_llama()
        if early is True:
            model.gradient_checkpointing_enable()
        model.train()
        engine = make_engine(model)
        if early is False:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        stats = engine.train_step([make_batch(0), make_batch(1, length=9)])
        results.append((stats.loss, stats.grad_norm, copy.deepcopy(model.state_dict())))
    for loss, norm, weights in results[1:]:
        assert (loss, norm) == results[0][:2]
        assert all(torch.equal(weights[name], w) for name, w in results[0][2].items())
