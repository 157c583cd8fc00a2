"""data.packing: what auto comes to, and what is refused."""

from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from megatrain.config import Config, parse_config
from megatrain.data.examples import Examples
from megatrain.data.packing import TokenStream
from megatrain.data.rows import JoinedRows, PackedRows, SeparateRows
from megatrain.errors import ConfigError
from megatrain.model import shared_rows
from megatrain.train import packing
from megatrain.train.packing import rows_of

END = 1
TEXT = TokenStream(np.array([END, *([5, 6, 7, END] * 20)], np.uint16), 100)
EXAMPLES = Examples(np.arange(60, dtype=np.uint16), np.ones(60, np.bool_), np.arange(0, 61, 6, dtype=np.int64), 100)
LLAMA, MAMBA = AutoConfig.for_model("llama"), AutoConfig.for_model("mamba")
STATE = "MambaMixer carries a document's state into the next one of its row"


def config(setting: str, seq_len: int = 16, **engine: Any) -> Config:
    return parse_config(
        {
            "model": {"path": "somewhere"},
            "data": {"train": "stdlib", "packing": setting, "seq_len": seq_len},
            "train": {"steps": 1},
            "engine": engine,
            "output": "out",
        }
    )


@pytest.mark.parametrize(
    ("setting", "content", "model", "expected"),
    [
        ("auto", TEXT, MAMBA, JoinedRows),
        ("joined", TEXT, MAMBA, JoinedRows),
        ("best_fit", TEXT, LLAMA, PackedRows),
        ("none", TEXT, MAMBA, SeparateRows),
        ("auto", EXAMPLES, LLAMA, PackedRows),
        ("auto", EXAMPLES, MAMBA, SeparateRows),
        ("none", EXAMPLES, LLAMA, SeparateRows),
    ],
)
def test_what_rows_come_of_it(
    setting: str, content: Any, model: Any, expected: type, caplog: pytest.LogCaptureFixture
) -> None:
    assert type(rows_of(config(setting), content, model, END)) is expected
    said = [f"data.packing: none, one example to a row: {STATE}"]
    assert caplog.messages == (said if (setting, expected) == ("auto", SeparateRows) else [])


@pytest.mark.parametrize(
    ("setting", "content", "message"),
    [
        ("best_fit", TEXT, f"data.packing: best_fit is wrong for this model: {STATE}; expected none"),
        ("joined", EXAMPLES, "data.packing: joined is wrong; examples are not joined: expected best_fit, none or auto"),
    ],
)
def test_what_is_refused(setting: str, content: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rows_of(config(setting), content, MAMBA, END)
    assert str(caught.value) == message


def test_a_whole_mask_is_for_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LONG_TOKENS", 32)
    assert type(rows_of(config("best_fit", 32, compile="blocks"), EXAMPLES, LLAMA, END)) is PackedRows
    with pytest.raises(ConfigError, match=r"would need a mask of 33 x 33 \(compiled blocks take tensors for masks\)"):
        rows_of(config("best_fit", 33, compile="blocks"), EXAMPLES, LLAMA, END)
    assert type(rows_of(config("best_fit", 33), EXAMPLES, LLAMA, END)) is PackedRows


def test_no_model_is_tried_out_where_nothing_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "reduced_model", None)
    for setting, content in (("auto", TEXT), ("none", EXAMPLES)):
        rows_of(config(setting), content, LLAMA, END)


def test_longer_examples_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows_of(config("none", 4), EXAMPLES, LLAMA, END)
    assert caplog.messages == [
        "data.seq_len: 10 of 10 examples are longer than 4 tokens and are cut (the longest has 6)"
    ]


def test_experts_that_count_padding_get_a_mask() -> None:
    uneven = Examples(EXAMPLES.tokens, EXAMPLES.targets, np.array([0, 10, 60], np.int64), 100)
    for counted in (False, True):
        model = AutoConfig.for_model("qwen3_moe", output_router_logits=counted)
        batch = rows_of(config("none"), uneven, model, END).batch([(0, 0), (0, 1)])
        assert ("attention_mask" in batch) == counted
