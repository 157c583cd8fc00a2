"""Attention over blocks of queries: no mask of sequence x sequence, and the same training."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from reference import kept_gradients
from some_of import some_of
from test_engine_toys import make_engine
from test_sequence_chunks import Largest
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    create_sliding_window_causal_mask,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatrain.model import deferred_masks
from megatrain.planner.workload import build_workload

TOKENS, PART, WINDOW = 45, 8, 5
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "gemma2": BOTH_KINDS | {"attn_implementation": "eager"},  # which soft-caps are for
    "gemma3_text": BOTH_KINDS,
    "qwen2": BOTH_KINDS | {"use_sliding_window": True},
    "gpt_oss": BOTH_KINDS | EXPERTS,  # eager, with sinks
    "llama": {},  # without a window
    "llama4_text": EXPERTS | {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 24},
}


def build(kind: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    given = SIZES | {"sliding_window": WINDOW} | KINDS[kind] | settings
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given))
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter)
    return model


def batches(step: int, padding: str, count: int = 2, length: int = TOKENS) -> list[dict[str, Tensor]]:
    """Micro-batches of two sequences; the second sequence of each is padded."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for number in range(count):
        ids = torch.randint(0, 61, (2, length - number), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if padding != "none":
            left_out = slice(0, 11) if padding == "left" else slice(length - number - 11, None)
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][1, left_out] = 0
            batch["labels"][1, left_out] = -100
        made.append(batch)
    return made


Trained = tuple[list[float], float, dict[str, Tensor]]


def train(model: nn.Module, setting: int | None, padding: str = "none", **options: Any) -> Trained:
    """Losses of three steps, norm and gradients of the first."""
    with make_engine(model, sequence_chunk_tokens=setting, **options) as engine:
        first = engine.train_step(batches(0, padding))
        gradients = copy.deepcopy(kept_gradients(engine))
        losses = [first.loss, *(engine.train_step(batches(step, padding)).loss for step in (1, 2))]
        return losses, first.grad_norm, gradients


def assert_same(found: Trained, expected: Trained) -> None:
    """But for rounding: a weight's gradient to 1e-6 of its norm, or 1e-8 of that of all."""
    (losses, norm, gradients), (their_losses, their_norm, theirs) = found, expected
    assert losses == pytest.approx(their_losses, rel=1e-6)
    assert norm == pytest.approx(their_norm, rel=1e-6)
    assert gradients.keys() == theirs.keys()
    for name in theirs:
        error = float((gradients[name] - theirs[name]).norm())
        assert error <= 1e-6 * max(float(theirs[name].norm()), 0.01 * their_norm), name


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the masks that are made: of queries and keys."""
    made: list[tuple[int, ...]] = []
    own = deferred_masks.DeferredMask.of

    def of(self: Any, queries: slice, keys: slice) -> Tensor:
        made.append((queries.stop - queries.start, keys.stop - keys.start))
        return own(self, queries, keys)

    monkeypatch.setattr(deferred_masks.DeferredMask, "of", of)
    return made


# -- the same training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "padding"), some_of(2, KINDS, ("none", "left", "right")))
def test_trains_like_whole_attention(kind: str, padding: str, masks: list[tuple[int, ...]]) -> None:
    with warnings.catch_warnings(record=True) as said:
        found = train(build(kind), PART, padding)
    assert_same(found, train(build(kind), None, padding))
    assert bool(masks) == ((kind, padding) not in (("llama", "none"), ("gemma2", "left")))
    whole = [str(w.message) for w in said if "exists as a whole" in str(w.message) and "mask" in str(w.message)]
    if (kind, padding) == ("gemma2", "left"):  # its code without a kernel averages over all tokens
        assert len(whole) == 1 and "pad on the right" in whole[0]
    else:
        assert not whole
    if kind == "mistral":
        assert set(masks) <= {(q, k) for q in range(PART + 1) for k in range(PART + WINDOW)}


@pytest.mark.parametrize("options", [{"device": "lagged"}, {"keep_graphs": 100}, {"keep_graphs": "off"}], ids=str)
@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss"])
def test_trains_like_whole_attention_elsewhere_and_with_kept_graphs(kind: str, options: dict[str, Any]) -> None:
    """Bit for bit as on the host with recomputation, which the other tests compare with whole attention."""
    losses, norm, gradients = train(build(kind), PART, "right", **options)
    expected, their_norm, theirs = train(build(kind), PART, "right", keep_graphs="off")
    assert (losses, norm) == (expected, their_norm)
    assert all(torch.equal(gradients[name], theirs[name]) for name in theirs)


def test_several_sequences_in_one_stay_apart(masks: list[tuple[int, ...]]) -> None:
    """Positions that begin anew, without a mask: transformers takes them for several sequences. The blocks are those of
    17 tokens and of the 28 that follow, each by itself."""
    batch = batches(0, "none", count=1)[0]
    batch["position_ids"] = torch.cat([torch.arange(17), torch.arange(TOKENS - 17)])[None].expand(2, -1)
    results = []
    for setting in (PART, None):
        with make_engine(build("mistral", use_cache=False), sequence_chunk_tokens=setting) as engine:
            stats = engine.train_step([batch])
            results.append(([stats.loss], stats.grad_norm, copy.deepcopy(kept_gradients(engine))))
    assert_same(*results)
    assert set(masks) == {(8, 8), (8, 12), (1, 5), (4, 8)}


def test_evaluation_runs_over_blocks_too(masks: list[tuple[int, ...]]) -> None:
    batch, losses = batches(0, "right", count=1)[0], []
    for setting in (PART, None):
        with make_engine(build("mistral"), sequence_chunk_tokens=setting) as engine, torch.no_grad():
            losses.append(float(engine.model.eval()(**batch, use_cache=False).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert masks


def test_gradients_in_bf16_are_as_good_as_those_of_whole_attention() -> None:
    """Keys and values get sums over blocks, which add up in fp32."""

    def gradients(precision: str, setting: int | None) -> dict[str, Tensor]:
        _, _, found = train(build("mistral"), setting, precision=precision, clip_norm=1e9)
        return {name: g.float() for name, g in found.items()}

    exact, whole, blocks = gradients("fp32", None), gradients("bf16", None), gradients("bf16", 2)
    for name in exact:
        error = [float((g[name] - exact[name]).norm() / exact[name].norm()) for g in (whole, blocks)]
        assert error[1] < max(1.5 * error[0], 0.01), name


# -- what runs as it did ----------------------------------------------------------------------------------------------


def test_short_sequences_have_the_model_s_own_masks(masks: list[tuple[int, ...]]) -> None:
    """And give the same bits."""
    found, expected = (train(build("mistral"), setting, "left") for setting in (TOKENS, None))
    assert found[:2] == expected[:2]
    assert all(torch.equal(found[2][name], expected[2][name]) for name in expected[2])
    assert masks == []


@pytest.mark.parametrize("settings", [{"attention_dropout": 0.5}, {"output_attentions": True}], ids=str)
def test_what_blocks_cannot_do_runs_with_the_whole_mask(settings: dict[str, Any], masks: list[tuple[int, ...]]) -> None:
    """The same random numbers, the same attention weights; and one warning."""
    eager = settings | {"attn_implementation": "eager"}
    whole = train(build("mistral", **eager), None, keep_graphs="off")
    with pytest.warns(
        UserWarning, match="an attention mask of 4[45] x 4[45] positions exists as a whole: attention"
    ) as said:
        found = train(build("mistral", **eager), PART, keep_graphs="off")
    assert_same(found, whole)
    assert masks == []
    assert len([w for w in said if "exists as a whole: attention" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("beyond", "module", "warning"),
    [
        (0, "transformers.mine", "gives other results for some queries than for all"),
        (10, "mine", "not of transformers"),
    ],
)
def test_attention_that_looks_at_more_than_its_arguments_runs_with_the_whole_mask(
    beyond: int, module: str, warning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias by the number of keys, which differs from block to block; of many keys, where a few would not show it."""
    from transformers.models.mistral import modeling_mistral

    own = modeling_mistral.eager_attention_forward

    def biased(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        return own(module, query, key * max(1, key.shape[2] - beyond) ** 0.5, value, mask, **kwargs)

    biased.__module__ = module
    monkeypatch.setattr(modeling_mistral, "eager_attention_forward", biased)
    with pytest.warns(UserWarning, match=f"biased .*{warning}"):
        found = train(build("mistral", attn_implementation="eager"), PART)
    assert_same(found, train(build("mistral", attn_implementation="eager"), None))


def test_a_model_that_asks_whether_its_mask_is_a_tensor_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mistral.modeling_mistral import MistralAttention

    own = MistralAttention.forward

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        return own(self, hidden_states, attention_mask=mask, **kwargs)

    monkeypatch.setattr(MistralAttention, "forward", forward)
    with pytest.warns(UserWarning, match="MistralAttention asks whether its arguments are tensors"):
        found = train(build("mistral"), PART)
    assert_same(found, train(build("mistral"), None))


def test_code_of_the_model_s_own_gets_the_whole_mask() -> None:
    """What is neither transformers' interface nor knows of blocks: operators, functions, attributes."""
    with make_engine(build("mistral"), sequence_chunk_tokens=PART) as engine:
        mask = make_mask(engine.model.config)
        assert isinstance(mask, deferred_masks.DeferredMask)
        plain = whole_mask(TOKENS, WINDOW)
        assert (mask.shape, mask.dtype, mask.device, mask.ndim) == (plain.shape, plain.dtype, plain.device, 4)
        assert mask.size() == plain.shape and mask.size(-1) == TOKENS and mask.dim() == 4
        states = torch.randn(1, 2, TOKENS, 4)
        attend = torch.nn.functional.scaled_dot_product_attention
        with pytest.warns(UserWarning, match="scaled_dot_product_attention takes it"):
            found = attend(states, states, states, mask)
        assert torch.equal(found, attend(states, states, states, plain))
        assert torch.equal(~mask, ~plain) and torch.equal(mask[:, :, 3], plain[:, :, 3])
        assert torch.equal(states[:, :1, :, :1] * mask, states[:, :1, :, :1] * plain)
        assert torch.equal(torch.where(mask, 1, 0), torch.where(plain, 1, 0))
        assert torch.equal(mask.float(), plain.float()) and torch.equal(
            torch.cat([mask, mask]), torch.cat([plain, plain])
        )


def whole_mask(tokens: int, window: int) -> Tensor:
    function = sliding_window_causal_mask_function(window)
    found: Tensor = sdpa_mask(1, tokens, tokens, mask_function=function, allow_is_causal_skip=False)
    return found


def test_an_inner_model_takes_the_mask_of_an_outer_one() -> None:
    """As transformers hands on masks of four dimensions; asking what kind of array it is does not make it either."""
    with warnings.catch_warnings(), make_engine(build("mistral"), sequence_chunk_tokens=PART) as engine:
        warnings.simplefilter("error")
        mask = make_mask(engine.model.config)
        assert not hasattr(mask, "jax")
        assert make_mask(engine.model.config, mask) is mask


def make_mask(config: Any, given: Any = None) -> Any:
    return create_sliding_window_causal_mask(
        config=config, inputs_embeds=torch.zeros(1, TOKENS, 16), attention_mask=given, past_key_values=None
    )


def test_another_model_s_masks_are_its_own() -> None:
    other = build("mistral")
    with make_engine(build("mistral"), sequence_chunk_tokens=PART):
        assert isinstance(make_mask(other.config), Tensor)


def test_removal_restores() -> None:
    before = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping), dict(vars(ALL_ATTENTION_FUNCTIONS))
    at_first = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]  # sdpa_mask, unless another test's engine was never closed
    model = build("gemma2")
    config = copy.deepcopy(model.config.to_dict()), model.config._attn_implementation
    first, second = make_engine(model, sequence_chunk_tokens=PART), make_engine(build("mistral"))
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_mask
    first.close()
    assert isinstance(make_mask(second.model.config), Tensor)  # 'auto': longer sequences alone
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_mask
    second.close()
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is at_first
    assert before == (ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, vars(ALL_ATTENTION_FUNCTIONS))
    assert config == (model.config.to_dict(), model.config._attn_implementation)
    assert isinstance(make_mask(model.config), Tensor)


# -- which keys a block reaches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (causal_mask_function, (-math.inf, 0)),
        (sliding_window_causal_mask_function(5), (-4, 0)),
        (sliding_window_bidirectional_mask_function(5), (-5, 5)),
        (chunked_causal_mask_function(5, torch.zeros(1)), (-4, 0)),
        (or_masks(sliding_window_causal_mask_function(5), sliding_window_bidirectional_mask_function(2)), (-4, 2)),
        (or_masks(sliding_window_causal_mask_function(5), lambda *_: True), (-math.inf, math.inf)),
        (and_masks(sliding_window_causal_mask_function(5), lambda *_: True), (-4, 0)),
        (lambda *_: True, (-math.inf, math.inf)),
    ],
)
def test_keys_in_reach_of_transformers_mask_functions(function: Any, expected: Any) -> None:
    assert deferred_masks.offsets_of(function) == expected


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("window", [1, 7, 100, 3000])
def test_blocks_hold_every_pair_of_the_mask_and_little_else(window: int, additive: bool) -> None:
    tokens, part, heads = 2048, 512, 4
    owner = deferred_masks.DeferredMasks([], None)
    owner.remove()
    arguments = {"batch_size": 1, "q_length": tokens, "kv_length": tokens, "device": "cpu", "dtype": torch.float32}
    arguments["mask_function"] = sliding_window_causal_mask_function(window)
    mask = deferred_masks.DeferredMask(sdpa_mask, arguments, part, owner, additive=additive)
    whole = whole_mask(tokens, window)
    built, blocks = torch.zeros_like(whole), mask.blocks(heads)
    for rows, keys in blocks:
        built[:, :, rows, keys] = mask.of(rows, keys)
        elements = (rows.stop - rows.start) * (keys.stop - keys.start)
        assert elements * (heads if additive else 1) <= max(part**2, 64 * (tokens + 64) * heads)
    assert torch.equal(built, whole)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "padding"), [("mistral", "none"), ("gemma3_text", "right"), ("gpt_oss", "none")])
def test_no_tensor_of_sequence_by_sequence_exists(kind: str, padding: str) -> None:
    tokens, part = 2048, 256
    batch = {name: t[1:] for name, t in batches(0, padding, count=1, length=tokens)[0].items()}
    model = build(kind, sliding_window=128)
    with make_engine(model, sequence_chunk_tokens=part) as engine:
        for _ in range(2):
            with Largest() as largest:
                engine.train_step([batch])
            assert largest.quadratic(tokens) == []


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_plans_know_of_no_mask_of_sequence_by_sequence(kind: str) -> None:
    tokens, part = 4096, 512
    config = build(kind, sliding_window=128).config
    work = build_workload(config, precision="fp32", seq_len=tokens, sequence_chunk_tokens=part)
    layers = [u for u in work.units if ".layers." in u.name]
    for unit in layers:
        assert unit.held_constants(chunked=False) >= tokens**2
        assert unit.in_parts is not None
        assert unit.held_constants(chunked=True) + unit.in_parts.graph < tokens**2
        assert unit.in_parts.part < unit.graph / 3  # products of a block, of several heads
        assert unit.in_parts.repeated * unit.flops.forward(tokens) >= unit.flops.attention_forward(tokens)
