"""A fused loss takes the place of head and cross-entropy where a probe shows it to be the same, and nowhere else."""

import copy
from typing import Any

import fused_losses
import pytest
import torch
import transformers
from reference import kept_gradients
from test_engine_toys import Net, make_engine
from tiny_models import TEXT
from torch import Tensor, nn

import megatrain as mt
from megatrain.device.lagged import LaggedDevice
from megatrain.model.fused_loss import FusedLoss

VOCABULARY: int = TEXT["vocab_size"]


def make(kind: str = "llama", **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**TEXT, "pad_token_id": 0, **settings})
    return transformers.AutoModelForCausalLM.from_config(config)


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rows in (1, 3):
        ids = torch.randint(1, VOCABULARY, (rows, 50), generator=generator)
        made.append(
            {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)}
        )
    return made


def fused(model: nn.Module, loss: FusedLoss = fused_losses.right, **settings: Any) -> tuple[mt.Engine, str]:
    engine = make_engine(model, **settings)
    reason = engine.head.fuse(loss)
    engine.executor.abort_step()
    engine.executor.forget_order()
    return engine, reason


HEADS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 50.0},
    "gemma2, a cap for large logits alone": {"final_logit_softcapping": 500.0, "attn_logit_softcapping": 50.0},
    "phi": {},  # a bias
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},  # an auxiliary loss
}


@pytest.mark.parametrize("device", ["cpu", "lagged"])
@pytest.mark.parametrize("head", HEADS)
def test_trains_as_without(head: str, device: str) -> None:
    where = {"device": LaggedDevice("fp32")} if device == "lagged" else {"device": "cpu"}
    model = make(head.partition(",")[0], **HEADS[head])
    nn.init.normal_(model.get_output_embeddings().weight)
    plain = make_engine(copy.deepcopy(model), device="cpu")
    engine, reason = fused(model, **where)
    assert engine.head.fused is not None, reason
    assert engine.head.fused.soft_cap == HEADS[head].get("final_logit_softcapping")
    for step in range(2):
        expected, found = plain.train_step(batches(step)), engine.train_step(batches(step))
        assert found.loss == pytest.approx(expected.loss, rel=1e-5 if step == 0 else 1e-3)
        if step == 0:  # AdamW's first update is the gradient's sign: rounding decides where it is nearly zero
            mine = kept_gradients(engine)
            for name, gradient in kept_gradients(plain).items():
                torch.testing.assert_close(mine[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))
    assert engine.executor.generation == plain.executor.generation
    engine.close()
    plain.close()


def test_the_logits_of_a_chunk_are_not_made() -> None:
    model = make()
    engine, _ = fused(model)
    shapes: list[Any] = []
    assert engine.head.fused is not None
    own = engine.head.fused._forward
    engine.head.fused._forward = lambda hidden: shapes.append(hidden.shape) or own(hidden)  # type: ignore[func-returns-value]
    engine.train_step(batches())
    assert {shape[1] for shape in shapes} == {1}  # the forward around the base sees one token
    engine.close()


def test_any_factor_before_backward_is_right() -> None:
    model = make()
    engine, _ = fused(model)
    hidden = torch.randn(1, 9, TEXT["hidden_size"])
    labels = torch.randint(0, VOCABULARY, (1, 9))
    found = []
    for factor in (1.0, 0.5, -3.0):
        leaf = hidden.clone().requires_grad_()
        with engine.executor.direct() as weights:
            loss = engine.head.chunk_loss(leaf, labels, None, {}, 7)
        (factor * loss).backward()
        (weight,) = (w.grad for w in weights.leaves.values())
        found.append((leaf.grad / factor, weight / factor))
    for gradients in zip(*found, strict=True):
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-6, atol=0)
    engine.close()


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("granite", {"logits_scaling": 8.0}, "on a probe the loss is"),
        ("cohere", {"logit_scale": 0.0625}, "on a probe the loss is"),
        ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": 50.0}, None),
    ],
)
def test_what_else_a_head_does_keeps_it_as_it_is(kind: str, settings: dict[str, Any], why: str | None) -> None:
    engine, reason = fused(make(kind, **settings))
    assert engine.head.reason is None
    if why is None:
        assert engine.head.fused is not None and engine.head.fused.soft_cap is None
    else:
        assert engine.head.fused is None and why in reason
    engine.train_step(batches())
    engine.close()


class _DropoutBefore(transformers.LlamaForCausalLM):
    """Dropout between base and head."""

    def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(nn.functional.dropout(hidden, 0.5, self.training))
        loss = self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


def _config() -> Any:
    return transformers.LlamaConfig(**TEXT)


def test_dropout_before_the_head_keeps_it_as_it_is() -> None:
    torch.manual_seed(0)
    model = _DropoutBefore(_config()).eval()
    engine, reason = fused(model)
    assert engine.head.reason is None  # it runs in chunks
    assert engine.head.fused is None, reason
    assert not any(module.training for module in model.modules())
    engine.close()


def test_a_loss_function_of_the_users_keeps_the_head_as_it_is() -> None:
    model = make()
    own = model.loss_function
    model.loss_function = lambda *args, **kwargs: own(*args, **kwargs)
    engine, reason = fused(model)
    assert engine.head.reason is None and engine.head.fused is None and "loss function" in reason
    engine.close()


def test_weights_of_zero_tell_nothing() -> None:
    model = make()
    nn.init.zeros_(model.get_output_embeddings().weight)
    engine, reason = fused(model)
    assert engine.head.fused is None and reason == "the head's weights are zero"
    engine.close()


def test_a_model_whose_head_does_not_run_apart() -> None:
    engine, reason = fused(Net())
    assert engine.head.fused is None and "Net has no base model" in reason
    engine.close()


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (fused_losses.without_bias, "phi"),
        (fused_losses.with_half_the_weights_gradient, "llama"),
        (fused_losses.with_one_row_without_gradient, "llama"),
        (fused_losses.with_half_the_hidden_states_gradient, "llama"),
    ],
)
def test_a_loss_that_is_wrong_in_one_point_is_not_taken(loss: FusedLoss, kind: str) -> None:
    model = make(kind)
    if kind == "phi":
        nn.init.normal_(model.get_output_embeddings().bias)
    engine, reason = fused(model, loss)
    assert engine.head.fused is None and reason.startswith("on a probe")
    engine.train_step(batches())
    engine.close()


def test_a_loss_that_fails_is_not_taken() -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    engine, reason = fused(make(), broken)
    assert engine.head.fused is None and reason == "RuntimeError: no such kernel"
    engine.train_step(batches())
    engine.close()


@pytest.mark.parametrize("by", ["hook", "argument"])
def test_what_the_fused_loss_cannot_know_runs_the_models_own_code(by: str) -> None:
    model = make()
    engine, _ = fused(model)
    assert engine.head.fused is not None
    seen: list[Any] = []
    made = batches()
    if by == "hook":
        model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    else:
        own = engine.head.fused._forward
        engine.head.fused._forward = lambda hidden: seen.append(hidden.shape) or own(hidden)  # type: ignore[func-returns-value]
        made = [{**batch, "ignore_index": -100} for batch in made]
    engine.train_step(made)
    assert max(shape[1] for shape in seen) > 1 and all(len(shape) == 3 for shape in seen)
    engine.close()


def test_the_probe_leaves_nothing_behind() -> None:
    model = make()
    model.eval()
    engine = make_engine(model)
    state = torch.get_rng_state()
    engine.head.fuse(fused_losses.right)
    engine.executor.abort_step()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not engine.gradients.squares
    engine.close()
    assert "forward" not in model.get_output_embeddings().__dict__


def test_removing_the_head_gives_the_linear_layer_back() -> None:
    model = make()
    engine, _ = fused(model)
    assert model.lm_head(torch.ones(1, 1, TEXT["hidden_size"])).shape[-1] == VOCABULARY
    engine.head.remove()
    forward = model.lm_head.forward
    while hasattr(forward, "forward"):  # what stands in for it
        forward = forward.forward
    assert engine.head.fused is None and forward.__func__ is nn.Linear.forward
    engine.close()


def test_on_the_cpu_nothing_is_fused() -> None:
    engine = make_engine(make(), kernels="auto")
    assert engine.head.fused is None
    engine.close()
