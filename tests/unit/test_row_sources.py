"""Where rows come from: files of every kind, saved tables, LLaMA-Factory's dataset_info.json."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatrain.config import parse_config
from megatrain.data.bad_rows import BadRows
from megatrain.data.mixture import Mixture
from megatrain.data.row_files import json_rows
from megatrain.data.row_source import Source, open_source
from megatrain.errors import ConfigError
from megatrain.train.build import find_corpora

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = [{"messages": QA}, {"messages": [*QA, *QA]}]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def opened(spec: Any, *, form: str = "auto", split: Any = "train") -> Source:
    return open_source(spec, key="data.train", split=split, form=form, text_field="text")


def rows_of(source: Source) -> list[tuple[str, Any]]:
    assert source.rows is not None
    return [(row.where, row.wrong or dict(row.fields)) for row in source.rows.read()]


def write_jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8-sig")


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def write_parquet(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(path)


def write_saved(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(path)


@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("a.jsonl", write_jsonl, ["{path} line 1", "{path} line 3"]),
        ("a.json", write_json, ["{path} line 2", "{path} line 14"]),
        ("b.json", write_jsonl, ["{path} line 1", "{path} line 3"]),
        ("a.parquet", write_parquet, ["{path} row 1", "{path} row 2"]),
        ("saved", write_saved, ["{path} row 1", "{path} row 2"]),
    ],
)
def test_files_of_every_kind_hold_the_same_rows(
    tmp_path: Path, name: str, write: Callable[[Path], None], places: list[str]
) -> None:
    path = tmp_path / name
    write(path)
    source = opened(str(path))
    assert source.layout.format == "messages" and source.detected
    assert rows_of(source) == list(zip([place.format(path=path) for place in places], ROWS, strict=True))
    assert rows_of(source) == rows_of(source)  # as often as one likes
    assert source.files and all(file.is_file() for file in source.files)


def test_csv_and_tsv_have_a_place_for_each_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt", "completion"], ["p", "two\nlines"], ["q", "c", "more"], ["r", ""]])
    source = opened(str(path))
    assert source.layout.format == "prompt-completion"
    assert rows_of(source) == [
        (f"{path} line 2", {"prompt": "p", "completion": "two\nlines"}),
        (f"{path} line 4", "has 3 columns; the first line names 2"),
        (f"{path} line 5", {"prompt": "r", "completion": ""}),
    ]
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\np, 1\tc\n")
    assert rows_of(opened(str(tmp_path / "a.tsv"))) == [
        (f"{tmp_path / 'a.tsv'} line 2", {"prompt": "p, 1", "completion": "c"})
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"', "data.train: {path} line 1 is not JSON; expected a list of objects"),
        ("a.json", b"\n[", "data.train: {path} line 2 is where the file ends without the ] of its list"),
        (
            "a.csv.gz",
            gzip.compress(b"text\n" + bytes(range(65, 91)) * 99, mtime=0)[:-30],
            "data.train: cannot read '{path}': it is",
        ),
        ("a.jsonl.gz", b"{}", "data.train: cannot read '{path}': Not a gzipped file"),
        ("a.jsonl.zst", b"x", "data.train: '{path}' is compressed (.zst), which is not read; unpack it, or compress"),
        ("a.txt.xz", b"x", "data.train: '{path}' is compressed (.xz), which is not read"),
        ("a.json", b'[\n{"text": "x"}\n\xff]', "data.train: '{path}' is not UTF-8"),
        ("a.csv", b"a,a\n1,2\n", "data.train: {path} line 1 is no list of columns"),
        ("a.csv", b'text\n"x', "data.train: {path} line 2 is no CSV: unexpected end of data"),
        ("a.csv", b"text\n\xff", "data.train: '{path}' is not UTF-8"),
        ("a.parquet", b"PAR1", "data.train: '{path}': "),
        ("a.jsonl", b'{"question": "x"}', None),  # its own error comes with its first text
        ("a.json", b'[{"question": "x"}]', "data.train: '{path}' is in no format that its fields tell (question); say"),
        (
            "a.json",
            b'[{"prompt": "x", "completion": "y", "instruction": "q", "output": "a"}]',
            "data.train: '{path}' could be alpaca, prompt-completion (fields: completion, instruction, output, prompt)",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: bytes, message: str | None) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if message is None:
        assert opened(str(path)).corpus is not None
        return
    with pytest.raises(ConfigError) as caught:
        opened(str(path))
    assert str(caught.value).startswith(message.format(path=path)) and "\n" not in str(caught.value)


def test_jsonl_rows_that_cannot_be_read_are_rows_with_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"x\n[1]\n\xff\n')
    assert [row for _, row in rows_of(opened(str(path)))] == [
        ROWS[0],
        "is not JSON; a .jsonl file has one JSON object per line",
        "is a list; expected an object",
        "is not JSON; a .jsonl file has one JSON object per line",
    ]


CUT = "is where the file ends without the ] of its list; is it cut off?"
NO_JSON = "is not JSON; expected a list of objects, or an object in each line"


@pytest.mark.parametrize(
    ("text", "rows", "line", "wrong"),
    [
        ('[{"text": "a"},\n{"text": "b"}', 2, 2, CUT),
        ('[{"text": "a"},\n{"text": "b"},\n', 2, 3, CUT),
        ('[{"text": "a"},\n{"text": "b', 1, 2, NO_JSON),
        (
            '[{"text": "a"}\n{"text": 1}]',
            1,
            2,
            "has '{\"text\": 1}]' where a comma or the ] of the list would be right",
        ),
        ('[{"text": "a"},\n, {"text": "b"}]', 1, 2, NO_JSON),
        ('[{"text": "a"},\n]', 1, 2, NO_JSON),
        ('[{"text": "a"}]\n[{"text": "b"}]', 1, 1, 'has \'[{"text": "b"}]\' after the ] of the list'),
        ('[{"text": "a"}\n] x', 1, 2, "has 'x' after the ] of the list"),
        ("[] []", 0, 1, "has '[]' after the ] of the list"),
    ],
)
def test_a_damaged_list_has_a_bad_row_at_its_end(tmp_path: Path, text: str, rows: int, line: int, wrong: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    found = list(json_rows(path, "data.train"))
    assert [dict(row.fields)["text"] for row in found if row.wrong is None] == ["a", "b"][:rows]
    assert len(found) == rows + 1
    assert (found[-1].where, found[-1].wrong) == (f"{path} line {line}", f"{wrong}; what follows is not read")


@pytest.mark.parametrize(
    ("text", "count"),
    [("[]", 0), (" [ ]\n\n", 0), ('[{"text": "a"}]\n', 1), ('[\n{"text": "a"} ,\n{"text": "b"}]', 2)],
)
def test_whole_lists_have_no_bad_row(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert [row.wrong for row in json_rows(path, "data.train")] == [None] * count


def write_texts(path: Path) -> None:
    path.write_text("".join(json.dumps({"prompt": "p", "completion": str(n)}) + "\n\n" for n in range(10)))


def write_texts_json(path: Path) -> None:
    path.write_text(json.dumps([{"prompt": "p", "completion": str(number)} for number in range(10)]))


def write_texts_csv(path: Path) -> None:
    path.write_text("prompt,completion\n" + "".join(f"p,{number}\n" for number in range(10)))


def write_texts_gz(path: Path) -> None:
    write_texts(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_texts_folder(path: Path) -> None:
    path.mkdir()
    write_texts(path / "a.jsonl")
    lines = (path / "a.jsonl").read_text().split("\n\n")
    (path / "a.jsonl").write_text("\n".join(lines[:4]))
    (path / "b.jsonl").write_text("\n".join(lines[4:]))


def texts_table() -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": "p", "completion": str(number)} for number in range(10)])


def write_texts_saved(path: Path) -> None:
    texts_table().save_to_disk(path)


def write_texts_dict(path: Path) -> None:
    datasets.DatasetDict({"train": texts_table()}).save_to_disk(path)


def write_texts_parquet(path: Path) -> None:
    texts_table().to_parquet(path)


def write_parquet_folder(path: Path) -> None:
    path.mkdir()
    texts_table().to_parquet(path / "train-0.parquet")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_texts),
        ("a.json", write_texts_json),
        ("a.csv", write_texts_csv),
        ("a.jsonl.gz", write_texts_gz),
        ("folder", write_texts_folder),
        ("saved", write_texts_saved),
        ("dict", write_texts_dict),
        ("a.parquet", write_texts_parquet),
        ("parquet", write_parquet_folder),
    ],
)
def test_a_split_takes_a_part_of_the_rows(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    path = tmp_path / name
    write(path)

    def numbers(split: str | None) -> list[int]:
        return [int(fields["completion"]) for _, fields in rows_of(opened({"path": str(path), "split": split}))]

    everything = rows_of(opened(str(path)))
    assert numbers(None) == numbers("train") == list(range(10))
    for split, expected in [
        ("train[:50%]", range(5)),
        ("train[50%:]", range(5, 10)),
        ("train[:3]", range(3)),
        ("train[-2:]", range(8, 10)),
        ("train[7:99]", range(7, 10)),
        ("train[:15%](pct1_dropremainder)", None),
        ("train[:2]+train[8:]", [0, 1, 8, 9]),
    ]:
        if expected is None:
            with pytest.raises(ConfigError, match=r"split 'train\[:15%\]\(pct1_dropremainder\)'"):
                numbers(split)
        else:
            assert numbers(split) == list(expected)
    part = rows_of(opened({"path": str(path), "split": "train[3:]"}))
    assert part == everything[3:]  # with their places
    for split, message in [
        ("test", r"has no split 'test'; it has: train$"),
        ("test[:1]", r"has no split 'test'; it has: train$"),
        ("train[:x]", r"split 'train\[:x\]' is not known; expected a name or a part such as"),
        ("train[3:3]", r"split 'train\[3:3\]' takes no row"),
        ("train[20:]+train[:1%]", r"takes no row of 10$"),
    ]:
        with pytest.raises(ConfigError, match=message):
            numbers(split)
    with pytest.raises(ConfigError, match=r"^data\.train: '.*'.*(leave name: other out|'other' not found)"):
        opened({"path": str(path), "name": "other"})
    with pytest.raises(ConfigError, match=r"is a path here and has no revisions; leave revision: main out$"):
        opened({"path": str(path), "revision": "main"})


def test_a_split_takes_a_part_of_texts(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(str(number))
    (tmp_path / "texts" / "4.jsonl").write_text("".join(f'{{"text": "{number}"}}\n' for number in range(4, 10)))

    def texts(path: Path, split: str, skip: bool = False) -> list[str]:
        return list(opened({"path": str(path), "split": split}).documents(BadRows("data.train", skip=skip)))

    assert texts(tmp_path / "texts", "train[:20%]+train[50%:70%]") == ["0", "1", "5", "6"]
    assert texts(tmp_path / "texts" / "4.jsonl", "train[:50%]") == ["4", "5", "6"]
    (tmp_path / "texts" / "0.txt").write_bytes(b"\xff")  # what is not taken is not read
    assert texts(tmp_path / "texts", "train[1:3]") == ["1", "2"]
    with pytest.raises(ConfigError, match=r"has no split 'validation'; it has: train$"):
        texts(tmp_path / "texts", "validation")


def test_dataset_infos_splits_count(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl")
    columns = {"prompt": "prompt", "response": "completion"}
    entry = {"file_name": "a.jsonl", "columns": columns, "split": "train[:30%]"}
    (tmp_path / "info.json").write_text(json.dumps({"a": entry, "b": {**entry, "subset": "x"}}))
    assert len(rows_of(opened({"path": "a", "dataset_info": str(tmp_path / "info.json")}))) == 3
    with pytest.raises(ConfigError, match=r"has no configurations; leave name: x out$"):
        opened({"path": "b", "dataset_info": str(tmp_path / "info.json")})


@pytest.mark.parametrize("write", [write_texts, write_texts_saved, write_parquet_folder])
def test_data_are_held_out_by_their_rows(
    tmp_path: Path, write: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / ("a.jsonl" if write is write_texts else "a")
    write(path)

    def warned(train: str | None, held_out: str | None) -> bool:
        caplog.clear()
        data = {"train": {"path": str(path), "split": train}, "eval": {"path": str(path), "split": held_out}}
        find_corpora(parse_config({"model": {"path": "x"}, "data": data}, for_training=False))
        return "what is measured on it is not held out" in caplog.text

    assert not warned("train[:90%]", "train[90%:]")
    assert not warned("train[2:4]+train[6:8]", "train[:2]+train[9:]")
    assert warned("train[:90%]", "train[80%:]")
    assert warned("train", "train[80%:]") and warned("train", "train")


def test_several_files_by_a_pattern(tmp_path: Path) -> None:
    write_texts_folder(tmp_path / "folder")
    assert rows_of(opened(str(tmp_path / "folder" / "*.jsonl"))) == rows_of(opened(str(tmp_path / "folder")))
    assert len(rows_of(opened({"path": str(tmp_path / "**" / "[a]*.jsonl"), "split": "train[:2]"}))) == 2
    for number in range(2):
        texts_table().select([number]).to_parquet(tmp_path / f"{number}.parquet")
        (tmp_path / f"{number}.txt").write_text(str(number))
    assert len(rows_of(opened(str(tmp_path / "*.parquet")))) == 2
    assert list(opened(str(tmp_path / "?.txt")).documents(BadRows("data.train", skip=False))) == ["0", "1"]
    with pytest.raises(ConfigError, match=r"^data\.train: no file matches '.*\*\.none'$"):
        opened(str(tmp_path / "*.none"))
    with pytest.raises(ConfigError, match=r"names \.parquet, \.txt files; give files of one kind$"):
        opened(str(tmp_path / "1.*"))
    (tmp_path / "[x].txt").write_text("not a pattern")
    assert opened(str(tmp_path / "[x].txt")).files == (tmp_path / "[x].txt",)


def test_a_revision_of_the_hub_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> datasets.Dataset:
        given.append((arguments, options))
        return texts_table()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("megatrain.hub.check_hub_is_reachable", lambda *_: None)
    spec = {"path": "org/data", "name": "small", "revision": "v1"}
    identities = [opened(one).identity for one in (spec, {**spec, "revision": "v2"})]
    options = {"split": "train", "revision": "v1", "streaming": False}
    assert given[0] == (("org/data", "small"), options) and identities[0] != identities[1]


def test_splits_are_chosen_by_name(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "saved")
    for name in ("train", "test"):
        (tmp_path / "files").mkdir(exist_ok=True)
        table.select([0] if name == "test" else [0, 1]).to_parquet(tmp_path / "files" / f"{name}-0.parquet")
    (tmp_path / "files" / "README.md").write_text("# about")
    for folder in ("saved", "files"):
        path = str(tmp_path / folder)
        assert len(rows_of(opened(path))) == 2
        held_out = opened({"path": path, "split": "test"}, split="eval")
        assert len(rows_of(held_out)) == 1 and all("test" in str(file) for file in held_out.files)
        with pytest.raises(ConfigError, match=r"has splits \(test, train\); say which, with split: NAME"):
            opened(path, split="eval")
        with pytest.raises(ConfigError, match=r"^data.train: '.*none.*"):
            opened({"path": path, "split": "none"})


def test_unknown_columns_of_tables_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"has no column 'chat' \(for messages\); its columns are: messages$"):
        opened({"path": str(tmp_path / "a.parquet"), "columns": {"messages": "chat"}})


def test_texts_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("one")
    (tmp_path / "mixed" / "b.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "mixed" / "c.csv").write_text("text\nthree\n")
    mixture = Mixture([str(tmp_path / "mixed")], split="train", key="data.train")
    assert list(mixture.documents()) == ["one", "two"] and mixture.kind == "text"
    assert mixture.detected == [f"data.train: {tmp_path / 'mixed'} is in format text"]
    mixture = Mixture([str(tmp_path / "mixed" / "c.csv")], split="train", key="data.train")
    assert list(mixture.documents()) == ["three"] and mixture.detected
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    for form, said in (("auto", [f"data.train: {tmp_path / 'b.jsonl'} is in format text"]), ("text", [])):
        assert Mixture([str(tmp_path / "b.jsonl")], split="train", key="data.train", form=form).detected == said
    with pytest.raises(ConfigError, match="is plain text, which has no format alpaca; give format: text"):
        opened({"path": str(tmp_path / "mixed"), "format": "alpaca"})


def test_well_known_layouts_of_several_formats_are_told_by_the_method(tmp_path: Path) -> None:
    ultrafeedback = {"prompt": "q", "messages": QA, "chosen": QA, "rejected": [QA[0], {**QA[1], "content": "b"}]}
    stanford = {"instruction": "q", "input": "", "output": "a", "text": "Below is q a"}
    (tmp_path / "u.jsonl").write_text(json.dumps({**ultrafeedback, "prompt_id": "1", "score_chosen": 8.0}))
    (tmp_path / "s.jsonl").write_text(json.dumps(stanford))

    def detected(name: str, method: str) -> str:
        (said,) = Mixture([str(tmp_path / name)], split="train", key="data.train", method=method).detected
        return said.removeprefix(f"data.train: {tmp_path / name} is in format ")

    assert detected("u.jsonl", "dpo") == "preference (it could be messages, too, which format says)"
    assert detected("u.jsonl", "auto") == "messages (it could be preference, too, which format says)"
    assert detected("s.jsonl", "sft") == "alpaca (it could be text, too, which format says)"


def test_a_hub_id_that_cannot_be_reached_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        opened("nobody/nothing-at-all")
    assert str(caught.value).startswith("data.train: 'nobody/nothing-at-all' does not exist here, and as a hub id: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="is no path here; for a dataset of the hub say which split: NAME"):
        opened("nobody/nothing-at-all", split="eval")
    with pytest.raises(ConfigError, match=r"'texts/none\.jsonl' does not exist; give a text file"):
        opened("texts/none.jsonl")


def test_llama_factorys_dataset_info_is_read(tmp_path: Path) -> None:
    info = tmp_path / "dataset_info.json"
    share = [{"who": "me", "said": "q"}, {"who": "it", "said": "a"}]
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "q", "input": "", "output": "a", "q": 1}]))
    more = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q", "a"]]}
    (tmp_path / "more.json").write_text(json.dumps([more]))
    (tmp_path / "share.jsonl").write_text(json.dumps({"chat": share}))
    (tmp_path / "openai.jsonl").write_text(json.dumps({"messages": QA}))
    (tmp_path / "pairs.json").write_text(json.dumps([{"instruction": "q", "yes": "a", "no": "b"}]))
    (tmp_path / "text.json").write_text(json.dumps([{"content": "t"}]))
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "me", "assistant_tag": "it"}
    entries = {
        "alpaca": {"file_name": "alpaca.json", "num_samples": 3},
        "share": {"file_name": "share.jsonl", "formatting": "sharegpt", "columns": {"messages": "chat"}, "tags": tags},
        "openai": {"file_name": "openai.jsonl", "formatting": "openai", "columns": {"messages": "messages"}},
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "yes", "rejected": "no"},
        },
        "plain": {"file_name": "more.json", "columns": {"prompt": "instruction", "response": "output"}},
        "all": {
            "file_name": "more.json",
            "columns": {"prompt": "instruction", "query": "input", "system": "system", "history": "history"},
        },
        "text": {"file_name": "text.json", "columns": {"prompt": "content"}},
        "videos": {"file_name": "text.json", "columns": {"videos": "content"}},
        "script": {"script_url": "x"},
        "odd": {"file_name": "text.json", "formatting": "odd"},
    }
    info.write_text(json.dumps(entries))

    def sample(name: str) -> Any:
        from megatrain.data.formats import sample_of

        source = opened({"path": name, "dataset_info": str(info)})
        assert not source.detected
        return next(sample_of(row, source.layout) for _, row in rows_of(source))

    from megatrain.data.formats import Chat, Pair, Text

    other = [QA[0], {"role": "assistant", "content": "b"}]
    assert sample("alpaca") == sample("share") == sample("openai") == Chat(QA)
    assert sample("pairs") == Pair(Chat(QA, first=1), Chat(other, first=1))
    assert sample("text") == Text("t")
    assert sample("plain") == Chat(QA)  # what it does not name is not read
    assert sample("all") == Chat([{"role": "system", "content": "s"}, *QA, {"role": "user", "content": "q\ni"}, QA[1]])
    named = opened({"path": "plain", "dataset_info": str(info), "columns": {"system": "system"}})
    assert "system" not in named.layout.unread and "input" in named.layout.unread
    assert opened({"path": "alpaca", "dataset_info": str(info)}).samples == 3
    for name, message in [
        (
            "none",
            r"has no dataset 'none'; it has: all, alpaca, odd, openai, pairs, plain, script, share, text, videos$",
        ),
        ("videos", r"columns.videos is not supported; rows are of text and images$"),
        ("script", r"names no file_name and no hf_hub_url"),
        ("odd", r"formatting 'odd' is not known; expected alpaca, sharegpt or openai$"),
    ]:
        with pytest.raises(ConfigError, match=message):
            opened({"path": name, "dataset_info": str(info)})


def test_sources_of_a_mixture_are_of_one_kind(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"a.txt' \(text\) and '.*a.jsonl' \(chat\) cannot be in one"):
        Mixture([str(tmp_path / "a.jsonl"), str(tmp_path / "a.txt")], split="train", key="data.train")
    with pytest.raises(ConfigError, match=r"weight 0.5 of '.*a.txt' is wrong; expected a whole number from 1"):
        Mixture([{"path": str(tmp_path / "a.txt"), "weight": 0.5}], split="train", key="data.train")
    twice = Mixture([{"path": str(tmp_path / "a.txt"), "weight": 2}], split="train", key="data.train")
    assert list(twice.documents()) == ["x", "x"]
