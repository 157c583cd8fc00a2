"""Training on a GPU against plain PyTorch on it: loss, every gradient, weights and buffers, to the last bit."""

import copy
from typing import Any

import pytest
import test_engine_toys as toys
import torch
from comparison import compare
from on_gpu import DRY, WHERE, make_device
from reference import gradient_differences, placed, plain_norm, weight_differences
from test_bf16 import Pair, assert_equal_bits
from test_engine_clipping import clip_units
from test_engine_random import tiny_llama
from test_engine_toys import (
    Block,
    Net,
    assert_free_loop_like_plain,
    assert_trains_like_plain,
    batches_of,
    make_batch,
    make_engine,
    plain_trainer,
)
from torch import Tensor, nn

BOUND = 1e-5  # of a gradient, relative to its largest element, for types whose kernels may add up in another order


@pytest.mark.parametrize("keep_graphs", ["auto", "off", 3])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_trains_like_plain(micro_batches: int, slots: int, keep_graphs: Any) -> None:
    assert_trains_like_plain(
        Net(count=4, dropout=0.1),
        micro_batches=micro_batches,
        device=make_device(),
        slots=slots,
        keep_graphs=keep_graphs,
    ).close()


def test_inputs_that_leave_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatrain.engine.weight_stream import WeightStream

    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: True)
    model = Net(count=6, dropout=0.1)
    engine = assert_trains_like_plain(model, micro_batches=3, device=make_device(), keep_graphs="off")
    stats = engine.train_step(batches_of(9, 3))
    assert stats.d2h_bytes > sum(p.nbytes for p in model.parameters())
    engine.close()


def test_by_name() -> None:
    engine = make_engine(Net(), device="lagged" if DRY else "cuda:0")
    assert engine.device.torch_device == WHERE
    assert engine.train_step(batches_of(0, 1)).h2d_bytes > 0
    engine.close()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("limit", [None, 0.2])
@pytest.mark.parametrize("scope", ["global", "unit"])
def test_clipping(scope: str, limit: float | None, micro_batches: int) -> None:
    plain, model = Net(count=3), Net(count=3)
    engine, trainer = make_engine(model, device=make_device(), clip_norm=limit, clip_scope=scope), plain_trainer(plain)
    plain.to(WHERE)
    for step in range(4):
        batches = batches_of(step, micro_batches)
        loss = trainer.backward(placed(batches, WHERE))
        norm = plain_norm(plain)
        stats = engine.train_step(batches)
        assert stats.loss == pytest.approx(loss, rel=1e-6)
        assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
        trainer.clip_norm = limit
        if scope == "unit" and limit is not None:
            clip_units(trainer, plain, engine, limit)
        else:
            trainer.update(stats.grad_norm)
    if scope == "global" or limit is None:
        assert weight_differences(plain, engine) == []
    for name, value in engine.model.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name].cpu(), rtol=1e-5, atol=1e-5)
    engine.close()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_tied_weights(micro_batches: int) -> None:
    model = Net()
    model.head.weight = model.embed.weight
    assert_trains_like_plain(model, micro_batches=micro_batches, device=make_device()).close()


class Stray(Net):
    """Two parameters that belong to no unit."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.linspace(-1, 1, toys.WIDTH))
        self.scale = nn.Parameter(torch.ones(2, toys.WIDTH))

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.start
        for block, scale in zip(self.blocks, self.scale, strict=True):
            x = block(x) * scale
        return x


class Expanding(Net):
    """The first block's input overlaps itself in memory, and has a gradient."""

    def __init__(self) -> None:
        super().__init__(count=4)
        self.query = nn.Parameter(torch.linspace(-1, 1, toys.WIDTH))

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = self.query.expand(*input_ids.shape, toys.WIDTH)
        for block in self.blocks:
            x = block(x) + self.embed(input_ids)
        return x


class Averages(Block):
    """A running mean that its own output depends on, and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.BatchNorm1d(toys.WIDTH, momentum=0.3)
        self.register_buffer("mean", torch.zeros(toys.WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        self.count += 1
        return super().forward(self.normed((x - self.mean).transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("make", [Stray, lambda: Net(Averages)], ids=["stray", "buffers"])
def test_what_lies_beside_the_weights(make: Any, micro_batches: int) -> None:
    assert_trains_like_plain(make(), micro_batches=micro_batches, steps=5, device=make_device()).close()


def test_an_input_that_overlaps_itself_leaves_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatrain.engine.weight_stream import WeightStream

    monkeypatch.setattr(WeightStream, "_inputs_must_leave", lambda *_: True)
    assert_trains_like_plain(Expanding(), micro_batches=2, tolerance=1e-6, device=make_device()).close()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_types_of_transformers_are_equal(model_type: str) -> None:
    found = compare(model_type, steps=3, micro_batches=3, keep_graphs="auto", device=make_device())
    assert found.equal, str(found)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "jamba"])
def test_types_of_transformers_are_close(model_type: str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # not all of their operations have such a kernel
    found = compare(model_type, steps=2, micro_batches=3, keep_graphs="auto", device=make_device())
    assert found.equal or found.relative <= BOUND, str(found)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_bf16_with_fp32_masters_is_equal(model_type: str) -> None:
    assert_equal_bits(Pair(model_type, dropout=True, device=make_device(precision="bf16")))


# -- the caller's own loop --------------------------------------------------------------------------------------------


def test_own_loop() -> None:
    assert_free_loop_like_plain(Net(count=3), lambda model, batch: model(**batch).loss, device=make_device()).close()


def test_several_backward_calls_before_one_step() -> None:
    plain, model = Net(count=3), Net(count=3)
    trainer, engine = plain_trainer(plain), make_engine(model, device=make_device())
    plain.to(WHERE)
    for step in range(3):
        for batch in batches_of(step, 3):
            plain(**placed([batch], WHERE)[0]).loss.backward()
            model(**batch).loss.backward()  # on the host: the engine moves it
        stats = engine.step()
        assert gradient_differences(plain, engine) == []
        trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []
    engine.close()


def test_the_devices_generator_goes_on_as_in_plain() -> None:
    plain, model = Net(dropout=0.4).to(WHERE), Net(dropout=0.4)
    engine = make_engine(model, device=make_device())
    after = []
    for one in (plain, model):
        torch.manual_seed(12)
        one(**placed([make_batch(0)], WHERE)[0]).loss.backward()
        after.append(torch.get_rng_state() if DRY else torch.cuda.get_rng_state())
    assert torch.equal(after[0], after[1])
    engine.discard_gradients()
    engine.train_step(batches_of(0, 3))
    assert torch.equal(torch.get_rng_state() if DRY else torch.cuda.get_rng_state(), after[1])
    engine.close()


def test_an_evaluation_inside_a_step() -> None:
    plain, model = Net(count=4), Net(count=4)
    trainer, engine = plain_trainer(plain), make_engine(model, device=make_device())
    plain.to(WHERE)
    for step in range(4):
        seen = []
        for one in (plain, model):
            losses = [one(**batch).loss for batch in placed(batches_of(step, 2), WHERE)]
            with torch.no_grad():
                seen.append(one(**placed([make_batch(50)], WHERE)[0]).loss)
            for loss in losses:
                loss.backward()
        assert torch.equal(*seen)
        trainer.update(engine.step().grad_norm)
    assert weight_differences(plain, engine) == []
    engine.close()


def test_generation_with_the_prompt_on_either_side() -> None:
    model = tiny_llama()
    plain = copy.deepcopy(model).to(WHERE)
    engine = make_engine(model, device=make_device())
    prompt = torch.tensor([[3, 5, 7]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(prompt.to(WHERE), **options).cpu()
    for given in (prompt, prompt.to(WHERE)):
        assert torch.equal(engine.model.generate(given, **options).cpu(), expected)
    engine.close()
