"""Liger itself, where it is installed: on the host by Triton's interpreter, in a process of its own.

    TRITON_INTERPRET=1 pytest tests/unit/test_liger.py      that process

The reference is plain PyTorch whose model Liger has patched in the same way.
"""

import os
import subprocess
import sys
from importlib import util
from typing import Any

import liger_on_the_host
import pytest
import torch
import zoo
from comparison import compare_models, quiet
from reference import gradient_differences, kept_gradients
from test_engine_toys import make_engine
from torch import Tensor, nn

import megatrain as mt
from megatrain.device.lagged import LaggedDevice
from megatrain.model import kernels
from megatrain.model.head import ChunkedHead

INSTALLED = util.find_spec("liger_kernel") is not None and util.find_spec("triton") is not None
if INSTALLED and liger_on_the_host.INTERPRETED:
    liger_on_the_host.prepare()
interpreted = pytest.mark.skipif(
    not (INSTALLED and liger_on_the_host.INTERPRETED), reason="Liger is not installed, or another process runs this"
)


@pytest.mark.skipif(not INSTALLED, reason="Liger is not installed")
@pytest.mark.skipif(liger_on_the_host.INTERPRETED, reason="this is that process")
def test_all_below_in_a_process_of_its_own() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", __file__], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_DEVICE_TYPES", ("cpu",))


@pytest.fixture
def own_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own head code, as in the reference."""
    monkeypatch.setattr(ChunkedHead, "fuse", lambda *_: "")


def batches_of(model: nn.Module, kind: str, step: int = 0) -> list[dict[str, Tensor]]:
    """Of few tokens: the interpreter takes milliseconds for each row of each kernel."""
    return [zoo.make_batch(model, kind, 10 * step + n, batch=1, length=4 + n, mask_labels=False) for n in range(2)]


def loss_and_gradients(model: nn.Module, kind: str) -> list[Tensor]:
    model.zero_grad()
    loss = model(**batches_of(model, kind)[0]).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@interpreted
@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_one_model_gets_what_liger_would_give_to_all(kind: str) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    theirs, mine, other = zoo.build(kind), zoo.build(kind), zoo.build(kind)
    plain = loss_and_gradients(other, kind)
    shared = kernels._SharedState()
    try:
        _apply_liger_kernel_to_instance(theirs, cross_entropy=False, fused_linear_cross_entropy=False)
        expected = loss_and_gradients(theirs, kind)
    finally:
        assert shared.put_back()  # it had reached what all models share
    before = dict(vars(sys.modules[type(mine).__module__]))
    remove = kernels._install_liger(mine)
    assert vars(sys.modules[type(mine).__module__]) == before
    assert same(loss_and_gradients(mine, kind), expected)
    assert not same(expected, plain)  # other kernels do round differently
    assert same(loss_and_gradients(other, kind), plain)
    remove()
    assert same(loss_and_gradients(mine, kind), plain)


@interpreted
def test_norms_around_a_residual_connection_leave_its_gradient_alone() -> None:
    plain, mine = zoo.build("glm4v"), zoo.build("glm4v")
    kernels._install_liger(mine)
    expected, found = loss_and_gradients(plain, "glm4v"), loss_and_gradients(mine, "glm4v")
    largest = max(float(gradient.abs().max()) for gradient in expected[1:])
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-4 * largest


@interpreted
@pytest.mark.usefixtures("usable", "own_head")
@pytest.mark.parametrize(
    ("kind", "device", "keep_graphs"),
    [("llama", "lagged", "off"), ("llama", "cpu", 99), ("gemma2", "cpu", "off")],
)
def test_trains_like_plain_pytorch_with_the_same_kernels(kind: str, device: str, keep_graphs: Any) -> None:
    plain, mine = zoo.build(kind), zoo.build(kind)
    kernels._install_liger(plain)
    where: Any = LaggedDevice("fp32") if device == "lagged" else "cpu"
    found = compare_models(
        plain,
        mine,
        lambda step: batches_of(plain, kind, step),
        steps=2,
        name=kind,
        keep_graphs=keep_graphs,
        device=where,
        kernels="liger",
    )
    assert found.equal, str(found)


@interpreted
@pytest.mark.usefixtures("usable")
def test_the_callers_own_loop_with_a_factor() -> None:
    plain, mine = zoo.build("llama"), zoo.build("llama")
    kernels._install_liger(plain)
    engine = make_engine(mine, kernels="liger", device="cpu")
    for model in (plain, mine):
        for batch in batches_of(plain, "llama"):
            (0.5 * model(**batch).loss).backward()
    engine.step()
    assert gradient_differences(plain, engine) == []
    engine.close()


def _head(kind: str) -> nn.Module:
    model = zoo.build(kind)
    nn.init.normal_(model.get_output_embeddings().weight, generator=torch.Generator().manual_seed(0))
    return model


@interpreted
@pytest.mark.usefixtures("usable")
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_its_loss_takes_the_place_of_the_head(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(_head(kind), kernels="liger", device="cpu")
    assert engine.head.fused is not None
    assert engine.head.fused.soft_cap == getattr(engine.model.config, "final_logit_softcapping", None)
    stats = engine.train_step(batches_of(engine.model, kind))
    monkeypatch.setattr(ChunkedHead, "fuse", lambda *_: "")
    other = make_engine(_head(kind), kernels="liger", device="cpu")
    expected = other.train_step(batches_of(other.model, kind))
    assert other.head.fused is None
    assert stats.loss == pytest.approx(expected.loss, rel=1e-5)
    found, references = kept_gradients(engine), kept_gradients(other)
    largest = max(float(gradient.abs().max()) for gradient in references.values())
    for name, gradient in references.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * largest)
    engine.close()
    other.close()


@interpreted
@pytest.mark.usefixtures("usable")
def test_any_factor_before_its_backward_is_right() -> None:
    engine = make_engine(_head("llama"), kernels="liger", device="cpu")
    width = engine.model.config.hidden_size
    hidden, labels = torch.randn(1, 9, width), torch.randint(0, engine.model.config.vocab_size, (1, 9))
    found: list[tuple[Tensor, Tensor]] = []
    for factor in (1.0, 0.5, -3.0):
        leaf = hidden.clone().requires_grad_()
        with engine.executor.direct() as weights:
            loss = engine.head.chunk_loss(leaf, labels, None, {}, 7)
        (factor * loss).backward()
        (weight,) = (w.grad for w in weights.leaves.values())
        assert leaf.grad is not None and weight is not None
        found.append((leaf.grad / factor, weight / factor))
    for gradients in zip(*found, strict=True):
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-6, atol=0)
    engine.close()


@interpreted
@pytest.mark.usefixtures("usable")
def test_a_head_that_scales_its_logits_stays_the_models_own() -> None:
    engine = make_engine(zoo.build("granite"), kernels="liger", device="cpu")
    assert engine.kernels.name == "liger" and engine.head.reason is None
    assert engine.head.fused is None or engine.model.config.logits_scaling == 1.0
    engine.close()


@interpreted
@pytest.mark.usefixtures("usable")
def test_liger_refuses_a_variant_of_a_type_that_it_knows() -> None:
    model = zoo.build("llama")
    model.model.layers[0].mlp = nn.Identity()
    model.model.layers[0].input_layernorm = None
    with quiet(), pytest.raises(mt.ConfigError, match="Liger fails on LlamaForCausalLM: "):
        make_engine(model, kernels="liger", device="cpu")
