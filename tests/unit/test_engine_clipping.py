"""clip_norm and clip_scope in every combination, and gradients that are not finite."""

import copy
from typing import Any

import pytest
import torch
from reference import PlainTrainer, plain_norm, weight_differences
from test_engine_toys import Net, Output, batches_of, make_batch, make_engine, plain_trainer
from torch import Tensor, nn

import megatrain as mt
from megatrain.errors import NonFiniteGradientError


def clip_units(trainer: PlainTrainer, plain: nn.Module, engine: mt.Engine, limit: float) -> None:
    """Clip every unit's gradient in `plain` by its own norm, and step."""
    for unit in engine.partition.units:
        members = [dict(plain.named_parameters())[slot.name] for slot in unit.slots]
        norm = torch.nn.utils.get_total_norm([p.grad for p in members]).item()
        for parameter in members:
            parameter.grad *= torch.tensor(min(1.0, limit / (norm + 1e-6)), dtype=torch.float32)
    trainer.clip_norm = None
    trainer.update(1.0)


@pytest.mark.parametrize("free", [False, True], ids=["train_step", "free"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("scope", ["global", "unit"])
@pytest.mark.parametrize("limit", [None, 0.2, 1e6])
def test_clipping(limit: float | None, scope: str, micro_batches: int, free: bool) -> None:
    plain, model = Net(), Net()
    engine = make_engine(model, clip_norm=limit, clip_scope=scope)
    trainer = plain_trainer(plain, limit)
    exact = limit is None or limit > 1 or scope == "global"
    for step in range(3):
        batches = batches_of(step, micro_batches)
        trainer.backward(batches)
        norm = plain_norm(plain)
        if free:
            total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
            for batch in batches:
                loss = model(**batch).loss
                loss.backward(torch.full_like(loss, int((batch["labels"][:, 1:] != -100).sum()) / total))
            stats = engine.step()
        else:
            stats = engine.train_step(batches)
        assert stats.grad_norm == pytest.approx(norm, rel=1e-5), "the norm is the one before clipping"
        if limit is not None and scope == "unit":
            clip_units(trainer, plain, engine, limit)
        else:
            trainer.update(stats.grad_norm)
    engine.flush()
    for name, expected in plain.named_parameters():
        found = dict(model.named_parameters())[name]
        if exact:
            assert torch.equal(found, expected), name
        else:  # the units' norms are summed in another order
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_scopes_differ() -> None:
    """Otherwise the test above could not tell them apart."""
    results = []
    for scope in ("global", "unit"):
        engine = make_engine(Net(), clip_norm=0.2, clip_scope=scope)
        for step in range(3):
            engine.train_step([make_batch(step)])
        results.append(engine.model.state_dict()["embed.weight"].clone())
    assert not torch.equal(*results)


class Exploding(Net):
    """Multiplies its loss by `factor`; a gradient of inf or NaN reaches every unit."""

    factor = 1.0

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return Output(super().forward(input_ids, labels).loss * self.factor)


def everything(engine: mt.Engine) -> dict[str, Any]:
    """Copies of all state that a skipped step must leave alone."""
    engine.flush()
    state: dict[str, Any] = {}
    for index, entry in engine.store.slots.items():
        slab, where = entry.slab, entry.slab.range_of(entry.place)
        state[f"weight {index}"] = slab.weight[where].clone()
        state[f"master {index}"] = engine.store.read_master(index)
        state[f"steps {index}"] = torch.tensor(entry.steps)
        state[f"exp_avg {index}"] = slab.state.moments["exp_avg"][where].clone()
        state[f"exp_avg_sq {index}"] = slab.state.moments["exp_avg_sq"][where].clone()
        if slab.state.remainder is not None:
            state[f"remainder {index}"] = slab.state.remainder[where].clone()
    return state


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("free", [False, True], ids=["train_step", "free"])
def test_non_finite_norm_skips_the_step(factor: float, precision: str, free: bool) -> None:
    models = [Exploding(), Exploding()]
    engines = [make_engine(model, precision=precision) for model in models]
    for engine in engines:
        engine.train_step(batches_of(0, 2))
    before = everything(engines[0])
    models[0].factor = factor
    if free:
        models[0](**make_batch(1)).loss.backward()
        stats = engines[0].step()
    else:
        stats = engines[0].train_step(batches_of(1, 2))
    assert stats.skipped and not stats.grad_norm < float("inf")
    assert all(torch.equal(v, everything(engines[0])[name]) for name, v in before.items())
    models[0].factor = 1.0
    losses = [engine.train_step(batches_of(2, 2)).loss for engine in engines]
    assert losses[0] == losses[1]
    after = [everything(engine) for engine in engines]
    assert all(torch.equal(v, after[1][name]) for name, v in after[0].items())


@pytest.mark.parametrize("settings", [{"clip_norm": None}, {"clip_norm": 0.5, "clip_scope": "unit"}])
def test_non_finite_gradient_where_units_are_updated_at_once(settings: dict[str, Any]) -> None:
    model = Exploding()
    engine = make_engine(model, **settings)
    engine.train_step(batches_of(0, 2))
    before = everything(engine)
    model.factor = float("nan")
    with pytest.raises(NonFiniteGradientError, match="head"):
        engine.train_step(batches_of(1, 2))
    # the gradient of the first unit to be updated is not finite: here nothing has changed yet
    assert all(torch.equal(v, everything(engine)[name]) for name, v in before.items())
    model.factor = 1.0
    assert not engine.train_step(batches_of(2, 2)).skipped


def test_one_bad_unit_among_good_ones_is_named() -> None:
    class OneBad(Net):
        bad = False

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = super().hidden(input_ids)
            if self.bad:
                x.register_hook(lambda gradient: gradient * float("inf"))
            return x

    model = OneBad()
    engine = make_engine(model, clip_norm=None)
    model.bad = True
    with pytest.raises(NonFiniteGradientError, match=r"blocks\.1"):
        engine.train_step(batches_of(0, 2))


@pytest.mark.parametrize(("settings", "named"), [
    ({"clip_norm": 0.0}, "clip_norm"),
    ({"clip_norm": -1.0}, "clip_norm"),
    ({"clip_norm": float("nan")}, "clip_norm"),
    ({"clip_scope": "layer"}, "clip_scope"),
    ({"precision": "fp16"}, "precision"),
    ({"device": "tpu"}, "device"),
])  # fmt: skip
def test_wrong_setting_is_named(settings: dict[str, Any], named: str) -> None:
    model = Net()
    with pytest.raises(mt.ConfigError, match=named):
        make_engine(model, **settings)
    make_engine(model)  # the refusal has left nothing behind


def test_gradient_memory_follows_the_scope() -> None:
    """Gradients are kept only where the global norm has to be waited for."""
    for settings, kept in (({}, True), ({"clip_scope": "unit"}, False), ({"clip_norm": None}, False)):
        engine = make_engine(Net(), **settings)
        engine.train_step(batches_of(0, 2))
        held = engine.store.bytes_by_category()["gradients"]
        assert (held > 0) == kept


def test_copy_of_a_trained_model_is_a_plain_model() -> None:
    engine = make_engine(Net())
    engine.train_step(batches_of(0, 2))
    weights = copy.deepcopy(engine.model.state_dict())
    plain = Net()
    plain.load_state_dict(weights)
    assert weight_differences(plain, engine) == []
