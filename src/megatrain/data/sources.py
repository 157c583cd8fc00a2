"""Where text comes from: files, folders, JSONL, and Python's own standard library.

A corpus is a fixed, sorted list of files; reading it twice gives the same documents in the same order.
"""

import hashlib
import json
import logging
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from megatrain.data.bad_rows import BadRowError, BadRows, kind_of, names_of
from megatrain.data.data_files import open_data, reading, refuse_other_compression, suffix_of
from megatrain.data.row_files import jsonl_lines
from megatrain.data.splits import WHOLE, Part
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


class _BadLineError(ConfigError):
    """A line that holds no text."""


class Corpus:
    """The documents of one `data.train` or `data.eval` setting.

    `sources` are paths of files and folders, or `stdlib`; `key` is the config key that error messages name.
    For `stdlib` the split decides which files are taken: no file is in both. Raises ConfigError where a path
    does not exist or no text file is found; contents are read later, by `documents`.
    """

    def __init__(self, sources: Sequence[str], *, split: Split, key: str, text_field: str = "text") -> None:
        self.key = key
        self.text_field = text_field
        self.files: list[Path] = []
        for source in sources:
            self.files += _files_of(source, split, key)

    def count(self) -> int:
        """Of all documents, those that are empty or cannot be read among them."""
        lines = (jsonl_lines(path, self.key) for path in self.files if _is_jsonl(path))
        return sum(not _is_jsonl(path) for path in self.files) + sum(1 for _ in chain.from_iterable(lines))

    def documents(self, bad: BadRows, parts: Sequence[Part] = ()) -> Iterator[str]:
        """Every non-empty document in order, of all or of some parts: one per text file, one per JSONL line. Those that
        cannot be read are an error, or what `bad` makes of them."""
        for part in parts or (Part(WHOLE, tuple(self.files)),):
            for path, read in self._in(part):
                try:
                    text = read()
                except _BadLineError as error:
                    if not bad.skip:
                        raise
                    bad.found(str(error).split(": ", 1)[1], "")
                except BadRowError as error:
                    bad.found(str(path), str(error), always_named=True)
                else:
                    if text.strip():
                        yield text

    def _in(self, part: Part) -> Iterator[tuple[Path, Callable[[], str]]]:
        """Each document's file, and what reads it, of a part."""
        number = 0
        for path in self.files:
            if not _is_jsonl(path):
                if part.has(number):
                    yield path, partial(self._read_text, path)
                number += 1
                continue
            for line_number, line in jsonl_lines(path, self.key):
                if part.has(number):
                    yield path, partial(self._text_of, line, f"{path} line {line_number}")
                number += 1
                if number == part.stop:
                    return

    def _read_text(self, path: Path) -> str:
        """The file's text. Raises BadRowError where it is not UTF-8 (or holds NUL bytes, which no text does)."""
        with reading(path, self.key), open_data(path) as stream:
            data = stream.read()
        try:
            if b"\0" not in data:
                return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadRowError(f"is not UTF-8 text (at byte {error.start})") from None
        raise BadRowError("has a NUL byte, which no text has")

    def _text_of(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # bad JSON, bad UTF-8 and a thousand brackets alike
            raise _BadLineError(
                f"{self.key}: {where} is not JSON; a .jsonl file has one JSON object per line"
            ) from None
        if not isinstance(record, dict):
            raise _BadLineError(f"{self.key}: {where} is a {type(record).__name__}; expected a JSON object")
        text = record.get(self.text_field)
        if self.text_field in record and not isinstance(text, str):
            raise _BadLineError(
                f"data.text_field: {where} has {kind_of(text)} in field {self.text_field!r}; expected a string"
            )
        if not isinstance(text, str):
            raise _BadLineError(
                f"data.text_field: {where} has no text in field {self.text_field!r}; its fields are: "
                f"{names_of(list(record))}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a character, "\ud800"; UTF-8 cannot
            half = f"\\u{ord(text[error.start]):04x}"
            raise _BadLineError(
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
        refuse_other_compression(path, key)
        return [path]
    if not os.path.isdir(path):
        what = "is neither a file nor a folder" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"{key}: {source!r} {what}; give a text file, a .jsonl file, a folder or stdlib")
    shown = [found for found in path.rglob("*") if not _is_hidden(found.relative_to(path))]
    files = sorted(found for found in shown if _is_text(found) and _is_file(found, key))
    if not files:
        raise ConfigError(f"{key}: folder {source!r} has no text files (such as .txt, .md, .py or .jsonl)")
    others = Counter(one.suffix.lower() or one.name for one in shown if not _is_text(one) and os.path.isfile(one))
    if others:
        told = names_of([f"{count:,} {suffix}" for suffix, count in others.items()])
        _log.warning("%s: of folder %r files are left out that are no texts by their names: %s", key, source, told)
    return files


def _is_file(path: Path, key: str) -> bool:
    """False also for a link to nothing. Raises ConfigError for one that nobody can tell, such as into a folder that
    must not be read: leaving it out would train on less than was asked for."""
    try:
        return path.is_file()
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {str(path)!r}: {error.strerror}") from None


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _is_text(path: Path) -> bool:
    return suffix_of(path) in TEXT_SUFFIXES | JSONL_SUFFIXES


def _is_jsonl(path: Path) -> bool:
    return suffix_of(path) in JSONL_SUFFIXES
