"""Rows of data files, each with its place: JSON, JSON lines and CSV read here, line by line; what has rows in tables
(Parquet, Arrow, the hub) through `datasets`, as it comes.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.data.bad_rows import kind_of
from megatrain.data.data_files import open_data, reading, suffix_of
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
    """One object per line."""
    return (_line(path, number, line) for number, line in jsonl_lines(path, key))


def jsonl_lines(path: Path, key: str) -> Iterator[tuple[int, bytes]]:
    """Lines by their numbers; empty ones are nobody's."""
    with reading(path, key), open_data(path) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield number, text


def json_rows(path: Path, key: str) -> Iterator[Row]:
    """The objects of a list, by the line that each begins in; or JSON lines under another name. A list that is damaged
    ends with a row that says so: where the next object begins, nobody can tell."""
    with reading(path, key), open_data(path) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {str(path)!r} is not UTF-8 (at byte {error.start})") from None
    if not text.lstrip().startswith("["):
        yield from jsonl_rows(path, key)
        return
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    line = 1 + text.count("\n", 0, place)
    separator = ""  # before the first object
    while True:
        start = _next(text, place)
        is_next = text.startswith(separator, start) and not text.startswith("]", start)
        if is_next:
            start = _next(text, start + len(separator))
        line += text.count("\n", place, start)
        where = f"{path} line {line}"
        if not is_next or start == len(text):
            wrong = _end_of_list(text, start)
            break
        try:
            value, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            wrong = "is not JSON; expected a list of objects, or an object in each line"
            break
        yield _object(where, value, path)
        line += text.count("\n", start, place)
        separator = ","
    if wrong:
        yield Row(where, {}, f"{wrong}; what follows is not read")


def _end_of_list(text: str, place: int) -> str:
    """What is wrong with a list of which no further object is at `place`; empty: nothing."""
    if place == len(text):
        return "is where the file ends without the ] of its list; is it cut off?"
    if text[place] != "]":
        return f"has {text[place : place + 20]!r} where a comma or the ] of the list would be right"
    after = _next(text, place + 1)
    return "" if after == len(text) else f"has {text[after : after + 20]!r} after the ] of the list"


def _next(text: str, place: int) -> int:
    """Where the first character is that is no space."""
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def csv_rows(path: Path, key: str) -> Iterator[Row]:
    """The first line names the columns; .tsv has tabs. A row with more or fewer fields is a bad one."""
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    with reading(path, key), io.TextIOWrapper(open_data(path), encoding="utf-8-sig", newline="") as lines:
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


def table_rows(described: str, rows: Callable[[], Iterable[Mapping[str, Any]]], first: int = 1) -> Iterator[Row]:
    """Rows of a `datasets` table, of which the number of the first is given; nulls that Arrow filled in are taken out
    of what is nested."""
    for number, fields in enumerate(rows(), start=first):
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
