"""Rows with images: what becomes of them on the way to a step, for three families of models that see."""

import io
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_runs import BLUE, RED, ROWS, TEXT, Row, built, config_of, learned, model_of
from PIL import Image
from tiny_vision import FAMILIES
from transformers import GenerationMixin

from megatrain import cli
from megatrain.config import Config, to_yaml
from megatrain.data.batches import batch_sha256
from megatrain.data.image_files import MOST_PIXELS, ImageReference, open_image
from megatrain.data.images import ImageRows
from megatrain.errors import ConfigError
from megatrain.model.loading import load_pretrained
from megatrain.train import build
from megatrain.train.export import export
from megatrain.train.run import run


@pytest.fixture(scope="module")
def models() -> Callable[[str], Path]:
    """The folder of a family's tiny model."""
    return model_of


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with two images."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (40, 20), (255, 0, 0)).save(folder / "red.png")
    Image.new("RGB", (16, 30), (0, 0, 255)).save(folder / "blue.jpg")
    return folder


# -- what a step is given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_trains_on_rows_with_images_as_plain_pytorch_does(family: str, models: Any, data: Path) -> None:
    """Micro-batches with two images and none in their rows, with one, and without any."""
    from comparison import compare_models

    torch.set_num_threads(1)
    config = config_of(models(family), data, [*ROWS, TEXT], train={"tokens_per_step": 6 * 256})
    found, _ = built(config)
    given = build.batches_of(config, found)(0)
    assert ["pixel_values" in batch for batch in given] == [True, True, False]
    compared = compare_models(
        load_pretrained(models(family)).train(),
        load_pretrained(models(family)).train(),
        lambda step: given,
        steps=1,
        device="lagged",
        freeze=("lm_head",) if family != "gemma3" else (),
    )
    assert compared.equal, str(compared)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_assistant_says_is_learned(family: str, models: Any, data: Path) -> None:
    config = config_of(models(family), data, ROWS, engine={"micro_batch": 4})
    found, tokenizer = built(config)
    (batch,) = build.batches_of(config, found)(0)
    assert learned(batch, tokenizer) == [
        "it is red.<|eos|>it is blue<|eos|>",
        "it is.<|eos|>",
        "blue<|eos|>",
        "it is.<|eos|>",
    ]


def test_rows_of_text_alone_keep_their_words(models: Any, data: Path) -> None:
    """They go through the tokenizer and not the processor, by the same template, which reads parts."""
    found, tokenizer = built(config_of(models("llava_next"), data, [TEXT, TEXT], data={"packing": "none"}))
    (batch, *_) = build.batches_of(config_of(models("llava_next"), data, [TEXT, TEXT]), found)(0)
    assert "pixel_values" not in batch and learned(batch, tokenizer)[0] == "it is.<|eos|>"
    assert tokenizer.decode(batch["input_ids"][0]).startswith("<|user|>is it red?<|assistant|>it is.<|eos|>")


def test_images_need_a_message_of_a_user(models: Any, data: Path) -> None:
    row = {"messages": [{"role": "assistant", "content": "hello"}], "images": ["red.png"]}
    with pytest.raises(ConfigError, match="has images and no message of a user to put them in"):
        built(config_of(models("llava_next"), data, [BLUE, row]))


def test_an_answer_of_weight_0_is_not_learned_beside_images(models: Any, data: Path) -> None:
    user, first, second, last = RED["messages"]
    row = {**RED, "messages": [user, {**first, "weight": 0}, second, last]}
    config = config_of(models("llava_next"), data, [row], train={"tokens_per_step": 512})
    found, tokenizer = built(config)
    assert learned(build.batches_of(config, found)(0)[0], tokenizer)[0] == "it is blue<|eos|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_never_learned(family: str, models: Any, data: Path) -> None:
    config = config_of(models(family), data, [BLUE], data={"train_on": "all"}, train={"tokens_per_step": 512})
    found, tokenizer = built(config)
    (batch,) = build.batches_of(config, found)(0)
    (text,) = learned(batch, tokenizer)[:1]
    around = "<start_of_vision><end_of_vision>" if family == "qwen2_5_vl" else ""  # an image stands between them
    assert text.split() == ["<|user|>what", "is", f"this{around}<|assistant|>blue<|eos|>"]
    assert (batch["input_ids"] == tokenizer.image_token_id).any()


def test_a_step_is_the_same_whenever_it_is_asked_for(models: Any, data: Path) -> None:
    config = config_of(models("llava_next"), data, ROWS, data={"shuffle": True})
    found, _ = built(config)
    one, other = build.batches_of(config, found), build.batches_of(config, built(config)[0])
    assert [batch_sha256(one(step)) for step in (0, 1, 2)] == [batch_sha256(other(step)) for step in (0, 1, 2)]
    assert batch_sha256(one(0)) != batch_sha256(one(1))


def test_the_digest_covers_every_pixel() -> None:
    """Also of more images than there are rows."""
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "pixel_values": torch.zeros(3, 2, 2)}
    digests = {batch_sha256([batch])}
    for image in range(3):
        batch["pixel_values"][image, 1, 1] = 1
        digests.add(batch_sha256([batch]))
    assert len(digests) == 4


def test_pixels_are_decoded_for_the_step_that_needs_them(models: Any, data: Path) -> None:
    config = config_of(models("llava_next"), data, [BLUE, BLUE])
    found, _ = built(config)
    before = build.batches_of(config, found)(0)
    Image.new("RGB", (16, 30), (0, 255, 0)).save(data / "blue.jpg")
    assert batch_sha256(build.batches_of(config, found)(0)) != batch_sha256(before)
    (data / "blue.jpg").unlink()
    with pytest.raises(ConfigError, match=r"rows.jsonl line 1.*'blue.jpg', which cannot be read: No such file"):
        build.batches_of(config, found)(0)


# -- where images are ---------------------------------------------------------------------------------------------


def jpeg(color: tuple[int, int, int]) -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", (16, 30), color).save(packed, "JPEG")
    return packed.getvalue()


def test_llava_rows_and_a_datasets_column_are_the_same(models: Any, data: Path) -> None:
    """ShareGPT with <image> and a path; Parquet whose images `datasets` opens."""
    import datasets

    model = models("llava_next")
    turns = [{"from": "human", "value": "<image>what is this"}, {"from": "gpt", "value": "blue"}]
    (data / "blue.jpg").write_bytes(jpeg((0, 0, 255)))
    llava, _ = built(config := config_of(model, data, [{"conversations": turns, "image": "blue.jpg"}]))
    messages = [{"role": "user", "content": "what is this"}, {"role": "assistant", "content": "blue"}]
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    table = datasets.Dataset.from_dict({"messages": [messages], "images": [[{"bytes": jpeg((0, 0, 255))}]]}, features)
    table.to_parquet(data / "rows.parquet")
    column, _ = built(config_of(model, data, data / "rows.parquet"))
    one, other = (build.batches_of(config, found)(0) for found in (llava, column))
    assert batch_sha256(one) == batch_sha256(other)


# -- what is wrong with them --------------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says that it has more pixels than anybody wants."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def image_row(*names: Any, marks: int = 1, role: str = "user") -> Row:
    said = {"user": "what is this", "assistant": "blue"}
    said[role] += "<image>" * marks
    return {"messages": [{"role": r, "content": text} for r, text in said.items()], "images": list(names)}


BAD = [
    (image_row("gone.png"), "image 'gone.png', which cannot be read: No such file"),
    (image_row("short.jpg"), "image 'short.jpg', which cannot be read: image file is truncated"),
    (image_row("bomb.png"), "image 'bomb.png' of more than 67,108,864 pixels"),
    (image_row("large.png"), "image 'large.png' of more than 67,108,864 pixels"),
    (image_row("text.png"), "image 'text.png', which is none of BMP, GIF, JPEG"),
    (image_row("page.eps"), "image 'page.eps', which is none of BMP, GIF, JPEG"),
    (image_row("../secret.png"), "image '../secret.png', which is outside of the data's folder"),
    (image_row("link.png"), "image 'link.png', which is outside of the data's folder"),
    (image_row("/etc/passwd"), "image '/etc/passwd', which is outside of the data's folder"),
    (image_row("red.png", "red.png"), "has 2 images and 1 places for them"),
    (image_row("red.png", role="assistant"), "has an image in message 2, which the assistant says"),
    (image_row(7), "has a number for an image"),
]


@pytest.fixture
def bad_files(data: Path) -> Path:
    (data / "short.jpg").write_bytes(jpeg((0, 0, 255))[:-2])
    (data / "bomb.png").write_bytes(bomb(100_000))
    (data / "large.png").write_bytes(bomb(9_000))
    (data / "text.png").write_text("no image")
    (data / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    Image.new("RGB", (8, 8)).save(data.parent / "secret.png")
    (data / "link.png").symlink_to(data.parent / "secret.png")
    return data


def test_bad_images_are_named_and_left_out(models: Any, bad_files: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row for row, _ in BAD]
    found, _ = built(config_of(models("llava_next"), bad_files, [BLUE, *rows], data={"bad_rows": "skip"}))
    assert isinstance(found.rows, ImageRows) and found.rows.count == 1
    assert f"skipped {len(BAD)} bad rows" in caplog.text and "rows.jsonl line 2 has image 'gone.png'" in caplog.text


@pytest.mark.parametrize(("row", "said"), BAD)
def test_a_bad_image_ends_the_run_in_a_line(row: Row, said: str, models: Any, bad_files: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        built(config_of(models("llava_next"), bad_files, [BLUE, row]))
    assert "rows.jsonl line 2 " in str(refused.value) and said in str(refused.value) and "\n" not in str(refused.value)


def test_an_image_of_as_many_pixels_as_may_be_is_read_upright(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules[open_image.__module__], "MOST_PIXELS", 200)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=turned)
    assert open_image(ImageReference("a", path=tmp_path / "a.jpg")).size == (10, 20)
    assert MOST_PIXELS > 200


def test_long_examples_are_left_out_whole(models: Any, data: Path) -> None:
    found, _ = built(config_of(models("llava_next"), data, ROWS, data={"seq_len": 128}, train={"tokens_per_step": 256}))
    assert isinstance(found.rows, ImageRows) and [e.where[-1] for e in found.rows.examples] == ["2", "3", "4", "5"]
    assert any("1 examples are left out, which have more tokens than data.seq_len" in line for line in found.said)


def test_where_no_row_is_left_it_is_said_why(models: Any, data: Path) -> None:
    rows = [image_row("gone.png"), RED, image_row("gone.png")]
    with pytest.raises(ConfigError) as refused:
        built(config_of(models("llava_next"), data, rows, data={"bad_rows": "skip", "seq_len": 8}))
    assert str(refused.value).endswith("rows.jsonl: bad rows: 2, rows with more than data.seq_len tokens: 1")


def test_what_cannot_be_done_with_images_is_said(models: Any, data: Path, tmp_path: Path) -> None:
    config = config_of(models("llava_next"), data, [BLUE])
    tokenizer = build.given_tokenizer(config)
    blind = tmp_path / "blind"
    tokenizer.save_pretrained(blind)
    (blind / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"model.path: .*blind.* has none of processor_config.json"):
        built(config_of(blind, data, [BLUE]))


# -- asking about one ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_is_what_training_begins_an_example_with(family: str, models: Any, data: Path) -> None:
    """The same tokens and pixels, up to the answer."""
    config = config_of(models(family), data, [BLUE], train={"tokens_per_step": 256}, engine={"micro_batch": 1})
    found, _ = built(config)
    assert isinstance(found.rows, ImageRows)
    (trained,) = build.batches_of(config, found)(0)
    asked = found.rows._encoder.question("what is this<image>", [ImageReference("blue", path=data / "blue.jpg")])
    before = int((trained["labels"][0] != -100).nonzero()[0])
    assert asked["input_ids"][0].tolist() == trained["input_ids"][0, :before].tolist()
    assert torch.equal(asked["pixel_values"], trained["pixel_values"])
    first = found.rows._encoder.question("what is this", [ImageReference("blue", path=data / "blue.jpg")])
    assert first["input_ids"].shape == asked["input_ids"].shape
    assert first["input_ids"].tolist() != asked["input_ids"].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_is_put_to_the_model(
    family: str, models: Any, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = built(config_of(models(family), data, [BLUE], train={"tokens_per_step": 512}))
    assert isinstance(found.rows, ImageRows)
    references = [ImageReference(name, path=data / name) for name in ("red.png", "blue.jpg")]
    asked = found.rows._encoder.question("<image> or <image>?", references)
    given: dict[str, Any] = {}
    generate = GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, **all: given.update(all) or generate(self, **all))
    images = [word for name in ("red.png", "blue.jpg") for word in ("--image", str(data / name))]
    command = ["generate", str(models(family)), "--prompt", "<image> or <image>?", *images, "--max-new-tokens", "5"]
    assert cli.main(command) == 0
    assert "pixel_values" in asked and all(torch.equal(given[name], value) for name, value in asked.items())
    said = capsys.readouterr().out
    assert said.strip() and " or " not in said  # the answer alone


def test_what_cannot_be_asked_is_said(models: Any, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert cli.main(["generate", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    model, image = str(models("llava_next")), ["--image", str(data / "red.png")]
    line = refused(model, "--prompt", "<image><image>", *image)
    assert line == "megatrain: --image: the prompt has 1 images and 2 places for them"
    line = refused(model, "--prompt", "a", "--image", str(data / "gone.png"))
    assert line.endswith(f"has image '{data / 'gone.png'}', which cannot be read: No such file or directory")
    tokenizer = build.given_tokenizer(config_of(models("llava_next"), data, [BLUE]))
    tokenizer.save_pretrained(data / "blind")
    (data / "blind" / "config.json").write_text('{"model_type": "llama"}')
    assert "images need a model that sees" in refused(str(data / "blind"), "--prompt", "a", *image)


# -- looking at them ----------------------------------------------------------------------------------------------


def test_the_data_command_shows_what_the_processor_makes(
    models: Any, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(models("llava_next"), data, [BLUE, TEXT])
    (data / "run.yaml").write_text(to_yaml(config))
    assert cli.main(["data", str(data / "run.yaml"), "--examples", "1"]) == 0
    shown = capsys.readouterr().out
    found, _ = built(config)
    (batch,) = build.batches_of(config, found)(0)[:1]
    tokens, learned_tokens = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    assert f"2 examples, {tokens} tokens, {learned_tokens} of them targets" in shown
    images = int((batch["input_ids"][0] == config_image_token(config)).sum())
    assert f"<|user|>what is this<image> x {images} <|assistant|>⟦blue<|eos|>⟧" in shown
    (data / "eval.jsonl").write_text(json.dumps(BLUE))
    assert cli.main(["data", str(data / "run.yaml"), "--data.eval", str(data / "eval.jsonl")]) == 0
    assert "data.eval: 1 examples" in capsys.readouterr().out


def config_image_token(config: Config) -> int:
    return int(build.given_tokenizer(config).image_token_id)


# -- a whole run --------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_folder_that_sees(models: Any, data: Path, tmp_path: Path) -> None:
    """With a frozen tower; exported, too."""
    from transformers import AutoProcessor

    source = models("llava_next")
    config = config_of(source, data, ROWS, model={"freeze": "vision_tower"})
    done = run(config)
    assert done.loop.steps == 2
    before, after = (dict(load_pretrained(path).named_parameters()) for path in (source, done.folder / "model"))
    same = {name for name, parameter in before.items() if torch.equal(parameter, after[name])}
    assert {name for name in before if "vision_tower" in name} <= same
    assert not any("projector" in name for name in same)
    export(str(done.folder), str(tmp_path / "exported"))
    for folder in (done.folder / "model", tmp_path / "exported"):
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        assert processor.image_processor.image_grid_pinpoints == [[16, 16], [16, 32], [32, 16]]
