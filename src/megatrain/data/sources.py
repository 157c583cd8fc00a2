"""Where text comes from: files, folders, JSONL, and Python's own standard library.

A corpus is a fixed, sorted list of files; reading it twice gives the same documents in the same order.
"""

import contextlib
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatrain.data.bad_rows import BadRows, kind_of, names_of
from megatrain.errors import ConfigError

STDLIB = "stdlib"
# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".css", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp",
    ".cu", ".rs", ".go", ".java", ".kt", ".js", ".ts", ".jl", ".r", ".sh", ".sql",
})
# fmt: on
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})

# Distributions package the tests separately or not at all, and they would outweigh the library. `encodings`
# and `pydoc_data` are generated tables: near copies of each other, which would flatter the held-out figure.
_STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "encodings", "pydoc_data"})
_INSTALLED = frozenset({"site-packages", "dist-packages", "__pycache__"})
_HELD_OUT_ONE_IN = 32

Split = Literal["train", "eval"]
_log = logging.getLogger(__name__)


class Corpus:
    """The documents of one `data.train` or `data.eval` setting.

    `sources` are paths of files and folders, or `stdlib`; `key` is the config key that error messages name.
    For `stdlib` the split decides which files are taken: no file is in both. Raises ConfigError where a path
    does not exist or no text file is found; contents are read later, by `documents`.
    """

    def __init__(self, sources: Sequence[str], *, split: Split, key: str, text_field: str = "text") -> None:
        self.key = key
        self.described = ", ".join(sources)
        self.text_field = text_field
        self.files: list[Path] = []
        for source in sources:
            self.files += _files_of(source, split, key)
        self._warned = False

    def documents(self, bad: BadRows | None = None) -> Iterator[str]:
        """Every non-empty document in order: one per text file, one per JSONL line. Lines that hold none are an error,
        or what `bad` makes of them."""
        skipped: list[Path] = []
        for path in self.files:
            if path.suffix.lower() in JSONL_SUFFIXES:
                yield from self._jsonl_documents(path, bad)
                continue
            text = self._read_text(path)
            if text is None:
                skipped.append(path)
            elif text.strip():
                yield text
        if skipped and not self._warned:
            self._warned = True
            _log.warning("%s: skipped %d files that are not UTF-8 text, e.g. %s", self.key, len(skipped), skipped[0])

    def _read_text(self, path: Path) -> str | None:
        """The file's text, or None where it is not UTF-8 (or holds NUL bytes, which no text does)."""
        with self._naming(path):
            data = path.read_bytes()
        if b"\0" in data:
            return None
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return None

    def _jsonl_documents(self, path: Path, bad: BadRows | None) -> Iterator[str]:
        with self._naming(path), path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    text = self._text_of(line, f"{path} line {number}")
                except ConfigError as error:
                    if bad is None or not bad.skip:
                        raise
                    bad.found(str(error).split(": ", 1)[1], "")
                    continue
                if text.strip():
                    yield text

    @contextlib.contextmanager
    def _naming(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self.key}: cannot read {str(path)!r}: {error.strerror}") from None

    def _text_of(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # bad JSON, bad UTF-8 and a thousand brackets alike
            raise ConfigError(f"{self.key}: {where} is not JSON; a .jsonl file has one JSON object per line") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{self.key}: {where} is a {type(record).__name__}; expected a JSON object")
        text = record.get(self.text_field)
        if self.text_field in record and not isinstance(text, str):
            raise ConfigError(
                f"data.text_field: {where} has {kind_of(text)} in field {self.text_field!r}; expected a string"
            )
        if not isinstance(text, str):
            raise ConfigError(
                f"data.text_field: {where} has no text in field {self.text_field!r}; its fields are: "
                f"{names_of(list(record))}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a character, "\ud800"; UTF-8 cannot
            half = f"\\u{ord(text[error.start]):04x}"
            raise ConfigError(
                f"{self.key}: {where} has {half} by itself in field {self.text_field!r}, which is half of a surrogate "
                "pair and no character; write both halves or remove it"
            ) from None
        return text


def stdlib_files(split: Split) -> list[Path]:
    """The `.py` sources of the running Python's standard library, sorted, without tests and generated tables.

    About one file in 32 is held out for `eval`, chosen by the hash of its contents: the choice needs no list,
    and two copies of one file always fall on the same side.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path for path in root.rglob("*.py") if not (_STDLIB_SKIPPED | _INSTALLED) & set(path.relative_to(root).parts)
    ]
    return [path for path in sorted(files) if _is_held_out(path) == (split == "eval")]


def _is_held_out(path: Path) -> bool:
    digest = hashlib.sha256(path.read_bytes()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def _files_of(source: str, split: Split, key: str) -> list[Path]:
    if source == STDLIB:
        files = stdlib_files(split)
        if not files:
            raise ConfigError(f"{key}: stdlib has no .py sources in {sysconfig.get_path('stdlib')}; give a path")
        return files
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):  # unlike `path.is_file`, no error for a name that is too long
        return [path]
    if not os.path.isdir(path):
        what = "is neither a file nor a folder" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"{key}: {source!r} {what}; give a text file, a .jsonl file, a folder or stdlib")
    files = sorted(found for found in path.rglob("*") if _is_text(found.relative_to(path)) and _is_file(found, key))
    if not files:
        raise ConfigError(f"{key}: folder {source!r} has no text files (such as .txt, .md, .py or .jsonl)")
    return files


def _is_file(path: Path, key: str) -> bool:
    """False also for a link to nothing. Raises ConfigError for one that nobody can tell, such as into a folder that
    must not be read: leaving it out would train on less than was asked for."""
    try:
        return path.is_file()
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {str(path)!r}: {error.strerror}") from None


def _is_text(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and relative.suffix.lower() in TEXT_SUFFIXES | JSONL_SUFFIXES
