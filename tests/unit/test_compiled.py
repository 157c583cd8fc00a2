"""Compiled blocks: one graph for all layers, the same training but for the order of sums."""

import gc
import shutil
import sys

import pytest
import torch
from test_engine_random import tiny_llama
from test_engine_toys import make_engine

from megatrain.device.lagged import LaggedDevice
from megatrain.engine import compiled
from megatrain.errors import ConfigError

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(0, 29, (2, 16), generator=generator) for _ in range(2)]
    return [{"input_ids": i, "labels": i} for i in ids]


@needs_compiler
def test_trains_as_without_and_compiles_one_graph_for_all_layers() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    plain = make_engine(tiny_llama(), keep_graphs="off")
    engine = make_engine(tiny_llama(), keep_graphs="off", compile="blocks", device=LaggedDevice("fp32"))
    for step in range(3):
        expected, found = plain.train_step(batches(step)), engine.train_step(batches(step))
        # products are the same library's; only sums inside fused loops may be added in another order
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    layers = sum("layers" in unit.name for unit in engine.partition.units)
    graphs = counters["stats"]["unique_graphs"]
    assert layers > 1 and 0 < graphs <= 2, f"{graphs} graphs for {layers} layers"
    plain.close()
    engine.close()


@pytest.mark.long  # half a minute of tracing
def test_a_layer_that_torch_compiled_ends_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    model = tiny_llama()
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    with make_engine(model) as engine, make_engine(tiny_llama()) as plain:
        assert engine.train_step(batches(0)[:1]).loss == plain.train_step(batches(0)[:1]).loss
    gc.collect()
    assert ignored == []


def test_without_a_compiler_it_is_refused_before_anything_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(ConfigError, match=r"engine\.compile is 'blocks', which needs a C\+\+ compiler"):
        make_engine(tiny_llama(), compile="blocks")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("triton", "needs triton on cuda; install triton"),
        ("gcc", "needs a C compiler on cuda, for triton; install gcc"),
    ],
)
def test_so_it_is_on_a_gpu_where_its_compilers_are_missing(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    there = {"triton", "gcc"}
    monkeypatch.setattr(compiled, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    cuda = torch.device("cuda")
    compiled.check_compile("blocks", cuda)
    there.remove(missing)
    with pytest.raises(ConfigError, match=rf"^engine\.compile is 'blocks', which {message}, or use off$"):
        compiled.check_compile("blocks", cuda)
    compiled.check_compile("off", cuda)


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.compile is 'all'; it must be one of off, blocks"):
        make_engine(tiny_llama(), compile="all")
