"""One run, from settings to a trained model on disk."""

import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.config import Config
from megatrain.data.batches import StepBatches
from megatrain.errors import MegaTrainError
from megatrain.memory.arena import share_one_heap
from megatrain.memory.limits import reset_peak_resident
from megatrain.model.loading import one_line
from megatrain.optim.schedules import learning_rate
from megatrain.sizes import format_bytes
from megatrain.train import build
from megatrain.train.evaluate import Evaluation, evaluate
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.loop import LoopResult, train
from megatrain.train.metrics import MetricsFile
from megatrain.train.model_settings import ModelSettings, Vocabulary, check_fit, read_model_settings
from megatrain.train.planning import WatchedEngine, outcome_lines, write_plan
from megatrain.train.profile import ProfiledEngine
from megatrain.train.progress import show_progress
from megatrain.train.run_folder import RunFolder
from megatrain.train.trial import try_out

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine
    from megatrain.optim.adamw import AdamW
    from megatrain.train.planning import RunPlanner


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, how training went, the measure on data.eval where there is one.

    `interrupted`: by Ctrl-C, in training or in what follows it.
    """

    folder: Path
    loop: LoopResult
    evaluation: Evaluation | None
    interrupted: bool


def run(config: Config, *, replace: bool = False, profile_steps: int = 0) -> RunResult:
    """Train as `config` says; with `replace`, a finished run in `output` gives way to it once it is done.
    `profile_steps`: how many steps to write a trace of.

    Raises ConfigError and CapacityError before anything is written, and most of them before the texts are read.
    """
    share_one_heap()  # before reading and measuring start threads
    folder = RunFolder(str(config.output), replace=replace)
    corpora = build.find_corpora(config)
    settings, optimizer, planner, tokenizer = _prepare_model(config, folder)
    _say(f"reading {corpora.train.described} ({len(corpora.train.files)} files)")
    if tokenizer is None:
        tokenizer = build.trained_tokenizer(config, corpora)
        settings.fit(Vocabulary.of(tokenizer))
    data = build.build_data(config, corpora, tokenizer)
    _say(
        f"{data.sequences.size:,} tokens of {format_bytes(data.train_bytes)} text, vocabulary of "
        f"{len(tokenizer):,}; {data.steps:,} steps of {config.tokens_per_step:,} tokens"
    )
    plan = planner.plan()  # with the text in memory
    reset_peak_resident()  # so that the peak is the engine's, and not that of reading the text
    engine = build.build_engine(config, settings, optimizer, plan)
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    where = engine.device.name
    kernels = f", {engine.kernels}" if engine.device.torch_device.type != "cpu" else ""
    _say(f"{settings.config.model_type} with {parameters:,} parameters, {engine.precision} on {where}{kernels}")

    with StopOnInterrupt() as stop, closing(folder):
        folder.create(config)
        write_plan(folder.plan, plan)
        watched = WatchedEngine(engine)
        try:
            result = _train(config, engine, watched, data, folder, stop, profile_steps)
        except BaseException:
            if not folder.metrics.exists() or not folder.metrics.stat().st_size:
                folder.discard()  # nothing of it was logged: there is nothing to keep
            raise
        outcome = watched.outcome(plan)
        write_plan(folder.plan, plan, outcome)
        for line in outcome_lines(outcome):
            _say(line)
        if config.checkpoint.at_end:
            _save(engine, folder, tokenizer)
        if result.skipped:
            _say(f"warning: {result.skipped} steps had a gradient that was not finite and changed nothing")
        evaluation = _evaluate(config, engine, data, stop)
    engine.close()
    folder.finish(complete=not result.interrupted)
    return RunResult(folder.path, result, evaluation, stop.requested)


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


def _save(engine: "Engine", folder: RunFolder, tokenizer: Any) -> None:
    try:
        engine.save_pretrained(folder.model, tokenizer=tokenizer)
    except MegaTrainError:
        raise
    except Exception as error:  # of a full disk, tokenizers' own writer raises nothing more exact
        raise MegaTrainError(f"output: cannot save the model to {str(folder.model)!r}: {one_line(error)}") from error
    _say(f"saved {folder.model}")


def _evaluate(config: Config, engine: "Engine", data: build.Data, stop: StopOnInterrupt) -> Evaluation | None:
    """The measure on data.eval; None where there is none to take, or Ctrl-C ends it."""
    if data.held_out is None or stop.requested:
        return None
    _say("measuring on held-out text")
    stop.promise = "ending the measurement; the run is kept"
    seq_len, micro_batch = config.data.seq_len, config.engine.micro_batch
    evaluation = evaluate(engine.model, data.held_out, seq_len=seq_len, micro_batch=micro_batch, stop=stop)
    if evaluation is None:
        _say("held-out text: not measured, interrupted")
    return evaluation


def _train(
    config: Config,
    engine: "Engine",
    watched: WatchedEngine,
    data: build.Data,
    folder: RunFolder,
    stop: StopOnInterrupt,
    profile_steps: int,
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
        total_steps=data.steps,
        warmup_steps=schedule.warmup_steps,
        min_ratio=schedule.min_lr_ratio,
    )
    engine.model.train()
    profiled = ProfiledEngine(engine, profile_steps, data.steps, folder.trace) if profile_steps else None
    if profiled is not None:
        watched.wrap(profiled)
    with MetricsFile(folder.metrics) as metrics:
        result = train(
            watched,
            batches_of=batches.of_step,
            learning_rate_of=learning_rate_of,
            total_steps=data.steps,
            metrics=metrics,
            progress=show_progress(data.steps),
            stop=stop,
            log_every=config.train.log_every,
        )
        if metrics.lost:
            _say(f"warning: {folder.metrics} lacks {metrics.lost} lines that could not be written")
    if profiled is not None:
        profiled.finish()
        if profiled.written:
            _say(f"wrote {folder.trace}; open it in ui.perfetto.dev")
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
