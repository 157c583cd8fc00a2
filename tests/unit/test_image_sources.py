"""Where images of rows come from: which rows have some, under which names, in which folders; and that none is lost."""

import base64
import json
from pathlib import Path

import pytest
import yaml
from image_runs import BLUE, RED, TEXT, Row, built, config_of, model_of
from PIL import Image

from megatrain.config import Config, parse_config, to_yaml
from megatrain.data.image_files import reference_to
from megatrain.data.images import ImageExample, ImageRows
from megatrain.data.row_source import open_source
from megatrain.errors import ConfigError

ASKED = [{"role": "user", "content": "<image>what is this"}, {"role": "assistant", "content": "blue"}]
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    save_image(folder / "red.png", "red")
    save_image(folder / "blue.jpg", "blue")
    return folder


def save_image(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), COLOURS[colour]).save(path)


def write_rows(path: Path, *rows: Row) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def examples(config: Config) -> list[ImageExample]:
    found, _ = built(config)
    assert isinstance(found.rows, ImageRows)
    return list(found.rows.examples)


def images(config: Config) -> list[list[str]]:
    """The images of each example, by the names of their files."""
    return [[image.path.name if image.path else "bytes" for image in example.images] for example in examples(config)]


def colours(config: Config) -> list[tuple[int, ...]]:
    """Of the first pixel of each image."""
    paths = [image.path for example in examples(config) for image in example.images]
    return [Image.open(path).convert("RGB").getpixel((0, 0)) for path in paths if path is not None]


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        built(config)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- which data have images ---------------------------------------------------------------------------------------


def test_images_after_many_rows_of_text_are_trained_on(data: Path) -> None:
    found = images(config_of(model_of("llava_next"), data, [TEXT] * 40 + [BLUE, RED, TEXT]))
    assert found == [[]] * 40 + [["blue.jpg"], ["red.png", "blue.jpg"], []]


def test_images_late_in_a_table_are_trained_on(data: Path) -> None:
    """By the columns, and where contents are parts, by the rows."""
    import datasets

    rows = [TEXT | {"images": []}] * 40 + [{"messages": ASKED, "images": ["blue.jpg"]}]
    datasets.Dataset.from_list(rows).to_parquet(data / "column.parquet")
    asked = [{"type": "image", "path": "blue.jpg"}, {"type": "text", "text": "what is this", "path": None}]
    said = [{"type": "text", "text": "blue", "path": None}]
    parts = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    plain = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    datasets.Dataset.from_list([{"messages": plain}] * 40 + [{"messages": parts}]).to_parquet(data / "parts.parquet")
    for name in ("column", "parts"):
        found = images(config_of(model_of("llava_next"), data, data / f"{name}.parquet"))
        assert found == [[]] * 40 + [["blue.jpg"]], name


def test_a_table_of_texts_is_not_read_to_find_images(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from megatrain.data.image_fields import has_images
    from megatrain.data.row_source import Rows

    datasets.Dataset.from_list([{**TEXT, "note": "<image>"}] * 3).to_parquet(data / "rows.parquet")
    write_rows(data / "rows.jsonl", TEXT, TEXT)
    for name in ("rows.parquet", "rows.jsonl"):
        source = open_source(str(data / name), key="data.train", split="train", form="messages", text_field="text")
        monkeypatch.setattr(Rows, "read", property(lambda rows: pytest.fail("was read")), raising=False)
        assert not has_images(source)
        monkeypatch.undo()


def test_a_place_without_an_image_is_a_bad_row_of_a_model_that_sees(data: Path) -> None:
    """Also where no row has an image: the picture under a name that nobody knows would be lost."""
    line = refused(config_of(model_of("llava_next"), data, [TEXT, {"messages": ASKED, "img": ["red.png"]}]))
    assert "rows.jsonl line 2 has 1 places for images and no images; columns: {images: NAME}" in line


def test_an_image_late_in_a_stream_is_a_bad_row(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatrain.data.image_fields._PEEKED", 2)
    write_rows(data / "rows.json", TEXT, TEXT, TEXT, BLUE)
    given = {"path": str(data / "rows.json"), "streaming": True}
    config = config_of(model_of("llava_next"), data, data / "rows.json", data={"train": given})
    line = refused(config)
    assert "rows.json line 4 has images, and the first rows of the stream have none" in line


def test_what_nothing_can_be_done_with_is_refused(data: Path) -> None:
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    pair = {"prompt": ASKED[:1], **answers}
    model = model_of("llava_next")
    for row in (pair | {"images": ["red.png"]}, pair):  # images, or only a place for one
        line = refused(config_of(model, data, [pair | {"prompt": TEXT["messages"][:1]}, row]))
        assert (
            line.startswith("data.train: rows of ") and "preference pairs with images (DPO) are not supported" in line
        )
    line = refused(config_of(model, data, [{"text": "a red square " * 99, "image": "red.png"}]))
    assert "have images, and format text has no place for any; give conversations" in line
    train = {"path": str(data / "rows.jsonl"), "columns": {"images": None}}
    found, _ = built(config_of(model, data, data / "rows.jsonl", data={"train": train}, train={"tokens_per_step": 512}))
    assert not isinstance(found.rows, ImageRows)


# -- under which names --------------------------------------------------------------------------------------------


def test_the_column_of_images_may_have_another_name(data: Path) -> None:
    write_rows(data / "rows.jsonl", {"messages": ASKED, "img": ["red.png"], "image": "not one"})
    train = {"path": str(data / "rows.jsonl"), "columns": {"images": "img"}}
    config = config_of(model_of("llava_next"), data, data / "rows.jsonl", data={"train": train})
    assert images(config) == [["red.png"]]
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


def test_images_in_a_column_that_nobody_named_are_not_lost(data: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    table = datasets.Dataset.from_dict({"text": ["a"], "picture": [str(data / "red.png")]}, features)
    table.to_parquet(data / "rows.parquet")
    line = refused(config_of(model_of("llava_next"), data, data / "rows.parquet"))
    assert line.endswith(
        "has images in column 'picture'; give columns: {images: picture}, or columns: {images: null} to "
        "leave them aside"
    )


def test_llama_factorys_rows_with_images_are_read(data: Path) -> None:
    """Its mllm_demo: paths are relative to the folder of dataset_info.json."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "pictures"}
    entry = {"file_name": "demo/mllm_demo.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (data / "dataset_info.json").write_text(json.dumps({"mllm_demo": entry}))
    (data / "demo").mkdir()
    (data / "demo" / "mllm_demo.json").write_text(json.dumps([{"messages": ASKED, "pictures": ["blue.jpg"]}]))
    train = {"path": "mllm_demo", "dataset_info": str(data / "dataset_info.json")}
    assert images(config_of(model_of("llava_next"), data, data, data={"train": train})) == [["blue.jpg"]]


def packed(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.mark.parametrize("asked", ["path", "data", "text", "trl"])
def test_parts_of_messages_may_be_openais_and_trls(asked: str, data: Path) -> None:
    """image_url with a path, a data: URI, or as a text; prompt and completion whose images are in a column."""
    url = packed(data / "red.png") if asked == "data" else "red.png"
    part: Row = {"type": "image_url", "image_url": url if asked == "text" else {"url": url, "detail": "low"}}
    part = {"type": "image"} if asked == "trl" else part
    question = {"role": "user", "content": [part, {"type": "text", "text": "what is this"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    row: Row = {"messages": [question, answer]}
    if asked == "trl":
        row = {"prompt": [question], "completion": [answer], "images": ["red.png"]}
    (found,) = examples(config_of(model_of("llava_next"), data, [row], train={"tokens_per_step": 512}))
    assert found.text == "<|user|><image>what is this<|assistant|>red<|eos|>"
    assert [found.text[start:end] for start, end in found.spans] == ["red<|eos|>"]
    (image,) = found.images
    assert image.content == (data / "red.png").read_bytes() if asked == "data" else image.path == data / "red.png"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://example.org/a.png", "'https://example.org/a.png', and nothing is fetched; download it"),
        ("data:image/png;base64,%%%", "has a data: URI with wrong base64"),
        ("data:text/plain,abc", "has a data: URI that is not in base64"),
        ("file:///etc/passwd", "is outside of the data's folder"),
        ("a\0b", "which is no path"),
    ],
)
def test_an_image_from_elsewhere_is_a_bad_row(url: str, said: str, data: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    line = refused(
        config_of(model_of("llava_next"), data, [{"messages": [{"role": "user", "content": [part]}, ASKED[1]]}])
    )
    assert "rows.jsonl line 1 " in line and said in line


# -- in which folders ---------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_of_their_row(data: Path) -> None:
    """Of a folder with data in two, and pictures beside them."""
    for name, colour in (("a", "red"), ("b", "green")):
        write_rows(data / "both" / name / "rows.jsonl", {"messages": ASKED, "images": ["img/x.png"]})
        save_image(data / "both" / name / "img" / "x.png", colour)
    assert colours(config_of(model_of("llava_next"), data, data / "both")) == [COLOURS["red"], COLOURS["green"]]


def test_tables_in_several_folders_do_not_say_where_images_are(data: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"messages": ASKED, "images": ["red.png"]}])
    for name in ("a", "b"):
        (data / "tables" / name).mkdir(parents=True)
        table.to_parquet(data / "tables" / name / "train.parquet")
    given = {"path": str(data / "tables")}
    config = config_of(model_of("llava_next"), data, data, data={"train": given})
    assert "row 1 names image 'red.png', and it is not known in which folder; give images_folder" in refused(config)
    given["images_folder"] = str(data)
    assert images(config_of(model_of("llava_next"), data, data, data={"train": given})) == [["red.png"]] * 2


def test_a_folder_of_images_may_be_named_and_is_not_left(data: Path) -> None:
    save_image(data / "pictures" / "green.png", "green")
    save_image(data / "secret.png", "red")
    rows = write_rows(data / "rows" / "rows.jsonl", {"messages": ASKED, "images": ["green.png"]})
    given = {"path": str(rows), "images_folder": str(data / "pictures")}
    config = config_of(model_of("llava_next"), data, data, data={"train": given})
    assert colours(config) == [COLOURS["green"]]
    write_rows(rows, {"messages": ASKED, "images": ["../secret.png"]})
    assert "which is outside of the data's folder" in refused(config)
    given["images_folder"] = str(data / "nowhere")
    assert "is no folder" in refused(config_of(model_of("llava_next"), data, data, data={"train": given}))


def test_rows_of_the_hub_do_not_name_files_here(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatrain.data.bad_rows import BadRowError

    monkeypatch.chdir(data)
    with pytest.raises(BadRowError, match="it is not known in which folder"):
        reference_to("red.png", None)
    assert reference_to({"bytes": b"x"}, None).content == b"x"
