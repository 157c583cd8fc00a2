"""From settings to what a run needs: tokenizer, data, engine.

Whatever is wrong shows here, before anything is written.
"""

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.config import Config
from megatrain.data.packing import Tokens, TokenStream, tokenize
from megatrain.data.sources import Corpus
from megatrain.data.tokenizer import load_tokenizer, train_bpe
from megatrain.errors import ConfigError
from megatrain.yaml_file import read_yaml

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine


@dataclass(frozen=True)
class Corpora:
    """The files of a run's texts, found but not read."""

    train: Corpus
    eval: Corpus | None


@dataclass(frozen=True)
class Data:
    """A run's texts as tokens: `sequences` [count, seq_len] to train on, `held_out` to measure on."""

    sequences: Tokens
    train_bytes: int
    held_out: TokenStream | None


@dataclass(frozen=True)
class ModelSettings:
    """A transformers configuration, and whether it leaves the vocabulary to the tokenizer."""

    config: Any
    open_vocabulary: bool


def find_corpora(config: Config) -> Corpora:
    """Find the files of data.train and data.eval. Raises ConfigError where one does not exist."""
    data = config.data
    field = data.text_field
    train = Corpus(data.train or (), split="train", key="data.train", text_field=field)
    if data.eval is None:
        return Corpora(train, None)
    return Corpora(train, Corpus(data.eval, split="eval", key="data.eval", text_field=field))


def build_tokenizer(config: Config, corpora: Corpora) -> Any:
    """The tokenizer: loaded, or trained on data.train. Raises ConfigError where there is none, or no text."""
    setting = config.model.tokenizer
    if isinstance(setting, dict):
        _require_text(corpora.train)
        return train_bpe(corpora.train.documents(), setting["vocab_size"])
    return load_tokenizer(setting or str(config.model.path))


def build_data(config: Config, corpora: Corpora, tokenizer: Any) -> Data:
    """Tokenize the texts. Raises ConfigError where they hold no text, or less than one sequence."""
    stream = tokenize(corpora.train.documents(), tokenizer)
    if stream.utf8_bytes == 0:
        raise _no_text(corpora.train)
    sequences = stream.sequences(config.data.seq_len)
    if len(sequences) == 0:
        raise ConfigError(
            f"data.train: {len(stream.tokens)} tokens are less than one sequence of data.seq_len = "
            f"{config.data.seq_len}; give more text or a smaller data.seq_len"
        )
    held_out = None
    if corpora.eval is not None:
        held_out = tokenize(corpora.eval.documents(), tokenizer)
        if held_out.utf8_bytes == 0:
            raise _no_text(corpora.eval)
    return Data(sequences, stream.utf8_bytes, held_out)


def total_steps(config: Config, sequences: int) -> int:
    """Optimizer steps of the run, at least one: as given, or what the epochs or tokens come to."""
    train = config.train
    if train.steps is not None:
        steps = train.steps
    elif train.tokens is not None:
        steps = math.ceil(train.tokens / config.tokens_per_step)
    else:
        steps = math.floor((train.epochs or 0) * sequences * config.data.seq_len / config.tokens_per_step)
    if config.schedule.warmup_steps > steps:
        raise ConfigError(
            f"schedule.warmup_steps: {config.schedule.warmup_steps} is wrong; expected at most the "
            f"{steps} steps of the run"
        )
    return max(1, steps)


def read_model_settings(config: Config) -> ModelSettings:
    """The configuration that model.path or model.config gives. Raises ConfigError."""
    from huggingface_hub.errors import StrictDataclassError

    from megatrain.model.loading import load_config

    key = "model.config" if config.model.path is None else "model.path"
    try:
        with _naming(key):
            if config.model.path is not None:
                return ModelSettings(load_config(config.model.path), open_vocabulary=False)
            entries = _model_entries(config.model.config)
            settings = load_config(entries)
            _check_entries(entries, settings)
    except StrictDataclassError as error:  # a value of the wrong type
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from None
    return ModelSettings(settings, open_vocabulary="vocab_size" not in entries and "text_config" not in entries)


def fit_to_tokenizer(settings: ModelSettings, tokenizer: Any, config: Config) -> None:
    """Give a new model the tokenizer's vocabulary and special tokens, where it leaves them open.

    Raises ConfigError where the model is too small for the tokenizer or for data.seq_len.
    """
    if settings.open_vocabulary:
        settings.config.vocab_size = len(tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(settings.config, name, getattr(tokenizer, name))
    text = settings.config.get_text_config()
    if text.vocab_size < len(tokenizer):
        key = "model.path" if config.model.config is None else "model.config"
        raise ConfigError(f"{key}: vocab_size {text.vocab_size} is less than the tokenizer's {len(tokenizer)} tokens")
    longest = getattr(text, "max_position_embeddings", None)
    if isinstance(longest, int) and config.data.seq_len > longest:
        raise ConfigError(
            f"data.seq_len: {config.data.seq_len} is more than the model's max_position_embeddings, {longest}"
        )


def build_engine(config: Config, model_config: Any) -> "Engine":
    """The engine with its model, loaded or new. Raises ConfigError or CapacityError."""
    from megatrain.engine.engine import Engine, check_plan
    from megatrain.model.loading import build_on_meta, initialise
    from megatrain.optim.adamw import AdamW

    optimizer = AdamW(
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )
    settings: dict[str, Any] = {
        "device": config.engine.device,
        "precision": config.engine.precision,
        "clip_norm": config.train.clip_norm,
        "clip_scope": config.train.clip_scope,
        "device_memory": config.engine.device_memory,
        "seed": config.train.seed,
        "threads": config.engine.threads,
        "keep_graphs": config.engine.keep_graphs,
    }
    attention = config.model.attn_implementation
    if config.model.path is not None:
        with _naming("model.path"):
            return Engine.from_pretrained(
                config.model.path, optimizer=optimizer, attn_implementation=attention, **settings
            )
    with _naming("model.config"):
        check_plan(build_on_meta(model_config), optimizer, settings)
        model = initialise(model_config, config.train.seed, attn_implementation=attention)
    return Engine(model, optimizer=optimizer, **settings)


def _model_entries(setting: str | dict[str, Any] | None) -> dict[str, Any]:
    """The entries of model.config, which may be a file of them."""
    if isinstance(setting, dict):
        return setting
    path = Path(str(setting)).expanduser()
    if path.is_dir():
        path /= "config.json"
    return read_yaml(path)  # JSON is YAML


def _check_entries(entries: Mapping[str, Any], settings: Any) -> None:
    """Find misspelt entries: transformers takes any name and ignores those that it does not know."""
    known = type(settings)().to_dict()
    for name in entries:
        near = difflib.get_close_matches(name, known, 1, 0.8)
        if near and name not in known and name not in settings.attribute_map:
            raise ConfigError(
                f"model.config.{name}: unknown to model type {settings.model_type}; did you mean {near[0]}?"
            )


def _require_text(corpus: Corpus) -> None:
    if next(corpus.documents(), None) is None:
        raise _no_text(corpus)


def _no_text(corpus: Corpus) -> ConfigError:
    return ConfigError(f"{corpus.key}: no text in {corpus.described}; give files with UTF-8 text")


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Put the config key in front of errors that do not know it."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(key.partition(".")[0] + ".") else f"{key}: {text}") from None
