"""The settings of a run: what every key is, means and accepts, and the YAML files they are read from.

Each key is described once, beside its field; `megatrain config` prints these descriptions. Reading a file
checks every key and value before anything else happens.
"""

import dataclasses
import difflib
import reprlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatrain.config_kinds import (
    ABOVE_0,
    AT_LEAST_0,
    BETAS,
    BOOL,
    BPE,
    BYTES,
    DEVICE,
    FORMAT,
    GROUPS,
    LOGGERS,
    MAPPING,
    PATH,
    PATTERNS,
    PROMPTS,
    RATIO,
    SEQUENCE_LENGTH,
    SOURCES,
    TEMPERATURE,
    TEXT,
    Kind,
    WrongPartError,
    choice,
    either,
    or_null,
    real,
    to_be_given,
    whole,
)
from megatrain.errors import ConfigError
from megatrain.yaml_file import PlainDumper, parse_yaml, read_yaml


def _about(kind: Kind, meaning: str) -> dict[str, Any]:
    return {"kind": kind, "meaning": meaning}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained: a pretrained model (`path`) or a new one (`config`)."""

    path: str | None = field(
        default=None,
        metadata=_about(or_null(PATH), "pretrained model: a transformers folder, a run's folder or a hub id"),
    )
    config: str | dict[str, Any] | None = field(
        default=None,
        metadata=_about(
            or_null(either(PATH, MAPPING)),
            "new model with random weights: a transformers configuration, as a mapping with model_type or a "
            ".json or .yaml file of one; its vocab_size comes from the tokenizer where not given",
        ),
    )
    tokenizer: str | dict[str, Any] | None = field(
        default=None,
        metadata=_about(
            or_null(either(PATH, BPE)),
            "a folder or hub id, or {train: bpe, vocab_size: N}: train one on data.train; null: model.path's",
        ),
    )
    attn_implementation: str | None = field(
        default=None,
        metadata=_about(or_null(TEXT), "attention code of transformers, such as sdpa or eager; null: its own choice"),
    )
    freeze: tuple[str, ...] | None = field(
        default=None,
        metadata=_about(
            or_null(PATTERNS),
            "parameters that are not trained, such as [visual, '^lm_head']: those whose name a regular expression "
            "finds; null: none",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text to train on and, optionally, held-out text to measure on."""

    train: tuple[str | dict[str, Any], ...] | None = field(
        default=None,
        metadata=_about(
            to_be_given(SOURCES),
            "a text file, a folder (searched for text files), stdlib (the sources of Python's own standard library), a "
            "file of rows (.jsonl, .json, .csv, .parquet, .arrow), a folder that `datasets` saved, a hub id, or a list "
            "of these; a mapping says more: {path, name, split, revision, format, weight, text_field, columns, "
            "streaming, dataset_info, images_folder}",
        ),
    )
    eval: tuple[str | dict[str, Any], ...] | None = field(
        default=None,
        metadata=_about(
            or_null(SOURCES),
            "held-out data, measured after training and as `eval` says; stdlib: the files that data.train: stdlib "
            "leaves out",
        ),
    )
    format: str = field(
        default="auto", metadata=_about(FORMAT, "what rows hold; auto: found by their columns, and said")
    )
    text_field: str = field(default="text", metadata=_about(TEXT, "field of a row that holds its text"))
    chat_template: str | None = field(
        default=None,
        metadata=_about(
            or_null(TEXT), "template of conversations: a file, or the Jinja text itself; null: the tokenizer's own"
        ),
    )
    train_on: str = field(
        default="assistant",
        metadata=_about(
            choice("assistant", "all"),
            "what of conversations and completions is learned: what the assistant says, or all of it",
        ),
    )
    bad_rows: str = field(
        default="fail",
        metadata=_about(
            choice("fail", "skip"), "rows that make no example: the first is an error, or all are left out"
        ),
    )
    workers: int | None = field(
        default=None,
        metadata=_about(
            or_null(whole(1)),
            "processes that tokenise rows and decode images; null: all cores but one, for little data 1",
        ),
    )
    cache: str = field(
        default="auto",
        metadata=_about(
            either(choice("auto", "off"), PATH),
            "folder in which tokenised rows (none with images) are kept; auto: ~/.cache/megatrain, for all but little "
            "data; off: nowhere",
        ),
    )
    seq_len: int = field(default=1024, metadata=_about(SEQUENCE_LENGTH, "tokens per sequence"))
    packing: str = field(
        default="auto",
        metadata=_about(
            choice("auto", "joined", "best_fit", "none"),
            "joined: documents follow each other, an end-of-text token between them; best_fit: several whole examples "
            "to a row, each attending to itself alone; none: one to a row; auto: joined for text, best_fit for "
            "examples, or none where the model cannot keep them apart",
        ),
    )
    shuffle: bool = field(
        default=True, metadata=_about(BOOL, "shuffle the sequences anew in each epoch, from train.seed")
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW; weight decay applies to parameters with two or more dimensions."""

    lr: float = field(default=1e-5, metadata=_about(AT_LEAST_0, "peak learning rate"))
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata=_about(BETAS, "decay rates of the two moments"))
    eps: float = field(default=1e-8, metadata=_about(ABOVE_0, "added to the root of the second moment"))
    weight_decay: float = field(default=0.1, metadata=_about(AT_LEAST_0, "decoupled weight decay"))
    param_groups: tuple[dict[str, Any], ...] = field(
        default=(),
        metadata=_about(
            GROUPS,
            "parameters with settings of their own, such as [{match: 'norm|bias', lr: 1e-6}]: those whose name a "
            "regular expression of match finds; the first group counts; what a group leaves out is as for the rest",
        ),
    )
    moments: str = field(
        default="fp32",
        metadata=_about(
            choice("fp32", "int8"),
            "fp32: as torch's, 8 bytes per parameter; int8: 2.1 bytes, rounded in blocks of 64, near torch's",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves between warm-up and the last step."""

    name: str = field(
        default="cosine",
        metadata=_about(
            choice("constant", "linear", "cosine", "wsd"),
            "shape; wsd is constant, then linear over the last fifth of the steps",
        ),
    )
    warmup_steps: int = field(
        default=0, metadata=_about(whole(0), "steps over which the learning rate rises linearly to its peak")
    )
    min_lr_ratio: float = field(
        default=0.1,
        metadata=_about(RATIO, "learning rate at the end, as a fraction of the peak (not for constant)"),
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to learn from data.train, how long, and on how much per step. Give one of steps, epochs and tokens."""

    method: str = field(
        default="auto",
        metadata=_about(
            choice("auto", "pretrain", "sft", "dpo"),
            "pretrain: every token of a text; sft: the targets of examples (answers); dpo: to prefer the chosen answer "
            "of each pair to the rejected one; auto: as the format of data.train says",
        ),
    )
    dpo_beta: float = field(
        default=0.1, metadata=_about(ABOVE_0, "dpo: how strongly the weights that training begins with hold")
    )
    dpo_label_smoothing: float = field(
        default=0.0,
        metadata=_about(
            real("a number from 0 to below 0.5", lambda number: 0 <= number < 0.5),
            "dpo: share of the pairs that are taken to be the wrong way round",
        ),
    )
    dpo_loss: str = field(
        default="sigmoid",
        metadata=_about(
            choice("sigmoid", "ipo"), "dpo: sigmoid (Rafailov et al., 2023) or ipo (Azar et al., 2023), as TRL has them"
        ),
    )
    steps: int | None = field(default=None, metadata=_about(or_null(whole(1)), "optimizer steps"))
    epochs: float | None = field(
        default=None,
        metadata=_about(
            or_null(real("a number above 0, at most 1e9", lambda number: 0 < number <= 1e9)),
            "or passes over data.train",
        ),
    )
    tokens: int | None = field(default=None, metadata=_about(or_null(whole(1)), "or tokens, rounded up to whole steps"))
    tokens_per_step: int | None = field(
        default=None,
        metadata=_about(
            or_null(whole(1)),
            "tokens per optimizer step, a multiple of engine.micro_batch * data.seq_len (of twice that with dpo, where "
            "a pair is two sequences); null: just that",
        ),
    )
    clip_norm: float | None = field(
        default=1.0, metadata=_about(or_null(ABOVE_0), "largest gradient norm; null: no clipping")
    )
    clip_scope: str = field(
        default="global",
        metadata=_about(choice("global", "unit"), "norm over the whole model, or of each unit (layer) by itself"),
    )
    seed: int = field(default=0, metadata=_about(whole(0), "seed of new weights, data order and dropout"))
    deterministic: bool = field(
        default=False,
        metadata=_about(
            BOOL,
            "on a GPU, only algorithms that give the same bits each time, so that `megatrain audit` can compare; "
            "slower, and an error where there is none",
        ),
    )
    log_every: int = field(default=1, metadata=_about(whole(1), "steps between two lines of metrics.jsonl"))
    log_to: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            LOGGERS,
            "who is told what metrics.jsonl holds, too: tensorboard (files in <output>/tensorboard), wandb (Weights & "
            "Biases, in its own library's settings; WANDB_MODE=offline for no network)",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where and how the computation runs."""

    device: str = field(
        default="auto",
        metadata=_about(DEVICE, "where the model computes; auto: a GPU where there is one; lagged: for tests"),
    )
    precision: str = field(
        default="auto",
        metadata=_about(
            choice("auto", "bf16", "fp32"),
            "bf16: compute in bf16 with exact fp32 masters; fp32: all in fp32; auto: bf16 where native",
        ),
    )
    micro_batch: int = field(
        default=1, metadata=_about(whole(1), "sequences (with dpo: pairs) that pass through the model together")
    )
    device_memory: int | None = field(
        default=None, metadata=_about(or_null(BYTES), "device memory to use at most; null: what is free")
    )
    host_memory: int | None = field(
        default=None, metadata=_about(or_null(BYTES), "host memory to plan with at most; null: what is free")
    )
    nvme: str | None = field(
        default=None,
        metadata=_about(
            or_null(TEXT), "folder on a local disk for optimizer state that host memory has no room for; null: none"
        ),
    )
    nvme_encryption: bool = field(
        default=False,
        metadata=_about(
            BOOL,
            "seal what lies in engine.nvme with a key that is in memory alone (pip install 'megatrain[encryption]')",
        ),
    )
    slots: int | None = field(
        default=None,
        metadata=_about(or_null(whole(1)), "units (layers) whose weights may be on a GPU at once; null: 2"),
    )
    resident_units: int | str = field(
        default="auto",
        metadata=_about(
            either(choice("auto"), whole(0)),
            "first units (layers) that stay in a GPU's memory, with their optimizer state; auto: as planned",
        ),
    )
    threads: int | None = field(
        default=None,
        metadata=_about(or_null(whole(1)), "host threads of the optimizer; null: all cores, or all but 2 beside a GPU"),
    )
    compile: str = field(
        default="off",
        metadata=_about(choice("off", "blocks"), "blocks: torch.compile, one graph per kind of block"),
    )
    kernels: str = field(
        default="auto",
        metadata=_about(
            choice("auto", "torch", "liger"),
            "torch: the model's own code; liger: kernels of liger-kernel in place of parts of it (cuda only); "
            "auto: liger where it is installed and knows the model",
        ),
    )
    keep_graphs: int | str = field(
        default="auto",
        metadata=_about(
            either(choice("auto", "off"), whole(0)),
            "units (layers) whose forward is kept for backward instead of recomputed; auto: as memory allows",
        ),
    )
    sequence_chunk_tokens: int | str | None = field(
        default="auto",
        metadata=_about(
            or_null(either(choice("auto"), whole(1))),
            "tokens of each sequence that norms and feed-forward take at a time; auto: 8192 where sequences are longer;"
            " null: whole sequences",
        ),
    )
    integrity: str = field(
        default="off",
        metadata=_about(
            choice("off", "sampled", "full"),
            "checksums of weights, optimizer state and gradients, to find bits that change by themselves; sampled: of a"
            " sixteenth of the units (layers) in each step",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, and when."""

    every: int | None = field(
        default=None,
        metadata=_about(
            or_null(whole(1)),
            "steps between checkpoints, from which `train --resume` goes on to the last bit; null: none are saved",
        ),
    )
    keep: int | None = field(
        default=2, metadata=_about(or_null(whole(1)), "checkpoints that stay, the last ones; null: all")
    )
    at_end: bool = field(
        default=True,
        metadata=_about(BOOL, "save the model to <output>/model when training ends or is interrupted"),
    )
    keep_best: int = field(
        default=1,
        metadata=_about(
            whole(0),
            "checkpoints with the lowest loss on data.eval that stay besides; where eval.every and checkpoint.every "
            "are given, each evaluation that is among them saves one; 0: none",
        ),
    )
    key_file: str | None = field(
        default=None,
        metadata=_about(
            or_null(PATH),
            "file of 32 random bytes, private to you, to seal the state files of checkpoints with (weights stay plain; "
            "pip install 'megatrain[encryption]'); null: not sealed",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured on data.eval while training goes on, which changes no bit of it."""

    every: int | None = field(
        default=None, metadata=_about(or_null(whole(1)), "steps between evaluations; null: one, at the end")
    )
    at_start: bool = field(default=False, metadata=_about(BOOL, "evaluate before the first step, too"))
    max_tokens: int | None = field(
        default=None,
        metadata=_about(or_null(whole(1)), "tokens of data.eval that are measured, the first ones; null: all"),
    )
    prompts: int | tuple[Any, ...] = field(
        default=0,
        metadata=_about(
            PROMPTS,
            "what the model goes on from at each evaluation, into samples.jsonl: texts, or chats as lists of "
            "{role, content}; a number: the beginnings of so many texts of data.eval",
        ),
    )
    max_new_tokens: int = field(default=64, metadata=_about(whole(1), "tokens that it writes for each prompt, at most"))
    temperature: float = field(
        default=0.8,
        metadata=_about(TEMPERATURE, "of these texts, drawn from train.seed; 0: always the likeliest token"),
    )
    patience: int | None = field(
        default=None,
        metadata=_about(
            or_null(whole(1)), "evaluations in a row without a lower loss after which training ends; null: it does not"
        ),
    )
    min_delta: float = field(
        default=0.0, metadata=_about(AT_LEAST_0, "by how much the loss has to be lower to count for eval.patience")
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, checked and complete."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output: str | None = field(
        default=None,
        metadata=_about(or_null(PATH), "folder of the run; null: runs/<name of the config file>"),
    )

    @property
    def sequences_together(self) -> int:
        """Rows of a micro-batch: two for each pair."""
        return self.engine.micro_batch * (2 if self.train.method == "dpo" else 1)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step, also where `train.tokens_per_step` is null."""
        return self.train.tokens_per_step or self.sequences_together * self.data.seq_len

    @property
    def planned_steps(self) -> int | None:
        """Optimizer steps, where they do not depend on how much text there is."""
        if self.train.tokens is not None:
            return -(-self.train.tokens // self.tokens_per_step)
        return self.train.steps


_SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "train": TrainConfig,
    "engine": EngineConfig,
    "checkpoint": CheckpointConfig,
    "eval": EvalConfig,
}


def load_config(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """The checked settings of YAML file `path`, with `overrides` (`("train.steps", "100")`) put over them.

    Override values are read as YAML. Raises ConfigError for whatever is wrong: one line that names the key,
    its value and what would be right.
    """
    settings = read_yaml(path)
    override(settings, overrides)
    settings.setdefault("output", None)
    if settings["output"] is None:
        settings["output"] = f"runs/{Path(path).stem}"
    return parse_config(settings)


def parse_config(settings: Mapping[str, Any], *, for_training: bool = True) -> Config:
    """A Config from nested mappings, every key, value and combination checked. Raises ConfigError.

    `for_training`: text, a tokenizer and a length of the run must be given, too; a plan needs none of them.
    """
    values: dict[str, Any] = {}
    output = next(spec for spec in dataclasses.fields(Config) if spec.name == "output")
    for name, value in settings.items():
        if name == "output":
            values[name] = _parse_value("output", output, value)
        elif name in _SECTIONS:
            values[name] = _parse_section(name, value)
        else:
            raise _unknown_key(str(name))
    config = Config(**values)
    _check_model(config.model)
    if for_training:
        _check_run(config)
    check_tokens_per_step(config)
    return config


def _parse_section(section: str, settings: Any) -> Any:
    if settings is None:  # a section whose keys are all commented out
        settings = {}
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{section}: {shown(settings)} is wrong; expected a section with keys, see `megatrain config`"
        )
    fields = {spec.name: spec for spec in dataclasses.fields(_SECTIONS[section])}
    for name in settings:
        if name not in fields:
            raise _unknown_key(f"{section}.{name}")
    values = {name: _parse_value(f"{section}.{name}", fields[name], value) for name, value in settings.items()}
    return _SECTIONS[section](**values)


def _parse_value(key: str, spec: dataclasses.Field[Any], value: Any) -> Any:
    kind: Kind = spec.metadata["kind"]
    try:
        return kind.parse(value)
    except WrongPartError as part:
        raise ConfigError(f"{key}{part.place}: {_given(part.value)} is wrong; expected {part.expected}") from None
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise ConfigError(f"{key}: {_given(value)} is wrong; expected {kind.expected}") from None


def _given(value: Any) -> str:
    """`shown`, and for true and false the other words that YAML reads as them."""
    return shown(value) + (
        f" ({'yes and on' if value else 'no and off'} are the same)" if isinstance(value, bool) else ""
    )


def shown(value: Any) -> str:
    """`value` as YAML's user knows it, on one line, shortened where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist = 3, 12, 12
        self.maxstring = self.maxother = 200
        self.maxlong = 60


_SHORT = _Short()


def _unknown_key(name: str) -> ConfigError:
    known = ["output"]
    for section, kind in _SECTIONS.items():
        known += [f"{section}.{spec.name}" for spec in dataclasses.fields(kind)]
    if "." not in name:
        near = difflib.get_close_matches(name, [*_SECTIONS, "output"], 1, 0.5)
    else:
        # the right name in the wrong section comes first, then the nearest spelling
        last = name.rpartition(".")[2]
        near = [key for key in known if key.rpartition(".")[2] == last]
        near = near or difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else "`megatrain config` lists all keys"
    return ConfigError(f"{_on_one_line(name)}: unknown key; {hint}")


def _on_one_line(name: str) -> str:
    """A key as it was written, or as Python writes it where it is empty or breaks the line."""
    return name if name and name.isprintable() else ascii(name)


def _check_model(model: ModelConfig) -> None:
    """One model, with a tokenizer that suits it."""
    if model.path is None and model.config is None:
        raise ConfigError("model.path: missing; give model.path (a pretrained model) or model.config (a new one)")
    if model.path is not None and model.config is not None:
        raise ConfigError(f"model.config: not together with model.path ({model.path!r}); give one of the two")
    if model.path is not None and isinstance(model.tokenizer, dict):
        raise ConfigError(
            "model.tokenizer: a pretrained model needs its own tokenizer; train one only for model.config"
        )


def _check_run(config: Config) -> None:
    """What a run needs beside its model: a tokenizer, text, and one length."""
    model, data, train = config.model, config.data, config.train
    if model.config is not None and model.tokenizer is None:
        raise ConfigError("model.tokenizer: missing; a new model needs a path or {train: bpe, vocab_size: 4096}")
    if data.train is None:
        raise ConfigError("data.train: missing; give a text file, a folder, a .jsonl file or stdlib")
    lengths = [name for name in ("steps", "epochs", "tokens") if getattr(train, name) is not None]
    if len(lengths) != 1:
        given = " and ".join(f"train.{name}" for name in lengths) or "none"
        raise ConfigError(f"train.steps: give exactly one of train.steps, train.epochs, train.tokens; given: {given}")
    if train.dpo_loss == "ipo" and train.dpo_label_smoothing:
        raise ConfigError(f"train.dpo_label_smoothing: {train.dpo_label_smoothing} is not for dpo_loss ipo; give 0")
    _check_evaluation(config)


def _check_evaluation(config: Config) -> None:
    """Nothing is asked for that would silently not happen."""
    given = config.eval
    asked = {"every": given.every, "at_start": given.at_start, "prompts": given.prompts, "patience": given.patience}
    for name, value in asked.items():
        if value and config.data.eval is None:
            raise ConfigError(f"eval.{name}: there is nothing to measure; give data.eval")
    if given.patience is not None and given.every is None:
        raise ConfigError("eval.patience: counts evaluations during training; give eval.every, too")


def check_tokens_per_step(config: Config) -> None:
    """Raise ConfigError where a step is not made of whole micro-batches."""
    micro_batch_tokens = config.sequences_together * config.data.seq_len
    if config.tokens_per_step % micro_batch_tokens:
        twice = "2 * " if config.train.method == "dpo" else ""
        raise ConfigError(
            f"train.tokens_per_step: {config.train.tokens_per_step} is wrong; expected a multiple of "
            f"{twice}engine.micro_batch * data.seq_len = {micro_batch_tokens}"
        )
    if config.planned_steps is not None:
        check_warmup(config, config.planned_steps)


def check_warmup(config: Config, steps: int) -> None:
    """Raise ConfigError where the learning rate would still be rising when the run of `steps` ends."""
    if config.schedule.warmup_steps > steps:
        raise ConfigError(
            f"schedule.warmup_steps: {config.schedule.warmup_steps} is wrong; expected at most the "
            f"{steps} steps of the run"
        )


def override(settings: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    """Put values, written as YAML, at dotted names. Raises ConfigError where a name leads nowhere, or comes twice."""
    _refuse_repetition([name for name, _ in pairs])
    for name, text in pairs:
        _override(settings, name, text)


def _refuse_repetition(names: Sequence[str]) -> None:
    """Of two values for a key one would be lost without a word."""
    for number, name in enumerate(names):
        for earlier in names[:number]:
            if earlier == name:
                raise ConfigError(f"{_on_one_line(name)}: given twice on the command line; give it once")
            if earlier.startswith(f"{name}."):
                first, later = _on_one_line(name), _on_one_line(earlier)
                raise ConfigError(f"{first}: would replace {later} before it on the command line; give {first} first")


def _override(settings: dict[str, Any], name: str, text: str) -> None:
    """Put the value written as `text` at dotted `name`, which may reach into mappings (model.config)."""
    try:
        value = parse_yaml(text)
    except ValueError:
        value = text  # such as `a: b: c`: a plain text
    *parents, last = name.split(".")
    place = settings
    for depth, parent in enumerate(parents):
        if place.get(parent) is None:
            place[parent] = {}
        if not isinstance(place[parent], dict):
            above = _on_one_line(".".join(parents[: depth + 1]))
            raise ConfigError(f"{_on_one_line(name)}: cannot be set, {above} is {shown(place[parent])}")
        place = place[parent]
    place[last] = value


def to_yaml(config: Config) -> str:
    """The complete settings as YAML that `load_config` reads back to an equal Config."""
    settings = _plain(dataclasses.asdict(config))
    return str(yaml.dump(settings, Dumper=PlainDumper, sort_keys=False, allow_unicode=True))


def describe() -> str:
    """Every key with its default and meaning, as YAML with comments."""
    lines = ["# Every key, its default and its meaning. Paths are relative to the folder you run in."]
    for section, kind in _SECTIONS.items():
        lines += ["", f"# {(kind.__doc__ or '').splitlines()[0]}", f"{section}:"]
        for spec in dataclasses.fields(kind):
            lines += _describe_key(spec, indent="  ")
    output = [spec for spec in dataclasses.fields(Config) if spec.name == "output"]
    return "\n".join([*lines, "", *_describe_key(output[0], indent="")])


def _describe_key(spec: dataclasses.Field[Any], indent: str) -> Iterable[str]:
    comment = f"{spec.metadata['meaning']} [{spec.metadata['kind'].expected}]"
    yield from textwrap.wrap(comment, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    value = yaml.safe_dump(_plain(spec.default), default_flow_style=True).removesuffix("...\n").strip()
    yield f"{indent}{spec.name}: {value}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
