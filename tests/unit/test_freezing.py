"""model.freeze: which parameters it means, what they cost, and that they stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEXT, tiny_config
from torch import Tensor

import megatrain as mt
from megatrain.config import parse_config
from megatrain.device.lagged import LaggedDevice
from megatrain.engine import setup
from megatrain.engine.engine import Engine
from megatrain.errors import ConfigError
from megatrain.model.freezing import freeze
from megatrain.model.loading import build_on_meta, initialise
from megatrain.planner.flops import UnitFlops
from megatrain.planner.placement import HOST, Placement, ledger
from megatrain.planner.visits import backward_order
from megatrain.planner.workload import Workload, build_workload
from megatrain.train.build import plan_training
from megatrain.train.model_settings import read_model_settings

LENGTH = 12
LAYERS = TEXT["num_hidden_layers"]


def llama(name: str = "llama") -> Any:
    return initialise(tiny_config(name), 0)


def engine_of(model: Any, patterns: Any = (), **settings: Any) -> Engine:
    chosen = {"device": "cpu", "precision": "fp32", "threads": 1} | settings
    return Engine(model, mt.AdamW(lr=1e-2), freeze=patterns, **chosen)


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 90, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def frozen_names(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


# -- which parameters ---------------------------------------------------------------------------------------------


def test_a_pattern_finds_names_as_in_param_groups() -> None:
    model = build_on_meta(tiny_config("llama"))
    undo = freeze(model, [r"layers\.0\.", "^lm_head"])
    assert frozen_names(model) == {n for n, _ in model.named_parameters() if "layers.0." in n or n == "lm_head.weight"}
    undo()
    assert not frozen_names(model)


def test_a_tied_weight_goes_by_all_of_its_names() -> None:
    model = build_on_meta(tiny_config("llama-tied"))
    freeze(model, "lm_head")
    assert frozen_names(model) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("vision_towr", "model.freeze: 'vision_towr' matches no parameter; did you mean model.vision_tower?"),
        (["lm_head", "zzz"], "'zzz' matches no parameter; their names are such as model.vision_tower"),
        ("(", "model.freeze: '(' is wrong; expected a regular expression"),
        (7, "model.freeze: 7 is wrong; expected a regular expression"),
        (["vision", "."], "leave none of"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(patterns: Any, said: str) -> None:
    model = build_on_meta(tiny_config("llava"))
    with pytest.raises(ConfigError) as refused:
        freeze(model, patterns)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not frozen_names(model)


def test_a_refused_engine_leaves_the_model_as_it_was() -> None:
    model = llama()
    with pytest.raises(ConfigError, match="param_groups"):
        Engine(model, mt.AdamW(param_groups=[{"params": "lm_head*", "lr": 1e-3}]), device="cpu", freeze="lm_head")
    assert not frozen_names(model)


def test_what_is_frozen_can_be_trained_once_the_engine_is_closed() -> None:
    """Two stages, as LLaVA is trained."""
    model = llama()
    with engine_of(model, "layers") as engine:
        engine.train_step([batch()])
        assert frozen_names(model)
    assert not frozen_names(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with engine_of(model, "embed_tokens") as engine:
        engine.train_step([batch()])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys() - {"model.embed_tokens.weight"}


# -- what it costs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_frozen_parameters_take_their_weights_alone(precision: str) -> None:
    model = llama()
    frozen = sum(p.numel() for name, p in model.named_parameters() if "layers" in name)
    with engine_of(llama(), precision=precision) as whole, engine_of(model, "layers", precision=precision) as part:
        saved = {name: n - part.plan.state.get(name, 0) for name, n in whole.plan.state.items()}
        assert saved["weights"] == 0
        assert saved["exp_avg"] == saved["exp_avg_sq"] == 4 * frozen
        assert saved["remainders"] == (2 * frozen if precision == "bf16" else 0)
        assert saved["gradients"] == (2 if precision == "bf16" else 4) * frozen


def test_the_planner_counts_them_so() -> None:
    whole, part = (workload("llama", patterns) for patterns in ((), "layers"))
    frozen = sum(u.parameters for u in whole.units if "layers" in u.name)
    placement = Placement({u.index: HOST for u in whole.homes}, micro_batch=1)
    more, less = (ledger(w, placement, 1, in_host_memory=False, process=0)[HOST] for w in (whole, part))
    assert more["weights"] == less["weights"]
    assert [more[name] - less[name] for name in ("remainders", "moments", "gradients")] == [
        2 * frozen,
        8 * frozen,
        2 * frozen,
    ]


def workload(name: str, patterns: Any) -> Workload:
    return build_workload(tiny_config(name), precision="bf16", seq_len=LENGTH, freeze=patterns)


def test_the_planner_goes_back_as_far_as_something_is_trained() -> None:
    first = r"embed_tokens|layers\.0"
    assert len(backward_order(workload("llama", ()))) == LAYERS + 2  # beside the head: embedding, layers, norm
    assert backward_order(workload("llama", first)) == [LAYERS + 1, LAYERS]
    assert backward_order(workload("llama", "layers"))[-1] == 0  # past frozen layers to the embedding


def test_the_planner_expects_gradients_from_images() -> None:
    """Text alone does not reach the projector, whose gradient passes the frozen language model."""
    work = workload("llava", "vision_tower|language_model|lm_head")
    blocks = [u for u in work.units if "language_model.layers" in u.name]
    assert [(u.flops.trained, u.flops.passes) for u in blocks] == [(False, True)] * LAYERS
    assert {u.index for u in blocks} <= set(backward_order(work))


def test_operations_of_what_is_frozen() -> None:
    whole, passing, without = (
        UnitFlops(10, 4, None, *flags) for flags in ((True, True), (False, True), (False, False))
    )
    products, attention = whole.products_forward(8), whole.attention_forward(8)
    assert whole.backward(8) == 2 * products + 2 * attention
    assert passing.backward(8) == products + 2 * attention
    assert without.backward(8) == 0


@pytest.mark.parametrize("patterns", [r"embed_tokens|layers\.0", "lm_head|norm", r"layers|norm|lm_head"])
def test_bytes_on_the_link_are_those_that_were_planned(patterns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is frozen is fetched for a backward where one passes, and sends no gradient."""
    from test_planner import flat_durations

    from megatrain.planner.simulate import simulate

    config = tiny_config("llama")
    config.num_hidden_layers = 6
    work = build_workload(config, precision="fp32", seq_len=LENGTH, freeze=patterns)
    with engine_of(initialise(config, 0), patterns, device=LaggedDevice("fp32"), keep_graphs="off") as engine:
        ids = batch()["input_ids"][:1]
        steps = [engine.train_step([{"input_ids": ids, "labels": ids}] * 2) for _ in range(4)]
    placement = Placement({u.index: HOST for u in work.homes}, micro_batch=1)
    found = simulate(work, placement, flat_durations(work), 2)
    assert (found.h2d_bytes, found.d2h_bytes) == (steps[-1].h2d_bytes, steps[-1].d2h_bytes)


# -- that they stay -----------------------------------------------------------------------------------------------


def calls_of(module: Any) -> list[bool]:
    """Filled with whether gradients are on, at each run of `module`."""
    found: list[bool] = []
    module.register_forward_pre_hook(lambda *_: found.append(torch.is_grad_enabled()))
    return found


@pytest.mark.parametrize(("patterns", "runs"), [(r"embed_tokens|layers\.0", [False]), (r"layers\.0", [True, True])])
def test_a_frozen_unit_runs_again_only_where_a_gradient_passes(patterns: str, runs: list[bool]) -> None:
    model = llama()
    with engine_of(model, patterns, keep_graphs="off") as engine:
        engine.train_step([batch()])  # which finds out that the model has to run without its caches
        calls = calls_of(model.model.layers[0].mlp)
        engine.train_step([batch()])
    assert calls == runs


def test_a_step_that_reaches_nothing_trained_changes_nothing() -> None:
    """Text without images, where the projector alone is trained: plain PyTorch has no gradient there, either."""
    model = initialise(tiny_config("llava"), 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with engine_of(model, ["vision_tower", "language_model", "lm_head"]) as engine:
        stats = engine.train_step([batch(), batch(1)])
        assert stats.grad_norm == 0.0 and not stats.skipped and stats.loss is not None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("whole", [False, True])
def test_a_loss_without_a_gradient_is_no_error(whole: bool) -> None:
    """Also where the model's own loss is differentiated as a whole."""
    model = initialise(tiny_config("llava"), 0)
    with engine_of(model, ["vision_tower", "language_model", "lm_head"]) as engine:
        if whole:
            engine.head.give_up("so that whole logits are used")
            engine._warned = True
        assert engine.train_step([batch()]).grad_norm == 0.0


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_they_are_saved_and_resumed_bit_for_bit(precision: str, tmp_path: Path) -> None:
    """From a folder in the precision of the run, to a folder and a checkpoint, from which training goes on alike."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    source, patterns = tmp_path / "source", ["embed_tokens", r"layers\.1"]
    start = initialise(tiny_config("llama"), 0, dtype)
    start.save_pretrained(source)
    settings = {"device": "cpu", "precision": precision, "threads": 1, "freeze": patterns}

    def steps(engine: Engine, numbers: range) -> None:
        for number in numbers:
            engine.train_step([batch(number)])

    with Engine.from_pretrained(source, mt.AdamW(lr=1e-2), **settings) as engine:
        steps(engine, range(2))
        engine.save(tmp_path / "checkpoint")
        steps(engine, range(2, 4))
        engine.save_pretrained(tmp_path / "model")
        hashes = engine.unit_hashes()
    from transformers import AutoModelForCausalLM

    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype).named_parameters())
    for name, parameter in start.named_parameters():
        assert torch.equal(saved[name], parameter) == ("embed_tokens" in name or "layers.1" in name), name
    with Engine.from_checkpoint(tmp_path / "checkpoint", mt.AdamW(lr=1e-2), **settings) as engine:
        steps(engine, range(2, 4))
        assert engine.unit_hashes() == hashes
    with pytest.raises(ConfigError, match=r"param_groups: the checkpoint .* other parameters"):
        Engine.from_checkpoint(tmp_path / "checkpoint", mt.AdamW(lr=1e-2), **settings | {"freeze": ["embed_tokens"]})


# -- in a run -----------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "model": {"config": {"model_type": "llama", **TEXT}, "tokenizer": {"train": "bpe", "vocab_size": 300}},
    "data": {"train": "stdlib", "seq_len": LENGTH},
    "train": {"steps": 1},
    "engine": {"device": "cpu", "precision": "fp32"},
}


def run_with(**model: Any) -> Any:
    return parse_config(RUN | {"model": RUN["model"] | model})


def test_a_run_plans_what_is_frozen_without_state() -> None:
    def moments(patterns: Any) -> int:
        config = run_with(freeze=patterns)
        _, planner = plan_training(config, read_model_settings(config), None)
        return sum(slab.moment_bytes for u in planner._workload.homes for slab in u.slabs)

    model = build_on_meta(tiny_config("llama"))
    frozen = sum(p.numel() for name, p in model.named_parameters() if "layers" in name)
    assert moments(None) - moments("layers") == 4 * frozen


@pytest.mark.parametrize(("patterns", "said"), [("layer.0", "did you mean"), (".", "leave none of")])
def test_a_run_is_refused_before_anything_is_read(patterns: str, said: str) -> None:
    config = run_with(freeze=patterns)
    with pytest.raises(ConfigError, match=said):
        plan_training(config, read_model_settings(config), None)


def test_a_group_of_frozen_parameters_is_refused() -> None:
    settings = {**RUN, "optimizer": {"param_groups": [{"match": "lm_head", "lr": 1e-6}]}}
    config = parse_config(settings | {"model": RUN["model"] | {"freeze": "lm_head"}})
    with pytest.raises(ConfigError, match=r"optimizer.param_groups\[0\].match: 'lm_head' matches no parameter"):
        plan_training(config, read_model_settings(config), None)


def test_the_plan_of_a_folder_knows_them() -> None:
    model = build_on_meta(tiny_config("llama"))
    setup.check_plan(model, None, {"device": "cpu", "freeze": "layers"})
    assert frozen_names(model) == {n for n, _ in model.named_parameters() if "layers" in n}
