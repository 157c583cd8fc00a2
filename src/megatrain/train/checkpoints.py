"""When a run saves checkpoints, and what they say of it."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain import files
from megatrain.checkpoint.folders import (
    later_than,
    list_checkpoints,
    remove,
    remove_leftovers,
    retain,
    step_folder,
    step_of,
)
from megatrain.config import CheckpointConfig
from megatrain.errors import ConfigError, IntegrityError, MegaTrainError
from megatrain.sizes import format_seconds
from megatrain.train.best import evaluated_checkpoints, evaluation_entry, keeps, lowest, point_to
from megatrain.train.held_out import HeldOut
from megatrain.trust.ledger import LedgerWriter
from megatrain.trust.manifest import Parent, write_manifest

if TYPE_CHECKING:
    from megatrain.checkpoint.save import Save
    from megatrain.engine.engine import Engine

_log = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves the engine into `folder` as `settings` say, beside training. What cannot be saved is said, and training,
    which may have taken days, goes on; the next one is tried at its time. Raises ConfigError where `folder` cannot be
    cleared of what killed runs have left, and IntegrityError where what training holds is not what it should be: that
    ends the run.

    `config`: the text of the run's config.yaml. `facts`: of every manifest. `first_step`: that the run goes on from,
    `parent`: the manifest that it began with. Checkpoints are entered in `ledger`, whose last line
    each manifest records. `extra`: files that go into each, by name. `held_out`: what is measured between steps; a
    checkpoint is saved after each evaluation that is among the best ones, and says how evaluations stand.
    """

    def __init__(
        self,
        settings: CheckpointConfig,
        engine: "Engine",
        folder: Path,
        *,
        config: str,
        facts: Mapping[str, Any],
        tokenizer: Any,
        first_step: int,
        parent: Parent | None,
        ledger: LedgerWriter,
        extra: Mapping[str, bytes] | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self._settings, self._engine, self._folder = settings, engine, folder
        self._config, self._facts, self._tokenizer = config, facts, tokenizer
        self._extra = extra or {}
        self._saved_step, self._parent, self._ledger = first_step, parent, ledger
        self._first_step = first_step
        self._held_out = held_out
        self._running: tuple[int, Save] | None = None
        self._sealed: Parent | None = None  # what the next one calls the one that is being saved
        self.lost: str | None = None  # why the last one that was due is not there
        self.stall_seconds = 0.0  # that training has stood still for saves, at most
        self.seconds = 0.0  # that saves took
        self.saved = self.failed = 0
        try:
            remove_leftovers(folder)
            self._losses = {} if held_out is None else evaluated_checkpoints(folder, held_out.standing.of)
            self._losses = {step: loss for step, loss in self._losses.items() if step <= first_step}
            if folder.is_dir():
                point_to(folder, self._losses)
        except OSError as error:
            raise ConfigError(f"output: cannot remove checkpoints in {str(folder)!r}: {error.strerror}") from None
        self._outlived = later_than(folder, first_step)
        """Of a future that this run will not have, damaged ones too; they stay until the first of its own is whole."""
        if self._outlived:
            names = ", ".join(path.name for path in self._outlived)
            _log.warning("checkpoint: the run goes on before %s, which go when its own next one is complete", names)

    def after_step(self, done: int, *, last: bool) -> None:
        """`done` steps are; `last`: no other comes."""
        if self._running is not None and self._running[1].over:
            self._settle()
        self._learn_first_loss()
        every, loss = self._settings.every, self._loss_at(done)
        due = every is not None and (last or done % every == 0 or keeps(self._losses, done, loss, self._kept))
        if due and done != self._saved_step:
            self._settle()
            self._begin(done)
        if last:
            self._settle()

    def _learn_first_loss(self) -> None:
        """Of the checkpoint that the run began with, where Ctrl-C came between saving and measuring it."""
        found = {} if self._held_out is None else self._held_out.losses
        if self._first_step in found and step_folder(self._folder, self._first_step).is_dir():
            self._losses[self._first_step] = found[self._first_step]

    @property
    def _kept(self) -> int:
        """How many of the best ones stay. What is measured only once has none."""
        during = self._held_out is not None and self._held_out.measures_during_training
        return self._settings.keep_best if during else 0

    def _loss_at(self, step: int) -> float | None:
        return None if self._held_out is None else self._held_out.loss_at(step)

    def _told(self, done: int) -> dict[str, Any]:
        """What a checkpoint says of the run."""
        standing = None if self._held_out is None else self._held_out.standing
        if standing is None or not standing.of:
            return {"steps": done}
        if standing.step == done:
            self._losses[done] = standing.loss
        return {"steps": done, "evaluation": evaluation_entry(asdict(standing), self._losses)}

    def _begin(self, done: int) -> None:
        stood = time.perf_counter()
        target = step_folder(self._folder, done)
        try:
            save = self._engine.save(
                target,
                run=self._told(done),
                extra={"config.yaml": self._config.encode(), **self._extra},
                tokenizer=self._tokenizer,
                key_file=self._settings.key_file,
                seal=self._seal(done),
                background=True,
                hash_units=True,
                replaces=target in self._outlived,
            )
        except IntegrityError:
            raise
        except MegaTrainError as error:
            self._say_failed(done, error)
            return
        self.stall_seconds += time.perf_counter() - stood
        self._saved_step, self._running = done, (done, save)

    def _seal(self, done: int) -> Callable[[Path], object]:
        facts, parent, name = {**self._facts, "step": done}, self._parent, step_folder(self._folder, done).name
        if self._ledger.head is not None:
            facts["ledger"] = asdict(self._ledger.head)

        def seal(folder: Path) -> None:
            self._ledger.sync()  # before anything relies on it
            self._sealed = Parent(name, write_manifest(folder, facts, parent, write=files.write_file))
            for outlived in self._outlived:  # all of the new one is on disk, but for its name
                remove(outlived)
            self._outlived = []

        return seal

    def _settle(self) -> None:
        """The save that is under way is over, in one way or the other."""
        if self._running is None:
            return
        (done, save), self._running = self._running, None
        try:
            self._engine.wait_for_save()
        except IntegrityError:
            raise
        except MegaTrainError as error:
            self._say_failed(done, error)
            return
        finally:
            self.stall_seconds += save.stall_seconds
            self.seconds += save.seconds
        self.saved += 1
        self._parent, self.lost = self._sealed, None
        if self._sealed is not None:
            digest = self._sealed.manifest_sha256
            self._ledger.append("checkpoint", step=done, manifest_sha256=digest, units=save.unit_hashes)
        best = lowest(self._losses, self._kept)
        try:
            retain(self._folder, self._settings.keep, best)
            there = {step_of(path) for path in list_checkpoints(self._folder)}
            self._losses = {step: loss for step, loss in self._losses.items() if step in there}
            if self._kept:
                point_to(self._folder, self._losses)
        except OSError as error:
            _log.warning("checkpoint: an old one in %s cannot be removed: %s", self._folder, error.strerror or error)

    def _say_failed(self, done: int, error: BaseException) -> None:
        self.failed += 1
        self._saved_step = -1
        self._losses.pop(done, None)
        there = list_checkpoints(self._folder)
        stands = f"; the last checkpoint is {there[-1].name}" if there else ""
        self.lost = f"checkpoint: step {done} was not saved: {error}{stands}"
        _log.warning("%s; training goes on", self.lost)

    def best(self, folder: Path) -> tuple[Path, float] | None:
        """The checkpoint with the lowest loss, and that loss, now that they lie in `folder`."""
        found = lowest(self._losses, 1) if self._kept else []
        return (step_folder(folder, found[0]), self._losses[found[0]]) if found else None

    def summary(self) -> str | None:
        """A line for people; None where nothing was to be saved."""
        if not self.saved and not self.failed:
            return None
        failed = f", {self.failed} could not be" if self.failed else ""
        stood_still = f"training stood still for {format_seconds(self.stall_seconds)} of {format_seconds(self.seconds)}"
        return f"saved {self.saved} checkpoints in {self._folder}{failed}; {stood_still}"
