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
from megatrain.data.examples import HeldOutData, PreferenceExamples, of_one_epoch
from megatrain.data.images import ImageRows
from megatrain.data.mixture import Mixture
from megatrain.data.pairs import PairRows, Reference, epoch_of
from megatrain.data.rows import Rows
from megatrain.data.splits import shared_file
from megatrain.data.tokenizer import BPE_SPECIAL_TOKENS, load_tokenizer, train_bpe
from megatrain.errors import ConfigError, IntegrityError
from megatrain.optim.int8_moments import BLOCK
from megatrain.optim.schedules import learning_rate
from megatrain.train.image_data import names_images, prepare_images
from megatrain.train.model_settings import ModelSettings, Vocabulary
from megatrain.train.packing import rows_of
from megatrain.train.param_groups import make_optimizer
from megatrain.train.processor import with_processor_files
from megatrain.train.row_data import give_chat_template, prepare_rows, prepare_texts
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
    """A run's texts and rows, found, but of their contents only what formats are told by."""

    train: Mixture
    eval: Mixture | None


@dataclass(frozen=True)
class Data:
    """A run's data as tokens: `rows` to train on for `steps`, or `pairs` of answers; `held_out` to measure on; `said`:
    what became of what was read, in lines for people."""

    rows: Rows | None
    steps: int
    train_bytes: int
    held_out: HeldOutData | ImageRows
    pairs: PreferenceExamples | None = None
    said: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens to train on in an epoch."""
        if self.pairs is not None:
            return epoch_of(self.pairs)[1]
        return 0 if self.rows is None else self.rows.tokens


def find_corpora(config: Config) -> Corpora:
    """Find the sources of data.train and data.eval. Raises ConfigError where one does not exist."""
    data = config.data
    common: dict[str, Any] = {"form": data.format, "text_field": data.text_field, "bad_rows": data.bad_rows}
    common["method"] = config.train.method
    train = Mixture(data.train or (), split="train", key="data.train", **common)
    if data.eval is None:
        return Corpora(train, None)
    held_out = Mixture(data.eval, split="eval", key="data.eval", **common)
    shared = shared_file(train.parts, held_out.parts)
    if shared:
        _log.warning("data.eval: %s is in data.train too; what is measured on it is not held out", shared)
    return Corpora(train, held_out)


def given_tokenizer(config: Config) -> Any:
    """The tokenizer that is there already; None where it is to be trained. Raises ConfigError."""
    setting = config.model.tokenizer
    if isinstance(setting, dict):
        return None
    tokenizer = load_tokenizer(model_folder(setting or str(config.model.path)))
    give_chat_template(config, tokenizer)
    return tokenizer


def saved_beside(config: Config, tokenizer: Any) -> Any:
    """What is saved with the model: the tokenizer, and the processor's files where the model came with some."""
    path = config.model.path
    return tokenizer if path is None else with_processor_files(tokenizer, model_folder(path))


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
    if corpora.train.kind != "text":
        raise ConfigError(
            "model.tokenizer: one is trained on texts only, and data.train has rows; give a tokenizer's path"
        )
    _require_text(corpora.train)
    return train_bpe(corpora.train.documents(), setting["vocab_size"])


def build_data(config: Config, corpora: Corpora, tokenizer: Any, model_config: Any) -> Data:
    """Tokenize texts and rows. Raises ConfigError where they hold nothing, or less than one sequence, or the model
    cannot be given them in such rows."""
    if names_images(config, corpora.train):
        images = prepare_images(config, corpora.train, tokenizer)
        data = Data(images.rows, total_steps(config, images.rows.count), images.utf8_bytes, None, None, images.said)
    elif corpora.train.kind == "text":
        data = _text_data(config, corpora.train, tokenizer, model_config)
    else:
        found = prepare_rows(config, corpora.train, tokenizer, every_epoch=True)
        utf8_bytes, said = sum(one.counts.utf8_bytes for one in found.sources), tuple(found.said)
        if isinstance(found.examples, PreferenceExamples):
            steps = total_steps(config, epoch_of(found.examples)[0])
            data = Data(None, steps, utf8_bytes, None, found.examples, said)
        else:
            rows = rows_of(config, found.examples, model_config, tokenizer.eos_token_id)
            data = Data(rows, total_steps(config, rows.count), utf8_bytes, None, None, said)
    return data if corpora.eval is None else _with_held_out(config, data, corpora.eval, tokenizer)


def _with_held_out(config: Config, data: Data, mixture: Mixture, tokenizer: Any) -> Data:
    if data.pairs is not None and mixture.kind != "preference":
        raise ConfigError(
            f"data.eval: has rows of kind {mixture.kind}, which the loss of train.method dpo cannot be measured on; "
            "expected pairs of answers, as data.train has"
        )
    if names_images(config, mixture):
        images = prepare_images(config, mixture, tokenizer)
        return replace(data, held_out=images.rows, said=(*data.said, *images.said))
    if mixture.kind == "text":
        stream = prepare_texts(config, mixture, tokenizer)
        if stream.utf8_bytes == 0:
            raise _no_text(mixture)
        return replace(data, held_out=stream)
    rows = prepare_rows(config, mixture, tokenizer)
    held_out = rows.examples
    if not isinstance(held_out, PreferenceExamples):
        held_out = of_one_epoch(held_out)
    elif data.pairs is None:  # how likely what was chosen is
        held_out = of_one_epoch(held_out.chosen)
    return replace(data, held_out=held_out, said=(*data.said, *rows.said))


def _text_data(config: Config, texts: Mixture, tokenizer: Any, model_config: Any) -> Data:
    stream = prepare_texts(config, texts, tokenizer)
    if stream.utf8_bytes == 0:
        raise _no_text(texts)
    rows = rows_of(config, stream, model_config, tokenizer.eos_token_id)
    return Data(rows, total_steps(config, rows.count), stream.utf8_bytes, None)


def passes_per_step(config: Config, data: Data) -> float:
    """Of the data that a step takes, in epochs."""
    sequences = config.tokens_per_step / config.data.seq_len
    if data.pairs is not None:
        return sequences / 2 / epoch_of(data.pairs)[0]
    assert data.rows is not None
    return sequences / data.rows.count


def batches_of(
    config: Config, data: Data, reference: Reference | None = None
) -> Callable[[int], list[dict[str, Tensor]]]:
    """What each step is given, by its number from 0. `reference`: of pairs."""
    rows, rows_per_step = data.rows, config.tokens_per_step // config.data.seq_len
    if data.pairs is not None:
        assert reference is not None
        rows = PairRows(data.pairs, reference, shuffle=config.data.shuffle, seed=config.train.seed)
        rows_per_step //= 2  # a pair has two
    assert rows is not None
    return StepBatches(rows, micro_batch=config.engine.micro_batch, rows_per_step=rows_per_step).of_step


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


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the run, at least one: as given, or what the epochs (of so many sequences, or pairs of them)
    or tokens come to."""
    steps = config.planned_steps
    if steps is None:
        sequences = rows * config.sequences_together // config.engine.micro_batch
        tokens = (config.train.epochs or 0) * sequences * config.data.seq_len
        steps = max(1, math.floor(tokens / config.tokens_per_step))
    check_warmup(config, steps)
    return steps


def plan_training(config: Config, settings: ModelSettings, folder: RunFolder | None) -> "tuple[AdamW, RunPlanner]":
    """The optimizer and the planner, once it is clear that a step and the model, saved in `folder`, have room.

    Works on shapes alone. Raises ConfigError or CapacityError.
    """
    from megatrain.engine import setup
    from megatrain.model.freezing import freeze
    from megatrain.model.loading import build_on_meta, is_here
    from megatrain.train.planning import RunPlanner

    setup.check_threads(config.engine.threads)
    setup.check_slots(config.engine.slots)
    model = build_on_meta(settings.config)
    freeze(model, config.model.freeze)
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
        "freeze": config.model.freeze or (),
    }


def _require_text(corpus: Mixture) -> None:
    if next(corpus.documents(), None) is None:
        raise _no_text(corpus)


def _no_text(corpus: Mixture) -> ConfigError:
    return ConfigError(f"{corpus.key}: no text in {corpus.described}; give files with UTF-8 text")
