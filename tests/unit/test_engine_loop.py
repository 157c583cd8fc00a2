"""The same engine under the caller's own loop: forward, backward and step are plain PyTorch's."""

import copy
import gc
from typing import Any

import pytest
import torch
from reference import gradient_differences, plain_norm, weight_differences
from test_engine_random import tiny_llama
from test_engine_toys import (
    Net,
    assert_free_loop_like_plain,
    batches_of,
    make_batch,
    make_engine,
    plain_trainer,
)
from torch import Tensor, nn

import megatrain as mt
from megatrain.errors import UnsupportedModelError


def scaled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return 0.5 * model(**batch).loss


def summed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss + 2 * model(**make_batch(77, length=9)).loss


def penalised(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss * model(**batch).loss.detach().sqrt() + 3.0


@pytest.mark.parametrize("loss", [scaled, summed, penalised])
def test_upstream_factors_are_honoured(loss: Any) -> None:
    assert_free_loop_like_plain(Net(), loss)


def test_llama_under_a_free_loop() -> None:
    assert_free_loop_like_plain(tiny_llama(), scaled)


def both(**settings: Any) -> tuple[nn.Module, mt.Engine]:
    return Net(), make_engine(Net(), **settings)


@pytest.mark.parametrize("calls", [2, 3, 4])
def test_gradients_accumulate_over_backward_calls(calls: int) -> None:
    plain, engine = both()
    trainer = plain_trainer(plain)
    for step in range(3):
        for model in (plain, engine.model):
            for batch in batches_of(step, calls):
                (model(**batch).loss / calls).backward()
        stats = engine.step()
        assert stats.grad_norm == pytest.approx(plain_norm(plain), rel=1e-5)
        assert gradient_differences(plain, engine) == [], f"step {step}"
        trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []


def test_backward_calls_in_another_order_than_their_forwards() -> None:
    plain, engine = both()
    for model in (plain, engine.model):
        first, second = (model(**make_batch(n)).loss for n in range(2))
        first.backward()
        second.backward()
    engine.step()
    assert gradient_differences(plain, engine) == []


def test_backward_twice_over_a_retained_graph() -> None:
    plain, engine = both()
    for model in (plain, engine.model):
        loss = model(**make_batch(0)).loss
        loss.backward(retain_graph=True)
        loss.backward()
    engine.step()
    assert gradient_differences(plain, engine) == []


def test_forward_without_backward_then_step() -> None:
    plain, engine = both()
    before = copy.deepcopy(engine.model.state_dict())
    unused = engine.model(**make_batch(1)).loss
    stats = engine.step()
    assert stats.grad_norm == 0
    assert all(torch.equal(before[name], w) for name, w in engine.model.state_dict().items())
    for model in (plain, engine.model):
        model(**make_batch(1))  # dropped at once
        model(**make_batch(0)).loss.backward()
    engine.step()
    assert gradient_differences(plain, engine) == []
    del unused


def test_loss_variable_that_outlives_its_step() -> None:
    """`loss = model(...).loss` frees the old graph only after the new forward."""
    plain, engine = both()
    trainer = plain_trainer(plain)
    loss = engine.model(**make_batch(9)).loss  # never differentiated
    engine.optimizer.zero_grad()
    for step in range(3):
        loss = engine.model(**make_batch(step)).loss
        loss.backward()
        plain(**make_batch(step)).loss.backward()
        stats = engine.step()
        assert gradient_differences(plain, engine) == [], f"step {step}"
        trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []


def test_backward_of_a_forward_from_before_the_step_is_refused() -> None:
    _, engine = both()
    old = engine.model(**make_batch(0)).loss
    engine.model(**make_batch(1)).loss.backward()
    engine.step()
    with pytest.raises(RuntimeError, match="step"):
        old.backward()
    stats = engine.train_step([make_batch(2)])
    assert not stats.skipped


def test_evaluation_between_forward_and_backward() -> None:
    plain, engine = both()
    trainer = plain_trainer(plain)
    for step in range(3):
        values = []
        for model in (plain, engine.model):
            loss = model(**make_batch(step)).loss
            model.eval()
            with torch.no_grad():
                values.append(model(**make_batch(50)).loss.item())
            model.train()
            loss.backward()
        stats = engine.step()
        assert values[0] == values[1]
        assert gradient_differences(plain, engine) == []
        trainer.update(stats.grad_norm)


def test_evaluation_sees_the_finished_step() -> None:
    plain, engine = both()
    trainer = plain_trainer(plain)
    for step in range(3):
        trainer.backward(batches_of(step, 2))
        trainer.update(engine.train_step(batches_of(step, 2)).grad_norm)
        with torch.inference_mode() if step == 1 else torch.no_grad():
            assert engine.model(**make_batch(9)).loss == plain(**make_batch(9)).loss


def test_free_loop_and_train_step_take_turns() -> None:
    plain, engine = both()
    trainer = plain_trainer(plain)
    for step in range(4):
        loss = trainer.backward(batches_of(step, 1))
        if step % 2:
            stats = engine.train_step(batches_of(step, 1))
            assert stats.loss == loss
        else:
            engine.model(**batches_of(step, 1)[0]).loss.backward()
            stats = engine.step()
        assert gradient_differences(plain, engine) == [], f"step {step}"
        trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []


def test_train_step_drops_gradients_gathered_before_it() -> None:
    plain, engine = both()
    plain_trainer(plain).backward([make_batch(1)])
    engine.model(**make_batch(0)).loss.backward()
    engine.train_step([make_batch(1)])
    assert gradient_differences(plain, engine) == []


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_zero_grad_forgets(clip_norm: float | None) -> None:
    plain, engine = both(clip_norm=clip_norm)
    engine.model(**make_batch(0)).loss.backward()
    engine.optimizer.zero_grad()
    for model in (plain, engine.model):
        model(**make_batch(1)).loss.backward()
    trainer = plain_trainer(plain, clip_norm)
    trainer.update(engine.step().grad_norm)
    assert weight_differences(plain, engine) == []


# -- learning rates and the optimizer's face -------------------------------------------------------------------------


def test_learning_rate_of_one_step() -> None:
    plain, engine = both()
    trainer = plain_trainer(plain)
    for step, lr in enumerate((1e-3, 0.0, 5e-2)):
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr
        trainer.backward([make_batch(step)])
        if step % 2:
            stats = engine.train_step([make_batch(step)], lr=lr)
        else:
            engine.model(**make_batch(step)).loss.backward()
            stats = engine.step(lr=lr)
        trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []


def test_a_group_without_a_decay_of_its_own_keeps_vectors_from_decaying() -> None:
    groups = [{"params": "blocks.0.*", "lr": 1e-3}, {"params": "blocks.1.*", "weight_decay": 0.3}]
    _, engine = both(optimizer=mt.AdamW(lr=1e-2, weight_decay=0.1, param_groups=groups))
    decays = {
        (name, group["weight_decay"])
        for group in engine.optimizer.param_groups
        for name, parameter in engine.model.named_parameters()
        if any(parameter is p for p in group["params"])
    }
    assert {("blocks.0.up.weight", 0.1), ("blocks.0.up.bias", 0.0), ("blocks.0.norm.weight", 0.0)} <= decays
    assert {("blocks.1.up.weight", 0.3), ("blocks.1.up.bias", 0.3), ("embed.weight", 0.1)} <= decays


def test_learning_rate_keeps_the_groups_proportions() -> None:
    groups = [{"params": "embed.*", "lr": 1e-3}]
    _, engine = both(optimizer=mt.AdamW(lr=1e-2, param_groups=groups))
    engine.train_step([make_batch(0)], lr=5e-2)
    assert {round(g["lr"], 9) for g in engine.optimizer.param_groups} == {5e-3, 5e-2}


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=6, cycle_momentum=False),
], ids=["lambda", "cosine", "one-cycle"])  # fmt: skip
def test_torch_schedulers(make: Any) -> None:
    plain, engine = both()
    trainer = plain_trainer(plain)
    theirs, ours = make(trainer.optimizer), make(engine.optimizer)
    for step in range(4):
        trainer.backward([make_batch(step)])
        engine.optimizer.zero_grad()
        engine.model(**make_batch(step)).loss.backward()
        norm = float(engine.clip_grad_norm_(0.5))
        engine.optimizer.step()
        trainer.update(norm)
        theirs.step()
        ours.step()
        assert ours.get_last_lr()[0] == theirs.get_last_lr()[0]
    assert weight_differences(plain, engine) == []


def test_optimizer_is_a_torch_optimizer_over_the_models_parameters() -> None:
    _, engine = both()
    assert isinstance(engine.optimizer, torch.optim.Optimizer)
    held = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in engine.model.parameters()}
    plain = Net()
    trainer = plain_trainer(plain)

    def closure() -> Tensor:
        loss = engine.model(**make_batch(0)).loss
        loss.backward()
        return loss

    assert engine.optimizer.step(closure).item() == trainer.backward([make_batch(0)])
    assert gradient_differences(plain, engine) == []
    before = Net().state_dict()
    assert any(not torch.equal(w, before[name]) for name, w in engine.model.state_dict().items())


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_clip_grad_norm(clip_norm: float | None, limit: float) -> None:
    """It returns the norm before clipping, and its limit takes the place of the engine's for this step only."""
    plain, engine = both(clip_norm=clip_norm)
    trainer = plain_trainer(plain)
    for step in range(3):
        trainer.clip_norm = limit if step == 1 else clip_norm
        for model in (plain, engine.model):
            model(**make_batch(step)).loss.backward()
        norm = plain_norm(plain)
        if step == 1:
            returned = engine.clip_grad_norm_(limit)
            assert isinstance(returned, Tensor) and float(returned) == pytest.approx(norm, rel=1e-5)
        stats = engine.step()
        assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
        trainer.update(stats.grad_norm)
        assert weight_differences(plain, engine) == [], f"step {step}"


def test_clip_grad_norm_then_more_backward_calls() -> None:
    plain, engine = both()
    trainer = plain_trainer(plain, clip_norm=0.25)
    for model in (plain, engine.model):
        model(**make_batch(0)).loss.backward()
        if model is engine.model:
            engine.clip_grad_norm_(0.25)
        model(**make_batch(1)).loss.backward()
    stats = engine.step()
    assert stats.grad_norm == pytest.approx(plain_norm(plain), rel=1e-5)
    trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []


# -- errors in between -----------------------------------------------------------------------------------------------


class Failing(Net):
    """Raises `error` in the forward (`where` 'forward') or in the backward of its hidden states, when armed."""

    error: BaseException | None = None
    where = "forward"

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = super().hidden(input_ids)
        if self.error is not None and input_ids.shape[1] == 7:  # the second micro-batch
            if self.where == "forward":
                raise self.error
            x.register_hook(self._fail)
        return x

    def _fail(self, _gradient: Tensor) -> None:
        assert self.error is not None
        raise self.error


class Stop(BaseException):
    pass


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), Stop(), SystemExit(3)], ids=repr)
def test_exception_in_one_micro_batch(where: str, error: BaseException) -> None:
    """It reaches the caller, nothing has changed, and training goes on as if the step had never been tried."""
    model, plain = Failing(), Net()
    engine, trainer = make_engine(model), plain_trainer(plain)
    trainer.backward(batches_of(0, 3))
    trainer.update(engine.train_step(batches_of(0, 3)).grad_norm)
    model.error, model.where = error, where
    with pytest.raises(type(error)) as raised:
        engine.train_step(batches_of(5, 3))
    assert raised.value is error
    model.error = None
    assert weight_differences(plain, engine) == []
    loss = trainer.backward(batches_of(1, 3))
    stats = engine.train_step(batches_of(1, 3))
    assert stats.loss == loss
    assert gradient_differences(plain, engine) == []
    trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []


@pytest.mark.parametrize("settings", [{"clip_norm": None}, {"clip_scope": "unit"}, {}])
def test_free_loop_after_a_failed_step(settings: dict[str, Any]) -> None:
    """The failed step must not leave its way of treating gradients behind: a backward alone changes no weight."""
    model = Failing()
    engine = make_engine(model, **settings)
    model.error = ValueError("x")
    with pytest.raises(ValueError):
        engine.train_step(batches_of(0, 3))
    model.error = None
    before = copy.deepcopy(model.state_dict())
    model(**make_batch(0)).loss.backward()
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    model(**make_batch(1)).loss.backward()
    engine.step()
    assert any(not torch.equal(before[name], w) for name, w in model.state_dict().items())


@pytest.mark.parametrize("clip_norm", [0.5, None])
def test_graph_of_a_failed_step_freed_during_the_next(clip_norm: float | None) -> None:
    """A traceback keeps graphs alive; their end must not be counted against the step that then runs."""
    model, plain = Failing(), Net()
    engine, trainer = make_engine(model, clip_norm=clip_norm), plain_trainer(plain, clip_norm)
    model.error = ValueError("x")
    held: list[Any] = []
    try:
        engine.train_step(batches_of(5, 3))
    except ValueError as error:
        held.append(error)
    model.error = None

    def let_go(*_: Any) -> None:
        model.__dict__.pop("error", None)
        held.clear()
        gc.collect()

    handle = model.head.register_forward_pre_hook(let_go)
    loss = trainer.backward(batches_of(1, 3))
    stats = engine.train_step(batches_of(1, 3))
    handle.remove()
    assert stats.loss == loss
    trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []


def test_failing_forward_in_the_free_loop() -> None:
    model, plain = Failing(), Net()
    engine = make_engine(model)
    model.error = ValueError("x")
    with pytest.raises(ValueError):
        model(**make_batch(0, length=7))
    model.error = None
    for one in (plain, model):
        one(**make_batch(1)).loss.backward()
    engine.step()
    assert gradient_differences(plain, engine) == []


# -- generate and caches ---------------------------------------------------------------------------------------------


def test_generate_equals_the_plain_model_before_and_after_training() -> None:
    model = tiny_llama()
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model), plain_trainer(plain)
    trainer.whole_loss = False
    prompt = torch.arange(3, 11).view(2, 4)
    for step in range(3):
        outputs = [
            one.eval().generate(
                prompt, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True,
                pad_token_id=0,
            )
            for one in (plain, model)
        ]  # fmt: skip
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-6, atol=1e-6)
        plain.train()
        model.train()
        trainer.backward([make_batch(step)])
        trainer.update(engine.train_step([make_batch(step)]).grad_norm)


def test_filled_cache_is_refused_with_gradients_on() -> None:
    model = tiny_llama()
    engine = make_engine(model)
    batch = make_batch(0)
    with torch.no_grad():
        cache = model(batch["input_ids"][:, :3], use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match="cache"):
        model(batch["input_ids"][:, 3:], past_key_values=cache)
    with torch.no_grad():
        model(batch["input_ids"][:, 3:], past_key_values=cache)
    assert cache.get_seq_length() == batch["input_ids"].shape[1]
    assert not engine.train_step([batch]).skipped


def test_weights_pass_twice_however_many_micro_batches() -> None:
    for count in (1, 2, 6):
        engine = make_engine(Net(count=4), keep_graphs="off")
        engine.train_step(batches_of(0, count))
        passes = engine.train_step(batches_of(1, count)).weight_passes
        assert 1.5 <= passes <= 2, count  # the head's weights stay from forward to backward


def test_statistics_of_a_step() -> None:
    _, engine = both()
    batches = batches_of(0, 3)
    stats = engine.train_step(batches)
    assert stats.target_tokens == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    assert stats.seconds > 0 and not stats.skipped and stats.h2d_bytes == stats.d2h_bytes == 0


@pytest.mark.parametrize("settings", [{}, {"clip_norm": None}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_another_default_device_changes_nothing(device: str, precision: str, settings: dict[str, Any]) -> None:
    """What the engine has on the host says so; a user's default is for the user's own tensors."""
    model, other = Net(count=3), Net(count=3)
    batches = [batches_of(step, 2) for step in range(4)]
    weights = []
    for one, default in ((model, "cpu"), (other, "meta")):
        with torch.device(default):
            engine = make_engine(one, device=device, precision=precision, **settings)
            for step in range(3):
                engine.train_step(batches[step])
            for batch in batches[3]:
                engine.model(**batch).loss.backward()
            assert engine.clip_grad_norm_(1.0).device.type == "cpu"
            engine.step()
            assert all(v.device.type == "cpu" for s in engine.optimizer_state().values() for v in s.values())
            weights.append([p.detach().clone() for p in one.parameters()])
            engine.close()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
