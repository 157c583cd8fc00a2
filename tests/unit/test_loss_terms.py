"""A term of the loss that head and base cannot give apart is never lost: whole logits take the place of chunks."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import gradient_differences, kept_gradients, placed, weight_differences
from test_engine_random import tiny_llama
from test_engine_toys import batches_of, make_batch, make_engine, plain_trainer
from tiny_models import TEXT
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import megatrain as mt

Term = Callable[[nn.Module, Any, Tensor], Tensor]  # (model, output with the plain loss, labels) -> loss


class _WithTerm(LlamaForCausalLM):
    term: Term | None = None
    own_labels: Callable[[Tensor], Tensor] | None = None

    def forward(self, input_ids: Any = None, labels: Any = None, **rest: Any) -> Any:
        changed = self.own_labels(labels) if self.own_labels is not None and labels is not None else labels
        output = super().forward(input_ids=input_ids, labels=changed, **rest)
        if labels is not None and self.term is not None:
            output.loss = self.term(self, output, labels)
        return output


def models() -> tuple[_WithTerm, _WithTerm]:
    plain, model = tiny_llama(), tiny_llama()
    plain.__class__ = model.__class__ = _WithTerm
    return plain, model  # type: ignore[return-value]


def z_loss(_model: nn.Module, output: Any, _labels: Tensor) -> Tensor:
    return output.loss + 1e-6 * output.logits.logsumexp(-1).square().mean()


TERMS: dict[str, Term] = {
    "penalty": z_loss,
    "penalty, subtracted": lambda _, o, __: o.loss - 1e-3 * o.logits.softmax(-1).square().mean(),
    "penalty in training": lambda m, o, labels: z_loss(m, o, labels) if m.training else o.loss,
    "penalty on long inputs": lambda m, o, labels: z_loss(m, o, labels) if o.logits.shape[1] > 1 else o.loss,
    "without a gradient": lambda _, o, __: o.loss + o.logits.detach().square().mean(),
    "a factor": lambda _, o, __: 2 * o.loss,
    "square": lambda _, o, __: o.loss.square(),
    "exponential": lambda _, o, __: o.loss.exp(),  # of slope 1 at 0
    "twice": lambda _, o, __: o.loss + o.loss,
    "another loss of the head": lambda m, o, _: o.loss + m.lm_head(torch.ones(1, 16)).square().mean(),
    "a second loss": lambda m, o, labels: o.loss + m.loss_function(o.logits, labels, m.config.vocab_size),
    "of every token": lambda _, o, labels: F.cross_entropy(o.logits.flatten(0, 1), labels.flatten()),
    "no loss function": lambda _, o, __: o.logits.square().mean(),
}


def assert_trains_like_plain(plain: nn.Module, model: nn.Module, switch: Callable[[Any], None], **settings: Any) -> str:
    """Every loss, gradient and weight is plain PyTorch's, to the last bit; returns the one warning."""
    micro_batches = settings.pop("micro_batches", 2)
    model.eval()  # as from_pretrained gives it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, trainer = make_engine(model, **settings), plain_trainer(plain, settings.get("clip_norm", 0.5))
        assert engine.head.reason is None  # the probe knows of nothing
        plain.to(engine.device.torch_device)
        for one in (plain, model):
            one.train()
            switch(one)
        for step in range(3):
            batches = batches_of(step, micro_batches)
            loss = trainer.backward(placed(batches, engine.device.torch_device))
            stats = engine.train_step(batches)
            assert stats.loss == loss, f"step {step}"
            assert not engine.keeps_gradients or gradient_differences(plain, engine) == [], f"step {step}"
            trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []
    engine.close()
    assert len(caught) == 1
    return str(caught[0].message)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_that_begins_after_takeover(name: str) -> None:
    plain, model = models()

    def switch(one: Any) -> None:
        one.term = TERMS[name]

    # with two calls of the head in each of two micro-batches, a sum of four has another order
    micro_batches = 1 if name == "another loss of the head" else 2
    message = assert_trains_like_plain(plain, model, switch, micro_batches=micro_batches)
    assert message.startswith("the logits of each micro-batch exist as a whole: ")


@pytest.mark.parametrize("settings", [{"clip_norm": None}, {"device": "lagged"}, {"micro_batches": 1}], ids=str)
@pytest.mark.parametrize("name", ["penalty", "penalty on long inputs"])
def test_a_term_on_other_ways_through_a_step(name: str, settings: dict[str, Any]) -> None:
    def switch(one: Any) -> None:
        one.term = TERMS[name]

    assert_trains_like_plain(*models(), switch, **settings)


def test_a_term_that_is_too_small_for_the_probe() -> None:
    plain, model = models()
    plain.term = model.term = z_loss
    assert "loss_function's result" in assert_trains_like_plain(plain, model, lambda _: None)


def test_labels_that_the_model_changes() -> None:
    def switch(one: Any) -> None:
        one.own_labels = lambda labels: labels.masked_fill(labels % 5 == 0, -100)

    assert "other labels" in assert_trains_like_plain(*models(), switch)


@pytest.mark.parametrize("evaluates", [True, False])
def test_the_probe_is_made_in_both_modes(evaluates: bool) -> None:
    _, model = models()
    model.term = lambda m, o, _: o.loss + 10 * o.logits.square().mean() if m.training == evaluates else o.loss
    model.train(not evaluates)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = make_engine(model)
    assert engine.head.reason is not None and engine.head.reason.startswith("its loss on a probe is")
    assert all(module.training is not evaluates for module in model.modules())
    engine.close()


def test_what_the_base_gives_and_penalties_on_weights_leave_the_head_in_chunks() -> None:
    def term(model: Any, output: Any, _labels: Tensor) -> Tensor:
        return output.loss + 1e-2 * model.lm_head.weight.square().sum()

    plain, model = models()
    engine = make_engine(model, head_chunk_tokens=4)
    plain.term = model.term = term
    batch = make_batch(0)
    loss = plain(**batch).loss
    loss.backward()
    stats = engine.train_step([batch])
    assert engine.head.reason is None
    assert stats.loss == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(kept_gradients(engine)[name], parameter.grad, rtol=1e-4, atol=1e-6)
    engine.close()


@pytest.mark.parametrize("by_argument", [True, False])
def test_an_auxiliary_loss_leaves_the_head_in_chunks(by_argument: bool) -> None:
    """Also where each batch asks for it."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4, output_router_logits=not by_argument))
    plain, engine = copy.deepcopy(model), make_engine(model)
    batch: dict[str, Any] = {**make_batch(0)} | ({"output_router_logits": True} if by_argument else {})
    loss = plain(**batch).loss
    assert loss.item() > plain(**batch | {"output_router_logits": False}).loss.item()
    stats = engine.train_step([batch])
    assert engine.head.reason is None
    assert stats.loss == pytest.approx(loss.item(), rel=1e-6)
    engine.close()


def test_an_error_of_the_batch_is_raised_as_it_is() -> None:
    _, model = models()
    engine = make_engine(model)
    batch = make_batch(0)
    wrong = batch | {"input_ids": batch["input_ids"] + 1000}
    with pytest.raises(IndexError):
        engine.train_step([wrong])
    assert engine.head.reason is None
    engine.train_step([batch])
    engine.close()


def test_what_the_model_does_with_whole_logits_alone_is_scored_with_whole_logits() -> None:
    """An evaluation may come before the first step, which would find that out; it decides nothing for training."""

    class Strict(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **rest: Any) -> Any:
            output = super().forward(input_ids=input_ids, **rest)
            if output.logits.shape[:2] != input_ids.shape:
                raise ValueError("not of all tokens")
            return output

    plain, model = tiny_llama(), tiny_llama()
    model.__class__ = Strict
    engine, batch = make_engine(model.eval()), make_batch(0)
    assert engine.head.reason is None
    found = engine.log_probabilities(batch)
    logits = plain.eval()(input_ids=batch["input_ids"]).logits
    expected = -F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    assert torch.equal(found[:, 1:].flatten(), expected) and engine.head.reason is None


def test_the_fused_head_gives_up_as_well() -> None:
    import fused_losses

    plain, model = models()
    engine, trainer = make_engine(model), plain_trainer(plain)
    engine.head.fuse(fused_losses.right)
    engine.executor.abort_step()
    engine.executor.forget_order()
    assert engine.head.fused is not None
    plain.term = model.term = z_loss
    loss = trainer.backward(batches_of(0, 2))
    with pytest.warns(UserWarning, match="exist as a whole"):
        assert engine.train_step(batches_of(0, 2)).loss == loss
    assert engine.head.fused is None and gradient_differences(plain, engine) == []
    engine.close()


def test_closing_after_giving_up_leaves_the_model_as_it_was() -> None:
    _, model = models()
    engine: mt.Engine = make_engine(model)
    model.term = z_loss
    with pytest.warns(UserWarning, match="exist as a whole"):
        engine.train_step(batches_of(0, 1))
    engine.close()
    assert "forward" not in model.model.__dict__ and "_loss_function" not in model.__dict__
