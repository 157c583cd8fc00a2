"""Held-out rows with images: their loss is that of transformers' own processor and model, and training goes on as if
nobody had measured it. How rows with images are read: by how many processes, how often, and that it is told."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_runs import BLUE, RED, ROWS, TEXT, Row, built, config_of, model_of
from PIL import Image
from tiny_vision import FAMILIES
from transformers import AutoTokenizer

import megatrain as mt
from megatrain import cli
from megatrain.config import Config, EvalConfig, to_yaml
from megatrain.data import image_processing, progress
from megatrain.data.images import ImageEncoder, ImageRows
from megatrain.errors import ConfigError
from megatrain.model.loading import load_pretrained
from megatrain.train import build
from megatrain.train.evaluate import evaluate
from megatrain.train.held_out import HeldOut
from megatrain.train.held_out_images import image_set
from megatrain.train.image_data import prepare_images
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.processor import load_processor
from megatrain.train.run import run
from megatrain.train.samples import read_prompts
from megatrain.train.undisturbed import undisturbed


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (40, 20), (255, 0, 0)).save(folder / "red.png")
    Image.new("RGB", (16, 30), (0, 0, 255)).save(folder / "blue.jpg")
    (folder / "eval.jsonl").write_text("\n".join(json.dumps(row) for row in (RED, TEXT, BLUE)))
    return folder


def held_out_config(family: str, data: Path, **sections: Any) -> Config:
    """A run with images whose held-out rows have some, too."""
    sections["data"] = {"eval": str(data / "eval.jsonl")} | sections.get("data", {})
    return config_of(model_of(family), data, [BLUE, TEXT], **sections)


def held_out_rows(config: Config) -> ImageRows:
    found, _ = built(config)
    assert isinstance(found.held_out, ImageRows)
    return found.held_out


def engine_of(family: str) -> mt.Engine:
    model = load_pretrained(model_of(family)).train()
    return mt.Engine(model, optimizer=mt.AdamW(lr=1e-2), device="cpu", precision="fp32", threads=1)


# -- what is measured ---------------------------------------------------------------------------------------------

_WRITTEN = {"gemma3": "<start_of_image>", "qwen2_5_vl": "<start_of_vision><image><end_of_vision>"}


def loss_by_transformers(family: str, data: Path) -> tuple[float, int]:
    """(mean loss, targets) of the same rows, one at a time, as a template would write them."""
    mark = _WRITTEN.get(family, "<image>")
    red, blue = (Image.open(data / name).convert("RGB") for name in ("red.png", "blue.jpg"))
    first = f"<|user|>{mark}what is in this picture?<|assistant|>it is red.<|eos|>"
    rows = [
        ([red, blue], f"{first}<|user|>and this one?{mark}<|assistant|>it is blue<|eos|>"),
        (None, "<|user|>is it red?<|assistant|>it is.<|eos|>"),
        ([blue], f"<|user|>what is this{mark}<|assistant|>blue<|eos|>"),
    ]
    processor = load_processor(str(model_of(family)), AutoTokenizer.from_pretrained(model_of(family)))
    model = load_pretrained(model_of(family)).eval()
    nats, targets = 0.0, 0
    for images, text in rows:
        made = processor(text=[text], images=images and [images], add_special_tokens=False, return_tensors="pt")
        ids = made["input_ids"][0].tolist()
        with torch.no_grad():
            scores = model(**made).logits[0].float().log_softmax(-1)
        for place in learned_places(ids, processor.tokenizer):
            nats, targets = nats - scores[place - 1, ids[place]].item(), targets + 1
    return nats / targets, targets


def learned_places(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """After each <|assistant|>, up to and with the end-of-text."""
    begins = tokenizer("<|assistant|>", add_special_tokens=False)["input_ids"]
    places, learning = [], False
    for place, token in enumerate(ids):
        places += [place] * learning
        learning = (learning and token != tokenizer.eos_token_id) or ids[: place + 1][-len(begins) :] == begins
    return places


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_transformers_own(family: str, data: Path) -> None:
    """Of micro-batches of two rows; bits per byte are of what is said, however its end is spelled."""
    rows, engine = held_out_rows(held_out_config(family, data)), engine_of(family)
    with undisturbed(engine.model, torch.device("cpu")):
        found = evaluate(engine, image_set(rows, 2, None))
    loss, targets = loss_by_transformers(family, data)
    assert found is not None and found.target_tokens == targets
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.utf8_bytes == len("it is red.it is blueit is.blue")


def test_so_many_tokens_are_whole_examples(data: Path) -> None:
    rows = held_out_rows(held_out_config("llava_next", data))
    lengths = [example.tokens for example in rows.examples]
    for most, count in ((1, 1), (lengths[0], 1), (lengths[0] + lengths[1], 2), (None, 3)):
        one = image_set(rows, 1, most)
        assert len(list(one.batches())) == count
        assert (one.utf8_bytes is None) == (count < 3)
    digests = {image_set(rows, 1, most).sha256 for most in (1, None)}
    Image.new("RGB", (16, 30), (0, 255, 0)).save(data / "blue.jpg")
    assert len(digests | {image_set(rows, 1, None).sha256}) == 3


def test_training_is_bit_equal_with_evaluations(data: Path) -> None:
    """Also with one before the first step, when transformers has not put its hooks on the vision tower."""
    config = held_out_config("llava_next", data)
    found, _ = built(config)
    assert isinstance(found.held_out, ImageRows)
    hashes = []
    for sets in ({}, {"eval": image_set(found.held_out, 2, None)}):
        engine = engine_of("llava_next")
        with StopOnInterrupt() as stop:
            held_out = HeldOut(EvalConfig(every=1, at_start=True), engine, sets, stop=stop)
            held_out.before_training()
            for step in range(2):
                engine.train_step(build.batches_of(config, found)(step), lr=1e-2)
                held_out.after_step(step + 1, last=False)
        hashes.append(engine.unit_hashes())
        engine.close()
    assert hashes[0] == hashes[1] and len(held_out.losses) == 3


def test_a_run_measures_keeps_the_best_and_ends(data: Path) -> None:
    config = held_out_config("idefics3", data, checkpoint={"every": 1}, train={"steps": 4})
    config = replace(config, eval=replace(config.eval, every=1, patience=1, min_delta=100.0))
    done = run(config)
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval" in line] == [1, 2]  # the second is no improvement by 100
    assert done.best is not None and done.best[1] == min(line["eval"]["loss"] for line in lines if "eval" in line)


def test_prompts_are_texts_where_held_out_rows_have_images(data: Path) -> None:
    rows = held_out_rows(held_out_config("llava_next", data))
    model_config = load_pretrained(model_of("llava_next")).config
    assert read_prompts(EvalConfig(), None, rows, model_config) == []
    with pytest.raises(
        ConfigError, match=r"^eval.prompts: 2 is wrong for a data.eval whose rows have images; expected"
    ):
        read_prompts(EvalConfig(prompts=2), None, rows, model_config)


# -- how rows are read --------------------------------------------------------------------------------------------


def read(config: Config) -> tuple[Any, ...]:
    """All that is read of data.train."""
    found = prepare_images(config, build.find_corpora(config).train, build.given_tokenizer(config), keep_tokens=True)
    assert found.examples is not None
    places = [example.where[-1] for example in found.rows.examples]
    return places, found.examples.tokens.tolist(), found.examples.targets.tolist(), found.said


@pytest.mark.long  # starts a process that imports all
def test_another_process_makes_the_same(
    data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a processor without its part for videos, too. Bad rows are named in their order; where nobody says how many
    processes, there are some only for more rows than starting them is worth."""
    gone: Row = {"messages": [{"role": "user", "content": "<image>a"}, TEXT["messages"][1]], "images": ["gone.png"]}
    rows = [*ROWS, gone, {"messages": []}, BLUE]
    common = {"bad_rows": "skip", "seq_len": 128}
    here, there = (
        config_of(
            model_of("qwen2_5_vl"), data, rows, data={"workers": workers, **common}, train={"tokens_per_step": 256}
        )
        for workers in (1, None)
    )
    expected = read(here)
    assert expected[0] == ["1", "2", "3", "4", "5", "8"]
    assert "line 6 has image 'gone.png'" in caplog.text and "; " in caplog.text.partition("line 6")[2]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    by_workers, asked = image_processing._by_workers, []
    one = lambda rows, encoder, workers: asked.append(workers) or by_workers(rows, encoder, 1)  # noqa: E731
    monkeypatch.setattr(image_processing, "_by_workers", one)
    assert read(there) == expected and asked == []
    monkeypatch.setattr(image_processing, "_ROWS_WITHOUT_WORKERS", 2)
    assert read(there) == expected and asked == [2]


def test_a_row_is_processed_once_to_be_shown(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(model_of("llava_next"), data, [BLUE, TEXT])
    (data / "run.yaml").write_text(to_yaml(config))
    calls = []
    processed = ImageEncoder._processed
    monkeypatch.setattr(ImageEncoder, "_processed", lambda self, rows: calls.append(len(rows)) or processed(self, rows))
    assert cli.main(["data", str(data / "run.yaml")]) == 0
    assert calls == [1, 1] and "2 examples" in capsys.readouterr().out


def test_reading_says_how_far_it_has_come(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    built(config_of(model_of("llava_next"), data, ROWS))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("processing images of ")]
    assert [line.rsplit(": ", 1)[1] for line in lines] == [f"{count} rows" for count in range(1, 6)]


def test_that_nothing_is_cached_is_said(data: Path, tmp_path: Path) -> None:
    found, _ = built(config_of(model_of("llava_next"), data, ROWS, data={"cache": str(tmp_path / "cache")}))
    assert any(line.startswith("data.cache: nothing is kept of rows with images") for line in found.said)
    assert not (tmp_path / "cache").exists()
