"""transformers' Trainer on a streamed model: the same weights, or a line that says why not."""

import copy
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import (
    Rows,
    Streamed,
    arguments,
    cheap_collections,
    largest_difference,
    logged,
    make_engine,
    tiny_llama,
    train_both,
)
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

import megatrain as mt
from megatrain.engine.registry import engine_of
from megatrain.trainers import scheduler_state

__all__ = ["cheap_collections"]
pytestmark = pytest.mark.xdist_group("trainers")  # importing trainers takes seconds


def make(**settings: Any) -> Callable[[type[Trainer], Any, Path], Trainer]:
    def trainer(cls: type[Trainer], model: Any, folder: Path) -> Trainer:
        return cls(model=model, args=arguments(folder, **settings), train_dataset=Rows())

    return trainer


# -- the same weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("cpu", {}),
        ("lagged", {"lr_scheduler_type": "linear", "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6}),
        ("lagged", {"bf16": True}),
        ("cpu", {"gradient_checkpointing": True, "use_cache": True}),
    ],
    ids=["accumulation, cosine, decay", "streaming", "autocast", "checkpointing and caches"],
)
def test_weights_are_a_resident_runs(settings: dict[str, Any], device: str, tmp_path: Path) -> None:
    """Bit for bit: rows differ in their numbers of targets, so that accumulation has to weigh by tokens, and dropout
    draws random numbers."""
    resident, streamed = train_both(tmp_path, tiny_llama(attention_dropout=0.3), make(**settings), device=device)
    assert largest_difference(resident.model, streamed.model) == 0.0
    assert largest_difference(streamed.model, tiny_llama()) > 1e-2
    for name in ("loss", "learning_rate"):
        assert logged(streamed, name) == logged(resident, name)
    assert logged(streamed, "grad_norm") == pytest.approx(logged(resident, "grad_norm"), rel=1e-6)


def test_clipping(tmp_path: Path) -> None:
    """The norm is summed in float64 here and in fp32 there, so the factor's last bits differ."""
    resident, streamed = train_both(tmp_path, tiny_llama(), make(max_grad_norm=0.5))
    assert min(logged(resident, "grad_norm")) > 0.5
    assert logged(streamed, "grad_norm") == pytest.approx(logged(resident, "grad_norm"), rel=1e-6)
    assert largest_difference(resident.model, streamed.model) < 1e-6


def test_accumulation_counts_tokens_and_not_micro_batches(tmp_path: Path) -> None:
    trained = []
    for settings in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}):
        trainer = make(max_steps=2, **settings)(Streamed, make_engine(tiny_llama()).model, tmp_path)
        trainer.train()
        trained.append(trainer.model)
    assert largest_difference(*trained) < 1e-6


def test_an_engines_own_optimizer_is_used_as_it_is(tmp_path: Path) -> None:
    optimizer = mt.AdamW(lr=1e-3, betas=(0.5, 0.9), weight_decay=0.3)
    engine = make_engine(tiny_llama(), optimizer=optimizer)
    Streamed(
        model=engine.model,
        args=arguments(tmp_path, lr_scheduler_type="constant", warmup_steps=0),
        train_dataset=Rows(),
        optimizers=(engine.optimizer, None),
    ).train()
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in engine.optimizer.param_groups] == [
        (1e-3, (0.5, 0.9), 0.3),
        (1e-3, (0.5, 0.9), 0.0),
    ]


def test_a_second_trainer_begins_afresh(tmp_path: Path) -> None:
    """As a second Trainer on a resident model does, whose optimizer is new."""
    model = tiny_llama()
    plain = copy.deepcopy(model)
    engine = make_engine(model)
    for folder in ("one", "two"):
        make(max_steps=2)(Trainer, plain, tmp_path / folder).train()
        make(max_steps=2)(Streamed, engine.model, tmp_path / folder).train()
    assert largest_difference(plain, engine.model) == 0.0


def test_a_step_whose_norm_is_not_finite_is_skipped_and_keeps_its_learning_rate(tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                kwargs["model"].lm_head.weight.grad = torch.full_like(kwargs["model"].lm_head.weight, float("inf"))

    engine = make_engine(tiny_llama())
    trainer = Streamed(engine.model, arguments(tmp_path, max_steps=3), train_dataset=Rows(), callbacks=[Spoil()])
    trainer.train()
    assert engine.store.slots[0].steps == 2
    assert logged(trainer, "learning_rate")[2] == logged(trainer, "learning_rate")[1]
    assert all(bool(p.isfinite().all()) for p in engine.model.parameters())


# -- saving, and going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), ("lagged", "bf16")])
def test_a_resumed_run_ends_with_the_same_bits(device: str, precision: str, tmp_path: Path) -> None:
    def run(folder: str, resume: Any = None) -> tuple[mt.Engine, Trainer]:
        engine = make_engine(tiny_llama(attention_dropout=0.3), device, precision)
        trainer = make(save_strategy="steps", save_steps=2)(Streamed, engine.model, tmp_path / folder)
        trainer.train(resume_from_checkpoint=resume)
        return engine, trainer

    straight, _ = run("straight")
    resumed, trainer = run("resumed", resume=str(tmp_path / "straight" / "checkpoint-2"))
    assert trainer.state.global_step == 3
    assert resumed.unit_hashes() == straight.unit_hashes()
    assert resumed.step_count == straight.step_count == 3


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    engine = make_engine(tiny_llama(), precision="bf16")
    make(save_strategy="steps", save_steps=1, max_steps=1)(Streamed, engine.model, tmp_path).train()
    folder = tmp_path / "checkpoint-1"
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "trainer_state.json", "training_args.json", "rng_state.pth"} <= names
    assert not names & {"optimizer.pt", "scheduler.pt", "training_args.bin"}  # pickles
    assert (folder / "model.safetensors").samefile(folder / "megatrain" / "model" / "model.safetensors")
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert largest_difference(loaded, engine.model) == 0.0
    engine.close()


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_scheduler_that_follows_evaluations_is_saved(name: str, tmp_path: Path) -> None:
    """Its best loss begins at inf, which JSON has not. Nothing is learnt, so that the learning rate falls."""

    class Flat(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            metrics["eval_loss"] = 5.0

    settings = {"lr_scheduler_type": name, "lr_scheduler_kwargs": {"patience": 1, "factor": 0.5}, "max_steps": 5}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}

    def run(folder: str, resume: str | None = None) -> tuple[mt.Engine, Trainer]:
        engine = make_engine(tiny_llama())
        args = arguments(tmp_path / folder, **settings)
        trainer = Streamed(engine.model, args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[Flat()])
        trainer.train(resume_from_checkpoint=resume)
        return engine, trainer

    straight, whole = run("straight")
    resumed, rest = run("resumed", str(tmp_path / "straight" / "checkpoint-2"))
    assert len(set(logged(whole, "learning_rate"))) > 1
    assert logged(rest, "learning_rate") == logged(whole, "learning_rate")
    assert resumed.unit_hashes() == straight.unit_hashes()
    assert rest.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()


def test_a_schedulers_state_comes_back_as_it_was() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
    schedules = torch.optim.lr_scheduler
    plateau = schedules.ReduceLROnPlateau(optimizer)
    plateau.step(float("nan"))
    steps = schedules.MultiStepLR(optimizer, [2, 2, 5])
    chain = schedules.SequentialLR(optimizer, [schedules.ConstantLR(optimizer), schedules.StepLR(optimizer, 2)], [3])
    cycle = schedules.OneCycleLR(optimizer, max_lr=1.0, total_steps=9)
    for scheduler in (plateau, steps, chain, cycle):
        state = scheduler.state_dict()
        text = json.dumps(scheduler_state.to_json(state), allow_nan=False)
        found = scheduler_state.from_json(json.loads(text), state)
        assert repr(found) == repr(state)  # nan is not itself
        scheduler.load_state_dict(found)
    assert type(steps.milestones) is Counter and sorted(steps.milestones.elements()) == [2, 2, 5]
    pair = {"pair": (1, (math.inf, -math.inf)), "flag": True, "none": None, "text": "a"}
    assert scheduler_state.from_json(scheduler_state.to_json(pair), pair) == pair


@pytest.mark.parametrize(
    ("encoded", "error", "line"),
    [
        ({"best": {"$float": "1"}}, mt.IntegrityError, r"damaged .*\$float"),
        ({"best": {"$float": math.inf}}, mt.IntegrityError, "damaged"),
        ({"best": {"$call": "x"}}, mt.IntegrityError, "damaged"),
        ({"best": {"$tuple": 3}}, mt.IntegrityError, "damaged"),
        ({"best": {"$counter": [[1]]}}, mt.IntegrityError, "damaged"),
        ({"$float": "inf"}, mt.IntegrityError, "damaged"),
        ({"best": {"a": 1, "$float": "inf"}}, mt.IntegrityError, "damaged"),
        ([], mt.IntegrityError, "damaged"),
        (None, mt.IntegrityError, "damaged"),
        ({"step": 3}, mt.ConfigError, r"has step = 3, which is not there .*lr_scheduler_type"),
        ({"best": "low"}, mt.ConfigError, r"has best = 'low', which is of type float"),
        ({"best": True}, mt.ConfigError, "of type float"),
    ],
)
def test_a_schedulers_state_that_is_not_one_is_refused(encoded: Any, error: type[Exception], line: str) -> None:
    with pytest.raises(error, match=line):
        scheduler_state.from_json(encoded, {"best": 1.0})


def test_the_state_of_another_kind_of_scheduler_changes_nothing(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make(**settings)(Streamed, make_engine(tiny_llama()).model, tmp_path / "cosine").train()
    engine = make_engine(tiny_llama())
    before = engine.unit_hashes()
    trainer = Streamed(
        engine.model,
        arguments(tmp_path / "other", max_steps=2),
        train_dataset=Rows(),
        optimizers=(engine.optimizer, torch.optim.lr_scheduler.ExponentialLR(engine.optimizer, 0.5)),
    )
    with pytest.raises(mt.ConfigError, match=r"lr_lambdas .* not there in this one's"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "cosine" / "checkpoint-1"))
    assert engine.unit_hashes() == before


@pytest.mark.parametrize("value", [torch.device("cpu"), {1: 2}, {"$float": 1}, {1, 2}])
def test_a_scheduler_whose_state_cannot_be_saved_is_refused_before_the_first_step(value: Any, tmp_path: Path) -> None:
    engine = make_engine(tiny_llama())
    scheduler = torch.optim.lr_scheduler.ConstantLR(engine.optimizer)
    scheduler.extra = value

    def trainer(**settings: Any) -> Trainer:
        args = arguments(tmp_path, max_steps=1, **settings)
        return Streamed(engine.model, args, train_dataset=Rows(), optimizers=(engine.optimizer, scheduler))

    with pytest.raises(mt.ConfigError, match=r"lr_scheduler.extra.* cannot be saved; use a scheduler whose"):
        trainer(save_strategy="steps", save_steps=1).train()
    assert engine.step_count == 0
    trainer().train()  # nothing is to be saved
    assert engine.step_count == 1


def test_a_run_may_write_its_checkpoints_again(tmp_path: Path) -> None:
    for _ in range(2):
        engine = make_engine(tiny_llama())
        settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 1}
        make(**settings)(Streamed, engine.model, tmp_path).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert largest_difference(LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-1"), engine.model) == 0.0


def test_going_on_from_a_resident_runs_checkpoint(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    plain = make(**settings)(Trainer, tiny_llama(), tmp_path / "plain")
    plain.train()
    engine = make_engine(tiny_llama())
    resumed = make(**settings)(Streamed, engine.model, tmp_path / "streamed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    assert largest_difference(plain.model, engine.model) == 0.0


def test_the_best_model_comes_back_at_the_end(tmp_path: Path) -> None:
    class Worse(TrainerCallback):
        """From the third step on, what an evaluation finds is worse."""

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            metrics["eval_loss"] = float(state.global_step)

    def trainer(cls: type[Trainer], model: Any, folder: Path) -> Trainer:
        settings = {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 2,
        }
        args = arguments(folder, load_best_model_at_end=True, metric_for_best_model="loss", **settings)
        return cls(model=model, args=args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[Worse()])

    resident, streamed = train_both(tmp_path, tiny_llama(), trainer)
    assert streamed.state.best_model_checkpoint.endswith("checkpoint-1")
    assert largest_difference(resident.model, streamed.model) == 0.0
    assert logged(streamed, "eval_loss") == logged(resident, "eval_loss")


def test_save_model_writes_a_plain_folder_beside_checkpoints(tmp_path: Path) -> None:
    engine = make_engine(tiny_llama())
    trainer = make(save_strategy="steps", save_steps=1, max_steps=1)(Streamed, engine.model, tmp_path)
    trainer.train()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"of another save")
    trainer.save_model()
    assert largest_difference(LlamaForCausalLM.from_pretrained(tmp_path), engine.model) == 0.0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("checkpoint-1", "config.json", "generation_config.json", "model.safetensors", "training_args.json"),
    }
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


# -- refused ------------------------------------------------------------------------------------------------------


def test_a_trainer_without_the_mixin_is_refused(tmp_path: Path) -> None:
    engine = make_engine(tiny_llama())
    before = engine.unit_hashes()
    with pytest.raises(mt.ConfigError, match=r"AdamW was about to update .*StreamedTrainerMixin"):
        make()(Trainer, engine.model, tmp_path).train()
    assert engine.unit_hashes() == before
    engine.close()
    make()(Trainer, engine.model, tmp_path).train()  # it is a plain model again


def test_another_optimizer_over_other_parameters_is_none_of_the_engines_business() -> None:
    engine = make_engine(tiny_llama())
    other = torch.nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    torch.optim.SGD([other], lr=1.0).step()
    assert engine_of(engine.model) is engine and not other.any()
    frozen = next(engine.model.parameters()).requires_grad_(False)
    frozen.requires_grad_(True)
    engine.close()
    assert engine_of(engine.model) is None


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"fp16": True}, r"fp16 is True: .*bf16=True"),
        ({"torch_compile": True}, r"torch_compile is True: .*compile='blocks'"),
        ({"auto_find_batch_size": True}, r"auto_find_batch_size is True: .*per_device_train_batch_size"),
        ({"use_liger_kernel": True}, r"use_liger_kernel is True: .*kernels='liger'"),
        ({"bf16_full_eval": True}, r"bf16_full_eval is True: .*cast"),
        ({"optim": "adafactor"}, r"optim is 'adafactor'; .*adamw_torch"),
        ({"optim_args": "a=1"}, r"optim_args is 'a=1': .*AdamW"),
    ],
)
def test_settings_that_a_streamed_model_cannot_follow(settings: dict[str, Any], line: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for name, value in settings.items():
        setattr(args, name, value)
    with make_engine(tiny_llama()) as engine, pytest.raises(mt.ConfigError, match=line):
        Streamed(model=engine.model, args=args, train_dataset=Rows())


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("fsdp", "full_shard", r"fsdp is 'full_shard': the engine streams"),
        ("deepspeed", {"zero_optimization": {"stage": 3}}, r"deepspeed is .*: the engine streams"),
        ("world_size", 2, r"there are 2 processes"),
        ("n_gpu", 2, r"2 GPUs are visible"),
        ("device", torch.device("cuda", 0), r"the trainer's device is cuda:0, and the engine computes on cpu"),
    ],
)
def test_surroundings_that_a_streamed_model_cannot_follow(name: str, value: Any, line: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    changed = type("Arguments", (type(args),), {name: value})  # some are properties that look at the machine
    args.__class__ = changed
    args.__dict__.pop(name, None)
    with make_engine(tiny_llama()) as engine, pytest.raises(mt.ConfigError, match=line):
        Streamed(model=engine.model, args=args, train_dataset=Rows())


def other_optimizer(engine: mt.Engine) -> dict[str, Any]:
    return {"optimizers": (torch.optim.SGD(engine.model.parameters(), lr=0.1), None)}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (other_optimizer, r"optimizers holds a SGD; pass \(engine.optimizer"),
        (lambda _: {"optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, r"optimizer_cls_and_kwargs is set"),
        (lambda _: {"model_init": tiny_llama}, r"model_init is set"),
        (lambda engine: {"model": engine}, r"model is an Engine; pass engine.model"),
        (lambda _: {"model": "gpt2"}, r"model is 'gpt2'; pass engine.model"),
        (lambda _: {"model": tiny_llama()}, r"model is a LlamaForCausalLM that no open Engine runs"),
        (lambda _: {"engine": make_engine(tiny_llama())}, r"engine is not the one that runs this model"),
        (
            lambda _: {"model": mt.Engine.frozen(tiny_llama(), device="cpu").model},
            r"Engine.frozen, which trains nothing",
        ),
    ],
)
def test_arguments_that_a_streamed_model_cannot_follow(given: Any, line: str, tmp_path: Path) -> None:
    with make_engine(tiny_llama()) as engine, pytest.raises(mt.ConfigError, match=line):
        Streamed(**{"model": engine.model, "args": arguments(tmp_path), "train_dataset": Rows(), **given(engine)})


def test_an_adapter_around_a_streamed_model_is_refused(tmp_path: Path) -> None:
    engine = make_engine(tiny_llama())
    engine.model.peft_config = {}
    with pytest.raises(mt.ConfigError, match=r"PeftModel"):
        Streamed(model=engine.model, args=arguments(tmp_path), train_dataset=Rows())


def test_a_mixin_without_a_trainer_is_refused() -> None:
    with pytest.raises(mt.ConfigError, match=r"no trainer comes after StreamedTrainerMixin"):
        mt.StreamedTrainerMixin(model=None)


@pytest.mark.parametrize("device", ["cpu", "lagged"])
@pytest.mark.parametrize("trainable", [True, False])
def test_freezing_in_the_middle_is_refused(device: str, trainable: bool, tmp_path: Path) -> None:
    class Change(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.model.layers[0].mlp.requires_grad_(trainable)

    model = tiny_llama()
    model.model.layers[0].mlp.requires_grad_(not trainable)
    engine = make_engine(model, device)
    trainer = Streamed(engine.model, arguments(tmp_path), train_dataset=Rows(), callbacks=[Change()])
    now = "trainable" if trainable else "frozen"
    line = rf"model.layers.0.mlp.gate_proj.weight was made {now} after the engine took over; make a new Engine"
    with pytest.raises(mt.IntegrityError, match=line):
        trainer.train()
    assert engine.step_count == 1


@pytest.mark.parametrize(("device", "tied"), [("cpu", False), ("lagged", True)])
def test_another_vocabulary_is_refused_when_it_is_made(device: str, tied: bool) -> None:
    engine, ids = make_engine(tiny_llama(tied), device), torch.arange(6).view(1, 6)
    for module in (engine.model, engine.model.model):
        with pytest.raises(mt.errors.UnsupportedModelError, match=r"96 token embeddings cannot become 128 .*before mt"):
            module.resize_token_embeddings(97, pad_to_multiple_of=64)
    for size in ((), (96,), (95, 32)):  # as it is
        assert engine.model.resize_token_embeddings(*size) is engine.model.get_input_embeddings()
    assert engine.train_step([{"input_ids": ids, "labels": ids}]).loss is not None
    engine.close()
    assert engine.model.resize_token_embeddings(97, mean_resizing=False).num_embeddings == 97


def test_a_module_that_was_replaced_is_named(tmp_path: Path) -> None:
    engine = make_engine(tiny_llama())
    engine.model.lm_head = torch.nn.Linear(32, 96, bias=False)
    with pytest.raises(mt.IntegrityError, match=r"lm_head.weight came after the engine had taken the model over"):
        make()(Streamed, engine.model, tmp_path).train()


# -- parts of the engine that only trainers use ---------------------------------------------------------------------


def test_param_groups_must_hold_each_trained_parameter_once() -> None:
    engine = make_engine(tiny_llama())
    common = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0}
    parameters = list(engine.model.parameters())
    for params in (parameters[1:], [*parameters[:-1], parameters[0]], [*parameters, torch.nn.Parameter(torch.ones(1))]):
        with pytest.raises(mt.ConfigError, match=r"param_groups hold \d+ parameters"):
            engine.set_param_groups([{"params": params, **common}])
    engine.set_param_groups([{"params": parameters, **common}])
    assert len(engine.optimizer.param_groups) == 1


@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_a_frozen_engine_runs_the_model_and_holds_weights_alone(device: str) -> None:
    model, ids = tiny_llama(), torch.arange(6).view(1, 6)
    with torch.no_grad():
        expected = copy.deepcopy(model)(ids).logits
    engine = mt.Engine.frozen(model, device=device, precision="fp32")
    assert torch.equal(engine.model(ids).logits, expected)
    held = engine.memory_report()
    assert sum(held.values()) - held["weights"] < 0.1 * held["weights"], held
    for train in (engine.step, lambda: engine.train_step([{"input_ids": ids, "labels": ids}])):
        with pytest.raises(mt.ConfigError, match=r"Engine.frozen, which trains nothing"):
            train()
