"""Liger's kernels on a GPU: the reference is plain PyTorch on it with the same kernels, which do not add up in a fixed
order everywhere, so comparisons have a bound."""

from importlib import util
from typing import Any

import pytest
import torch
import zoo
from comparison import LENGTHS, compare_models
from on_gpu import make_device, needs_cuda
from reference import kept_gradients
from test_engine_toys import make_engine

from megatrain.model import kernels
from megatrain.model.head import ChunkedHead

BOUND = 1e-4  # of a gradient in fp32, relative to its largest element
pytestmark = [
    needs_cuda,
    pytest.mark.skipif(util.find_spec("liger_kernel") is None, reason="Liger is not installed"),
]


@pytest.fixture(autouse=True)
def _without_determinism(on_the_device: None) -> Any:
    torch.use_deterministic_algorithms(True, warn_only=True)


def _batches(model: torch.nn.Module, kind: str, step: int) -> list[dict[str, torch.Tensor]]:
    return [zoo.make_batch(model, kind, 10 * step + n, length=length) for n, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mixtral", "qwen3_moe"])
def test_trains_like_plain_with_the_same_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChunkedHead, "fuse", lambda *_: "")  # the reference has the model's own head
    plain, mine = zoo.build(kind), zoo.build(kind)
    kernels._install_liger(plain)
    found = compare_models(
        plain, mine, lambda step: _batches(plain, kind, step), steps=2, device=make_device(), kernels="liger"
    )
    assert found.equal or found.relative <= BOUND, str(found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_auto_takes_liger_and_its_loss(kind: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(zoo.build(kind), device=make_device(precision=precision), precision=precision, kernels="auto")
    assert engine.kernels.name == "liger" and engine.head.fused is not None
    stats = engine.train_step(_batches(engine.model, kind, 0))
    monkeypatch.setattr(ChunkedHead, "fuse", lambda *_: "")
    other = make_engine(zoo.build(kind), device=make_device(precision=precision), precision=precision, kernels="liger")
    expected = other.train_step(_batches(other.model, kind, 0))
    bound = BOUND if precision == "fp32" else 0.05
    assert stats.loss == pytest.approx(expected.loss, rel=bound)
    found, references = kept_gradients(engine), kept_gradients(other)
    largest = max(float(gradient.norm()) for gradient in references.values())
    for name, gradient in references.items():
        assert float((found[name].float() - gradient.float()).norm()) <= bound * largest, name
    engine.close()
    other.close()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_close_to_the_models_own_code(kind: str) -> None:
    results = []
    for name in ("torch", "liger"):
        engine = make_engine(zoo.build(kind), device=make_device(), kernels=name)
        stats = engine.train_step(_batches(engine.model, kind, 0))
        results.append((stats.loss, stats.grad_norm))
        engine.close()
    assert results[1] == pytest.approx(results[0], rel=1e-4)
