"""One entry of data.train or data.eval: where its rows or texts are, and in which format."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatrain.data.bad_rows import BadRows, names_of
from megatrain.data.dataset_info import read_entry
from megatrain.data.formats import FORMATS, Layout, detect
from megatrain.data.image_fields import rows_of_text
from megatrain.data.image_files import SUFFIXES as IMAGE_SUFFIXES
from megatrain.data.row_files import Row, csv_rows, json_rows, jsonl_rows, table_rows
from megatrain.data.sources import JSONL_SUFFIXES, STDLIB, Corpus, Split
from megatrain.errors import ConfigError

_TABLE_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
_ROW_FILES: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    **dict.fromkeys(JSONL_SUFFIXES, jsonl_rows),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_PEEKED = 16


@dataclass(frozen=True)
class Rows:
    """Where rows are. `files` are local; `identity` stands for the contents of what is not; `features`: what `datasets`
    says of the columns, None where it does not know."""

    files: tuple[Path, ...]
    read: Callable[[], Iterator[Row]]
    columns: tuple[str, ...] | None = None  # where all rows have the same
    count: int | None = None
    identity: str = ""
    features: Any = None


@dataclass(frozen=True)
class Source:
    """An entry, found and its format known. `corpus`: of plain text, else None; `rows`: of anything else.

    `weight`: how many times an epoch has each example; `samples`: how many examples it has instead.
    `detected`: the format was found by looking at the rows. `images_folder`: what paths of images are relative to, and
    must not leave; None: the folder of the row's file.
    """

    described: str
    layout: Layout
    corpus: Corpus | None = None
    rows: Rows | None = None
    weight: float = 1.0
    samples: int | None = None
    streaming: bool = False
    detected: bool = False
    images_folder: Path | None = None
    key: str = field(default="data.train")

    @property
    def files(self) -> tuple[Path, ...]:
        """Local files that it reads."""
        if self.corpus is not None:
            return tuple(self.corpus.files)
        assert self.rows is not None
        return self.rows.files

    def documents(self, bad: BadRows) -> Iterator[str]:
        """Of format text: every document that is not empty."""
        if self.corpus is not None:
            yield from self.corpus.documents(bad)
            return
        from megatrain.data.bad_rows import BadRowError
        from megatrain.data.formats import Text, sample_of

        assert self.rows is not None
        for row in rows_of_text(self):
            try:
                if row.wrong is not None:
                    raise BadRowError(row.wrong)
                sample = sample_of(row.fields, self.layout)
            except BadRowError as error:
                bad.found(row.where, str(error))
                continue
            assert isinstance(sample, Text)
            if sample.text.strip():
                yield sample.text


def open_source(spec: str | Mapping[str, Any], *, key: str, split: Split, form: str, text_field: str) -> Source:
    """The source of an entry; `form` and `text_field` count where it names none. Raises ConfigError."""
    given: dict[str, Any] = {"path": spec} if isinstance(spec, str) else dict(spec)
    tags: dict[str, str] = {}
    samples = None
    if given.get("dataset_info") is not None:
        entry = read_entry(Path(os.path.expanduser(given["dataset_info"])), given["path"], key)
        given, tags, samples = {**entry.spec, **_others(given)}, entry.tags, entry.samples
    columns = dict(given.get("columns") or {})
    columns.setdefault("text", given.get("text_field") or text_field)
    if "images" in columns:
        columns["images"] = columns["images"] or ""  # null: no field holds any
    form = given.get("format") or form
    common: dict[str, Any] = {
        "described": given["path"],
        "weight": given.get("weight", 1.0),
        "samples": samples,
        "streaming": given.get("streaming", False),
        "images_folder": _images_folder(given, key),
        "key": key,
    }
    rows = _rows(given, key, split)
    if rows is None:
        return Source(
            layout=Layout("text", columns), corpus=_corpus(given, key, split, form, columns["text"]), **common
        )
    _check_columns(rows, given, columns, key)
    detected = form == "auto"
    if detected:
        form = _detected(rows, columns, given["path"], key)
    jsonl = all(path.suffix.lower() in JSONL_SUFFIXES for path in rows.files) and rows.files
    if form == "text" and jsonl:
        corpus = _corpus(given, key, split, form, columns["text"])
        return Source(layout=Layout("text", columns), corpus=corpus, **common)
    return Source(layout=Layout(form, columns, tags), rows=rows, detected=detected, **common)


def _others(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ("path", "dataset_info") and value is not None}


def _images_folder(given: Mapping[str, Any], key: str) -> Path | None:
    if given.get("images_folder") is None:
        return None
    folder = Path(os.path.expanduser(given["images_folder"]))
    if not os.path.isdir(folder):
        raise ConfigError(f"{key}: images_folder {given['images_folder']!r} is no folder")
    return folder


def _corpus(given: Mapping[str, Any], key: str, split: Split, form: str, text_field: str) -> Corpus:
    if form not in ("auto", "text"):
        raise ConfigError(f"{key}: {given['path']!r} is plain text, which has no format {form}; give format: text")
    return Corpus([given["path"]], split=split, key=key, text_field=text_field)


def _rows(given: Mapping[str, Any], key: str, split: Split) -> Rows | None:
    """Where its rows are; None for what is plain text, or is not there."""
    source = given["path"]
    path = Path(os.path.expanduser(source))
    if source == STDLIB:
        return None
    if os.path.isfile(path):
        suffix = path.suffix.lower()
        if suffix in _ROW_FILES:
            return _of_files([path], key)
        if suffix in _TABLE_SUFFIXES:
            return _of_table(given, [path], _TABLE_SUFFIXES[suffix], key)
        return None
    if os.path.isdir(path):
        return _of_folder(given, path, key, split)
    if _HUB_ID.fullmatch(source) and Path(source).suffix.lower() not in (*_ROW_FILES, *_TABLE_SUFFIXES, ".txt"):
        return _of_hub(given, key, split)
    return None


def _of_files(paths: list[Path], key: str) -> Rows:
    def read() -> Iterator[Row]:
        return chain.from_iterable(_ROW_FILES[path.suffix.lower()](path, key) for path in paths)

    return Rows(tuple(paths), read)


def _of_folder(given: Mapping[str, Any], path: Path, key: str, split: Split) -> Rows | None:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _of_saved(given, path, key, split)
    found = [one for one in path.rglob("*") if not any(part.startswith(".") for part in one.relative_to(path).parts)]
    files = sorted(one for one in found if one.is_file() and not _is_about(one))
    suffixes = {one.suffix.lower() for one in files}
    if suffixes & set(_TABLE_SUFFIXES):
        if suffixes - set(_TABLE_SUFFIXES):
            raise ConfigError(
                f"{key}: folder {given['path']!r} has {names_of(list(suffixes))} files; give the files to read, by path"
            )
        return _of_table(given, [path], "", key, split)
    readable = [one for one in files if one.suffix.lower() in _ROW_FILES]
    # a folder with texts in it is a folder of texts; pictures are what rows beside them name
    if readable and all(one in readable or one.suffix.lower() in IMAGE_SUFFIXES for one in files):
        return _of_files(readable, key)
    return None


def _is_about(path: Path) -> bool:
    """Whether a file says something about data and is none."""
    return path.name.upper().startswith(("README", "LICENSE", "DATASET_INFO"))


def _of_saved(given: Mapping[str, Any], path: Path, key: str, split: Split) -> Rows:
    """A folder that `datasets` saved."""
    from datasets import DatasetDict, load_from_disk

    table = _loading(given, key, partial(load_from_disk, str(path)))
    wanted = given.get("split")
    if isinstance(table, DatasetDict):
        wanted = wanted or _default_split(given, key, split, list(table))
        if wanted not in table:
            raise ConfigError(f"{key}: {given['path']!r} has no split {wanted!r}; it has: {names_of(list(table))}")
        table, path = table[wanted], path / wanted
    elif wanted not in (None, "train"):
        raise ConfigError(f"{key}: {given['path']!r} has no splits; leave split {wanted!r} out")
    files = tuple(sorted({Path(one["filename"]) for one in table.cache_files}))
    described = f"{given['path']}{f' split {wanted}' if wanted else ''}"
    names = tuple(table.column_names)
    return Rows(files, lambda: table_rows(described, lambda: table), names, len(table), features=table.features)


def _default_split(given: Mapping[str, Any], key: str, split: Split, known: list[str]) -> str:
    if split == "eval":
        raise ConfigError(f"{key}: {given['path']!r} has splits ({names_of(known)}); say which, with split: NAME")
    return "train"


def _of_table(given: Mapping[str, Any], paths: list[Path], kind: str, key: str, split: Split | None = None) -> Rows:
    """Parquet or Arrow files, read as they come; `kind` is empty for a folder, whose files `datasets` tells apart."""
    import datasets

    wanted = given.get("split")
    if kind and wanted not in (None, "train"):
        raise ConfigError(f"{key}: {given['path']!r} is one file and has no splits; leave split {wanted!r} out")
    if kind:
        options: dict[str, Any] = {"path": kind, "data_files": [str(path) for path in paths]}
        files, wanted = tuple(paths), "train"
    else:
        options = {"path": str(paths[0]), "name": given.get("name")}
        builder = _loading(given, key, partial(datasets.load_dataset_builder, **options))
        known = {str(name): [Path(one) for one in several] for name, several in builder.config.data_files.items()}
        wanted = wanted or (
            _default_split(given, key, split or "train", list(known)) if len(known) > 1 else next(iter(known))
        )
        files = tuple(known.get(wanted.partition("[")[0], ()))
    lazily = "[" not in wanted  # a part of a split is known by counting
    table = _loading(given, key, partial(datasets.load_dataset, **options, split=wanted, streaming=lazily))
    described = given["path"] if kind else f"{given['path']} split {wanted}"
    names = tuple(table.column_names) if table.column_names else None
    identity = "" if lazily else wanted
    return Rows(files, lambda: table_rows(described, lambda: table), names, identity=identity, features=table.features)


def _of_hub(given: Mapping[str, Any], key: str, split: Split) -> Rows:
    import datasets

    from megatrain.hub import check_hub_is_reachable

    source, name = given["path"], given.get("name")
    wanted = given.get("split")
    if wanted is None:
        if split == "eval":
            raise ConfigError(f"{key}: {source!r} is no path here; for a dataset of the hub say which split: NAME")
        wanted = "train"
    streaming = bool(given.get("streaming", False))

    def load() -> Any:
        if not (Path(datasets.config.HF_DATASETS_CACHE) / source.replace("/", "___")).is_dir():
            check_hub_is_reachable(source, "README.md")
        return datasets.load_dataset(source, name, split=wanted, streaming=streaming)

    table = _loading(given, key, load)
    described = f"{source}{f' {name}' if name else ''} split {wanted}"
    names = tuple(table.column_names) if table.column_names else None
    count = None if streaming else len(table)
    identity = f"{described} {getattr(table, '_fingerprint', '')}"
    return Rows((), lambda: table_rows(described, lambda: table), names, count, identity, table.features)


def _loading(given: Mapping[str, Any], key: str, load: Callable[[], Any]) -> Any:
    """Whatever `datasets` raises, in one line."""
    from megatrain.model.loading import one_line

    try:
        return load()
    except ConfigError:
        raise
    except Exception as error:  # OSError, ValueError, pyarrow's and datasets' own, by file and cause
        here = "" if os.path.exists(os.path.expanduser(given["path"])) else " does not exist here, and as a hub id"
        raise ConfigError(f"{key}: {given['path']!r}{here}: {one_line(error)}") from None


def _check_columns(rows: Rows, given: Mapping[str, Any], columns: Mapping[str, str], key: str) -> None:
    if rows.columns is None:
        return
    for ours, theirs in columns.items():
        chosen = theirs and (ours in (given.get("columns") or {}) or (ours == "text" and given.get("text_field")))
        if chosen and given.get("dataset_info") is None and theirs not in rows.columns:
            raise ConfigError(
                f"{key}: {given['path']!r} has no column {theirs!r} (for {ours}); its columns are: "
                f"{names_of(list(rows.columns))}"
            )


def _detected(rows: Rows, columns: Mapping[str, str], described: str, key: str) -> str:
    """The one format that the first rows can be in."""
    first = [row for row in islice(rows.read(), _PEEKED) if row.wrong is None]
    found: set[str] = set().union(*(detect(row.fields, columns) for row in first)) if first else set()
    if len(found) == 1:
        return found.pop()
    fields = names_of(list({name for row in first for name in row.fields}))
    if found:
        choices = ", ".join(form for form in FORMATS if form in found)
        raise ConfigError(f"{key}: {described!r} could be {choices} (fields: {fields}); say which, with format: NAME")
    if rows.columns is None and all(path.suffix.lower() in JSONL_SUFFIXES for path in rows.files):
        return "text"  # whose own error names the first line that has none
    raise ConfigError(
        f"{key}: {described!r} is in no format that its fields tell ({fields}); say which, with format: "
        f"{'|'.join(FORMATS)}, and columns: {{part: name}} where names differ"
    )


def chained(sources: Iterable[Source], bad: BadRows) -> Iterator[str]:
    """The documents of several sources of text, one after the other."""
    for source in sources:
        yield from source.documents(bad)
