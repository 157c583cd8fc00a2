"""A run's folder on disk: made when training is sure to start, and never over another run's."""

import contextlib
import os
import shutil
from pathlib import Path

from megatrain.config import Config, to_yaml
from megatrain.errors import ConfigError

_OWN_FILES = frozenset({"config.yaml", "metrics.jsonl", "model"})


class RunFolder:
    """Where a run writes `config.yaml`, `metrics.jsonl` and `model/`.

    A folder with files in it is refused, unless `replace` is set and it holds a run and nothing else. Then
    the new run is written beside it, and takes its place only when `finish` is told that it is complete.
    Nothing is written before `create`. Raises ConfigError where the folder cannot be used.
    """

    def __init__(self, output: str, *, replace: bool = False) -> None:
        self.final = Path(output).expanduser()
        self.path = self.final
        """The folder that is written to; after `finish`, where the run is."""
        content = self._content()
        if not content:
            return
        if not replace:
            raise ConfigError(f"output: {output!r} already holds files; give another folder or remove it")
        if not content <= _OWN_FILES:
            raise ConfigError(f"output: {output!r} holds more than a run; give another folder or remove it")
        self.path = self.final.with_name(self.final.name + ".partial")

    @property
    def model(self) -> Path:
        """The transformers folder of the trained model."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    def create(self, config: Config) -> None:
        """Make the folder and write the complete settings into it."""
        if self.path != self.final and self.path.exists():
            shutil.rmtree(self.path)  # an earlier replacement that never became complete
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output: cannot make folder {str(self.path)!r}: {error.strerror}") from None
        (self.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

    def finish(self, *, complete: bool) -> None:
        """Put a complete run in the place of the one it replaces; an incomplete one stays beside it."""
        if self.path == self.final or not complete:
            return
        old = self.final.with_name(self.final.name + ".old")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(old)
        os.rename(self.final, old)
        os.rename(self.path, self.final)
        shutil.rmtree(old)
        self.path = self.final

    def _content(self) -> set[str]:
        if self.final.exists() and not self.final.is_dir():
            raise ConfigError(f"output: {str(self.final)!r} is a file; give a folder")
        return {entry.name for entry in self.final.iterdir()} if self.final.exists() else set()
