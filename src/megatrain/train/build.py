"""From settings to what a run needs: tokenizer, data, engine.

Whatever is wrong shows here, before anything is written.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatrain.checkpoint.folders import list_checkpoints
from megatrain.config import Config, check_warmup
from megatrain.data.batches import StepBatches
from megatrain.data.packing import Tokens, TokenStream, tokenize
from megatrain.data.sources import Corpus
from megatrain.data.tokenizer import BPE_SPECIAL_TOKENS, load_tokenizer, train_bpe
from megatrain.errors import ConfigError, IntegrityError
from megatrain.optim.int8_moments import BLOCK
from megatrain.optim.schedules import learning_rate
from megatrain.train.model_settings import ModelSettings, Vocabulary
from megatrain.train.param_groups import make_optimizer
from megatrain.train.run_folder import RunFolder, model_folder
from megatrain.trust.encryption import read_key

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine
    from megatrain.optim.adamw import AdamW
    from megatrain.planner.plan import Plan
    from megatrain.train.planning import RunPlanner

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpora:
    """The files of a run's texts, found but not read."""

    train: Corpus
    eval: Corpus | None


@dataclass(frozen=True)
class Data:
    """A run's texts as tokens: `sequences` [count, seq_len] to train on for `steps`, `held_out` to measure on."""

    sequences: Tokens
    steps: int
    train_bytes: int
    held_out: TokenStream | None


def find_corpora(config: Config) -> Corpora:
    """Find the files of data.train and data.eval. Raises ConfigError where one does not exist."""
    data = config.data
    field = data.text_field
    train = Corpus(data.train or (), split="train", key="data.train", text_field=field)
    if data.eval is None:
        return Corpora(train, None)
    held_out = Corpus(data.eval, split="eval", key="data.eval", text_field=field)
    shared = sorted(set(train.files) & set(held_out.files))
    if shared:
        _log.warning("data.eval: %s is in data.train too; what is measured on it is not held out", shared[0])
    return Corpora(train, held_out)


def given_tokenizer(config: Config) -> Any:
    """The tokenizer that is there already; None where it is to be trained. Raises ConfigError."""
    setting = config.model.tokenizer
    if isinstance(setting, dict):
        return None
    return load_tokenizer(model_folder(setting or str(config.model.path)))


def planned_vocabulary(config: Config, tokenizer: Any) -> Vocabulary:
    """The vocabulary of `tokenizer`, or of the one to be trained: on very little text it may become smaller."""
    setting = config.model.tokenizer
    if isinstance(setting, dict):
        return Vocabulary(setting["vocab_size"], BPE_SPECIAL_TOKENS)
    return Vocabulary.of(tokenizer)


def trained_tokenizer(config: Config, corpora: Corpora) -> Any:
    """A tokenizer trained on data.train. Raises ConfigError where that holds no text."""
    setting = config.model.tokenizer
    assert isinstance(setting, dict)
    _require_text(corpora.train)
    return train_bpe(corpora.train.documents(), setting["vocab_size"])


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
    steps = total_steps(config, len(sequences))
    held_out = None
    if corpora.eval is not None:
        held_out = tokenize(corpora.eval.documents(), tokenizer)
        if held_out.utf8_bytes == 0:
            raise _no_text(corpora.eval)
    return Data(sequences, steps, stream.utf8_bytes, held_out)


def batches_of(config: Config, data: Data) -> Callable[[int], list[dict[str, Tensor]]]:
    """What each step is given, by its number from 0."""
    batches = StepBatches(
        data.sequences,
        micro_batch=config.engine.micro_batch,
        sequences_per_step=config.tokens_per_step // config.data.seq_len,
        shuffle=config.data.shuffle,
        seed=config.train.seed,
    )
    return batches.of_step


def learning_rate_of(config: Config, data: Data) -> Callable[[int], float]:
    """By the step's number from 0."""
    schedule = config.schedule
    return partial(
        learning_rate,
        peak=config.optimizer.lr,
        name=schedule.name,
        total_steps=data.steps,
        warmup_steps=schedule.warmup_steps,
        min_ratio=schedule.min_lr_ratio,
    )


def total_steps(config: Config, sequences: int) -> int:
    """Optimizer steps of the run, at least one: as given, or what the epochs or tokens come to."""
    steps = config.planned_steps
    if steps is None:
        tokens = (config.train.epochs or 0) * sequences * config.data.seq_len
        steps = max(1, math.floor(tokens / config.tokens_per_step))
    check_warmup(config, steps)
    return steps


def plan_training(config: Config, settings: ModelSettings, folder: RunFolder | None) -> "tuple[AdamW, RunPlanner]":
    """The optimizer and the planner, once it is clear that a step and the model, saved in `folder`, have room.

    Works on shapes alone. Raises ConfigError or CapacityError.
    """
    from megatrain.engine import setup
    from megatrain.model.loading import build_on_meta, is_here
    from megatrain.train.planning import RunPlanner

    setup.check_threads(config.engine.threads)
    setup.check_slots(config.engine.slots)
    model = build_on_meta(settings.config)
    weights = None if config.model.path is None else model_folder(config.model.path)
    if weights is not None and is_here(weights):  # where files do not fit, what memory they would take says nothing
        _check_weights(weights, model)
    optimizer = make_optimizer(config.optimizer, model)
    setup.check_arguments(optimizer, _engine_settings(config))
    planner = RunPlanner(config, settings.config, optimizer)
    planner.require_fit()
    if folder is not None:
        precision = setup.resolve_precision(config.engine.precision, setup.make_device(config.engine.device))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        folder.require_room(_saved_bytes(config, parameters, precision, len(list_checkpoints(folder.checkpoints))))
    if config.checkpoint.key_file is not None:
        read_key(config.checkpoint.key_file)  # before training, and not at the first save
    if weights is not None and not is_here(weights):  # is downloaded now that there is room for it
        _check_weights(weights, model)
    return optimizer, planner


def _check_weights(path: str, model: Any) -> None:
    from megatrain.model.loading import check_weights

    try:
        check_weights(path, model)
    except ConfigError as error:
        raise ConfigError(f"model.path: {error}") from None


def _saved_bytes(config: Config, parameters: int, precision: str, there: int) -> int:
    """That the run will add to its folder, where `there` checkpoints are already: the model, and as many checkpoints as
    stay and one more, which is complete before the oldest goes."""
    model = parameters * (2 if precision == "bf16" else 4)
    moments = 8 if config.optimizer.moments == "fp32" else 2 + 8 / BLOCK
    state = round(parameters * (moments + (2 if precision == "bf16" else 0)))
    several = 1 if config.checkpoint.keep is None else config.checkpoint.keep + 1
    checkpoints = max(1, several - there) if config.checkpoint.every is not None else 0
    return (model if config.checkpoint.at_end else 0) + checkpoints * (model + state)


def from_model(config: Config, folder: str) -> Config:
    """The same run with model and tokenizer from a folder: that of a checkpoint."""
    model = replace(config.model, path=folder, config=None, tokenizer=None)
    return replace(config, model=model)


def build_engine(
    config: Config, settings: ModelSettings, optimizer: "AdamW", plan: "Plan", checkpoint: Path | None = None
) -> "Engine":
    """The engine with its model, loaded or new, or with all that a checkpoint holds, which has been verified; units are
    where `plan` has them. Raises ConfigError, CapacityError."""
    from megatrain.engine.engine import Engine
    from megatrain.model.loading import initialise
    from megatrain.planner.placement import DEVICE

    options, attention = _engine_settings(config), config.model.attn_implementation
    names = {unit.index: unit.name for unit in plan.workload.units}
    options["resident_units"] = [names[unit] for unit in plan.placement.units_in(DEVICE)]
    if checkpoint is not None:
        options["attn_implementation"] = attention
        try:
            key_file = config.checkpoint.key_file
            return Engine.from_checkpoint(checkpoint, optimizer=optimizer, verify=False, key_file=key_file, **options)
        except (ConfigError, IntegrityError) as error:
            raise ConfigError(f"--resume: {error}") from None
    if config.model.path is not None:
        path = model_folder(config.model.path)
        try:
            return Engine.from_pretrained(path, optimizer=optimizer, attn_implementation=attention, **options)
        except ConfigError as error:
            raise ConfigError(f"model.path: {error}") from None
    try:
        model = initialise(settings.config, config.train.seed, attn_implementation=attention)
    except ConfigError as error:
        raise ConfigError(f"model.config: {error}") from None
    return Engine(model, optimizer=optimizer, **options)


def _engine_settings(config: Config) -> dict[str, Any]:
    return {
        "device": config.engine.device,
        "precision": config.engine.precision,
        "clip_norm": config.train.clip_norm,
        "clip_scope": config.train.clip_scope,
        "device_memory": config.engine.device_memory,
        "host_memory": config.engine.host_memory,
        "nvme": config.engine.nvme,
        "nvme_encryption": config.engine.nvme_encryption,
        "seed": config.train.seed,
        "threads": config.engine.threads,
        "keep_graphs": config.engine.keep_graphs,
        "slots": config.engine.slots,
        "compile": config.engine.compile,
        "kernels": config.engine.kernels,
        "sequence_chunk_tokens": config.engine.sequence_chunk_tokens,
        "integrity": config.engine.integrity,
    }


def _require_text(corpus: Corpus) -> None:
    if next(corpus.documents(), None) is None:
        raise _no_text(corpus)


def _no_text(corpus: Corpus) -> ConfigError:
    return ConfigError(f"{corpus.key}: no text in {corpus.described}; give files with UTF-8 text")
