"""One run, from settings to a trained model on disk."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatrain.config import Config
from megatrain.data.batches import StepBatches
from megatrain.optim.schedules import learning_rate
from megatrain.sizes import format_bytes
from megatrain.train import build
from megatrain.train.evaluate import Evaluation, evaluate
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.loop import LoopResult, train
from megatrain.train.metrics import MetricsFile
from megatrain.train.progress import show_progress
from megatrain.train.run_folder import RunFolder

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, how training went, and the measure on data.eval where there is one."""

    folder: Path
    loop: LoopResult
    evaluation: Evaluation | None


def run(config: Config, *, replace: bool = False) -> RunResult:
    """Train as `config` says; with `replace`, a finished run in `output` gives way to it once it is done.

    Raises ConfigError and CapacityError before anything is written.
    """
    folder = RunFolder(str(config.output), replace=replace)
    corpora = build.find_corpora(config)
    model_settings = build.read_model_settings(config)
    _say(f"reading {corpora.train.described} ({len(corpora.train.files)} files)")
    tokenizer = build.build_tokenizer(config, corpora)
    build.fit_to_tokenizer(model_settings, tokenizer, config)
    data = build.build_data(config, corpora, tokenizer)
    steps = build.total_steps(config, len(data.sequences))
    _say(
        f"{data.sequences.size:,} tokens of {format_bytes(data.train_bytes)} text, vocabulary of "
        f"{len(tokenizer):,}; {steps:,} steps of {config.tokens_per_step:,} tokens"
    )
    engine = build.build_engine(config, model_settings.config)
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    where = engine.device.torch_device
    _say(f"{model_settings.config.model_type} with {parameters:,} parameters, {engine.precision} on {where}")

    with StopOnInterrupt() as stop:
        folder.create(config)
        result = _train(config, engine, data, steps, folder, stop)
        if config.checkpoint.at_end:
            engine.save_pretrained(folder.model, tokenizer=tokenizer)
            _say(f"saved {folder.model}")
    if result.skipped:
        _say(f"warning: {result.skipped} steps had a gradient that was not finite and changed nothing")
    evaluation = None
    if data.held_out is not None and not result.interrupted:
        _say("measuring on held-out text")
        evaluation = evaluate(
            engine.model, data.held_out, seq_len=config.data.seq_len, micro_batch=config.engine.micro_batch
        )
    engine.close()
    folder.finish(complete=not result.interrupted)
    return RunResult(folder.path, result, evaluation)


def _train(
    config: Config, engine: "Engine", data: build.Data, steps: int, folder: RunFolder, stop: StopOnInterrupt
) -> LoopResult:
    batches = StepBatches(
        data.sequences,
        micro_batch=config.engine.micro_batch,
        sequences_per_step=config.tokens_per_step // config.data.seq_len,
        shuffle=config.data.shuffle,
        seed=config.train.seed,
    )
    schedule = config.schedule
    learning_rate_of = partial(
        learning_rate,
        peak=config.optimizer.lr,
        name=schedule.name,
        total_steps=steps,
        warmup_steps=schedule.warmup_steps,
        min_ratio=schedule.min_lr_ratio,
    )
    engine.model.train()
    with MetricsFile(folder.metrics) as metrics:
        return train(
            engine,
            batches_of=batches.of_step,
            learning_rate_of=learning_rate_of,
            total_steps=steps,
            metrics=metrics,
            progress=show_progress(steps),
            stop=stop,
            log_every=config.train.log_every,
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
