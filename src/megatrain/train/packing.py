"""How a run's text or examples become rows: `data.packing`."""

import logging
from typing import Any

from megatrain.config import Config
from megatrain.data.examples import Drawn, Examples
from megatrain.data.packing import TokenStream
from megatrain.data.rows import JoinedRows, PackedRows, Rows, SeparateRows, documents_as_examples
from megatrain.errors import ConfigError
from megatrain.model.sequence_chunks import LONG_TOKENS
from megatrain.model.shared_rows import judge_shared_rows

_log = logging.getLogger(__name__)


def rows_of(config: Config, content: TokenStream | Examples | Drawn, model_config: Any, end: int) -> Rows:
    """The rows that the model is trained on. `end`: the end-of-text token.

    Raises ConfigError where data.packing does not suit the model or the data, or there is not one row.
    """
    seq_len, shuffle, seed = config.data.seq_len, config.data.shuffle, config.train.seed
    packing = _resolved(config, content, model_config)
    if packing == "joined":
        assert isinstance(content, TokenStream)
        sequences = content.sequences(seq_len)
        if len(sequences) == 0:
            raise ConfigError(
                f"data.train: {len(content.tokens)} tokens are less than one sequence of data.seq_len = {seq_len}; "
                "give more text or a smaller data.seq_len"
            )
        return JoinedRows(sequences, shuffle=shuffle, seed=seed)
    examples = content if isinstance(content, Examples | Drawn) else documents_as_examples(content, end, seq_len)
    if len(examples) == 0:
        raise ConfigError("data.train: no examples; give at least one")
    longer = int((examples.lengths > seq_len).sum())
    if longer:
        _log.warning(
            "data.seq_len: %d of %d examples are longer than %d tokens and are cut (the longest has %d)",
            *(longer, len(examples), seq_len, int(examples.lengths.max())),
        )
    if packing == "best_fit":
        return PackedRows(examples, seq_len, shuffle=shuffle, seed=seed)
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    counts_padding = bool(getattr(text, "output_router_logits", False))  # in the loss that balances its experts
    return SeparateRows(examples, seq_len, shuffle=shuffle, seed=seed, masked=counts_padding)


def _resolved(config: Config, content: TokenStream | Examples | Drawn, model_config: Any) -> str:
    """data.packing, with auto decided."""
    packing = config.data.packing
    if packing == "auto" and isinstance(content, TokenStream):
        return "joined"
    if packing == "joined" and isinstance(content, Examples | Drawn):
        raise ConfigError("data.packing: joined is wrong; examples are not joined: expected best_fit, none or auto")
    if packing not in ("auto", "best_fit"):
        return packing
    obstacle = _obstacle_to_sharing(config, model_config)
    if obstacle is None:
        return "best_fit"
    if packing == "best_fit":
        raise ConfigError(f"data.packing: best_fit is wrong for this model: {obstacle}; expected none")
    _log.warning("data.packing: none, one example to a row: %s", obstacle)
    return "none"


def _obstacle_to_sharing(config: Config, model_config: Any) -> str | None:
    attention, compiled = config.model.attn_implementation, config.engine.compile != "off"
    found = judge_shared_rows(model_config, attention, compiled=compiled)
    if found.obstacle is None and found.whole_mask is not None and config.data.seq_len > LONG_TOKENS:
        tokens = config.data.seq_len
        return f"its attention would need a mask of {tokens:,} x {tokens:,} ({found.whole_mask})"
    return found.obstacle
