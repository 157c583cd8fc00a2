"""Texts to a stream of tokens: the same for any number of processes, from the cache or anew, in pieces or whole."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain import cli
from megatrain.config import parse_config
from megatrain.data import text_encoder, text_tokens
from megatrain.data.packing import TokenStream
from megatrain.data.text_encoder import TextEncoder
from megatrain.data.tokenizer import load_tokenizer, train_bpe
from megatrain.errors import ConfigError
from megatrain.train.build import find_corpora
from megatrain.train.row_data import prepare_texts

TEXTS = [f"def f{n}(x):\n    return x + {n}  # añadir\n\n\n" * (n % 5 + 1) for n in range(300)]


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS[:299], ""]))
    return path


def settings(folder: Path, train: Any, **data: Any) -> dict[str, Any]:
    return {
        "model": {"path": "none", "tokenizer": str(folder)},
        "data": {"train": train, "seq_len": 16, "cache": "off", **data},
        "train": {"tokens": 64, "tokens_per_step": 32},
    }


def stream_of(folder: Path, train: Any, tokenizer: Any = None, **data: Any) -> TokenStream:
    config = parse_config(settings(folder, train, **data))
    return prepare_texts(config, find_corpora(config).train, tokenizer or load_tokenizer(str(folder)))


def plainly(folder: Path, several: Sequence[str]) -> list[int]:
    """Each document by itself, with end-of-text around them."""
    tokenizer = load_tokenizer(str(folder))
    return [1, *(token for text in several for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], 1])]


def test_any_number_of_processes_gives_the_documents_one_by_one(
    bpe_folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoder, "_CHARACTERS_PER_BLOCK", 500)
    one, two = (stream_of(bpe_folder, str(texts), workers=workers) for workers in (1, 2))
    assert one.tokens.tolist() == two.tokens.tolist() == plainly(bpe_folder, TEXTS[:299])
    assert one.utf8_bytes == two.utf8_bytes == sum(len(text.encode()) for text in TEXTS[:299])


def test_sources_follow_each_other_as_often_as_they_weigh(bpe_folder: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(TEXTS[7])
    found = stream_of(bpe_folder, [{"path": str(tmp_path / "b.txt"), "weight": 2}, str(texts)])
    assert found.tokens.tolist() == plainly(bpe_folder, [TEXTS[7], TEXTS[7], *TEXTS[:299]])
    assert found.utf8_bytes == sum(len(text.encode()) for text in [TEXTS[7], TEXTS[7], *TEXTS[:299]])


def test_what_is_in_the_cache_is_not_made_again(
    bpe_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with texts.open("a") as stream:
        stream.write("{\n")
    cache = {"cache": str(tmp_path / "cache"), "bad_rows": "skip"}
    first = stream_of(bpe_folder, str(texts), **cache)
    (entry,) = (tmp_path / "cache").iterdir()
    assert {file.name for file in entry.iterdir()} == {"tokens.npy", "facts.json"}
    said = list(caplog.messages)
    assert len(said) == 1 and "skipped 1 bad rows" in said[0]
    with monkeypatch.context() as patch:
        patch.setattr(text_tokens, "encoded", None)
        again = stream_of(bpe_folder, str(texts), **cache)
    assert isinstance(again.tokens, np.memmap) and again.tokens.tolist() == first.tokens.tolist()
    assert again.utf8_bytes == first.utf8_bytes and caplog.messages == [*said, *said]
    with pytest.raises(ConfigError, match="line 301 is not JSON"):
        stream_of(bpe_folder, str(texts), **{**cache, "bad_rows": "fail"})
    part = stream_of(bpe_folder, {"path": str(texts), "split": "train[:2]"}, **cache)
    assert part.tokens.tolist() == plainly(bpe_folder, TEXTS[:2])
    (entry / "tokens.npy").unlink()  # what is mapped stays readable
    (entry / "tokens.npy").write_bytes(b"")
    assert stream_of(bpe_folder, str(texts), **cache).tokens.tolist() == first.tokens.tolist()


def test_a_tokenizer_that_is_code_of_its_own_stays_here(bpe_folder: Path, texts: Path, tmp_path: Path) -> None:
    class Loud:
        def __init__(self) -> None:
            self.inner = load_tokenizer(str(bpe_folder))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __len__(self) -> int:
            return len(self.inner)

        def __call__(self, several: list[str], **options: Any) -> Any:
            return self.inner([text.upper() for text in several], **options)

    found = stream_of(bpe_folder, str(texts), Loud(), cache=str(tmp_path / "cache"), workers=2)
    assert found.tokens.tolist() == plainly(bpe_folder, [text.upper() for text in TEXTS[:299]])
    assert not (tmp_path / "cache").exists()


def test_of_streaming_texts_the_command_reads_no_more_than_the_steps_need(
    bpe_folder: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with texts.open("a") as stream:
        stream.write("never reached\n")
    file = tmp_path / "run.yaml"
    given = settings(bpe_folder, {"path": str(texts), "streaming": True}, cache=str(tmp_path / "cache"))
    file.write_text(json.dumps(given))
    assert cli.main(["data", str(file), "--json"]) == 0
    read = json.loads(capsys.readouterr().out)["train"]["mixture"]["tokens"]
    assert read == len(plainly(bpe_folder, TEXTS[:128])) // 16 * 16
    longer = stream_of(bpe_folder, [{"path": str(texts), "streaming": True}] * 2)
    assert longer.tokens.tolist() == plainly(bpe_folder, TEXTS[:128])
    assert cli.main(["data", str(file), "--train.tokens", "999936"]) == 2
    assert "line 301 is not JSON" in capsys.readouterr().err


# -- long documents ---------------------------------------------------------------------------------------


def sentence_piece_like(folder: Path, kind: str) -> Path:
    """A tokenizer that puts a space before each text that it is given: as Llama 2's, and as newer ones do it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], show_progress=False)
    made.train_from_iterator(["this is a line of text\nand more words"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["normalizer", "metaspace", "bytes"])
@pytest.mark.parametrize("text", ["this is a line of text\n" * 40, "more words " * 80, "ab" * 400, "a\n\n    b\n" * 99])
def test_a_long_document_has_the_tokens_of_the_whole(
    bpe_folder: Path, tmp_path: Path, kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoder, "_CHARACTERS_PER_PIECE", 200)
    folder = bpe_folder if kind == "bytes" else sentence_piece_like(tmp_path / "tokenizer", kind)
    tokenizer = load_tokenizer(str(folder))
    path = tmp_path / "a.txt"
    path.write_text(text)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert stream_of(folder, str(path), tokenizer).tokens.tolist()[1:-1] == whole
    encoder, _ = text_encoder.text_encoder(tokenizer)
    pieces = [piece for block in encoder.blocks([text], 0) for piece in block]
    assert "".join(piece for piece, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert (len(pieces) == 1) == (kind == "normalizer" or "abab" in text)


def test_blocks_hold_no_more_than_they_must(bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "_CHARACTERS_PER_BLOCK", 1000)
    encoder, plain = text_encoder.text_encoder(load_tokenizer(str(bpe_folder)))
    assert plain and isinstance(encoder, TextEncoder)
    blocks = list(encoder.blocks(["x" * 600] * 4 + ["y"] * 200, 100))
    assert [len(block) for block in blocks] == [2, 2, 24, 128, 48]  # the third ends where 128 have come


# -- what a killed process left ---------------------------------------------------------------------------

KILLED = """
import sys
from pathlib import Path
from megatrain.data.token_files import TokenCache
with TokenCache(Path(sys.argv[1])).writing("x") as entry:
    entry.array("tokens", "uint16")
    print("here", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_in_the_cache_is_removed(bpe_folder: Path, texts: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, "-c", KILLED, cache], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    stream_of(bpe_folder, str(texts), cache=str(cache))
    assert len(list(cache.glob(".unfinished-*"))) == 1  # it is still being written
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(list(cache.glob(".unfinished-*"))) == 1
    stream_of(bpe_folder, {"path": str(texts), "split": "train[:3]"}, cache=str(cache))
    assert not list(cache.glob(".unfinished-*")) and len(list(cache.iterdir())) == 2
