"""Several documents in a row: the same training as each by itself, and nothing of one in another."""

import copy
import warnings
from typing import Any

import pytest
import torch
from reference import kept_gradients
from test_blockwise_attention import SIZES, build
from test_engine_toys import make_engine
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatrain.errors import UnsupportedModelError
from megatrain.model import deferred_masks
from megatrain.model.head import IGNORED

ROWS = [[9, 14, 1, 6], [22, 8], [5, 5, 5, 15]]  # lengths of documents; the window of some models is 5
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    | {"resid_pdrop": 0.0},
}
KINDS = ["llama", "mistral", "gemma3_text", "gemma2", "gpt_oss", "llama4_text", *OTHERS]


def make(kind: str, **settings: Any) -> nn.Module:
    if kind not in OTHERS:
        return build(kind, **settings)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | OTHERS[kind] | settings)))
    return model


def documents(row: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + row)
    return [torch.randint(0, 61, (length,), generator=generator) for length in ROWS[row]]


def row_of(given: list[Tensor]) -> dict[str, Tensor]:
    labels = [torch.cat([torch.tensor([IGNORED]), ids[1:]]) for ids in given]
    positions = [torch.arange(len(ids)) for ids in given]
    columns = {"input_ids": given, "labels": labels, "position_ids": positions}
    return {name: torch.cat(parts)[None] for name, parts in columns.items()}


def packed(seed: int = 0) -> list[dict[str, Tensor]]:
    """Micro-batches of different shapes: one row, and two of one length."""
    rows = [row_of(documents(number, seed)) for number in range(len(ROWS))]
    return [rows[0], {name: torch.cat([rows[1][name], rows[2][name]]) for name in rows[0]}]


Trained = tuple[float, dict[str, Tensor]]


def trained_packed(model: nn.Module, **settings: Any) -> Trained:
    with warnings.catch_warnings(), make_engine(model, **({"clip_norm": 1e9} | settings)) as engine:
        warnings.simplefilter("ignore")  # of whole logits, in llama4
        stats = engine.train_step(packed())
        return stats.loss, copy.deepcopy(kept_gradients(engine))


def trained_apart(model: nn.Module) -> Trained:
    """In plain PyTorch, one document after the other."""
    given = [ids[None] for row in range(len(ROWS)) for ids in documents(row) if len(ids) > 1]
    targets, total = sum(ids.shape[1] - 1 for ids in given), 0.0
    for ids in given:
        loss = model.train()(input_ids=ids, labels=ids).loss * ((ids.shape[1] - 1) / targets)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: Trained, expected: Trained) -> None:
    """But for fp32's rounding: sums over the tokens of a weight's gradient are taken in another order. A gradient to
    1e-6 of its norm, or of a hundredth of that of all."""
    (loss, gradients), (their_loss, theirs) = found, expected
    assert loss == pytest.approx(their_loss, rel=1e-6)
    assert gradients.keys() == theirs.keys()
    whole = float(torch.stack([g.norm() for g in theirs.values()]).norm())
    for name in theirs:
        error = float((gradients[name] - theirs[name]).norm())
        assert error <= 1e-6 * max(float(theirs[name].norm()), 0.01 * whole), name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_documents_train_like_documents_apart(kind: str) -> None:
    assert_close(trained_packed(make(kind)), trained_apart(make(kind)))


@pytest.mark.parametrize(
    "settings",
    [
        {"device": "lagged", "keep_graphs": "off"},
        {"device": "lagged", "keep_graphs": 9},
        {"keep_graphs": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["gemma3_text", "gpt_oss"])
def test_elsewhere_and_with_kept_graphs_bits_are_the_same(kind: str, settings: dict[str, Any]) -> None:
    loss, gradients = trained_packed(make(kind), **settings)
    expected, theirs = trained_packed(make(kind), keep_graphs="off")
    assert loss == expected
    assert all(torch.equal(gradients[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("settings", [{"sequence_chunk_tokens": 8}, {"head_chunk_tokens": 7}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss"])
def test_in_parts_it_is_the_same_training(kind: str, settings: dict[str, Any]) -> None:
    assert_close(trained_packed(make(kind), **settings), trained_apart(make(kind)))


# -- nothing of one in another ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_another_first_document_changes_no_bit_of_the_others(kind: str, chunk_tokens: int | None) -> None:
    first = ROWS[0][0]
    with make_engine(make(kind), sequence_chunk_tokens=chunk_tokens) as engine, torch.no_grad():
        engine.model.eval()
        given = documents(0)
        found, other = (
            engine.model(**row_of([one, *given[1:]])).logits[0] for one in (given[0], documents(0, seed=1)[0])
        )
    assert torch.equal(found[first:], other[first:])
    assert not torch.equal(found[:first], other[:first])


def test_the_first_token_of_a_document_is_nobodys_target() -> None:
    """The labels say so, and not the model: with one at a border, it is counted."""
    batch = row_of(documents(0))
    with make_engine(make("llama")) as engine:
        targets = engine.train_step([batch]).target_tokens
        batch["labels"][0, ROWS[0][0]] = 3
        assert targets == sum(n - 1 for n in ROWS[0]) == engine.train_step([batch]).target_tokens - 1


@pytest.fixture(autouse=True)
def no_other_engines() -> None:
    """Those that other tests have left open: masks are their functions' until the last one closes."""
    for each in list(deferred_masks._open):
        each.remove()


# -- without a mask of row x row ------------------------------------------------------------------------------------


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Queries of the masks that are made."""
    made: list[int] = []
    for name in ("sdpa", "eager"):
        own = ALL_MASK_ATTENTION_FUNCTIONS[name]

        def make_mask(own: Any = own, **arguments: Any) -> Any:
            found = own(**arguments)
            if found is not None:
                made.append(found.shape[2])
            return found

        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, make_mask)
        monkeypatch.setattr(f"transformers.masking_utils.{own.__name__}", make_mask)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_is_larger_than_a_document(kind: str, masks: list[int]) -> None:
    trained_packed(make(kind))
    assert max(masks, default=0) <= max(max(lengths) for lengths in ROWS)
    if kind in ("gemma3_text", "gemma2", "gpt_oss"):
        assert max(masks) == 22  # of a window, or of eager code
    if kind in ("llama", "qwen3", "gpt2"):
        assert 22 not in masks  # causal, and no more


def test_a_mask_of_row_x_row_is_for_short_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of bloom is its own code, which adds the mask."""
    sizes = {"vocab_size": 61, "hidden_size": 16, "n_head": 4, "n_layer": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes))
    assert_close(trained_packed(copy.deepcopy(model)), trained_apart(copy.deepcopy(model)))
    monkeypatch.setattr(deferred_masks, "LONG_TOKENS", 16)
    with pytest.raises(
        UnsupportedModelError, match=r"share a row of 30 tokens would need a mask of 30 x 30: add takes"
    ):
        trained_packed(model)


# -- flash attention ------------------------------------------------------------------------------------------------


def flash_by_documents(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **given: Any
) -> Any:
    """What transformers' flash attention does with the borders of documents: rows follow each other."""
    assert mask is None
    starts = given["cu_seq_lens_q"]
    assert starts.dtype == torch.int32 and torch.equal(starts, given["cu_seq_lens_k"])
    lengths = starts.diff().tolist()
    assert given["max_length_q"] == given["max_length_k"] == max(lengths)
    flat = [s.transpose(1, 2).reshape(-1, s.shape[1], s.shape[3]) for s in (query, key, value)]
    found = []
    for parts in zip(*(s.split(lengths) for s in flat), strict=True):
        q, k, v = (p.transpose(0, 1)[None] for p in parts)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        found.append(attended[0].transpose(0, 1))
    return torch.cat(found).view(query.shape[0], query.shape[2], query.shape[1], -1), None


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_flash_attention_is_told_the_borders_of_all_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers itself looks for them in a single row alone."""
    masking, attention = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, ALL_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(masking, "flash_by_documents", masking["flash_attention_2"])
    monkeypatch.setitem(attention, "flash_by_documents", flash_by_documents)
    model = make(kind)
    model.config._attn_implementation_internal = "flash_by_documents"
    assert_close(trained_packed(model), trained_apart(make(kind)))
