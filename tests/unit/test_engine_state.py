"""Taking a model over, reading and writing its state, giving it back; and the memory that it takes."""

import copy
import gc
import io
import mmap
import threading
import time
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import gradient_differences, weight_differences
from test_engine_random import tiny_llama
from test_engine_toys import WIDTH, Block, Net, batches_of, make_batch, make_engine, plain_trainer
from torch import nn

import megatrain as mt
from megatrain.errors import IntegrityError, UnsupportedModelError
from megatrain.memory.limits import HostLimits

# -- reading sees finished updates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["state_dict", "submodule", "flush", "no_grad", "close", "optimizer"])
def test_reading_sees_the_finished_step(read: str) -> None:
    plain, model = Net(), Net()
    engine, trainer = make_engine(model), plain_trainer(plain)
    trainer.backward([make_batch(0)])
    trainer.update(engine.train_step([make_batch(0)]).grad_norm)
    if read == "state_dict":
        found = model.state_dict()
    elif read == "submodule":
        found = {f"blocks.1.{name}": w for name, w in model.blocks[1].state_dict().items()}
    elif read == "no_grad":
        with torch.no_grad():
            assert model(**make_batch(1)).loss == plain(**make_batch(1)).loss
        return
    elif read == "optimizer":
        state = engine.optimizer.state_dict()["state"]
        assert all(s["step"] == 1 and s["exp_avg"].any() for s in state.values())
        assert len(state) == len(list(model.parameters()))
        return
    else:
        engine.flush() if read == "flush" else engine.close()
        found = dict(model.named_parameters())
    expected = plain.state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in found.items())


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_save_pretrained_writes_the_finished_step(precision: str, dtype: str | None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = make_engine(tiny_llama(), precision=precision)
    for step in range(2):
        engine.train_step(batches_of(step, 2))
    engine.save_pretrained(tmp_path, dtype=dtype)  # nobody has flushed
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    written = dtype or precision
    assert loaded.dtype == (torch.float32 if written == "fp32" else torch.bfloat16)
    mine = dict(loaded.named_parameters())
    for index, entry in engine.store.slots.items():
        exact = engine.store.read_master(index)
        found = mine[entry.slot.name]
        if written == "fp32":
            assert torch.equal(found, exact), entry.slot.name
        else:
            torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-30)
    assert not engine.train_step(batches_of(3, 2)).skipped


def test_wrong_save_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(mt.ConfigError, match="fp64"):
        make_engine(tiny_llama()).save_pretrained(tmp_path, dtype="fp64")


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["model", "submodule", "in place"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_goes_on_from_loaded_weights(how: str, precision: str) -> None:
    """Low master bits belonged to the old values; moments and step counts stay, as in PyTorch."""
    engine = make_engine(Net(), precision=precision)
    fresh = make_engine(Net(seed=5).to(torch.bfloat16), precision=precision)
    for step in range(2):
        engine.train_step(batches_of(step, 2))
    fresh.optimizer.load_state_dict(engine.optimizer.state_dict())
    source = {name: w.clone() for name, w in fresh.model.state_dict().items()}
    if how == "model":
        engine.model.load_state_dict(source)
    elif how == "submodule":
        for name, child in engine.model.named_children():
            part = {n[len(name) + 1 :]: w for n, w in source.items() if n.startswith(f"{name}.")}
            child.load_state_dict(part)
    else:
        engine.flush()
        with torch.no_grad():
            for name, parameter in engine.model.named_parameters():
                parameter.copy_(source[name])
    for step in range(2, 4):
        batches = [make_batch(step)]  # without dropout the random stream does not matter
        assert engine.train_step(batches).loss == fresh.train_step(batches).loss
    for one in (engine, fresh):
        one.flush()
    for index, entry in engine.store.slots.items():
        assert torch.equal(engine.store.read_master(index), fresh.store.read_master(index)), entry.slot.name
        assert entry.steps == 4


def test_loading_part_of_the_weights_leaves_the_rest() -> None:
    engine = make_engine(Net(), precision="bf16")
    engine.train_step(batches_of(0, 2))
    engine.flush()
    masters = {e.slot.name: engine.store.read_master(i) for i, e in engine.store.slots.items()}
    engine.model.load_state_dict({"head.weight": torch.zeros(29, WIDTH)}, strict=False)
    for index, entry in engine.store.slots.items():
        expected = torch.zeros(29, WIDTH) if entry.slot.name == "head.weight" else masters[entry.slot.name]
        assert torch.equal(engine.store.read_master(index), expected), entry.slot.name


def test_hook_on_a_parameter_and_unfreezing_are_refused() -> None:
    model = Net()
    model.embed.weight.requires_grad_(False)
    engine = make_engine(model)
    handle = model.head.weight.register_hook(lambda g: g * 0)
    with pytest.raises(IntegrityError, match=r"head.weight .*hook"):
        engine.train_step(batches_of(0, 2))
    handle.remove()
    model.embed.weight.requires_grad_(True)
    with pytest.raises(IntegrityError, match=r"embed.weight .*trainable"):
        engine.train_step(batches_of(0, 2))


def test_zero_grad_of_the_model_discards_gradients() -> None:
    engine, plain = make_engine(Net()), Net()
    engine.model(**make_batch(0)).loss.backward()
    engine.model.zero_grad()
    engine.step()
    engine.flush()
    for (name, mine), (_, own) in zip(engine.model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(mine, own), name


def test_update_in_waiting_does_not_overwrite_loaded_weights() -> None:
    model = Net()
    engine = make_engine(model)
    source = Net(seed=5).state_dict()
    engine.train_step(batches_of(0, 2))
    model.load_state_dict(source)
    engine.flush()
    assert all(torch.equal(w, source[name]) for name, w in model.state_dict().items())


def replace_whole(model: nn.Module) -> None:
    model.load_state_dict(Net(seed=5).state_dict(), assign=True)


def replace_data(model: nn.Module) -> None:
    model.head.weight.data = model.head.weight.data.clone()


def replace_parameter(model: nn.Module) -> None:
    model.blocks[0].up.weight = nn.Parameter(torch.zeros(2 * WIDTH, WIDTH))


@pytest.mark.parametrize("replace", [replace_whole, replace_data, replace_parameter])
@pytest.mark.parametrize("free", [False, True])
def test_replaced_parameters_are_noticed(replace: Any, free: bool) -> None:
    engine = make_engine(Net())
    engine.train_step(batches_of(0, 2))
    replace(engine.model)
    with pytest.raises(mt.IntegrityError, match=r"weight|bias"):
        engine.step() if free else engine.train_step(batches_of(1, 2))


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.extra = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.extra


def new_head(model: nn.Module) -> None:
    model.head = nn.Linear(WIDTH, 29, bias=False)


def adapter_in_a_block(model: nn.Module) -> None:
    model.blocks[1].up = Adapter(model.blocks[1].up)


def new_block(model: nn.Module) -> None:
    model.blocks[1] = Block()


@pytest.mark.parametrize("change", [new_head, adapter_in_a_block, new_block])
@pytest.mark.parametrize("free", [False, True])
def test_parameters_that_come_later_are_noticed(change: Callable[[nn.Module], None], free: bool) -> None:
    """Also after the first steps, in which more is looked at."""
    engine = make_engine(Net())
    for step in range(3):
        engine.train_step(batches_of(step, 1))
    change(engine.model)
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    with pytest.raises(mt.IntegrityError, match=r"parameter (head|blocks.1).* came after .*new Engine"):
        engine.step() if free else engine.train_step(batches_of(3, 1))
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())


def test_frozen_parameters_that_come_later_are_constants() -> None:
    engine, plain = make_engine(Net()), plain_trainer(Net())
    for model in (engine.model, plain.model):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model.head = nn.Linear(WIDTH, 29).requires_grad_(False)
    plain.backward([make_batch(0)])
    plain.update(engine.train_step([make_batch(0)]).grad_norm)
    assert [n for n in weight_differences(plain.model, engine) if n != "head.weight"] == []


def test_param_groups_cannot_be_added() -> None:
    engine = make_engine(Net())
    with pytest.raises(mt.ConfigError, match=r"add_param_group.*param_groups"):
        engine.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def test_optimizer_state_resumes_bit_for_bit() -> None:
    engine = make_engine(Net(dropout=0.3))
    for step in range(2):
        engine.train_step(batches_of(step, 2), lr=3e-3)
    weights = copy.deepcopy(engine.model.state_dict())
    state = copy.deepcopy(engine.optimizer.state_dict())

    other = Net(seed=9, dropout=0.3)
    other.load_state_dict(weights)
    resumed = make_engine(other)
    resumed.optimizer.load_state_dict(state)
    resumed.step_count = engine.step_count
    for step in range(2, 5):
        results = [one.train_step(batches_of(step, 2)) for one in (engine, resumed)]
        assert results[0].loss == results[1].loss and results[0].grad_norm == results[1].grad_norm
    assert [g["lr"] for g in resumed.optimizer.param_groups] == [3e-3] * 2
    expected = engine.model.state_dict()
    assert all(torch.equal(w, expected[name]) for name, w in other.state_dict().items())


def test_optimizer_state_goes_through_a_file_without_pickled_code(tmp_path: Path) -> None:
    engine = make_engine(Net())
    engine.train_step(batches_of(0, 2))
    torch.save(engine.optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    engine.train_step(batches_of(1, 2))
    engine.optimizer.load_state_dict(state)
    held = engine.optimizer.state_dict()["state"]
    for number, saved in state["state"].items():
        assert all(torch.equal(torch.as_tensor(held[number][k]), torch.as_tensor(v)) for k, v in saved.items())


def test_optimizer_state_is_torchs_own_in_shape_and_meaning() -> None:
    """What torch's AdamW saves after the same steps, the engine can load, and the other way round."""
    plain, model = Net(), Net()
    engine, trainer = make_engine(model), plain_trainer(plain)
    trainer.backward([make_batch(0)])
    trainer.update(engine.train_step([make_batch(0)]).grad_norm)
    state = engine.optimizer.state_dict()["state"]
    for number, parameter in enumerate(p for g in engine.optimizer.param_groups for p in g["params"]):
        assert set(state[number]) == {"step", "exp_avg", "exp_avg_sq"}
        assert state[number]["exp_avg"].shape == parameter.shape


def test_optimizer_state_of_another_model_is_refused() -> None:
    with pytest.raises(mt.ConfigError):
        make_engine(Net()).optimizer.load_state_dict(make_engine(Net(count=3)).optimizer.state_dict())


# -- param groups ----------------------------------------------------------------------------------------------------


def test_decay_is_for_two_and_more_dimensions() -> None:
    class Convolving(Block):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Conv1d(WIDTH, WIDTH, 1)

    model = Net(Convolving, count=1)
    engine = make_engine(model)
    decay = {id(p): g["weight_decay"] for g in engine.optimizer.param_groups for p in g["params"]}
    assert {p.ndim for p in model.parameters()} == {1, 2, 3}
    assert all(decay[id(p)] == (0.1 if p.ndim >= 2 else 0.0) for p in model.parameters())


def test_param_groups_by_pattern() -> None:
    groups = [
        {"params": "*.norm.*", "weight_decay": 0.5, "lr": 1e-3},
        {"params": ["embed.*", "*.norm.weight"], "betas": (0.5, 0.6), "eps": 1e-3},
    ]
    model, plain = Net(), Net()
    engine = make_engine(model, optimizer=mt.AdamW(lr=1e-2, weight_decay=0.1, param_groups=groups), clip_norm=None)
    members: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for name, parameter in plain.named_parameters():
        setting = (1e-2, (0.9, 0.95), 1e-8, 0.1 if parameter.ndim >= 2 else 0.0)
        if ".norm." in name:
            setting = (1e-3, (0.9, 0.95), 1e-8, 0.5)
        elif name.startswith("embed."):
            setting = (1e-2, (0.5, 0.6), 1e-3, 0.1)
        members.setdefault(setting, []).append(parameter)
    optimizer = torch.optim.AdamW([
        {"params": p, "lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
        for (lr, betas, eps, decay), p in members.items()
    ])  # fmt: skip
    for step in range(3):
        optimizer.zero_grad()
        plain(**make_batch(step)).loss.backward()
        optimizer.step()
        engine.train_step([make_batch(step)])
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w, plain.state_dict()[name], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("group", "named"), [
    ({"params": "*.nrom.*"}, "nrom"),
    ({"params": []}, r"param_groups\[0\]"),
    ({"lr": 1e-3}, "params"),
    ({"params": "*", "momentum": 0.9}, "momentum"),
    ({"params": "*", "lr": -1.0}, "lr"),
    ({"params": "*", "betas": (0.9, 1.0)}, "betas"),
])  # fmt: skip
def test_wrong_param_group_is_named(group: dict[str, Any], named: str) -> None:
    model = Net()
    with pytest.raises(mt.ConfigError, match=named):
        make_engine(model, optimizer=mt.AdamW(param_groups=[group]))
    make_engine(model)


@pytest.mark.parametrize("values", [
    {"lr": -1.0}, {"lr": float("nan")}, {"betas": (0.9,)}, {"betas": (1.0, 0.9)}, {"eps": 0.0}, {"weight_decay": -0.1},
])  # fmt: skip
def test_wrong_hyper_parameter_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(mt.ConfigError, match=next(iter(values))):
        mt.AdamW(**values)


# -- moves and casts -------------------------------------------------------------------------------------------------


def test_moves_to_where_the_model_is_do_nothing() -> None:
    model = Net()
    engine = make_engine(model)
    for moved in (
        model.to("cpu"),
        model.to(torch.device("cpu")),
        model.to(torch.float32),
        model.to("cpu", torch.float32),
    ):
        assert moved is model
    assert model.blocks[0].to("cpu") is model.blocks[0]
    assert not engine.train_step([make_batch(0)]).skipped


@pytest.mark.parametrize("cast", [
    lambda m: m.to(torch.float16), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(),
    lambda m: m.to("meta"), lambda m: m.cuda(), lambda m: m.to_empty(device="meta"), lambda m: m.type(torch.float64),
    lambda m: m.to("cpu", torch.bfloat16), lambda m: m.to(torch.zeros(1, dtype=torch.float64)),
])  # fmt: skip
@pytest.mark.parametrize("part", ["", "blocks", "blocks.0", "blocks.1.up", "head"])
def test_other_moves_and_casts_are_refused(cast: Any, part: str) -> None:
    model = Net()
    engine = make_engine(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="engine"):
        cast(model.get_submodule(part))
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    assert not engine.train_step([make_batch(0)]).skipped


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: torch.save(module, io.BytesIO())])
@pytest.mark.parametrize("part", ["", "blocks", "blocks.0", "blocks.1.up", "head"])
def test_copies_are_refused_in_one_line_that_says_what_to_do(copied: Any, part: str) -> None:
    model = Net()
    engine = make_engine(model)
    with pytest.raises(UnsupportedModelError, match=r"cannot be copied or pickled\. .*save_pretrained.*state_dict"):
        copied(model.get_submodule(part))
    assert not engine.train_step([make_batch(0)]).skipped
    copied_state = copy.deepcopy(model.state_dict())
    assert all(torch.equal(w, copied_state[name]) for name, w in model.state_dict().items())
    engine.close()
    copied(model.get_submodule(part))


def test_transformers_model_refuses_casts_too() -> None:
    model = tiny_llama()
    make_engine(model)
    assert model.to("cpu") is model
    for cast in (model.half, model.model.half, lambda: model.to(torch.float16)):
        with pytest.raises(UnsupportedModelError):
            cast()
    assert str(model.device) == "cpu"


# -- taking over and giving back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Net, tiny_llama])
def test_closed_engine_gives_the_plain_model_back(make: Any) -> None:
    model, plain = make(), make()
    names = {n: set(vars(m)) for n, m in plain.named_modules()}
    with make_engine(model) as engine:
        engine.train_step(batches_of(0, 2))
    trained = copy.deepcopy(model)
    assert type(model) is type(plain)
    for name, module in model.named_modules():
        assert set(vars(module)) == names[name], name
    plain.load_state_dict(model.state_dict())
    for one in (plain, model, trained):
        one.zero_grad()
        one(**make_batch(1)).loss.backward()
    for expected, first, second in zip(plain.parameters(), model.parameters(), trained.parameters(), strict=True):
        assert torch.equal(expected.grad, first.grad) and torch.equal(expected.grad, second.grad)
    model.half()
    engine.close()  # a second time does nothing


@pytest.mark.parametrize("part", ["whole", "block"])
@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_a_forward_of_the_instances_own_survives_closing(part: str, when: str) -> None:
    model = Net()

    def patch() -> None:
        module = model if part == "whole" else model.blocks[1]
        own = module.forward
        module.forward = lambda *args, **kwargs: doubled(own(*args, **kwargs))

    def doubled(result: Any) -> Any:
        return 2 * (result if isinstance(result, torch.Tensor) else result.loss)

    def loss() -> torch.Tensor:
        result = model(**make_batch(0))
        return result if isinstance(result, torch.Tensor) else result.loss

    if when == "before":
        patch()
    engine = make_engine(model)
    if when != "before":
        patch()
    expected = loss().detach()
    assert expected != Net()(**make_batch(0)).loss
    engine.close()
    assert torch.equal(loss(), expected)
    loss().backward()
    assert model.blocks[0].up.weight.grad is not None


def test_other_methods_of_the_instances_own_survive_closing() -> None:
    model, calls = Net(), []
    model.zero_grad = lambda set_to_none=True: calls.append("zero_grad")
    model.blocks[0].to = lambda *_: calls.append("to")
    make_engine(model).close()
    model.zero_grad()
    model.blocks[0].to("cpu")
    assert calls == ["zero_grad", "to"]


def test_model_can_be_taken_over_again_after_closing() -> None:
    plain, model = Net(), Net()
    trainer = plain_trainer(plain)
    for step in range(3):
        trainer.optimizer.state.clear()  # a new engine starts with new moments
        trainer.step_count = 0
        loss = trainer.backward(batches_of(step, 2))
        with make_engine(model) as engine:
            stats = engine.train_step(batches_of(step, 2))
        assert stats.loss == loss
        trainer.update(stats.grad_norm)
        assert all(torch.equal(w, plain.state_dict()[name]) for name, w in model.state_dict().items())


def test_taking_over_twice_is_refused() -> None:
    model = Net()
    engine = make_engine(model)
    with pytest.raises(mt.ConfigError, match="Engine"):
        make_engine(model)
    assert not engine.train_step([make_batch(0)]).skipped


def test_taking_over_a_part_of_an_owned_model_is_refused() -> None:
    model = Net()
    engine = make_engine(model)
    with pytest.raises(mt.ConfigError):
        make_engine(model.blocks[0])
    assert not engine.train_step([make_batch(0)]).skipped


def test_meta_parameters_are_refused_by_name() -> None:
    model = Net()
    model.head.to("meta")
    before = model.embed.weight.data_ptr()
    with pytest.raises(mt.ConfigError, match=r"head\.weight.*meta"):
        make_engine(model)
    assert model.embed.weight.data_ptr() == before


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters"):
        make_engine(nn.Identity())


def test_wholly_frozen_model_is_refused_or_computes() -> None:
    model = Net()
    model.requires_grad_(False)
    try:
        engine = make_engine(model)
    except mt.ConfigError:
        return
    with torch.no_grad():
        assert engine.model(**make_batch(0)).loss == Net()(**make_batch(0)).loss


# -- memory ----------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatrain.engine.engine as module

    model, plain = Net(), Net()
    monkeypatch.setattr(module, "host_memory_limits", lambda: HostLimits(1 << 30, 100))
    addresses = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(mt.CapacityError) as raised:
        make_engine(model)
    message = str(raised.value)
    assert "\n" not in message
    for word in (
        "missing",
        "weights",
        "exp_avg",
        "exp_avg_sq",
        "gradients",
        f"{sum(p.numel() for p in plain.parameters()):,}",
    ):
        assert word in message
    assert [p.data_ptr() for p in model.parameters()] == addresses
    model.half()  # still a plain model
    monkeypatch.undo()
    make_engine(model.float())


def test_missing_bytes_are_the_plans_less_what_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatrain.engine.engine as module

    plan = make_engine(Net()).plan
    weights = sum(p.nbytes for p in Net().parameters())  # the model's own tensors make room
    needed = plan.total_bytes - weights
    monkeypatch.setattr(module, "host_memory_limits", lambda: HostLimits(1 << 30, needed))
    make_engine(Net())
    monkeypatch.setattr(module, "host_memory_limits", lambda: HostLimits(1 << 30, needed - 1))
    with pytest.raises(mt.CapacityError, match=r"1 B missing"):
        make_engine(Net())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"clip_norm": None}, {"clip_scope": "unit"}])
@pytest.mark.parametrize("frozen", [False, True])
def test_plan_is_what_is_held(precision: str, settings: dict[str, Any], frozen: bool) -> None:
    model = Net()
    if frozen:
        model.blocks[0].requires_grad_(False)
        model.blocks[1].up.requires_grad_(False)
    engine = make_engine(model, precision=precision, **settings)
    engine.train_step(batches_of(0, 2))
    held = engine.store.bytes_by_category()
    for category in ("weights", "remainders", "exp_avg", "exp_avg_sq"):
        assert engine.plan.state[category] == held[category], category
    if not settings:
        assert engine.plan.state["gradients"] == held["gradients"]
    assert held["accumulated"] == 0


def test_state_is_14_bytes_per_parameter_with_clipping_and_12_without() -> None:
    class Wide(Block):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(WIDTH, 16384, bias=False)

    for settings, expected in (({}, 14), ({"clip_norm": None}, 12)):
        engine = make_engine(Net(Wide, count=8), precision="bf16", **settings)
        count = sum(p.numel() for p in engine.model.parameters())
        held = engine.store.bytes_by_category()
        witnesses = held.pop(
            "witnesses"
        )  # two bytes for each row or column: next to nothing, but for matrices like this
        assert witnesses == engine.plan.state["witnesses"]
        assert expected <= sum(held.values()) / count < expected + 0.1


def test_frozen_parameters_carry_no_state() -> None:
    model = Net()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    engine = make_engine(model, precision="bf16")
    held, count = engine.store.bytes_by_category(), model.head.weight.numel()
    assert 4 * count <= held["exp_avg"] < 4 * count + 512  # whole blocks of 256 bytes of weights
    assert 2 * count <= held["remainders"] < 2 * count + 256


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_are_views_of_one_page_aligned_buffer_per_unit(precision: str) -> None:
    model = Net()
    engine = make_engine(model, precision=precision)
    buffers = set()
    for unit in engine.partition.units:
        storages = {s.parameter.untyped_storage().data_ptr(): s.parameter.untyped_storage() for s in unit.slots}
        assert len(storages) == 1, unit.name
        ((start, storage),) = storages.items()
        buffers.add(start)
        assert start % mmap.PAGESIZE == 0
        ends = sorted((s.parameter.data_ptr(), s.parameter.data_ptr() + s.parameter.nbytes) for s in unit.slots)
        assert start <= ends[0][0] and ends[-1][1] <= start + storage.nbytes()
        assert all(b[0] >= a[1] for a, b in pairwise(ends)), "parameters overlap"
        gaps = storage.nbytes() - sum(s.parameter.nbytes for s in unit.slots)
        assert gaps < mmap.PAGESIZE + 256 * len(unit.slots)
        assert all(a[0] % 64 == 0 for a in ends)
        assert all(a[0] % 256 == 0 for a in ends if a[1] - a[0] >= 256)
    assert len(buffers) == len(engine.partition.units)


def test_source_tensors_are_released() -> None:
    import weakref

    model = Net()
    storages = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    make_engine(model)
    assert all(ref() is None for ref in storages)


def test_parameters_keep_their_identity() -> None:
    model = Net()
    before = dict(model.named_parameters())
    engine = make_engine(model)
    engine.train_step(batches_of(0, 2))
    assert all(p is before[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(Net().state_dict())


def test_shared_weights_are_held_once() -> None:
    tied = Net()
    tied.head.weight = tied.embed.weight
    engine, separate = make_engine(tied), make_engine(Net())
    for category in ("weights", "exp_avg", "gradients"):
        difference = separate.plan.state[category] - engine.plan.state[category]
        assert difference >= tied.embed.weight.nbytes


def test_gradients_of_one_engine_do_not_reach_another() -> None:
    first, second, plain = make_engine(Net()), make_engine(Net()), Net()
    plain(**make_batch(1)).loss.backward()
    first.model(**make_batch(0)).loss.backward()
    second.model(**make_batch(1)).loss.backward()
    second.step()
    assert gradient_differences(plain, second) == []
    assert weight_differences(Net(), first) == []


def test_an_engine_dropped_without_close_is_collected_with_its_threads() -> None:
    def names() -> set[str]:
        return {t.name for t in threading.enumerate() if t.name.startswith(("micro-batch", "megatrain"))}

    def use() -> "weakref.ref[mt.Engine]":
        engine = make_engine(Net(), threads=2)
        engine.train_step(batches_of(0, 2))
        return weakref.ref(engine)

    gc.collect()
    before = names()
    dropped = use()
    gc.collect()
    assert dropped() is None
    deadline = time.monotonic() + 5
    while names() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert names() <= before
