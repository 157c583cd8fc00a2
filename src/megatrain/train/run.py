"""One run, from settings to a trained model on disk."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatrain.checkpoint.folders import list_checkpoints
from megatrain.config import Config, to_yaml
from megatrain.data.examples import PreferenceExamples
from megatrain.data.images import ImageRows
from megatrain.device.base import streams
from megatrain.errors import ConfigError, IntegrityError, MegaTrainError
from megatrain.memory.arena import share_one_heap
from megatrain.memory.limits import reset_peak_resident
from megatrain.model.loading import one_line
from megatrain.planner.plan import Plan
from megatrain.report.page import REPORT_NAME, write_report
from megatrain.train import build
from megatrain.train.checkpoints import RunCheckpoints
from megatrain.train.determinism import determinism
from megatrain.train.entries import begin_ledger, end_ledger, record_step
from megatrain.train.evaluate import EvalSet, Evaluation, eval_set
from megatrain.train.held_out import HeldOut
from megatrain.train.held_out_images import image_set
from megatrain.train.held_out_pairs import first_pairs, pair_set
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.journal import Journal
from megatrain.train.loggers import Loggers, check_installed
from megatrain.train.loop import LoopResult, train
from megatrain.train.method import UnderLoss, loss_of
from megatrain.train.metrics import StepStats
from megatrain.train.planning import WatchedEngine, outcome_lines, write_plan
from megatrain.train.prepare import Prepared, prepare
from megatrain.train.profile import ProfiledEngine
from megatrain.train.progress import Progress, show_progress
from megatrain.train.reference import Scored, score
from megatrain.train.resume import Resumed, check_settings, cut_lines, find_checkpoint
from megatrain.train.run_folder import CHECKPOINTS, RunFolder, model_folder
from megatrain.train.samples import Sampler
from megatrain.train.watch import Watch, all_watchers
from megatrain.trust.ledger import LedgerWriter
from megatrain.trust.manifest import parent_of
from megatrain.trust.recorded import require_recorded_model

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run left: its folder, how training went of the steps that were meant, the last measures on data.eval by
    set, where there are some.

    `interrupted`: by Ctrl-C, in training or in what follows it. `lost`: why what training ended with is no checkpoint
    although it should be one. `best`: the checkpoint that is there with the lowest loss on data.eval, and that loss.
    """

    folder: Path
    loop: LoopResult
    total_steps: int
    evaluations: dict[str, Evaluation]
    interrupted: bool
    lost: str | None = None
    best: tuple[Path, float] | None = None

    @property
    def goes_on(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return bool(list_checkpoints(self.folder / CHECKPOINTS))


def run(
    config: Config,
    *,
    replace: bool = False,
    profile_steps: int = 0,
    resume: str | None = None,
    force: bool = False,
    verify: bool = True,
) -> RunResult:
    """Train as `config` says; with `replace`, a finished run in `output` gives way to it once it is done.
    `profile_steps`: how many steps to write a trace of. `resume`: go on from a checkpoint, `auto` for the last one in
    `output`; `force`: also with other settings. `verify`: only from one that is as it was written, as is the model
    of another run that this one begins with.

    Raises ConfigError and CapacityError before anything is written, and most of them before the texts are read.
    """
    share_one_heap()  # before reading and measuring start threads
    check_installed(config.train.log_to)
    if verify and resume is None and config.model.path is not None:
        try:
            require_recorded_model(Path(os.path.abspath(model_folder(config.model.path))))
        except IntegrityError as error:
            raise ConfigError(f"model.path: {error}") from None
    folder = _open_folder(config, replace=replace, resume=resume)
    with closing(folder), determinism(config.train.deterministic):
        resumed = find_checkpoint(resume, folder.final, verify=verify)
        return _run(config, folder, resumed, force=force, profile_steps=profile_steps)


def _run(config: Config, folder: RunFolder, resumed: Resumed | None, *, force: bool, profile_steps: int) -> RunResult:
    if resumed is not None:
        check_settings(resumed, config, force=force)
        _say(f"going on from {resumed.folder}, step {resumed.step:,}")
    made = prepare(config, folder, resumed, force=force)
    config, data = made.config, made.data
    engine = _make_engine(made, resumed)
    scored = _score(made, engine, resumed)
    for one in scored.values():
        made.facts.update(one.facts)
    first_step = 0 if resumed is None else resumed.step

    with StopOnInterrupt() as stop, ExitStack() as stack:
        held_out = _held_out(made, engine, scored, resumed, stop)
        folder.create(config)
        for path in (folder.metrics, folder.samples):
            cut_lines(path, first_step, evaluated=held_out.loss_at(first_step) is not None)
        ledger = stack.enter_context(closing(begin_ledger(folder, config, engine, made.facts, resumed)))
        progress = show_progress(data.steps)
        loggers = Loggers(config.train.log_to, folder.path, config, first_step)
        journal = stack.enter_context(Journal(folder, ledger, loggers, progress))
        held_out.tell = journal.evaluated
        _write_plan(folder, made.plan, data.steps)
        engine.model.train()
        trained = UnderLoss(engine, loss_of(config))
        watched = WatchedEngine(trained)
        profiled = ProfiledEngine(trained, profile_steps, data.steps, folder.trace) if profile_steps else None
        if profiled is not None:
            watched.wrap(profiled)
        checkpoints = RunCheckpoints(
            config.checkpoint,
            engine,
            folder.checkpoints,
            config=to_yaml(config),
            facts=made.facts,
            tokenizer=made.beside,
            first_step=first_step,
            parent=None if resumed is None else parent_of(resumed.folder),
            ledger=ledger,
            extra={name: content for one in scored.values() for name, content in one.files.items()},
            held_out=held_out,
        )
        try:
            result = train(
                watched,
                batches_of=build.batches_of(config, data, scored["data.train"].reference if scored else None),
                learning_rate_of=build.learning_rate_of(config, data),
                total_steps=data.steps,
                log_every=config.train.log_every,
                metrics=journal,
                progress=progress,
                stop=stop,
                first_step=first_step,
                evaluations=held_out,
                after_step=lambda done, last: checkpoints.after_step(done, last=last),
                record=partial(_record, ledger, _watch(made, engine, first_step, progress)),
            )
        except BaseException:
            if not folder.has_results:
                folder.discard()  # there is nothing to keep
            raise
        _say_profile(profiled)
        outcome = watched.outcome(made.plan)
        _write_plan(folder, made.plan, data.steps, outcome)
        for line in (*outcome_lines(outcome), *filter(None, [checkpoints.summary()])):
            _say(line)
        if config.checkpoint.at_end:
            _save(engine, folder, made.beside)
        try:
            evaluations = _measure_at_end(held_out, result, stop)
        finally:
            end_ledger(ledger, folder, engine, result.steps, saved=config.checkpoint.at_end)
        for line in _warnings(folder, journal, ledger, result):
            _say(f"warning: {line}")
    engine.close()
    _write_report(folder)
    folder.finish(complete=not result.interrupted)
    best = checkpoints.best(folder.checkpoints)
    return RunResult(folder.path, result, data.steps, evaluations, stop.requested, checkpoints.lost, best)


def _make_engine(made: Prepared, resumed: Resumed | None) -> "Engine":
    reset_peak_resident()  # so that the peak is the engine's, and not that of reading the text
    checkpoint = None if resumed is None else resumed.folder
    engine = build.build_engine(made.source, made.settings, made.optimizer, made.plan, checkpoint)
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    where = engine.device.name
    kernels = f", {engine.kernels}" if engine.device.torch_device.type != "cpu" else ""
    _say(f"{made.settings.config.model_type} with {parameters:,} parameters, {engine.precision} on {where}{kernels}")
    return engine


def _score(made: Prepared, engine: "Engine", resumed: Resumed | None) -> dict[str, Scored]:
    """What pairs of answers are compared with, by where they are from: of the first weights, also where the run goes
    on. Nothing where the run is not about pairs."""
    config, data = made.config, made.data
    if data.pairs is None:
        return {}
    pairs = {"data.train": data.pairs}
    if isinstance(data.held_out, PreferenceExamples):
        pairs["data.eval"] = first_pairs(data.held_out, config.eval.max_tokens)
    if resumed is None:
        _say("scoring the pairs by the weights that training begins with")
    checkpoint, recorded = (None, {}) if resumed is None else (resumed.folder, resumed.manifest.facts)
    micro_batch = config.engine.micro_batch
    return {key: score(engine, key, these, micro_batch, checkpoint, recorded) for key, these in pairs.items()}


def _held_out(
    made: Prepared, engine: "Engine", scored: Mapping[str, Scored], resumed: Resumed | None, stop: StopOnInterrupt
) -> HeldOut:
    """What is measured and written between steps."""
    config, prompts, seed = made.config, made.prompts, made.config.train.seed
    return HeldOut(
        config.eval,
        engine,
        _eval_sets(config, made.data, scored),
        sampler=Sampler(config.eval, engine.model, made.tokenizer, prompts, seed=seed) if prompts else None,
        first_step=0 if resumed is None else resumed.step,
        told=None if resumed is None else resumed.told.run.get("evaluation"),
        stop=stop,
    )


def _say_profile(profiled: ProfiledEngine | None) -> None:
    if profiled is not None:
        profiled.finish()
        if profiled.written:
            _say(f"wrote {profiled.path}; open it in ui.perfetto.dev")


def _warnings(folder: RunFolder, journal: Journal, ledger: LedgerWriter, result: LoopResult) -> Iterator[str]:
    """What of a run is not as it should be."""
    if journal.lost:
        yield f"{folder.metrics} lacks {journal.lost} lines that could not be written"
    if ledger.unwritten:
        yield f"{folder.ledger} lacks its last lines, which could not be written"
    if result.skipped:
        yield f"{result.skipped} steps had a gradient that was not finite and changed nothing"


def _open_folder(config: Config, *, replace: bool, resume: str | None) -> RunFolder:
    """The run's folder, where it goes on in its own, or a new one: nobody else has it from here on."""
    output = Path(os.path.expanduser(str(config.output))).resolve()
    given = Path(os.path.expanduser(resume or "")).resolve()
    own = resume is not None and (resume == "auto" or output in (given, given.parent.parent))
    return RunFolder(str(config.output), replace=replace, resume=own)


def _write_plan(
    folder: RunFolder, plan: Plan, total_steps: int, outcome: dict[str, dict[str, float]] | None = None
) -> None:
    """No run fails for want of it."""
    try:
        write_plan(folder.plan, plan, total_steps, outcome)
    except OSError as error:
        _log.warning("output: cannot write %r: %s", str(folder.plan), error.strerror)


def _write_report(folder: RunFolder) -> None:
    """No run fails for want of it: it can be made again."""
    try:
        write_report(folder.path, name=folder.final.name)
    except Exception as error:
        _log.warning("%s is not written: %s; megatrain report makes it", REPORT_NAME, one_line(error))


def _watch(made: Prepared, engine: "Engine", first_step: int, progress: Progress) -> Watch:
    """Who looks for what the user should know while the run goes on."""
    watchers = all_watchers(
        warmup_steps=made.config.schedule.warmup_steps,
        passes_per_step=build.passes_per_step(made.config, made.data),
        first_step=first_step,
        streaming=streams(engine.device),
        device_memory=engine.device.memory_bytes if streams(engine.device) else None,
    )
    return Watch(watchers, progress.say)


def _record(
    ledger: LedgerWriter, watch: Watch, step: int, batches: Sequence[dict[str, Tensor]], lr: float, stats: StepStats
) -> None:
    record_step(ledger, step, batches, lr, stats)
    watch.see(step, batches, lr, stats)


def _save(engine: "Engine", folder: RunFolder, tokenizer: Any) -> None:
    try:
        engine.save_pretrained(folder.model, tokenizer=tokenizer)
    except MegaTrainError:
        raise
    except Exception as error:  # of a full disk, tokenizers' own writer raises nothing more exact
        raise MegaTrainError(f"output: cannot save the model to {str(folder.model)!r}: {one_line(error)}") from error
    _say(f"saved {folder.model}")


def _eval_sets(config: Config, data: build.Data, scored: Mapping[str, Scored]) -> dict[str, EvalSet]:
    """What is measured, by name."""
    if data.held_out is None:
        return {}
    loss = loss_of(config)
    if loss is not None:
        pairs = scored["data.eval"]
        return {"eval": pair_set(pairs.pairs, pairs.reference, loss, config.engine.micro_batch)}
    assert not isinstance(data.held_out, PreferenceExamples)
    if isinstance(data.held_out, ImageRows):
        return {"eval": image_set(data.held_out, config.engine.micro_batch, config.eval.max_tokens)}
    sizes = {"seq_len": config.data.seq_len, "micro_batch": config.engine.micro_batch}
    return {"eval": eval_set(data.held_out, **sizes, max_tokens=config.eval.max_tokens)}


def _measure_at_end(held_out: HeldOut, result: LoopResult, stop: StopOnInterrupt) -> dict[str, Evaluation]:
    """The measures on data.eval; none where there are none to take, or Ctrl-C ends it."""
    if not held_out.has_sets or stop.requested:
        return {}
    if held_out.loss_at(result.steps) is None:
        _say("measuring on held-out text")
    stop.promise = "ending the measurement; the run is kept"
    evaluations = held_out.at_end(result.steps)
    if not evaluations:
        _say("held-out text: not measured, interrupted")
    return evaluations


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
