"""Which models may be given several documents in a row: tried out on a small one of the same kind."""

from typing import Any

import pytest
from transformers import AutoConfig

from megatrain.model.reduced import reduced_model
from megatrain.model.shared_rows import judge_shared_rows

LAYERS = ["linear_attention", "full_attention"]
CONV = ["conv", "conv", "full_attention"]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt2", "gpt_oss"])
def test_attention_keeps_documents_apart(kind: str) -> None:
    found = judge_shared_rows(AutoConfig.for_model(kind))
    assert (found.obstacle, found.whole_mask) == (None, None)


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("mamba", {}, "MambaMixer"),
        ("lfm2", {"layer_types": CONV * 2, "num_hidden_layers": 6}, "Lfm2ShortConv"),
    ],
)
def test_a_state_that_goes_on_is_named(kind: str, settings: dict[str, Any], name: str) -> None:
    found = judge_shared_rows(AutoConfig.for_model(kind, **settings))
    assert found.obstacle == f"{name} carries a document's state into the next one of its row"


def test_compiled_blocks_have_masks_as_a_whole_and_need_positions_for_them() -> None:
    found = judge_shared_rows(AutoConfig.for_model("llama"), compiled=True)
    assert found.obstacle is None and found.whole_mask == "compiled blocks take tensors for masks"
    found = judge_shared_rows(AutoConfig.for_model("gpt_oss"), compiled=True)  # its own code does not look at them
    assert found.obstacle == "GptOssAttention carries a document's state into the next one of its row"


def test_compiled_blocks_cannot_be_told_documents_for_flash_attention() -> None:
    config = AutoConfig.for_model("llama")
    assert judge_shared_rows(config, "flash_attention_2").obstacle is None
    found = judge_shared_rows(config, "flash_attention_2", compiled=True)
    assert found.obstacle == "compiled blocks cannot be told where documents begin for flash attention"


def test_attention_with_code_of_its_own_needs_the_whole_mask() -> None:
    found = judge_shared_rows(AutoConfig.for_model("bloom"))
    assert found.obstacle is None and found.whole_mask == "add takes it"


def test_what_cannot_be_made_small_is_not_said_to_be_fine() -> None:
    found = judge_shared_rows(AutoConfig.for_model("t5"))
    assert found.obstacle is not None and found.obstacle.startswith("no small t5 could be made to try it out on: ")


def test_a_small_model_has_every_kind_of_layer() -> None:
    config = AutoConfig.for_model("gemma3_text")
    model = reduced_model(config, None)
    assert set(model.config.layer_types) == set(config.layer_types)
    assert model.config.num_hidden_layers == 6 and sum(p.numel() for p in model.parameters()) < 20e6
    assert model.config.sliding_window == 4 and config.sliding_window == 4096
