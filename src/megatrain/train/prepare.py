"""From a run's settings to all that it needs before there is an engine: model, optimizer, data, plan."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatrain.config import Config, to_yaml
from megatrain.planner.plan import Plan
from megatrain.report.numbers import several
from megatrain.sizes import format_bytes
from megatrain.train import build
from megatrain.train.method import with_method
from megatrain.train.model_settings import ModelSettings, Vocabulary, check_fit, read_model_settings
from megatrain.train.resume import Resumed, check_data
from megatrain.train.run_folder import RunFolder
from megatrain.train.samples import Prompt, read_prompts
from megatrain.train.trial import try_out
from megatrain.trust.facts import run_facts

if TYPE_CHECKING:
    from megatrain.optim.adamw import AdamW
    from megatrain.train.planning import RunPlanner


_MUCH_ROUNDED = 0.05


@dataclass(frozen=True)
class Prepared:
    """`source`: the settings with the model that training begins with, which is a checkpoint's where it goes on.
    `beside`: what is saved with the model. `prompts`: of samples. `facts`: of every manifest, and the ledger."""

    config: Config
    source: Config
    settings: ModelSettings
    optimizer: "AdamW"
    tokenizer: Any
    beside: Any
    data: build.Data
    prompts: list[Prompt]
    plan: Plan
    facts: dict[str, Any]


def prepare(config: Config, folder: RunFolder, resumed: Resumed | None, *, force: bool) -> Prepared:
    """What is wrong with settings, data or memory is found here, before anything is written, and most of it before the
    data are read: ConfigError, CapacityError."""
    corpora = build.find_corpora(config)
    config = with_method(config, corpora.train.kind)
    source = config if resumed is None else build.from_model(config, resumed.model)
    settings, optimizer, planner, tokenizer = _prepare_model(source, folder)
    for line in (*corpora.train.detected, *(corpora.eval.detected if corpora.eval else ())):
        _say(line)
    _say(f"reading {corpora.train.described} ({len(corpora.train.files)} files)")
    if tokenizer is None:
        tokenizer = build.trained_tokenizer(config, corpora)
        settings.fit(Vocabulary.of(tokenizer))
    data = build.build_data(config, corpora, tokenizer, settings.config)
    for line in (*data.said, _in_numbers(config, data, tokenizer), *([] if data.rows is None else [data.rows.kind])):
        _say(line)
    if (rounded := _rounding(config, data)) is not None:
        _say(f"warning: {rounded}")
    prompts = read_prompts(config.eval, tokenizer, data.held_out, settings.config)
    plan = planner.plan()  # with the data in memory
    facts = run_facts(to_yaml(config), corpora.train.files, planner.device.name)
    if resumed is not None:
        check_data(resumed, facts, force=force)
    beside = build.saved_beside(source, tokenizer)
    return Prepared(config, source, settings, optimizer, tokenizer, beside, data, prompts, plan, facts)


def _in_numbers(config: Config, data: build.Data, tokenizer: Any) -> str:
    passes, size = data.steps * build.passes_per_step(config, data), format_bytes(data.train_bytes)
    text = f" of {size} text" if config.train.method == "pretrain" else f", {size} of text to learn"
    return (
        f"{data.tokens:,} tokens{text}, vocabulary of {len(tokenizer):,}; "
        f"{several(data.steps, 'step')} of {config.tokens_per_step:,} tokens, {passes:.3g} passes"
    )


def _rounding(config: Config, data: build.Data) -> str | None:
    """Where whole steps are much more, or less, than the passes that are wanted; None where they are about those."""
    wanted = config.train.epochs
    if wanted is None or config.planned_steps is not None:
        return None
    passes = data.steps * build.passes_per_step(config, data)
    if abs(passes / wanted - 1) <= _MUCH_ROUNDED:
        return None
    return (
        f"train.epochs: {wanted:g} comes to {wanted / build.passes_per_step(config, data):.2f} steps of "
        f"{config.tokens_per_step:,} tokens; {several(data.steps, 'whole one')} will be taken, {passes:.2f} passes. "
        "A lower train.tokens_per_step comes closer"
    )


def _prepare_model(config: Config, folder: RunFolder) -> tuple[ModelSettings, "AdamW", "RunPlanner", Any]:
    """The model's configuration, its optimizer, the planner, and its tokenizer if it is there already (else None),
    checked."""
    settings = read_model_settings(config)
    tokenizer = build.given_tokenizer(config)
    vocabulary = build.planned_vocabulary(config, tokenizer)
    settings.fit(vocabulary)
    check_fit(settings, vocabulary, config)
    try_out(config, settings, vocabulary)
    return settings, *build.plan_training(config, settings, folder), tokenizer


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
