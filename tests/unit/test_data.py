"""Text to batches: what is read, in what order, and that nothing depends on what came before."""

import gzip
import json
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatrain.data import text_encoder
from megatrain.data.bad_rows import BadRows
from megatrain.data.batches import StepBatches
from megatrain.data.mixture import Mixture
from megatrain.data.packing import TokenStream
from megatrain.data.rows import JoinedRows
from megatrain.data.sources import Corpus, stdlib_files
from megatrain.data.text_tokens import tokenise_texts
from megatrain.data.token_files import TokenCache
from megatrain.data.tokenizer import BPE_SPECIAL_TOKENS, load_tokenizer, train_bpe
from megatrain.errors import ConfigError

TEXTS = [f"def f{n}(x):\n    return x + {n}  # añadir\n\n\n" for n in range(40)]


@pytest.fixture(scope="module")
def bpe() -> Any:
    return train_bpe(TEXTS, 300)


def corpus(*sources: Path | str, **options: Any) -> Corpus:
    return Corpus([str(source) for source in sources], split="train", key="data.train", **options)


# -- sources ----------------------------------------------------------------------------------------------


def documents(found: Corpus, *, skip: bool = False) -> list[str]:
    return list(found.documents(BadRows("data.train", skip=skip)))


def test_folder_is_read_in_sorted_order_without_hidden_and_empty_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in [
        ("z.txt", b"last"),
        ("a.py", b"first"),
        ("b/c.md", "zwölf".encode()),
        ("empty.py", b"\n"),
        ("data.bin", b"\x00\x01"),
        ("b/one.JSON", b"[]"),
        ("two.json", b"[]"),
        ("packed.txt.gz", gzip.compress(b"packed", mtime=0)),
        (".git/x.py", b"hidden"),
    ]:
        (tmp_path / name).write_bytes(content)
    found = corpus(tmp_path)
    assert documents(found) == documents(found) == ["first", "zwölf", "packed", "last"]
    told = "files are left out that are no texts by their names: 1 .bin, 2 .json"
    assert caplog.messages == [f"data.train: of folder {str(tmp_path)!r} {told}"]


def test_files_that_are_no_text_end_the_run_or_are_left_out_by_name(tmp_path: Path) -> None:
    names = [f"{number}.txt" for number in range(9)]
    for name in names:
        (tmp_path / name).write_bytes("zwölf".encode("latin-1") if name != "3.txt" else b"a\x00b")
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(ConfigError, match=r"^data\.train: .*/0\.txt is not UTF-8 text \(at byte 2\); data\.bad_rows"):
        documents(corpus(tmp_path))
    bad = BadRows("data.train", skip=True)
    assert list(corpus(tmp_path).documents(bad)) == ["good"]
    assert bad.count == 9 and [first.split(" ")[0] for first in bad.first] == [str(tmp_path / name) for name in names]
    assert "3.txt has a NUL byte" in bad.first[3]
    (tmp_path / "good.txt").unlink()
    (tmp_path / "gone.txt").write_text("x")
    found = corpus(tmp_path / "gone.txt")
    (tmp_path / "gone.txt").unlink()
    with pytest.raises(ConfigError, match=r"cannot read '.*gone\.txt'"):  # which is no bad row
        documents(found, skip=True)


def test_jsonl_gives_one_document_per_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n\n" for text in ("one", "", "two\nlines")))
    assert documents(corpus(path, text_field="body")) == ["one", "two\nlines"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', "data.text_field: {path} line 1 has no text in field 'text'; its fields are: body"),
        ('{"text": 3}', "data.text_field: {path} line 1 has a number in field 'text'; expected a string"),
        ('{"text": null}', "data.text_field: {path} line 1 has null in field 'text'; expected a string"),
        ('{"text": ["x"]}', "data.text_field: {path} line 1 has a list in field 'text'; expected a string"),
        ("[1]", "data.train: {path} line 1 is a list; expected a JSON object"),
        ("{", "data.train: {path} line 1 is not JSON; a .jsonl file has one JSON object per line"),
        ("[" * 99_999, "data.train: {path} line 1 is not JSON; a .jsonl file has one JSON object per line"),
        (
            '{"text": "\\ud83d\\ude00 and \\ud800"}',
            "data.train: {path} line 1 has \\ud800 by itself in field 'text', which is half of a surrogate pair and no "
            "character; write both halves or remove it",
        ),
    ],
)
def test_wrong_jsonl_lines(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError) as caught:
        documents(corpus(path))
    assert str(caught.value) == message.format(path=path)


def test_a_link_that_cannot_be_followed_is_named_and_one_to_nothing_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "nothing.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "no_text").symlink_to("x" * 300)  # no file has so long a name: looking is an error, also for root
    assert [path.name for path in corpus(tmp_path).files] == ["a.txt"]
    (tmp_path / "link.txt").symlink_to("x" * 300)
    with pytest.raises(ConfigError, match=r"^data\.train: cannot read '.*link\.txt': File name too long$"):
        corpus(tmp_path)


def test_missing_path_and_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.train: '.*/none' does not exist; give a text file"):
        corpus(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"data.train: folder '.*' has no text files"):
        corpus(tmp_path)
    with pytest.raises(ConfigError, match=r"data.train: '/dev/null' is neither a file nor a folder"):
        corpus("/dev/null")
    with pytest.raises(ConfigError, match=r"data.train: 'x+' does not exist"):
        corpus("x" * 300)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text("x")
        found = corpus(tmp_path / name)
        (tmp_path / name).unlink()
        with pytest.raises(ConfigError, match=rf"data.train: cannot read '.*{name}': No such file"):
            documents(found)


def test_stdlib_splits_without_overlap() -> None:
    train, held_out = stdlib_files("train"), stdlib_files("eval")
    assert train == sorted(train) and not set(train) & set(held_out)
    share = sum(path.stat().st_size for path in held_out) / sum(path.stat().st_size for path in train)
    assert 0.005 < share < 0.1
    texts = {path.read_bytes() for path in train}
    assert not any(path.read_bytes() in texts for path in held_out)
    root = Path(sysconfig.get_path("stdlib"))
    parts = {part for path in train + held_out for part in path.relative_to(root).parts[:-1]}
    assert not parts & {"test", "tests", "site-packages", "dist-packages"}


# -- tokenizer --------------------------------------------------------------------------------------------


def test_bpe_is_deterministic_and_lossless(bpe: Any) -> None:
    again = train_bpe(TEXTS, 300)
    assert again.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()
    assert len(bpe) == 300
    odd = "\tä€𝄞 \r\n  x ,y .\n\n\n   def  f( ):\x07 '"
    assert bpe.decode(bpe(odd, add_special_tokens=False)["input_ids"]) == odd


def test_bpe_survives_a_folder(bpe: Any, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(TEXTS[3])["input_ids"] == bpe(TEXTS[3])["input_ids"]
    assert {name: getattr(loaded, name) for name in BPE_SPECIAL_TOKENS} == BPE_SPECIAL_TOKENS
    # its files are the same again: a run that goes on from a checkpoint leaves what it would have left
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model.tokenizer: no tokenizer in '.*': it has no tokenizer files"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^model.tokenizer: './none' does not exist"):
        load_tokenizer("./none")


# -- packing ----------------------------------------------------------------------------------------------


def tokenize(texts: list[str], tokenizer: Any) -> TokenStream:
    """What texts become, a file of them each."""
    with tempfile.TemporaryDirectory() as folder:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (Path(folder) / "a.jsonl").write_text(lines)
        mixture = Mixture([str(Path(folder) / "a.jsonl")], split="train", key="data.train")
        sources = mixture.sources
        return tokenise_texts(sources, tokenizer, bad_rows="fail", workers=1, cache_of=lambda _: TokenCache(None))


def test_documents_are_joined_with_end_of_text(bpe: Any) -> None:
    stream = tokenize(TEXTS[:2], bpe)
    first, second = (bpe(text, add_special_tokens=False)["input_ids"] for text in TEXTS[:2])
    assert stream.tokens.tolist() == [1, *first, 1, *second, 1]
    assert stream.tokens.dtype == np.uint16
    assert stream.utf8_bytes == sum(len(text.encode()) for text in TEXTS[:2])
    rows = stream.sequences(7)
    assert rows.shape == (len(stream.tokens) // 7, 7) and np.shares_memory(rows, stream.tokens)
    assert rows.ravel().tolist() == stream.tokens.tolist()[: rows.size]


@pytest.mark.parametrize("loaded", [False, True])
def test_text_that_speaks_of_special_tokens_is_text(bpe: Any, loaded: bool, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path)) if loaded else bpe
    text = "a<|eos|>b <|bos|> <|pad|>"
    tokens = tokenize([text], tokenizer).tokens.tolist()
    assert not set(tokens[1:-1]) & {0, 1, 2}
    assert tokenizer.decode(tokens[1:-1]) == text


def test_a_tokenizer_that_reads_special_tokens_in_text_goes_on_doing_so(bpe: Any, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path, split_special_tokens=False)
    theirs = load_tokenizer(str(tmp_path))
    theirs.split_special_tokens = False
    assert tokenize(["a<|eos|>b"], theirs).tokens.tolist().count(1) == 3


def test_a_long_document_is_tokenized_in_parts_that_join(bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "_CHARACTERS_PER_PIECE", 50)
    text = "".join(TEXTS) + "x" * 120
    stream = tokenize([text, "y"], bpe)
    assert stream.tokens.tolist().count(1) == 3
    assert bpe.decode(stream.tokens[1:-3].tolist()) == text
    assert stream.utf8_bytes == len(text.encode()) + 1


def test_no_documents_give_one_token(bpe: Any) -> None:
    stream = tokenize([], bpe)
    assert stream.tokens.tolist() == [1] and stream.utf8_bytes == 0 and len(stream.sequences(4)) == 0


# -- batches ----------------------------------------------------------------------------------------------


def batches(count: int = 10, shuffle: bool = True, seed: int = 5) -> StepBatches:
    sequences = np.arange(count, dtype=np.uint16)[:, None].repeat(3, axis=1)
    return StepBatches(JoinedRows(sequences, shuffle=shuffle, seed=seed), micro_batch=2, rows_per_step=4)


def rows_of(source: StepBatches, steps: range) -> list[int]:
    return [int(row[0]) for step in steps for batch in source.of_step(step) for row in batch["input_ids"]]


def test_a_step_is_micro_batches_of_int64_ids_and_equal_labels() -> None:
    step = batches().of_step(0)
    assert [batch["input_ids"].shape for batch in step] == [(2, 3), (2, 3)]
    for batch in step:
        assert batch["input_ids"].dtype == torch.int64 and torch.equal(batch["input_ids"], batch["labels"])


def test_unshuffled_steps_follow_the_text_and_wrap_around() -> None:
    assert rows_of(batches(shuffle=False), range(3)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_each_epoch_has_every_sequence_once_in_an_order_of_its_own() -> None:
    rows = rows_of(batches(), range(5))  # 20 rows: two epochs, the third step spans both
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:] and rows[:10] != list(range(10))
    assert rows != rows_of(batches(seed=6), range(5))


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    in_order = rows_of(batches(), range(8))
    backwards = [rows_of(batches(), range(step, step + 1)) for step in reversed(range(8))]
    assert [row for rows in reversed(backwards) for row in rows] == in_order


def test_a_step_may_be_larger_than_an_epoch() -> None:
    assert sorted(rows_of(batches(count=2), range(1))) == [0, 0, 1, 1]
