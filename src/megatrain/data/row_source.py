"""One entry of data.train or data.eval: where its rows or texts are, and in which format."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatrain.data.bad_rows import BadRowError, BadRows, names_of
from megatrain.data.data_files import matching, refuse_other_compression, suffix_of
from megatrain.data.dataset_info import read_entry
from megatrain.data.formats import FIELDS, FORMATS, Layout, Text, chosen_format, detect, sample_of
from megatrain.data.image_fields import rows_of_text
from megatrain.data.image_files import SUFFIXES as IMAGE_SUFFIXES
from megatrain.data.row_files import Row, csv_rows, json_rows, jsonl_lines, jsonl_rows, table_rows
from megatrain.data.sources import JSONL_SUFFIXES, STDLIB, Corpus, Split
from megatrain.data.splits import WHOLE, Part, parts_of
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
    """Where rows are: in parts of local files; `identity` stands for the contents of what is not there; `features`:
    what `datasets` says of the columns, None where it does not know."""

    parts: tuple[Part, ...]
    read: Callable[[], Iterator[Row]]
    columns: tuple[str, ...] | None = None  # where all rows have the same
    count: int | None = None
    identity: str = ""
    features: Any = None

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(path for part in self.parts for path in part.files))


@dataclass(frozen=True)
class Source:
    """An entry, found and its format known. `corpus`: of plain text, else None; `rows`: of anything else.

    `parts`: of its local files, that it has rows of.

    `weight`: how many times an epoch has each example; `samples`: how many of its examples these are, None for all.
    `detected`: the format was found by looking at the rows, which could be in `others`, too. `images_folder`: what
    paths of images are relative to, and must not leave; None: the folder of the row's file.
    """

    described: str
    layout: Layout
    parts: tuple[Part, ...] = ()
    corpus: Corpus | None = None
    rows: Rows | None = None
    weight: float = 1.0
    samples: int | None = None
    streaming: bool = False
    detected: bool = False
    others: tuple[str, ...] = ()
    images_folder: Path | None = None
    key: str = field(default="data.train")

    @property
    def files(self) -> tuple[Path, ...]:
        """Local files that it reads."""
        return tuple(dict.fromkeys(path for part in self.parts for path in part.files))

    @property
    def count(self) -> int | None:
        """Of its rows, where that is known."""
        return None if self.rows is None else self.rows.count

    @property
    def identity(self) -> list[Any]:
        """What, with the contents of its files, says which rows it has, as JSON: their names tell how they are read."""
        kinds = [suffix_of(path) for path in self.files]
        elsewhere = ["" if self.rows is None else self.rows.identity, self.described if not kinds else ""]
        return [kinds, *elsewhere, [part.range for part in self.parts if not part.whole]]

    def documents(self, bad: BadRows) -> Iterator[str]:
        """Of format text: every document that is not empty."""
        if self.corpus is not None:
            yield from self.corpus.documents(bad, self.parts)
            return
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


def open_source(
    spec: str | Mapping[str, Any], *, key: str, split: Split, form: str, text_field: str, method: str = "auto"
) -> Source:
    """The source of an entry; `form` and `text_field` count where it names none, `method` (of train.method) where its
    rows could be in several formats. Raises ConfigError."""
    given: dict[str, Any] = {"path": spec} if isinstance(spec, str) else dict(spec)
    tags: dict[str, str] = {}
    samples = None
    unread: tuple[str, ...] = ()
    columns = dict(given.get("columns") or {})
    if given.get("dataset_info") is not None:
        entry = read_entry(Path(os.path.expanduser(given["dataset_info"])), given["path"], key)
        given, tags, samples = {**entry.spec, **_others(given)}, entry.tags, entry.samples
        columns = {**entry.spec["columns"], **columns}
        unread = tuple(part for part in FIELDS if part not in (*columns, "text"))
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
    common["detected"] = form == "auto"
    paths = matching(given["path"], key)
    rows = _rows(given, paths, key, split)
    if rows is not None:
        _check_columns(rows, given, columns, key)
        if form == "auto":
            form, common["others"] = _detected(rows, columns, given["path"], key, method)
        jsonl = all(suffix_of(path) in JSONL_SUFFIXES for path in rows.files) and rows.files
        if form != "text" or not jsonl:
            return Source(layout=Layout(form, columns, tags, unread), parts=rows.parts, rows=rows, **common)
        paths = list(rows.files)
    if form not in ("auto", "text"):
        raise ConfigError(f"{key}: {given['path']!r} is plain text, which has no format {form}; give format: text")
    places = [given["path"]] if paths is None else [str(path) for path in paths]
    corpus = Corpus(places, split=split, key=key, text_field=columns["text"])
    parts = _plain_parts(given, key, corpus.files, corpus.count) if rows is None else rows.parts
    return Source(layout=Layout("text", columns), parts=parts, corpus=corpus, **common)


def _others(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ("path", "dataset_info") and value is not None}


def _images_folder(given: Mapping[str, Any], key: str) -> Path | None:
    if given.get("images_folder") is None:
        return None
    folder = Path(os.path.expanduser(given["images_folder"]))
    if not os.path.isdir(folder):
        raise ConfigError(f"{key}: images_folder {given['images_folder']!r} is no folder")
    return folder


def _rows(given: Mapping[str, Any], several: list[Path] | None, key: str, split: Split) -> Rows | None:
    """Where its rows are: in `several` files, or at its path; None for what is plain text, or is not there."""
    source = given["path"]
    path = Path(os.path.expanduser(source))
    if source == STDLIB:
        return None
    paths = [path] if several is None and os.path.isfile(path) else several
    if paths is not None:
        for one in paths:
            refuse_other_compression(one, key)
        suffixes = {suffix_of(one) for one in paths}
        if suffixes <= set(_ROW_FILES):
            return _of_files(given, paths, key)
        if len(suffixes) == 1 and (kind := _TABLE_SUFFIXES.get(min(suffixes))):
            return _of_table(given, paths, kind, key)
        if suffixes & set(_TABLE_SUFFIXES):
            raise ConfigError(f"{key}: {source!r} names {names_of(list(suffixes))} files; give files of one kind")
        return None
    if os.path.isdir(path):
        return _of_folder(given, path, key, split)
    if _HUB_ID.fullmatch(source) and Path(source).suffix.lower() not in (*_ROW_FILES, *_TABLE_SUFFIXES, ".txt"):
        return _of_hub(given, key, split)
    return None


def _of_files(given: Mapping[str, Any], paths: list[Path], key: str) -> Rows:
    def read() -> Iterator[Row]:
        return chain.from_iterable(_ROW_FILES[suffix_of(path)](path, key) for path in paths)

    def count() -> int:
        jsonl = [path for path in paths if suffix_of(path) in JSONL_SUFFIXES]
        others = (_ROW_FILES[suffix_of(path)](path, key) for path in paths if path not in jsonl)
        return sum(1 for path in jsonl for _ in jsonl_lines(path, key)) + sum(1 for rows in others for _ in rows)

    parts = _plain_parts(given, key, paths, count)
    if all(part.whole for part in parts):
        return Rows(parts, read)
    return Rows(parts, lambda: chain.from_iterable(islice(read(), part.start, part.stop) for part in parts))


def _plain_parts(
    given: Mapping[str, Any], key: str, files: Sequence[Path], count: Callable[[], int]
) -> tuple[Part, ...]:
    """Of files that have no splits: all their rows are the split train."""
    where = f"{key}: {given['path']!r}"
    _refuse(given, ("name", "revision"), where)
    return parts_of(given.get("split"), {WHOLE: files}, lambda _: count(), where)


def _refuse(given: Mapping[str, Any], settings: Sequence[str], where: str) -> None:
    """Raise ConfigError where one is given of what only a data set of the hub has."""
    for name in settings:
        if given.get(name) is not None:
            what = {"name": "no configurations", "revision": "no revisions"}[name]
            raise ConfigError(f"{where} is a path here and has {what}; leave {name}: {given[name]} out")


def _of_folder(given: Mapping[str, Any], path: Path, key: str, split: Split) -> Rows | None:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _of_saved(given, path, key, split)
    found = [one for one in path.rglob("*") if not any(part.startswith(".") for part in one.relative_to(path).parts)]
    files = sorted(one for one in found if one.is_file() and not _is_about(one))
    suffixes = {suffix_of(one) for one in files}
    if suffixes & set(_TABLE_SUFFIXES):
        if suffixes - set(_TABLE_SUFFIXES):
            raise ConfigError(
                f"{key}: folder {given['path']!r} has {names_of(list(suffixes))} files; give the files to read, by path"
            )
        return _of_table(given, [path], "", key, split)
    # a folder with texts in it is a folder of texts; images are what rows beside them name
    data = [one for one in files if suffix_of(one) not in IMAGE_SUFFIXES]
    return _of_files(given, data, key) if data and {suffix_of(one) for one in data} <= set(_ROW_FILES) else None


def _is_about(path: Path) -> bool:
    """Whether a file says something about data and is none."""
    return path.name.upper().startswith(("README", "LICENSE", "DATASET_INFO"))


def _of_saved(given: Mapping[str, Any], path: Path, key: str, split: Split) -> Rows:
    """A folder that `datasets` saved."""
    from datasets import DatasetDict, load_from_disk

    where = f"{key}: {given['path']!r}"
    _refuse(given, ("name", "revision"), where)
    found = _loading(given, key, partial(load_from_disk, str(path)))
    wanted = given.get("split")
    if isinstance(found, DatasetDict):
        tables = {str(name): table for name, table in found.items()}
        wanted = wanted or _default_split(given, key, split, list(tables))
    else:
        tables, wanted = {WHOLE: found}, wanted or WHOLE
    return _of_tables(tables, wanted, where, partial(_described, given, list(tables)))


def _described(given: Mapping[str, Any], known: list[str], split: str) -> str:
    """A split of something that has the `known` ones, for people."""
    return str(given["path"]) if known == [WHOLE] else f"{given['path']} split {split}"


def _of_tables(tables: Mapping[str, Any], wanted: str, where: str, described: Callable[[str], str]) -> Rows:
    """What `wanted` takes of tables that `datasets` has on disk, by the names of their splits."""
    files = {name: sorted({Path(one["filename"]) for one in table.cache_files}) for name, table in tables.items()}
    parts = parts_of(wanted, files, lambda name: len(tables[name]), where)

    ranges = [range(len(tables[part.split]))[part.start : part.stop] for part in parts]

    def read(part: Part, chosen: range) -> Iterator[Row]:
        table = tables[part.split] if part.whole else tables[part.split].select(chosen)
        return table_rows(described(part.split), lambda: table, part.start + 1)

    first = tables[parts[0].split]
    return Rows(
        parts,
        lambda: chain.from_iterable(map(read, parts, ranges)),
        tuple(first.column_names),
        sum(map(len, ranges)),
        features=first.features,
    )


def _default_split(given: Mapping[str, Any], key: str, split: Split, known: list[str]) -> str:
    if split == "eval":
        raise ConfigError(f"{key}: {given['path']!r} has splits ({names_of(known)}); say which, with split: NAME")
    return "train"


def _of_table(given: Mapping[str, Any], paths: list[Path], kind: str, key: str, split: Split | None = None) -> Rows:
    """Parquet or Arrow files, read as they come; `kind` is empty for a folder, whose files `datasets` tells apart."""
    import datasets

    wanted, where = given.get("split"), f"{key}: {given['path']!r}"
    _refuse(given, ("name", "revision") if kind else ("revision",), where)
    if kind:
        options: dict[str, Any] = {"path": kind, "data_files": [str(path) for path in paths]}
        known = {WHOLE: paths}
        wanted = wanted or WHOLE
    else:
        options = {"path": str(paths[0]), "name": given.get("name")}
        builder = _loading(given, key, partial(datasets.load_dataset_builder, **options))
        known = {str(name): [Path(one) for one in several] for name, several in builder.config.data_files.items()}
        wanted = wanted or (
            _default_split(given, key, split or "train", list(known)) if len(known) > 1 else next(iter(known))
        )

    def load(name: str, *, lazily: bool) -> Any:
        return _loading(given, key, partial(datasets.load_dataset, **options, split=name, streaming=lazily))

    if wanted in known:
        table = load(wanted, lazily=True)
        described = _described(given, list(known), wanted)
        names = tuple(table.column_names) if table.column_names else None
        part = Part(wanted, tuple(known[wanted]))
        return Rows((part,), lambda: table_rows(described, lambda: table), names, features=table.features)
    tables: dict[str, Any] = {}

    def count(name: str) -> int:
        tables[name] = tables.get(name) or load(name, lazily=False)
        return len(tables[name])

    parts = parts_of(wanted, known, count, where)
    for part in parts:
        count(part.split)
    found = _of_tables(tables, wanted, where, partial(_described, given, list(known)))
    return replace(found, parts=parts)  # which name the files that are here, not those that `datasets` made of them


def _of_hub(given: Mapping[str, Any], key: str, split: Split) -> Rows:
    import datasets

    from megatrain.hub import check_hub_is_reachable

    source, name, revision = given["path"], given.get("name"), given.get("revision")
    wanted = given.get("split")
    if wanted is None:
        if split == "eval":
            raise ConfigError(f"{key}: {source!r} is no path here; for a dataset of the hub say which split: NAME")
        wanted = "train"
    streaming = bool(given.get("streaming", False))

    def load() -> Any:
        if not (Path(datasets.config.HF_DATASETS_CACHE) / source.replace("/", "___")).is_dir():
            check_hub_is_reachable(source, "README.md")
        return datasets.load_dataset(source, name, split=wanted, revision=revision, streaming=streaming)

    table = _loading(given, key, load)
    described = f"{source}{f' {name}' if name else ''} split {wanted}"
    names = tuple(table.column_names) if table.column_names else None
    count = None if streaming else len(table)
    identity = f"{described} {revision or ''} {getattr(table, '_fingerprint', '')}"
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


def _detected(
    rows: Rows, columns: Mapping[str, str], described: str, key: str, method: str
) -> tuple[str, tuple[str, ...]]:
    """The format that the first rows are in, and the others that they could be in."""
    peeked = list(islice(rows.read(), _PEEKED))
    first = [row for row in peeked if row.wrong is None]
    if not first and peeked:
        raise ConfigError(f"{key}: {peeked[0].where} {peeked[0].wrong}")
    found: set[str] = set().union(*(detect(row.fields, columns) for row in first)) if first else set()
    chosen = chosen_format(found, method)
    if chosen is not None:
        return chosen, tuple(form for form in FORMATS if form in found and form != chosen)
    fields = names_of(list({name for row in first for name in row.fields}))
    if found:
        choices = ", ".join(form for form in FORMATS if form in found)
        raise ConfigError(f"{key}: {described!r} could be {choices} (fields: {fields}); say which, with format: NAME")
    if rows.columns is None and all(suffix_of(path) in JSONL_SUFFIXES for path in rows.files):
        return "text", ()  # whose own error names the first line that has none
    raise ConfigError(
        f"{key}: {described!r} is in no format that its fields tell ({fields}); say which, with format: "
        f"{'|'.join(FORMATS)}, and columns: {{part: name}} where names differ"
    )


def chained(sources: Iterable[Source], bad: BadRows) -> Iterator[str]:
    """The documents of several sources of text, one after the other."""
    for source in sources:
        yield from source.documents(bad)
