"""Rows of data files, each with its place: JSON, JSON lines and CSV read here, line by line; what has rows in tables
(Parquet, Arrow, the hub) through `datasets`, as it comes.
"""

import contextlib
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.data.bad_rows import kind_of
from megatrain.errors import ConfigError

_LONGEST_CSV_FIELD = 1 << 30


@dataclass(frozen=True)
class Row:
    """A row's place, such as 'a.csv line 3', and its fields, or what is wrong with it; its file, where it is known."""

    where: str
    fields: Mapping[str, Any]
    wrong: str | None = None
    file: Path | None = None


def jsonl_rows(path: Path, key: str) -> Iterator[Row]:
    """One object per line; empty lines are nobody's."""
    with _reading(path, key), path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield _line(path, number, text)


def json_rows(path: Path, key: str) -> Iterator[Row]:
    """The objects of a list, by the line that each begins in; or JSON lines under another name."""
    with _reading(path, key):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {str(path)!r} is not UTF-8 (at byte {error.start})") from None
    if not text.lstrip().startswith("["):
        yield from jsonl_rows(path, key)
        return
    decoder, place, line = json.JSONDecoder(), text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    while True:
        start = _next(text, place, " \t\r\n,")
        line += text.count("\n", place, start)
        if start == len(text) or text[start] == "]":
            return
        where = f"{path} line {line}"
        try:
            value, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # where the next object begins, nobody can tell
            raise ConfigError(
                f"{key}: {where} is not JSON; expected a list of objects, or an object in each line"
            ) from None
        line += text.count("\n", start, place)
        yield _object(where, value, path)


def _next(text: str, place: int, passed: str) -> int:
    while place < len(text) and text[place] in passed:
        place += 1
    return place


def csv_rows(path: Path, key: str) -> Iterator[Row]:
    """The first line names the columns; .tsv has tabs. A row with more or fewer fields is a bad one."""
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with _reading(path, key), path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        names = next(_csv_lines(rows, path, key), (1, []))[1]
        if len(set(names)) < len(names) or not all(names):
            raise ConfigError(f"{key}: {path} line 1 is no list of columns: each needs a name of its own")
        for line, fields in _csv_lines(rows, path, key):
            wrong = (
                None if len(fields) == len(names) else f"has {len(fields)} columns; the first line names {len(names)}"
            )
            if fields:
                yield Row(f"{path} line {line}", dict(zip(names, fields, strict=False)), wrong, path)


def _csv_lines(rows: Any, path: Path, key: str) -> Iterator[tuple[int, list[str]]]:
    """Each row with the line that it begins in."""
    while True:
        line = rows.line_num + 1
        try:
            yield line, next(rows)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise ConfigError(f"{key}: {str(path)!r} is not UTF-8 (near line {line}: {error.reason})") from None
        except csv.Error as error:  # a quote that is never closed: where the next row begins, nobody can tell
            raise ConfigError(f"{key}: {path} line {line} is no CSV: {error}") from None


def table_rows(described: str, rows: Callable[[], Iterable[Mapping[str, Any]]]) -> Iterator[Row]:
    """Rows of a `datasets` table; nulls that Arrow filled in are taken out of what is nested."""
    for number, fields in enumerate(rows(), start=1):
        yield Row(f"{described} row {number}", {name: _without_nulls(value) for name, value in fields.items()})


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _line(path: Path, number: int, text: bytes) -> Row:
    where = f"{path} line {number}"
    try:
        return _object(where, json.loads(text), path)
    except (ValueError, RecursionError):  # bad JSON, bad UTF-8 and a thousand brackets alike
        return Row(where, {}, "is not JSON; a .jsonl file has one JSON object per line")


def _object(where: str, value: Any, path: Path) -> Row:
    if not isinstance(value, dict):
        return Row(where, {}, f"is {kind_of(value)}; expected an object")
    return Row(where, value, file=path)


@contextlib.contextmanager
def _reading(path: Path, key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {str(path)!r}: {error.strerror}") from None
