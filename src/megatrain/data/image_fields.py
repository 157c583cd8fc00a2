"""Where a row has images: in a field of their own, in parts of its messages, or at marks in its texts.

Whether data have images at all is never guessed from their first rows: what is treated as text has none, or the row
that has one is a bad row.
"""

import json
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.data.bad_rows import BadRowError
from megatrain.data.data_files import suffix_of
from megatrain.data.formats import Chat, Layout
from megatrain.data.row_files import Row, jsonl_rows
from megatrain.data.sources import JSONL_SUFFIXES
from megatrain.errors import ConfigError

if TYPE_CHECKING:
    from megatrain.data.row_source import Source

MARK = "<image>"
_FIELDS = ("images", "image")
_LISTS = ("messages", "prompt", "completion", "chosen", "rejected")
_PART_TYPES = ("image", "image_url")
_PLACES = ("image", "path", "url", "bytes", "image_url")
_PEEKED = 256  # rows of a stream, which nobody reads to its end twice


def image_fields(layout: Layout) -> tuple[str, ...]:
    """The fields of a row that hold images and nothing else."""
    return (layout.columns["images"],) if "images" in layout.columns else _FIELDS


def names_images(fields: Mapping[str, Any], layout: Layout, *, marks: bool = False) -> bool:
    """Whether a row has an image; or with `marks` a place for one."""
    lists = [fields[name] for name in _lists(fields, layout)]
    turns = [turn for several in lists for turn in several if isinstance(turn, Mapping)]
    contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    return (
        any(fields.get(name) for name in image_fields(layout))
        or any(_is_image(part) for content in contents for part in content)
        or (marks and _has_mark(fields))
    )


def _lists(fields: Mapping[str, Any], layout: Layout) -> list[str]:
    """The fields that are lists of messages, in the order of a conversation."""
    names = [layout.name(part) for part in _LISTS]
    if names[0] == "messages" and "messages" not in fields:
        names[0] = "conversations"
    return [name for name in names if isinstance(fields.get(name), list)]


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _PART_TYPES


def _has_mark(value: Any) -> bool:
    if isinstance(value, str):
        return MARK in value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(_has_mark(one) for one in inner)


# -- of a whole source -------------------------------------------------------------------------------------------


def has_images(source: "Source", *, marks: bool = False) -> bool:
    """Whether any row names an image; or with `marks`, has a place for one. JSON that does not have the names of such
    fields anywhere is not parsed for it, nor is a table read whose columns are texts. Raises ConfigError."""
    rows, layout = source.rows, source.layout
    if rows is None:  # plain text; lines of JSON may name images beside it
        lines = [path for path in source.files if suffix_of(path) in JSONL_SUFFIXES]
        several = (jsonl_rows(path, source.key) for path in lines if _may_name(path, layout, source.key, marks=False))
        return any(_first_with_image(one, layout, marks=False) for one in several)
    if rows.columns is None and rows.files and all(suffix_of(path) in _JSON for path in rows.files):
        if not any(_may_name(path, layout, source.key, marks=marks) for path in rows.files):
            return False
    if rows.columns is not None:
        _require_known_images(source)
        named = not set(image_fields(layout)).isdisjoint(rows.columns)
        if named and source.streaming:
            return True
        if not named and not marks and _is_text(rows.features):
            return False
    return _first_with_image(islice(rows.read(), _PEEKED if source.streaming else None), layout, marks=marks)


_JSON = (".json", *JSONL_SUFFIXES)


def _first_with_image(rows: Iterator[Row], layout: Layout, *, marks: bool) -> bool:
    return any(row.wrong is None and names_images(row.fields, layout, marks=marks) for row in rows)


def _may_name(path: Path, layout: Layout, key: str, *, marks: bool) -> bool:
    """Whether the bytes of a file of JSON have what a row with an image cannot do without."""
    names = [json.dumps(name, ensure_ascii=ascii) for name in image_fields(layout) for ascii in (True, False)]
    wanted = {*names, *(json.dumps(kind) for kind in _PART_TYPES), *((MARK, r"\u003cimage\u003e") if marks else ())}
    if suffix_of(path) != path.suffix.lower():  # compressed
        return True
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:  # there are no maps of nothing
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return any(content.find(name.encode()) >= 0 for name in wanted)
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {str(path)!r}: {error.strerror}") from None


def _require_known_images(source: "Source") -> None:
    """Raise ConfigError where a column holds images, by what `datasets` says, and no part of a row is called so."""
    assert source.rows is not None
    features: Mapping[str, Any] = source.rows.features or {}
    found = [name for name, feature in features.items() if _is_of_images(feature)]
    if found and "images" not in source.layout.columns and set(found).isdisjoint(_FIELDS):
        raise ConfigError(
            f"{source.key}: {source.described!r} has images in column {found[0]!r}; give columns: {{images: "
            f"{found[0]}}}, or columns: {{images: null}} to leave them aside"
        )


def _is_of_images(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ == "Image" or (inner is not None and _is_of_images(inner))


def _is_text(features: Any) -> bool:
    """Whether what `datasets` says of columns leaves no room for parts of messages."""
    if isinstance(features, Mapping):
        return "type" not in features and all(_is_text(feature) for feature in features.values())
    if isinstance(features, list):
        return all(_is_text(feature) for feature in features)
    inner = getattr(features, "feature", None)
    return _is_text(inner) if inner is not None else type(features).__name__ in ("Value", "ClassLabel")


def rows_of_text(source: "Source") -> Iterator[Row]:
    """The rows of a source that is treated as text. In a stream only the first of them were looked at: one with an
    image is a bad row."""
    assert source.rows is not None
    for row in source.rows.read():
        if row.wrong is None and names_images(row.fields, source.layout):
            wrong = "has images, and the first rows of the stream have none; put some with images first"
            row = replace(row, wrong=wrong)
        yield row


# -- of a row ----------------------------------------------------------------------------------------------------


def with_marks(fields: Mapping[str, Any], layout: Layout) -> tuple[dict[str, Any], list[Any]]:
    """(the row with marks in its texts in place of images, its images in the order of the marks). Raises
    BadRowError."""
    own = image_fields(layout)
    inline: list[Any] = []
    texts = {name: value for name, value in fields.items() if name not in own}
    for name in _lists(texts, layout):
        texts[name] = [_marked(turn, inline) for turn in texts[name]]
    column: Any = next((fields[name] for name in own if fields.get(name)), [])
    given = list(column) if isinstance(column, (list, tuple)) else [column]
    if given and any(image is not None for image in inline):
        raise BadRowError("has images both in its messages and in a field of their own")
    return texts, given or inline


def _marked(turn: Any, inline: list[Any]) -> Any:
    """A message whose parts are one text."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), list):
        return turn
    parts = []
    for part in turn["content"]:
        if _is_image(part):
            place = next((part[name] for name in _PLACES if part.get(name) is not None), None)
            inline.append(place.get("url") if part["type"] == "image_url" and isinstance(place, Mapping) else place)
            part = {"type": "text", "text": MARK}
        parts.append(part)
    return {**turn, "content": parts}


def in_parts(chat: Chat, images: int) -> Chat:
    """The conversation with its contents as lists of parts, as processors' templates take them. Images that have no
    mark come first in what the user says first. Raises BadRowError."""
    marks = sum(str(message["content"]).count(MARK) for message in chat.messages)
    messages = [dict(message) for message in chat.messages]
    if images and not marks:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise BadRowError("has images and no message of a user to put them in")
        first["content"], marks = MARK * images + first["content"], images
    if marks and not images:
        raise BadRowError(f"has {marks} places for images and no images; columns: {{images: NAME}} says where they are")
    if marks != images:
        raise BadRowError(f"has {images} images and {marks} places for them")
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and MARK in message["content"]:
            raise BadRowError(f"has an image in message {number}, which the assistant says")
        message["content"] = list(_parts(message["content"]))
    return replace(chat, messages=messages)


def _parts(text: str) -> Iterator[dict[str, str]]:
    for piece in re.split(f"({MARK})", text):
        if piece == MARK:
            yield {"type": "image"}
        elif piece.strip() or (piece and MARK not in text):
            yield {"type": "text", "text": piece}


def folder_of(row: Row, source: "Source") -> Path | None:
    """The folder that a row's paths are relative to: as the source says, or that of the row's file. None where neither
    is known: of a dataset of the hub, of tables in several folders."""
    if source.images_folder is not None:
        return source.images_folder
    if row.file is not None:
        return row.file.parent
    folders = {path.parent for path in source.files}
    return folders.pop() if len(folders) == 1 else None
