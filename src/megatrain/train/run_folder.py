"""A run's folder on disk: made when training is sure to start, and never over another run's."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from megatrain.config import Config, to_yaml
from megatrain.errors import CapacityError, ConfigError
from megatrain.sizes import format_bytes
from megatrain.train.folder_lock import FolderLock
from megatrain.trust.ledger import LEDGER_NAME

CHECKPOINTS = "checkpoints"
_OWN_FILES = frozenset({"config.yaml", "metrics.jsonl", "model", "plan.json", "trace.json", CHECKPOINTS, LEDGER_NAME})


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
        made = make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: no path at all, such as one with a NUL in it
        reason = error.strerror if isinstance(error, OSError) else "no such name"
        raise ConfigError(f"{key}: cannot write to folder {str(folder)!r}: {reason}; give another folder") from None
    finally:
        _remove_folders(made)


def make_folder(folder: Path) -> list[Path]:
    """Make `folder` and what is missing above it; returns the folders made, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    made: list[Path] = []
    try:
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            made.insert(0, one)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(folder))
    except BaseException:
        _remove_folders(made)
        raise
    return made


def _remove_folders(folders: Iterable[Path]) -> None:
    """Remove those of `folders`, innermost first, that are still empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


class RunFolder:
    """Where a run writes `config.yaml`, `metrics.jsonl`, `ledger.jsonl` and `model/`.

    A folder with files in it is refused, unless it holds a run and nothing else, and `resume` or `replace` is set.
    With `resume` that run goes on. With `replace` the new run is written beside it, and takes its place only when
    `finish` is told that it is complete.
    Nothing stays on disk before `create`; from then on no other run can have the folder, until `finish` or `close`.
    Raises ConfigError where the folder cannot be used.
    """

    def __init__(self, output: str, *, replace: bool = False, resume: bool = False) -> None:
        self.final = Path(os.path.expanduser(output))
        self.path = self.final
        """The folder that is written to; after `finish`, where the run is."""
        self._made: list[Path] = []
        self._lock = FolderLock()
        self._resumes = resume
        content = _content(self.final)
        if resume and not content <= _OWN_FILES:
            others = ", ".join(sorted(content - _OWN_FILES)[:3])
            raise ConfigError(f"output: {output!r} holds more than a run ({others}); give another folder or remove it")
        if content and not resume:
            if not replace:
                raise ConfigError(f"output: {output!r} already holds files; give another folder or remove it")
            self.final = Path(os.path.abspath(self.final))  # `.` has no name of its own
            self.path = self.final.with_name(self.final.name + ".partial")
            if not (content | _content(self.path)) <= _OWN_FILES:
                raise ConfigError(f"output: {output!r} holds more than a run; give another folder or remove it")
        check_writable(self.path, "output")

    @property
    def model(self) -> Path:
        """The transformers folder of the trained model."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

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

    def require_room(self, model_bytes: int) -> None:
        """Raise CapacityError where the disk has no room for a model of that size."""
        above = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(above).free
        if model_bytes > free:
            raise CapacityError(
                f"output: the saved model takes {format_bytes(model_bytes)} and the disk of {str(self.path)!r} has "
                f"{format_bytes(free)} free; give a folder on another disk"
            )

    def create(self, config: Config) -> None:
        """Make the folder and write the complete settings into it. Raises ConfigError where another run came first."""
        settings = self.path / "config.yaml"
        try:
            self._made = make_folder(self.path)
            self._lock.take(settings)
            others = _content(self.path) - {settings.name}
            if self._resumes:
                pass  # what is there is this run's own
            elif self.path != self.final:
                _remove(self.path / name for name in others)  # an earlier replacement that never became complete
            elif others or settings.stat().st_size:
                self._lock.release()
                raise ConfigError(f"output: {str(self.path)!r} has just got another run's files; give another folder")
            settings.write_text(to_yaml(config), encoding="utf-8")
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"output: cannot write to folder {str(self.path)!r}: {error.strerror}") from None

    def discard(self) -> None:
        """Undo `create`: for a run that failed in its first step."""
        began = not self.checkpoints.exists()  # else the ledger tells where those come from
        for file in (self.path / "config.yaml", self.plan, self.metrics, *([self.ledger] if began else [])):
            file.unlink(missing_ok=True)
        self._lock.release()
        _remove_folders(self._made)

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
