"""What an engine says to arguments that are wrong, before anything has changed."""

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_engine_toys import WIDTH, Net, batches_of, make_batch, make_engine
from torch import nn

import megatrain as mt
from megatrain.engine.setup import memory_bytes
from megatrain.errors import ConfigError

NAN, INF = float("nan"), float("inf")
OTHER_ADAMW = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("device", None, "engine.device is None; it must be auto, cpu"),
        ("device", 5, "engine.device is 5; it must be auto, cpu"),
        ("device", torch.device("meta"), "engine.device is 'meta'; it must be auto, cpu"),
        ("optimizer", OTHER_ADAMW, "optimizer is torch.optim.adamw.AdamW; pass mt.AdamW(...)"),
        ("optimizer", "adamw", "optimizer is 'adamw'; pass mt.AdamW(...)"),
        ("optimizer", mt.AdamW, "optimizer is megatrain.optim.adamw.AdamW; pass mt.AdamW(...)"),
        ("clip_norm", "1", "train.clip_norm is '1'; it must be a number > 0"),
        ("clip_norm", True, "train.clip_norm is True; it must be a number > 0"),
        ("clip_norm", NAN, "train.clip_norm is nan; it must be a number > 0"),
        ("threads", "2", "engine.threads is '2'; it must be a number from 1"),
        ("threads", True, "engine.threads is True; it must be a number from 1"),
        ("seed", "a", "train.seed is 'a'; it must be a whole number"),
        ("seed", -1, "train.seed is -1; it must be a whole number from 0 up"),
        ("seed", 2**63, "train.seed is 9223372036854775808; it must be a whole number from 0 up, below"),
        ("device_memory", -1, "engine.device_memory is -1; it must be a number of bytes > 0"),
        ("device_memory", "much", "engine.device_memory is 'much'; it must be a number of bytes > 0"),
        ("device_memory", NAN, "engine.device_memory is nan; it must be a number of bytes > 0"),
        ("slots", "2", "engine.slots is '2'; it must be a number from 1 to 64"),
        ("head_chunk_tokens", 0, "engine.head_chunk_tokens is 0; it must be a number of tokens > 0"),
        ("head_chunk_tokens", 1.5, "engine.head_chunk_tokens is 1.5; it must be a number of tokens > 0"),
        ("nvme_encryption", "on", "engine.nvme_encryption is 'on'; it must be True or False"),
        ("slots", True, "engine.slots is True; it must be a number from 1 to 64"),
        ("keep_graphs", None, "engine.keep_graphs is None; it must be auto, off or a number"),
        ("keep_graphs", True, "engine.keep_graphs is True; it must be auto, off or a number"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        make_engine(Net(), **{name: value})


def test_a_model_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"^model is a str; pass an nn.Module, or use Engine.from_pretrained"):
        make_engine("gpt2")  # type: ignore[arg-type]


def test_a_wrong_argument_is_named_before_a_checkpoint_is_read() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer is 'adamw'"):
        mt.Engine.from_pretrained("nowhere", "adamw")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["revision", "dtype", "subfolder", "mapped"])
def test_an_unknown_argument_is_named_before_a_checkpoint_is_read(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^from_pretrained: there is no argument {name}; it takes attn.*, seed,"):
        mt.Engine.from_pretrained("nowhere", **{name: "main"})


@pytest.mark.parametrize(
    ("cores", "torch_threads", "device", "threads"),
    [(16, 16, "lagged", 14), (16, 4, "lagged", 4), (2, 2, "lagged", 1), (1, 1, "lagged", 1), (16, 16, "cpu", 16)],
)
def test_the_optimizer_leaves_cores_to_the_threads_that_feed_a_device(
    cores: int, torch_threads: int, device: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)
    with make_engine(Net(), device=device, threads=None) as engine:
        assert engine.store.workers.threads == threads
    with make_engine(Net(), device=device, threads=2) as engine:
        assert engine.store.workers.threads == 2


def complex_weight(model: nn.Module) -> None:
    model.blocks[0].extra = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


def sparse_embedding(model: nn.Module) -> None:
    model.embed = nn.Embedding(29, WIDTH, sparse=True)


def same_memory(model: nn.Module) -> None:
    model.head.weight.data = model.embed.weight.data


def overlapping_memory(model: nn.Module) -> None:
    model.blocks[1].up.bias.data = model.blocks[0].up.bias.data[:WIDTH]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (complex_weight, "model: blocks.0.extra is torch.complex64; a trainable parameter must be of real"),
        (sparse_embedding, "model: embed has sparse=True; AdamW takes no sparse gradients"),
        (same_memory, "model: embed.weight and head.weight are two parameters in the same memory; tie them"),
        (overlapping_memory, "model: blocks.0.up.bias and blocks.1.up.bias are two parameters in the same memory"),
    ],
)
def test_a_parameter_that_cannot_be_trained_as_it_is(change: Callable[[nn.Module], None], message: str) -> None:
    model = Net()
    change(model)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        make_engine(model)


def test_parameters_beside_each_other_in_one_buffer() -> None:
    model = Net()
    weights = [block.up.weight for block in model.blocks]
    buffer = torch.stack([w.detach() for w in weights])
    columns = torch.cat([block.down.weight.detach() for block in model.blocks], dim=1)
    for number, weight in enumerate(weights):
        weight.data = buffer[number]
        model.blocks[number].down.weight.data = columns[:, 2 * WIDTH * number :][:, : 2 * WIDTH]
    with make_engine(model) as engine, make_engine(Net()) as other:
        assert engine.train_step([make_batch(0)]).loss == other.train_step([make_batch(0)]).loss


def test_devices_and_sizes_in_other_forms(caplog: pytest.LogCaptureFixture) -> None:
    with make_engine(Net(), device=torch.device("cpu")) as engine:
        assert engine.device.torch_device == torch.device("cpu")
    assert not caplog.messages
    assert (
        memory_bytes("device_memory", "1GB"),
        memory_bytes("device_memory", 7),
        memory_bytes("device_memory", None),
    ) == (10**9, 7, None)
    make_engine(Net(), device="cpu", device_memory="1GB").close()
    (message,) = caplog.messages
    assert message.startswith("engine.device_memory has no effect on cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("lr", "eps", "weight_decay") for value in ("1", None, True, INF, NAN, -1.0)]
    + [("betas", value) for value in (0.9, "ab", None, (0.9,), (0.9, "x"), (0.9, NAN), (True, 0.9))]
    + [("param_groups", value) for value in ({"params": "*"}, "x", None, ["x"], [{"params": 3}], [{"params": [3]}])]
    + [("param_groups", [{"params": "*", "betas": 3}]), ("param_groups", [{"params": "*", "lr": INF}])],
)
def test_wrong_hyper_parameters_are_named(name: str, value: Any) -> None:
    group = name == "param_groups" and isinstance(value, list) and isinstance(value[0], dict)
    with pytest.raises(ConfigError, match=r"^optimizer\." if group else rf"^optimizer\.{name}"):
        mt.AdamW(**{name: value})


@pytest.mark.parametrize("lr", [NAN, INF, -0.1, "1", True])
def test_a_wrong_learning_rate_changes_nothing(lr: Any) -> None:
    with make_engine(Net()) as engine:
        before = [dict(group) for group in engine.optimizer.param_groups]
        for call in (engine.optimizer.set_lr, engine.step, lambda lr: engine.train_step(batches_of(0, 2), lr=lr)):
            with pytest.raises(ConfigError, match=r"^lr is .*; it must be a finite number >= 0"):
                call(lr)
        assert [dict(group) for group in engine.optimizer.param_groups] == before
        assert engine.step_count == 0
        engine.train_step(batches_of(0, 2), lr=0.01)


def test_a_closed_engine_says_so() -> None:
    engine = make_engine(Net())
    engine.close()
    for call in (lambda: engine.train_step(batches_of(0, 1)), engine.step, lambda: engine.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=r"^this engine is closed$"):
            call()


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (make_batch(0), "batches is a dict; it must be a list of micro-batches"),
        (None, "batches is a NoneType; it must be a list"),
        (torch.zeros(2), "batches is a Tensor; it must be a list"),
        ((), "batches is empty"),
        ([[1]], "batches[0] is a list; it must be a dict"),
        ([{**make_batch(0), "labels": None}], "batches[0]['labels'] is of type NoneType; it must be a tensor"),
        ([make_batch(0), {**make_batch(0), "labels": [1]}], "batches[1]['labels'] is of type list; it must be a"),
    ],
)
def test_wrong_batches(batches: Any, message: str) -> None:
    with make_engine(Net()) as engine, pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        engine.train_step(batches)


def test_batches_may_come_from_a_generator() -> None:
    with make_engine(Net()) as engine, make_engine(Net()) as other:
        losses = engine.train_step(batch for batch in batches_of(0, 2)).loss, other.train_step(batches_of(0, 2)).loss
    assert losses[0] == losses[1]
