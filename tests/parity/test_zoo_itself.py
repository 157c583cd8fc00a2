"""What the parity tests take for granted: the zoo's models train, and a seed always gives the same step."""

from __future__ import annotations

import pytest
import torch
import zoo


def _step(model_type: str) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model = zoo.build(model_type, seed=3)
    batch = zoo.make_batch(model, model_type, seed=5)
    torch.manual_seed(0)
    return zoo.plain_step(model, batch)


@pytest.mark.parametrize("model_type", zoo.NAMED)
def test_named_types_train_and_repeat(model_type: str) -> None:
    loss, grads = _step(model_type)
    assert torch.isfinite(loss)
    assert any(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    again, grads_again = _step(model_type)
    assert torch.equal(loss, again)
    assert grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        other = grads_again[name]
        assert (grad is None) == (other is None), name
        assert grad is None or other is None or torch.equal(grad, other), name


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "llava", "qwen2_5_vl"])
def test_length_batch_and_padding_are_as_asked(model_type: str) -> None:
    model = zoo.build(model_type)
    short = zoo.make_batch(model, model_type, seed=0, batch=2, length=8)
    long = zoo.make_batch(model, model_type, seed=0, batch=3, length=15, padded=True)
    assert long["input_ids"].shape[0] == 3
    assert long["input_ids"].shape[1] - short["input_ids"].shape[1] == 7
    assert short["attention_mask"].all() and not long["attention_mask"].all()
    assert (long["labels"][long["attention_mask"] == 0] == -100).all()
    assert torch.isfinite(zoo.plain_step(model, long)[0])


def test_seed_and_dropout_matter() -> None:
    one, other = zoo.build("gpt2", seed=0), zoo.build("gpt2", seed=1)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    model = zoo.build("gpt2", dropout=True)
    batch = zoo.make_batch(model, "gpt2", seed=0)
    assert model.config.resid_pdrop == 0.1
    assert not torch.equal(zoo.plain_step(model, batch)[0], zoo.plain_step(model, batch)[0])


def test_experts_are_balanced_in_the_loss() -> None:
    for model_type in ("mixtral", "qwen3_moe"):
        model = zoo.build(model_type)
        batch = zoo.make_batch(model, model_type, seed=0)
        assert model(**batch).aux_loss > 0


def test_kinds_of_layers_are_mixed() -> None:
    for model_type in ("gemma3_text", "gpt_oss", "qwen3_5_text", "jamba"):
        config = zoo.build(model_type).config
        assert len(set(config.layer_types)) > 1, model_type
    assert zoo.build("gemma3_text").config.sliding_window < 12
    assert zoo.build("gemma3n_text").config.num_kv_shared_layers > 0


def test_every_type_works_or_says_why_not() -> None:
    skipped = {t for t in zoo.MODEL_TYPES if zoo.skip_reason(t)}
    assert len(skipped) <= 32
    assert not skipped & set(zoo.NAMED)
