"""A run's folder on disk: made when training is sure to start, and never over another run's."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from megatrain import files
from megatrain.checkpoint.folders import list_checkpoints
from megatrain.config import Config, to_yaml
from megatrain.errors import CapacityError, ConfigError
from megatrain.model.folder_swap import is_leftover
from megatrain.report.page import REPORT_NAME
from megatrain.sizes import format_bytes
from megatrain.train.folder_lock import FolderLock
from megatrain.trust.durable import partial_name, write_durably
from megatrain.trust.ledger import LEDGER_NAME
from megatrain.trust.manifest import SIGNATURE_NAME

CHECKPOINTS, _MODEL, _SETTINGS = "checkpoints", "model", "config.yaml"
_OF_LOGGERS = frozenset({"tensorboard", "wandb"})
_OWN_FILES = _OF_LOGGERS | {
    *(_SETTINGS, "metrics.jsonl", "samples.jsonl", _MODEL, "plan.json", "trace.json", CHECKPOINTS),
    *(LEDGER_NAME, SIGNATURE_NAME, REPORT_NAME, partial_name(_SETTINGS)),
}
_log = logging.getLogger(__name__)


def model_folder(path: str) -> str:
    """The transformers folder that `path` means: a run's `model`, or `path` itself (a folder or hub id)."""
    folder = os.path.expanduser(path)
    inner = os.path.join(folder, "model")
    # unlike Path's methods, these give no error for a name that is too long
    is_run = os.path.isfile(os.path.join(inner, "config.json")) and not os.path.exists(
        os.path.join(folder, "config.json")
    )
    return inner if is_run else path


def check_writable(folder: Path, key: str) -> None:
    """Raise ConfigError naming `key` where `folder` cannot be made and written to. Leaves nothing behind."""
    made: list[Path] = []
    try:
        made = files.make_folders(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: no path at all, such as one with a NUL in it
        reason = error.strerror if isinstance(error, OSError) else "no such name"
        raise ConfigError(f"{key}: cannot write to folder {str(folder)!r}: {reason}; give another folder") from None
    finally:
        files.remove_empty(made)


class RunFolder:
    """Where a run writes `config.yaml`, `metrics.jsonl`, `ledger.jsonl` and `model/`.

    A folder with files in it is refused, unless it holds a run and nothing else, and `resume` or `replace` is set.
    With `resume` that run goes on. With `replace` the new run is written beside it, and takes its place only when
    `finish` is told that it is complete.
    Nothing stays on disk before `create`; from then on, and with `resume` from the start, no other run can have the
    folder, until `finish` or `close`. Raises ConfigError where the folder cannot be used.
    """

    def __init__(self, output: str, *, replace: bool = False, resume: bool = False) -> None:
        self.final = Path(os.path.expanduser(output))
        self.path = self.final
        """The folder that is written to; after `finish`, where the run is."""
        self._made: list[Path] = []
        self._lock = FolderLock()
        self._resumes = resume
        content = _content(self.final)
        if resume and (foreign := _foreign(content)):
            others = ", ".join(sorted(foreign)[:3])
            raise ConfigError(f"output: {output!r} holds more than a run ({others}); give another folder or remove it")
        if resume and SIGNATURE_NAME in content:
            _log.warning(
                "output: %s is of the run as it was, and will not fit what it becomes; sign it anew", SIGNATURE_NAME
            )
        if content and not resume:
            if not replace:
                raise ConfigError(f"output: {output!r} already holds files; give another folder or remove it")
            self.final = Path(os.path.abspath(self.final))  # `.` has no name of its own
            self.path = self.final.with_name(self.final.name + ".partial")
            if _foreign(content | _content(self.path)):
                raise ConfigError(f"output: {output!r} holds more than a run; give another folder or remove it")
        check_writable(self.path, "output")
        if resume and _SETTINGS in content:  # before anybody reads what it would go on from
            self._lock.take(self.path / _SETTINGS)

    @property
    def model(self) -> Path:
        """The transformers folder of the trained model."""
        return self.path / _MODEL

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model wrote at evaluations."""
        return self.path / "samples.jsonl"

    @property
    def ledger(self) -> Path:
        """The account of what the run did that `megatrain audit` checks."""
        return self.path / LEDGER_NAME

    @property
    def trace(self) -> Path:
        """The timeline of `--profile`."""
        return self.path / "trace.json"

    @property
    def plan(self) -> Path:
        """What was planned, and at the end what it came to."""
        return self.path / "plan.json"

    @property
    def has_results(self) -> bool:
        """Whether there is something that training has left: a line of metrics, a model, a checkpoint."""
        logged = self.metrics.exists() and self.metrics.stat().st_size > 0
        return logged or self.model.exists() or bool(list_checkpoints(self.checkpoints))

    def require_room(self, saved_bytes: int) -> None:
        """Raise CapacityError where the disk has no room for that much of models and checkpoints."""
        above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(above).free
        if saved_bytes > free:
            raise CapacityError(
                f"output: what is saved takes {format_bytes(saved_bytes)} and the disk of {str(self.path)!r} has "
                f"{format_bytes(free)} free; give a folder on another disk"
            )

    def create(self, config: Config) -> None:
        """Make the folder and write the complete settings into it. Raises ConfigError where another run came first."""
        settings = self.path / _SETTINGS
        try:
            self._made = files.make_folders(self.path)
            if not self._lock.held:
                self._lock.take(settings)
            others = _content(self.path) - {settings.name}
            if self._resumes:  # what is there is this run's own, but for what a save did not get to finish
                _remove(self.path / name for name in others if is_leftover(name, _MODEL))
            elif self.path != self.final:
                _remove(self.path / name for name in others)  # an earlier replacement that never became complete
            elif others or settings.stat().st_size:
                self._lock.release()
                raise ConfigError(f"output: {str(self.path)!r} has just got another run's files; give another folder")
            with self._lock.moving() as claim:
                write_durably(settings, to_yaml(config).encode(), before=claim)
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"output: cannot write to folder {str(self.path)!r}: {error.strerror}") from None

    def discard(self) -> None:
        """Undo `create`: for a run that failed in its first step."""
        began = not self.checkpoints.exists()  # else the ledger tells where those come from
        for file in (self.path / _SETTINGS, self.plan, self.metrics, *([self.ledger] if began else [])):
            file.unlink(missing_ok=True)
        self.samples.unlink(missing_ok=True)
        if began:
            _remove(self.path / name for name in _OF_LOGGERS if (self.path / name).exists())
        self._lock.release()
        files.remove_empty(self._made)

    def finish(self, *, complete: bool) -> None:
        """Put a complete run in the place of the one it replaces; an incomplete one stays beside it."""
        self.close()
        if self.path == self.final or not complete:
            return
        # a name of its own: `demo.old` may be somebody's
        old = Path(tempfile.mkdtemp(prefix=f"{self.final.name}.old-", dir=self.final.parent))
        os.rename(self.final, old / self.final.name)
        os.rename(self.path, self.final)
        shutil.rmtree(old)
        self.path = self.final

    def close(self) -> None:
        """Nothing more is written: let other runs have the folder."""
        self._lock.release()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _foreign(names: Iterable[str]) -> set[str]:
    """Those that no run writes."""
    return {name for name in names if name not in _OWN_FILES and not is_leftover(name, _MODEL)}


def _content(folder: Path) -> set[str]:
    """Names of what is in `folder`; none where it does not exist. Raises ConfigError where it is no folder."""
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        return set()
    except NotADirectoryError:
        raise ConfigError(f"output: {str(folder)!r} is a file, or its path goes through one; give a folder") from None
    except OSError as error:
        raise ConfigError(f"output: cannot read folder {str(folder)!r}: {error.strerror}") from None
