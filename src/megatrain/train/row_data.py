"""From a run's settings to examples: the sources' rows, the tokenizer and its chat template, the cache."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.config import Config
from megatrain.data.chat_template import ChatTemplate, TemplateSyntaxError
from megatrain.data.encode import EncoderSettings, encoder_settings
from megatrain.data.examples import Examples, PreferenceExamples
from megatrain.data.formats import Layout
from megatrain.data.mixture import Mixture, copies_of, mixed, say_counts
from megatrain.data.packing import TokenStream
from megatrain.data.row_source import Source
from megatrain.data.text_tokens import tokenise_texts
from megatrain.data.token_files import TokenCache, cache_folder
from megatrain.data.tokenising import Enough, Tokenised, tokenise
from megatrain.data.workers import is_small
from megatrain.errors import ConfigError

_TEMPLATE = "data.chat_template"


@dataclass(frozen=True)
class RowData:
    """An epoch's examples, and what they come from."""

    examples: Examples | PreferenceExamples
    sources: list[Tokenised]
    said: list[str]


def prepare_rows(config: Config, mixture: Mixture, tokenizer: Any) -> RowData:
    """The examples of all sources. Raises ConfigError where there is none, and where rows or settings are wrong."""
    sources = [_tokenised(config, source, tokenizer) for source in mixture.sources]
    said = []
    for number, one in enumerate(sources):
        in_epoch = len(copies_of(len(one.examples), one.source, config.train.seed, number))
        said += say_counts(one, in_epoch, mixture.key)
    examples = mixed(sources, config.train.seed)
    if len(examples) == 0:
        raise ConfigError(f"{mixture.key}: no example in {mixture.described} has a target; give data that has")
    return RowData(examples, sources, said)


def _tokenised(config: Config, source: Source, tokenizer: Any) -> Tokenised:
    data = config.data
    return tokenise(
        source,
        settings_of(config, source.layout, tokenizer, source.described),
        bad_rows=data.bad_rows,
        workers=data.workers,
        cache=_cache_of(config, source),
        enough=enough_of(config) if source.key == "data.train" else None,
    )


def prepare_texts(config: Config, mixture: Mixture, tokenizer: Any) -> TokenStream:
    """The documents of all sources, as one stream. Raises ConfigError where they are wrong."""
    streaming = mixture.key == "data.train" and all(source.streaming for source in mixture.sources)
    enough = enough_of(config) if streaming else None
    return tokenise_texts(
        mixture.sources,
        tokenizer,
        bad_rows=config.data.bad_rows,
        workers=config.data.workers,
        cache_of=partial(_cache_of, config),
        enough=None if enough is None else enough.tokens + 1,
    )


def _cache_of(config: Config, source: Source) -> TokenCache:
    setting = config.data.cache
    kept = setting not in ("auto", "off") or (setting == "auto" and not is_small(source))
    return TokenCache(cache_folder(setting) if kept else None)


def enough_of(config: Config) -> Enough | None:
    """How much a run of a given number of steps can use; None where that depends on how much there is."""
    steps = config.planned_steps
    if steps is None:
        return None
    return Enough(steps * config.tokens_per_step, steps * config.tokens_per_step // config.data.seq_len)


def settings_of(config: Config, layout: Layout, tokenizer: Any, described: str) -> EncoderSettings:
    """How rows are encoded. Raises ConfigError."""
    everything = config.data.train_on == "all"
    template = chat_template(tokenizer)
    if template is None and layout.format in ("messages", "alpaca", "sharegpt"):
        raise ConfigError(
            f"{_TEMPLATE}: the tokenizer has none, and {described!r} is in format {layout.format}; give one, as a file "
            "or as text"
        )
    try:
        return encoder_settings(
            tokenizer, layout, template=template, seq_len=config.data.seq_len, everything=everything
        )
    except ValueError as error:
        raise ConfigError(f"model.tokenizer: {error}; give a folder with a tokenizer.json") from None


def give_chat_template(config: Config, tokenizer: Any) -> None:
    """Give the tokenizer the template of data.chat_template, with which it is then saved. Raises ConfigError."""
    setting = config.data.chat_template
    if setting is None:
        return
    tokenizer.chat_template = _template_text(setting)
    template = chat_template(tokenizer)
    assert template is not None
    try:
        template.check()
    except TemplateSyntaxError as error:
        raise ConfigError(f"{_TEMPLATE}: it is no Jinja template: {error}") from None


def _template_text(setting: str) -> str:
    path = Path(os.path.expanduser(setting))
    if os.path.isfile(path):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise ConfigError(f"{_TEMPLATE}: cannot read {setting!r}: {reason}") from None
    if "{{" not in setting and "{%" not in setting:
        raise ConfigError(f"{_TEMPLATE}: {setting!r} is neither a file nor a template; expected one of the two")
    return setting


def chat_template(tokenizer: Any) -> ChatTemplate | None:
    """The tokenizer's own; of several, that which is called default, and tool_use where a row describes tools."""
    own = tokenizer.chat_template
    text, with_tools = (own.get("default"), own.get("tool_use")) if isinstance(own, Mapping) else (own, None)
    if not isinstance(text, str):
        return None
    names = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    return ChatTemplate(text, names, tuple(sorted(special, key=lambda token: (-len(token), token))), with_tools)
