"""Where rows come from: files of every kind, saved tables, LLaMA-Factory's dataset_info.json."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatrain.data.mixture import Mixture
from megatrain.data.row_source import Source, open_source
from megatrain.errors import ConfigError

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
        ("a.json", b'[{"text": "x"}, {', "data.train: {path} line 1 is not JSON; expected a list of objects"),
        ("a.json", b'[\n{"text": "x"}\n\xff]', "data.train: '{path}' is not UTF-8"),
        ("a.csv", b"a,a\n1,2\n", "data.train: {path} line 1 is no list of columns"),
        ("a.csv", b'text\n"x', "data.train: {path} line 2 is no CSV: unexpected end of data"),
        ("a.csv", b"text\n\xff", "data.train: '{path}' is not UTF-8"),
        ("a.parquet", b"PAR1", "data.train: '{path}': "),
        ("a.jsonl", b'{"question": "x"}', None),  # its own error comes with its first text
        ("a.json", b'[{"question": "x"}]', "data.train: '{path}' is in no format that its fields tell (question); say"),
        (
            "a.json",
            b'[{"text": "x", "instruction": "q", "output": "a"}]',
            "data.train: '{path}' could be text, alpaca (fields: instruction, output, text); say which, with",
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
    assert list(mixture.documents()) == ["one", "two"] and mixture.kind == "text" and not mixture.detected
    mixture = Mixture([str(tmp_path / "mixed" / "c.csv")], split="train", key="data.train")
    assert list(mixture.documents()) == ["three"] and mixture.detected
    with pytest.raises(ConfigError, match="is plain text, which has no format alpaca; give format: text"):
        opened({"path": str(tmp_path / "mixed"), "format": "alpaca"})


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
    assert opened({"path": "alpaca", "dataset_info": str(info)}).samples == 3
    for name, message in [
        ("none", r"has no dataset 'none'; it has: alpaca, odd, openai, pairs, script, share, text, videos$"),
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
