"""Norms and feed-forward over a part of the sequence at a time: what runs so, what must not, and the same training."""

import copy
import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import compare_models
from reference import kept_gradients
from test_engine_random import tiny_llama
from test_engine_toys import WIDTH, Net, make_batch, make_engine
from tiny_models import tiny_config
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import megatrain as mt
from megatrain.errors import ConfigError, UnsupportedModelError
from megatrain.model import sequence_chunks
from megatrain.model.sequence_chunks import ChunkedForward, GradientSums, part_tokens

TOKENS, PART = 23, 6


def text(step: int, count: int = 2, length: int = TOKENS, vocabulary: int = 29) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(0, vocabulary, (1 + n, length - n), generator=generator) for n in range(count)]
    return [{"input_ids": i, "labels": i.clone()} for i in ids]


def tiny_qwen3() -> nn.Module:
    """With norms inside attention, over [batch, tokens, heads, width]."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1))


def in_parts(model: nn.Module) -> list[str]:
    """Names of the modules that have run over parts of a sequence."""
    forwards = {id(f.module): f for f in gc.get_objects() if issubclass(type(f), ChunkedForward) and f.last}
    return [name for name, module in model.named_modules() if id(module) in forwards]


def over_parts(module: nn.Module, part: int) -> None:
    """The same in plain PyTorch: `module` over equal parts, its results put together again."""
    own = module.forward

    def forward(x: Tensor) -> Tensor:
        size = part_tokens(part, x.shape[1])
        return own(x) if size is None else torch.cat([own(p) for p in x.split(size, dim=1)], dim=1)

    module.forward = forward


@pytest.mark.parametrize(
    ("setting", "tokens", "expected"),
    [("auto", 8192, None), ("auto", 8193, 4097), ("auto", 131072, 8192), (None, 10**9, None), (6, 6, None), (6, 7, 4)],
)
def test_parts_are_equal_and_at_most_so_long(setting: Any, tokens: int, expected: int | None) -> None:
    assert part_tokens(setting, tokens) == expected


# -- the same training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "keep_graphs", "device"),
    [
        (tiny_qwen3, "off", "lagged"),
        (tiny_qwen3, 100, "cpu"),
        (tiny_llama, 100, "lagged"),
        pytest.param(tiny_llama, "off", "cpu", marks=pytest.mark.long),
    ],
)
def test_trains_like_plain_pytorch_over_the_same_parts(
    build: Callable[[], nn.Module], keep_graphs: Any, device: str
) -> None:
    """Bit for bit: losses, gradients, norms, weights."""
    plain, mine = build(), build()
    norms = ["input_layernorm", "post_attention_layernorm"] + ["self_attn.q_norm", "self_attn.k_norm"] * (
        build is tiny_qwen3
    )
    names = [f"model.layers.{n}.{name}" for n in range(2) for name in (*norms, "mlp")] + ["model.norm"]
    for name in names:
        over_parts(plain.get_submodule(name), PART)
    found = compare_models(
        plain, mine, text, steps=3, keep_graphs=keep_graphs, device=device, sequence_chunk_tokens=PART
    )
    assert found.equal, found
    assert sorted(in_parts(mine)) == sorted(names)


def test_modules_that_view_several_sequences_as_one_run_in_parts() -> None:
    """GPT-2's products do."""
    results = []
    for setting in (PART, None):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
        with make_engine(model.eval(), sequence_chunk_tokens=setting) as engine:
            ids = text(0)[0]["input_ids"].expand(3, -1)
            results.append(engine.train_step([{"input_ids": ids, "labels": ids}]))
            assert ("transformer.h.0.mlp" in in_parts(model)) == (setting is not None)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-6)


def test_the_reference_over_parts_differs_from_whole_sequences() -> None:
    """In the last bits of weights' gradients, and no more: a reference that did not differ would prove nothing."""
    whole, parts = (
        make_engine(tiny_llama(), sequence_chunk_tokens=None),
        make_engine(tiny_llama(), sequence_chunk_tokens=PART),
    )
    for step in range(3):
        expected, found = whole.train_step(text(step)), parts.train_step(text(step))
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        theirs, mine = kept_gradients(whole), kept_gradients(parts)
        assert any(not torch.equal(mine[name], theirs[name]) for name in theirs)
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-6 * float(expected.grad_norm))
    assert in_parts(whole.model) == []


def test_gradients_in_bf16_are_as_good_as_those_of_whole_sequences() -> None:
    """Parts add up in fp32; against an fp32 run the error stays that of bf16, however many parts there are."""

    def gradients(precision: str, setting: int | None) -> dict[str, Tensor]:
        with make_engine(tiny_llama(), precision=precision, sequence_chunk_tokens=setting, clip_norm=1e9) as engine:
            engine.train_step(text(0, count=1, length=60))
            return {name: g.float() for name, g in kept_gradients(engine).items()}

    exact, whole, parts = gradients("fp32", None), gradients("bf16", None), gradients("bf16", 2)
    for name in exact:
        error = [float((g[name] - exact[name]).norm() / exact[name].norm()) for g in (whole, parts)]
        assert error[1] < max(2 * error[0], 0.01), name


def test_weights_gradients_add_up_in_fp32() -> None:
    sums = GradientSums([torch.zeros(1, dtype=torch.bfloat16)])
    for _ in range(512):
        sums.add([torch.ones(1, dtype=torch.bfloat16)])
    (total,) = sums.rounded()
    assert total is not None and total.dtype == torch.bfloat16
    assert float(total) == 512  # in bf16 the sum stays at 256


def test_a_frozen_feed_forward_passes_its_gradient_on() -> None:
    def train(setting: int | None) -> tuple[float, dict[str, Tensor]]:
        model = tiny_llama()
        model.model.layers[1].mlp.requires_grad_(False)
        with make_engine(model, sequence_chunk_tokens=setting) as engine:
            return engine.train_step(text(0)).grad_norm, kept_gradients(engine)

    (norm, mine), (expected, theirs) = train(PART), train(None)
    assert norm == pytest.approx(expected, rel=1e-6)
    assert mine.keys() == theirs.keys() and not any("layers.1.mlp" in name for name in mine)


def test_evaluation_runs_in_parts_too() -> None:
    model = tiny_llama()
    batch = text(0, count=1)[0]
    expected = model.eval()(**batch).logits
    with make_engine(model, sequence_chunk_tokens=PART) as engine, torch.no_grad():
        found = engine.model(**batch).logits
        assert "model.layers.0.mlp" in in_parts(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_autocast_holds_in_parts_that_are_run_again() -> None:
    """Backward runs outside of it. Plain PyTorch without autocast's cache, which would add up casts of a weight in
    bf16."""
    plain, mine = tiny_llama(), tiny_llama()
    for name in ["mlp", "input_layernorm", "post_attention_layernorm"]:
        for layer in plain.model.layers:
            over_parts(layer.get_submodule(name), PART)
    over_parts(plain.model.norm, PART)
    batch = text(0, count=1)[0]
    with make_engine(mine, sequence_chunk_tokens=PART) as engine:
        for model in (plain, mine):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = model(**batch).loss
            loss.backward()
        for (name, expected), (_, found) in zip(plain.named_parameters(), mine.named_parameters(), strict=True):
            assert torch.equal(expected.grad, found.grad), name
        engine.step()


def test_closing_gives_every_module_its_forward_back() -> None:
    model = tiny_llama()
    engine = make_engine(model, sequence_chunk_tokens=PART)
    engine.train_step(text(0))
    assert any(isinstance(m.__dict__.get("forward"), ChunkedForward) for m in model.modules())
    engine.close()
    assert not any("forward" in m.__dict__ for m in model.modules())


# -- what must see the sequence whole -------------------------------------------------------------------------------


class Wide(nn.Module):
    """A feed-forward that acts token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Dropping(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(F.silu(self.up(x)), 0.1, self.training))


class OverTokens(Wide):
    """Of its neighbours each token gets the mean."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(dim=1, keepdim=True)


class Summing(Wide):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cumsum(dim=1))


class Counting(Wide):
    """Depends on how many tokens there are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / x.shape[1]


class Routing(Wide):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.up(x).topk(2, dim=-1).values
        return super().forward(x) * chosen.sum(dim=-1, keepdim=True)


class Normalising(Wide):
    """With running statistics over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.statistics(x.flatten(0, 1)).view_as(x))


class Remembering(Wide):
    def forward(self, x: Tensor) -> Tensor:
        self.penalty = self.up(x).square().mean()
        return super().forward(x)


class Pairing(Wide):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Looking(Wide):
    """Each token looks at the one so many before it: more than a few random tokens would show."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.pad(x, (0, 0, 12, 0))[:, : x.shape[1]]


class Placing(Wide):
    """Learned positions, which say nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, 4 * TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.places[:, : x.shape[1]])


class Masking(Wide):
    """The last tokens count for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.arange(4 * TOKENS)[:, None] < TOKENS - 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.kept[: x.shape[1]])


class Scaling(Wide):
    """Beyond some length, by how long the sequence is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * max(1.0, math.log(x.shape[1]) / math.log(PART))


class TwoWays(Wide):
    """Called as `across` it is another module; so it is when an attribute says so."""

    across = False

    def forward(self, x: Tensor, across: bool = False) -> Tensor:
        found = super().forward(x)
        return found + x.mean(dim=1, keepdim=True) if across or self.across else found


class Both(nn.Module):
    def __init__(self, by_attribute: bool = False) -> None:
        super().__init__()
        self.inner_way, self.by_attribute = TwoWays(), by_attribute

    def forward(self, x: Tensor) -> Tensor:
        first = self.inner_way(x)
        self.inner_way.across = self.by_attribute
        second = self.inner_way(x) if self.by_attribute else self.inner_way(x, True)
        self.inner_way.across = False
        return first + second


@pytest.mark.parametrize("inner", [Looking, Placing, Masking, Scaling, Both, partial(Both, by_attribute=True)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_few_tokens_would_not_show(inner: Callable[[], nn.Module], precision: str) -> None:
    torch.manual_seed(0)
    model = Net(lambda: Residual(inner))
    results = []
    for each, setting in ((copy.deepcopy(model), None), (model, PART)):
        with make_engine(each, sequence_chunk_tokens=setting, precision=precision) as engine:
            stats = [engine.train_step([make_batch(step, length=TOKENS)]) for step in range(4)]
            results.append([s.loss for s in stats])
    assert results[0] == pytest.approx(results[1], rel=1e-6 if precision == "fp32" else 1e-3)


class Residual(nn.Module):
    """A block that adds what `inner` makes of its input."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.inner = inner()

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(self.mix(x.cumsum(dim=1) / 10))
        return x + (found[0] if isinstance(found, tuple) else found)


@pytest.mark.parametrize("inner", [Dropping, OverTokens, Summing, Counting, Routing, Normalising, Remembering, Pairing])
def test_what_mixes_tokens_or_leaves_something_behind_runs_whole(inner: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Net(lambda: Residual(inner))
    plain = copy.deepcopy(model)
    results = []
    for each, setting in ((plain, None), (model, PART)):
        engine = make_engine(each, sequence_chunk_tokens=setting)
        stats = [engine.train_step([make_batch(step, length=TOKENS)]) for step in range(2)]
        results.append([(s.loss, s.grad_norm) for s in stats])
    assert results[0] == results[1]
    assert not [name for name in in_parts(model) if name.endswith("inner")]
    for (name, expected), (_, found) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(expected, found), name


def test_what_acts_token_by_token_runs_in_parts_whatever_its_name() -> None:
    model = Net(lambda: Residual(Wide))
    with make_engine(model, sequence_chunk_tokens=PART) as engine:
        engine.train_step([make_batch(0, length=TOKENS)])
        assert in_parts(model) == ["blocks.0.inner", "blocks.1.inner"]


def test_dropout_that_is_off_does_not_stand_in_the_way() -> None:
    model = Net(lambda: Residual(Dropping)).eval()
    with make_engine(model, sequence_chunk_tokens=PART) as engine:
        engine.train_step([make_batch(0, length=TOKENS)])
        assert in_parts(model) == ["blocks.0.inner", "blocks.1.inner"]
        model.train()
        first = engine.train_step([make_batch(1, length=TOKENS)])
    with make_engine(model) as engine:
        assert first.skipped is False and engine.train_step([make_batch(2, length=TOKENS)]).loss > 0


def test_a_router_whose_outputs_are_collected_runs_whole() -> None:
    """Its auxiliary loss and every gradient are those of whole sequences; the norms around it run in parts."""

    def train(setting: int | None) -> tuple[Any, dict[str, Tensor], list[str]]:
        torch.manual_seed(0)
        config = tiny_config("mixtral")
        config.output_router_logits, config.router_aux_loss_coef = True, 0.5
        model = AutoModelForCausalLM.from_config(config)
        with make_engine(model, sequence_chunk_tokens=setting) as engine:
            stats = [engine.train_step(text(step)) for step in range(2)]
            return stats, kept_gradients(engine), in_parts(model)

    (mine, gradients, parts), (theirs, expected, _) = train(PART), train(None)
    assert parts and all(name.endswith("norm") for name in parts)
    for found, whole in zip(mine, theirs, strict=True):
        assert found.loss == pytest.approx(whole.loss, rel=1e-6)
        assert found.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    assert float(expected["model.layers.0.mlp.gate.weight"].abs().max()) > 0
    torch.testing.assert_close(
        gradients["model.layers.0.mlp.gate.weight"], expected["model.layers.0.mlp.gate.weight"], rtol=1e-4, atol=1e-6
    )


def test_a_hook_inside_sees_whole_sequences() -> None:
    model = tiny_llama()
    seen: list[int] = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda _m, given, _r: seen.append(given[0].shape[1]))
    with make_engine(model, sequence_chunk_tokens=PART) as engine:
        engine.train_step(text(0, count=1))
        assert "model.layers.0.mlp" not in in_parts(model) and "model.layers.1.mlp" in in_parts(model)
    assert set(seen) == {TOKENS}


def test_a_tensor_that_comes_past_the_arguments_is_refused_as_ever() -> None:
    class Foreign(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale  # type: ignore[operator]

    model = Net(lambda: Residual(Foreign))
    scale = torch.ones((), requires_grad=True)
    for block in model.blocks:
        block.inner.__dict__["scale"] = scale
    with (
        make_engine(model, sequence_chunk_tokens=PART) as engine,
        pytest.raises(UnsupportedModelError, match="not among its arguments"),
    ):
        engine.train_step([make_batch(0, length=TOKENS)])


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [0, -1, 1.5, True, "8192"])
def test_a_wrong_setting_is_refused(setting: Any) -> None:
    with pytest.raises(ConfigError, match=r"engine\.sequence_chunk_tokens is .* a number of tokens > 0, 'auto'"):
        make_engine(Net(), sequence_chunk_tokens=setting)


def test_compiled_blocks_have_no_parts() -> None:
    with pytest.raises(ConfigError, match=r"sequence_chunk_tokens is 6 and engine\.compile 'blocks'"):
        make_engine(Net(), sequence_chunk_tokens=PART, compile="blocks")
    assert mt.engine.setup.resolve_sequence_chunks("auto", "blocks") is None


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_inputs_of_parts_are_gone_when_the_forward_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only units keep their inputs. Counted without the garbage collector: tensors held by a graph are not seen by
    it."""
    seen: list[tuple[str, StorageWeakRef]] = []
    own = sequence_chunks.in_parts

    def note(module: nn.Module, run: Any, hidden: Tensor, part: int) -> Tensor:
        seen.append((type(module).__name__, StorageWeakRef(hidden.untyped_storage())))
        return own(module, run, hidden, part)

    with make_engine(tiny_llama(), sequence_chunk_tokens=PART, keep_graphs="off") as engine:
        for step in range(3):
            engine.train_step(text(step, count=1))
        monkeypatch.setattr(sequence_chunks, "in_parts", note)
        held = engine.head.run_base(text(3, count=1)[0])
        # of each layer the first norm, whose input is the layer's, the second and the feed-forward; the last norm
        assert [name[5:] for name, _ in seen] == ["RMSNorm", "RMSNorm", "MLP"] * 2 + ["RMSNorm"]
        assert [ref.expired() for _, ref in seen] == [False, True, True] * 2 + [False]
        assert held[0].shape[1] == TOKENS
        engine.abort_step(RuntimeError())


class Largest(TorchDispatchMode):
    """Shapes of all tensors that come into being while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, (tuple, list)) else [result]
        self.shapes |= {tuple(t.shape) for t in found if isinstance(t, Tensor) and not t.is_meta}
        return result

    def quadratic(self, tokens: int) -> list[tuple[int, ...]]:
        return [s for s in self.shapes if sum(n >= tokens for n in s) > 1 or torch.Size(s).numel() >= tokens**2]


@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_of_sequence_by_sequence_exists(masked: bool) -> None:
    """Nor one as wide as the feed-forward for all tokens."""
    tokens, part, width = 2048, 256, 64
    model = tiny_llama(max_position_embeddings=tokens, intermediate_size=width, tie_word_embeddings=False)
    batch = text(0, count=1, length=tokens)[0] | ({"attention_mask": torch.ones(1, tokens)} if masked else {})
    with make_engine(model, sequence_chunk_tokens=part) as engine:
        for _ in range(2):
            with Largest() as largest:
                engine.train_step([batch])
            assert largest.quadratic(tokens) == []
            assert not [s for s in largest.shapes if width in s and torch.Size(s).numel() >= tokens * width]
            assert (1, part, width) in largest.shapes


def test_the_watch_notices_attention_that_is_quadratic() -> None:
    tokens = 128
    model = tiny_llama(attn_implementation="eager", max_position_embeddings=tokens)
    with make_engine(model, sequence_chunk_tokens=None) as engine, Largest() as largest:
        engine.train_step(text(0, count=1, length=tokens))
    assert largest.quadratic(tokens)
