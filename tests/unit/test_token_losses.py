"""A loss of log-probabilities trains as plain PyTorch does with whole logits, which never exist."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import gradient_differences, kept_gradients, weight_differences
from test_engine_toys import Net, make_engine
from test_fused_loss import fused
from test_loss_terms import z_loss
from token_losses import make, pairs, plain_dpo, plain_log_probabilities, plain_under, step_of_pairs
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import megatrain as mt
from megatrain.device.lagged import LaggedDevice
from megatrain.losses import DPO, REFERENCE

HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 50.0},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
}


def make_head(name: str) -> nn.Module:
    return make(name.partition(",")[0], **HEADS[name]).train()


def device_of(name: str, precision: str = "fp32") -> Any:
    return LaggedDevice(precision) if name == "lagged" else name


def assert_trains_like_plain(engine: mt.Engine, trainer: Any, steps: int = 3) -> None:
    for step in range(steps):
        batches = step_of_pairs(step)
        with engine.device.computing():  # of bf16 in plain PyTorch, too
            expected = trainer.backward(batches)
        stats = engine.train_step(batches, loss=trainer.loss)
        assert stats.loss == expected, f"step {step}"
        assert gradient_differences(trainer.model, engine) == [], f"step {step}"
        trainer.update(stats.grad_norm)
    assert weight_differences(trainer.model, engine) == []
    engine.close()


@pytest.mark.parametrize("device", ["cpu", "lagged"])
@pytest.mark.parametrize("head", HEADS)
def test_bits_of_plain_pytorch(head: str, device: str) -> None:
    model = make_head(head)
    trainer = plain_under(DPO(), model)
    engine = make_engine(model, device=device_of(device))
    assert engine.head.reason is None
    assert_trains_like_plain(engine, trainer)


@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_bits_of_plain_pytorch_in_bf16(device: str) -> None:
    model = make_head("llama")
    trainer = plain_under(DPO(), model, "bf16")
    assert_trains_like_plain(make_engine(model, device=device_of(device, "bf16"), precision="bf16"), trainer)


@pytest.mark.parametrize("loss", [DPO(0.3, label_smoothing=0.1), DPO(0.1, kind="ipo")], ids=str)
def test_other_losses_of_pairs_with_kept_graphs(loss: DPO) -> None:
    model = make_head("llama")
    trainer = plain_under(loss, model)
    engine = make_engine(model, device="cpu", keep_graphs=4)
    assert_trains_like_plain(engine, trainer)


@pytest.mark.parametrize("head", ["llama, tied", "gemma2", "mixtral"])
def test_in_chunks_sums_over_tokens_round_differently_and_nothing_else(head: str) -> None:
    """Weight gradients of the head and what follows from its hidden states: within 1e-5 of the largest, as stated."""
    model, shapes = make_head(head), set()
    trainer = plain_under(DPO(), model)
    engine = make_engine(model, device="cpu", head_chunk_tokens=7)
    engine.model.get_output_embeddings().register_forward_hook(lambda *a: shapes.add(a[2].shape[:-1].numel()))
    batches = step_of_pairs(0)
    expected = trainer.backward(batches)
    stats = engine.train_step(batches, loss=DPO())
    assert stats.loss == pytest.approx(expected, rel=1e-6)
    found = kept_gradients(engine)
    for name, parameter in trainer.model.named_parameters():
        if name in found:
            bound = 1e-5 * float(parameter.grad.abs().max())
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=bound)
    assert max(shapes) <= 7  # logits of so many tokens at a time
    engine.close()


class _DropoutBefore(LlamaForCausalLM):
    """Dropout between base and head."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(F.dropout(hidden, 0.5, self.training))
        loss = self.loss_function(logits, labels, self.config.vocab_size) if labels is not None else None
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_dropout_before_the_head_is_the_same_in_both_sweeps() -> None:
    model = make_head("llama")
    model.__class__ = _DropoutBefore
    trainer = plain_under(DPO(), model)
    assert_trains_like_plain(make_engine(model, device="cpu"), trainer, steps=2)


# -- whole logits -----------------------------------------------------------------------------------------------------


class _Penalised(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, labels: Any = None, **rest: Any) -> Any:
        output = super().forward(input_ids=input_ids, labels=labels, **rest)
        if labels is not None:
            output.loss = z_loss(self, output, labels)
        return output


@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_what_a_model_adds_to_its_loss_stays_with_whole_logits(device: str) -> None:
    """A penalty on the logits: the loss is put in the place of the model's loss function, in its own forward."""
    model = make_head("llama")
    model.__class__ = _Penalised
    trainer = plain_under(DPO(), model, whole=True)
    engine = make_engine(model, device=device_of(device))
    with pytest.warns(UserWarning, match="exist as a whole"):
        assert_trains_like_plain(engine, trainer)
    assert "loss_function" not in model.__dict__ and "_loss_function" not in model.__dict__


class WithLogits(Net):
    """A module of one's own: its loss is left aside."""

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Any = None) -> Any:
        logits = self.head(self.hidden(input_ids))
        return {"loss": self.loss(logits, labels), "logits": logits}


def test_a_module_of_ones_own() -> None:
    plain, engine = WithLogits(), make_engine(WithLogits(), device="cpu", clip_norm=None)
    batch = {name: entry % 29 if name == "input_ids" else entry for name, entry in pairs(0, 2).items()}
    batch["labels"] = batch["input_ids"].masked_fill(batch["labels"] == -100, -100)
    found = plain_log_probabilities(plain(batch["input_ids"], batch["labels"])["logits"], batch["labels"])
    (plain_dpo(found, batch, DPO()) / 2).backward()
    stats = engine.train_step([batch], loss=DPO())
    assert stats.loss == plain_dpo(found, batch, DPO()).item() / 2
    expected = torch.stack([p.grad.square().sum() for p in plain.parameters()]).sum().sqrt()
    assert stats.grad_norm == pytest.approx(expected.item(), rel=1e-6)
    del batch[REFERENCE]
    assert torch.equal(make_engine(WithLogits(), device="cpu").log_probabilities(batch), found)
    engine.close()


# -- log-probabilities by themselves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_log_probabilities(device: str, chunk: int | None) -> None:
    """Those of the model's forward, in one pass over the weights however many chunks there are."""
    model = make_head("gemma2").eval()
    batch = pairs(0, 2)
    given = {name: entry for name, entry in batch.items() if name not in (REFERENCE, "labels")}
    with torch.no_grad():
        expected = plain_log_probabilities(model(**given).logits, batch["labels"])
    engine = make_engine(model, device=device_of(device), head_chunk_tokens=chunk)
    for _ in range(2):
        before = engine.weights.fetched_bytes
        found = engine.log_probabilities({**given, "labels": batch["labels"]})
        assert engine.weights.fetched_bytes - before == sum(engine.weights.unit_bytes.values())
        assert not found.requires_grad and found.dtype == torch.float32
        if chunk is None:
            assert torch.equal(found.cpu(), expected)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert found[batch["labels"] == -100].abs().sum() == 0
    engine.close()


def test_the_reference_is_what_training_finds_in_its_first_step() -> None:
    model = make_head("llama").eval()
    engine = make_engine(model, device=LaggedDevice("fp32"))
    batch = pairs(0, 3)
    del batch[REFERENCE]
    batch[REFERENCE] = engine.log_probabilities(batch).sum(-1).cpu()
    stats = engine.train_step([batch], loss=DPO())
    assert stats.loss == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-7)
    assert stats.loss_values["rewards/margins"] == stats.loss_values["rewards/chosen"] == 0
    engine.close()


# -- what a loss reports, and what is refused -------------------------------------------------------------------------


class Weighted:
    """Weighted tokens: as short as a loss of one's own can be."""

    inputs = ("weights",)

    def units(self, batch: Mapping[str, Any]) -> float:
        return float(batch["weights"].sum())

    def __call__(self, found: Tensor, targets: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return -(found * batch["weights"]).sum(), {"right": (found.exp() > 0.5).sum(), "targets": targets.sum()}


def test_weighted_tokens_are_a_mean_over_weights_of_all_micro_batches() -> None:
    """With a weight of 1 for each target it is the default loss; micro-batches without weights are left out."""
    batches = [pairs(n, 2) for n in range(3)]
    for batch in batches:
        del batch[REFERENCE]
    default = make_engine(make_head("llama"), device="cpu").train_step(batches)
    for batch in batches:
        batch["weights"] = (batch["labels"] != -100).float()
    stats = make_engine(make_head("llama"), device="cpu").train_step(batches, loss=Weighted())
    assert stats.loss == pytest.approx(default.loss, rel=1e-6)
    assert stats.grad_norm == pytest.approx(default.grad_norm, rel=1e-6)
    assert stats.loss_values["targets"] == 1 and default.loss_values == {}
    batches[1]["weights"] *= 0
    two = make_engine(make_head("llama"), device="cpu").train_step(batches, loss=Weighted())
    rest = make_engine(make_head("llama"), device="cpu").train_step([batches[0], batches[2]], loss=Weighted())
    assert two.loss == pytest.approx(rest.loss, rel=1e-7)


def test_what_dpo_reports() -> None:
    batch = pairs(0, 2)
    model = make_head("llama")
    with torch.no_grad():
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    sums = plain_log_probabilities(output.logits, batch["labels"]).sum(-1)
    rewards = 0.5 * (sums - batch[REFERENCE])
    values = make_engine(model, device="cpu").train_step([batch], loss=DPO(0.5)).loss_values
    chosen, rejected = rewards[::2], rewards[1::2]
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": sums[::2].mean(),
        "logps/rejected": sums[1::2].mean(),
    }
    assert values == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_ligers_fused_head_is_left_aside() -> None:
    engine, _ = fused(make_head("llama"), device="cpu")
    assert engine.head.fused is not None
    trainer = plain_under(DPO(), make_head("llama"))
    assert_trains_like_plain(engine, trainer, steps=1)


class _Constant(Weighted):
    def __call__(self, found: Tensor, *_: Any) -> Any:
        return found.detach().sum(), {}


class _Many(Weighted):
    def __call__(self, found: Tensor, *_: Any) -> Any:
        return found, {}


def _without(name: str) -> dict[str, Tensor]:
    return {key: entry for key, entry in pairs(0).items() if key != name}


@pytest.mark.parametrize(
    ("loss", "batch", "message"),
    [
        (DPO(), _without(REFERENCE), rf"batches\[0\] has no {REFERENCE}, which DPO needs"),
        (DPO(), pairs(0) | {REFERENCE: torch.zeros(2, 2)}, rf"{REFERENCE} is \[2, 2\]; it must be a tensor of \[2\]"),
        (Weighted(), _without("weights"), r"batches\[0\] has no weights, which Weighted needs"),
        (DPO(), {n: e[:1] for n, e in pairs(0).items()}, "labels: 1 rows are no pairs"),
        (_Constant(), pairs(0) | {"weights": torch.ones(2, 12)}, "the sum that _Constant returned has no gradient"),
        (_Many(), pairs(0) | {"weights": torch.ones(2, 12)}, "must be a tensor of one number"),
        (Weighted(), pairs(0) | {"weights": torch.zeros(2, 12)}, "none of the 1 micro-batches has a unit"),
        (Weighted(), pairs(0) | {"weights": -torch.ones(2, 12)}, r"units of batches\[0\] are -24.0"),
    ],
)
def test_wrong_losses_are_named(loss: Any, batch: dict[str, Tensor], message: str) -> None:
    batch = {name: entry for name, entry in batch.items() if name != REFERENCE or isinstance(loss, DPO)}
    engine = make_engine(make_head("llama"), device="cpu")
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    with pytest.raises(mt.ConfigError, match=message):
        engine.train_step([batch], loss=loss)
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    engine.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0; it must be a number above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it must be at least 0 and below 0.5"),
        ({"kind": "hinge"}, "kind is 'hinge'; it must be one of sigmoid, ipo"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "with kind 'ipo' it must be 0"),
    ],
)
def test_settings_of_dpo(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(mt.ConfigError, match=message):
        DPO(**settings)
