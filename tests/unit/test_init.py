"""`megatrain init`: the file that it writes can be read, planned and trained with, and says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatrain import cli
from megatrain.config import load_config
from megatrain.model.loading import initialise
from megatrain.model.loading import load_config as load_model_config
from megatrain.train.init_command import _changes

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer and text."""
    root = tmp_path_factory.mktemp("init")
    initialise(load_model_config(CONFIG), 0).save_pretrained(root / "model")
    words = {chr(code): code - 32 for code in range(32, 127)} | {"<eos>": 95, "\n": 96}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(root / "model")
    (root / "text.txt").write_text("a text to learn from\n" * 2000)
    (root / "held.txt").write_text("a text to measure on\n" * 50)
    return root


def init(folder: Path, out: Path, *more: str) -> int:
    return cli.main(["init", str(out), "--model", str(folder / "model"), "--data", str(folder / "text.txt"), *more])


def test_what_is_written_trains(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    assert init(folder, out, "--eval", str(folder / "held.txt"), "--epochs", "0.5") == 0
    said = capsys.readouterr().out
    assert f"wrote {out}: " in said and f"megatrain train {out}" in said
    config = load_config(out)
    assert config.model.path == str(folder / "model") and config.train.epochs == 0.5
    assert config.data.seq_len == 64  # all that the model's positions allow
    assert config.tokens_per_step % (config.engine.micro_batch * 64) == 0
    text = out.read_text()
    assert "host memory: " in text and "tokens/s" in text and "held out" in text
    steps = int(0.5 * 656 * 64) // config.tokens_per_step  # 656 sequences of 64 tokens
    assert config.eval.every == -(-steps // 10) and config.schedule.warmup_steps == round(0.03 * steps)
    run = [str(out), "--train.tokens_per_step", "128", "--output", str(tmp_path / "run")]
    assert cli.main(["train", *run]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def text_of(characters: int, folder: Path) -> Path:
    (folder / "few.txt").write_text("a text to learn from\n" * (characters // 21) + "." * (characters % 21))
    return folder / "few.txt"


def init_on(data: Path, folder: Path, out: Path, *more: str) -> int:
    return cli.main(["init", str(out), "--model", str(folder / "model"), "--data", str(data), *more])


def rows(folder: Path, name: str, row: dict[str, Any], count: int = 40) -> Path:
    (folder / name).write_text((json.dumps(row) + "\n") * count)
    return folder / name


def test_few_data_make_many_small_steps(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as the file says, which is what training comes to."""
    out = tmp_path / "mine.yaml"
    assert init_on(text_of(3201, tmp_path), folder, out, "--epochs", "2") == 0
    written, text = yaml.safe_load(out.read_text()), out.read_text()
    assert written["train"]["tokens_per_step"] == 128
    assert "# 50 steps, as the data are few; " in text
    assert written["schedule"]["warmup_steps"] == 2 and written["checkpoint"]["every"] == 13
    capsys.readouterr()
    assert cli.main(["train", str(out), "--output", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "50 steps of 128 tokens" in said.err and "trained 50 steps" in said.out and "warning" not in said.err


def test_pairs_of_answers_have_settings_of_their_own(folder: Path, tmp_path: Path) -> None:
    pairs = rows(tmp_path, "pairs.jsonl", {"prompt": "one and one", "chosen": " two", "rejected": " three"})
    out = tmp_path / "mine.yaml"
    assert init_on(pairs, folder, out) == 0
    written = yaml.safe_load(out.read_text())
    assert written["optimizer"]["lr"] == 5e-7 and "far lower than for fine-tuning" in out.read_text()
    assert written["train"]["method"] == "dpo" and written["train"]["dpo_beta"] == 0.1
    assert written["train"]["tokens_per_step"] == 128  # both rows of one pair
    less = ["--train.epochs", "0.1", "--data.seq_len", "64"]
    assert cli.main(["train", str(out), *less, "--output", str(tmp_path / "run")]) == 0


def test_rows_with_images_are_counted(folder: Path, tmp_path: Path) -> None:
    """Without a look at any picture: there is none."""
    row = {"messages": [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "red"}]}
    data = rows(tmp_path, "images.jsonl", row | {"images": ["nowhere.png"]}, 120)
    out = tmp_path / "mine.yaml"
    assert init_on(data, folder, out, "--epochs", "2") == 0
    written = yaml.safe_load(out.read_text())
    assert written["train"]["tokens_per_step"] == 4 * 64 and "# 60 steps, as" in out.read_text()


def test_steps_that_are_not_the_passes_that_are_wanted_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    assert init_on(text_of(961, tmp_path), folder, out) == 0
    changed = ["--train.tokens_per_step", "640", "--schedule.warmup_steps", "0"]
    assert cli.main(["train", str(out), *changed, "--output", str(tmp_path / "run")]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "train.epochs" in line]
    assert line == (
        "warning: train.epochs: 1 comes to 1.50 steps of 640 tokens; 1 whole one will be taken, 0.67 passes. "
        "A lower train.tokens_per_step comes closer"
    )


def test_nothing_is_written_over_without_being_asked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("precious")
    assert init(folder, out, "--hardware", "h200") == 2 and out.read_text() == "precious"
    assert init(folder, out, "--hardware", "h200", "--replace") == 0 and out.read_text() != "precious"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "nowhere.txt"], "data.train: 'nowhere.txt' does not exist"),
        (["--eval", "nowhere.txt"], "data.eval: 'nowhere.txt' does not exist"),
        (["--epochs", "0"], "--epochs: '0' is wrong"),
        (["--seq-len", "65"], "--seq-len: 65 is more than the model's max_position_embeddings, 64"),
        (["--hardware", "abacus"], "abacus"),
    ],
)
def test_what_is_wrong_is_one_line(
    more: list[str], words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    assert init(folder, out, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and not out.exists()


def large(tmp_path: Path) -> Path:
    """The shapes of 8 B parameters, without weights: a plan needs none."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
    (tmp_path / "8b").mkdir()
    (tmp_path / "8b" / "config.json").write_text(json.dumps(CONFIG | shape | {"tie_word_embeddings": False}))
    return tmp_path / "8b"


def test_what_gives_way_on_a_small_machine_is_said_with_its_reason(folder: Path, tmp_path: Path) -> None:
    """A desktop with a 4090 and less memory than 12 bytes for each parameter."""
    hardware = yaml.safe_load((Path(cli.__file__).parent / "planner" / "profiles" / "rtx4090.yaml").read_text())
    (tmp_path / "desk.yaml").write_text(yaml.safe_dump(hardware | {"name": "desk", "host_memory": "80GB"}))
    out = tmp_path / "mine.yaml"
    model, data = str(large(tmp_path)), str(folder / "text.txt")
    machine = ["--hardware", str(tmp_path / "desk.yaml")]
    assert cli.main(["init", str(out), "--model", model, "--data", data, *machine]) == 0
    written, text = yaml.safe_load(out.read_text()), out.read_text()
    assert written["optimizer"]["moments"] == "int8"
    line = next(line for line in text.splitlines() if "moments: int8" in line)
    assert "without it, " in line and "of host memory would be missing" in line
    assert cli.main(["plan", str(out), *machine]) == 0


def test_a_model_without_room_is_refused_with_what_is_missing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware = yaml.safe_load((Path(cli.__file__).parent / "planner" / "profiles" / "rtx4090.yaml").read_text())
    (tmp_path / "desk.yaml").write_text(yaml.safe_dump(hardware | {"name": "desk", "host_memory": "16GB"}))
    out = tmp_path / "mine.yaml"
    arguments = ["--model", str(large(tmp_path)), "--data", str(folder / "text.txt")]
    assert cli.main(["init", str(out), *arguments, "--hardware", str(tmp_path / "desk.yaml")]) == 2
    assert "host memory: " in capsys.readouterr().err and not out.exists()


def test_remedies_are_settings_or_left_to_the_user() -> None:
    assert _changes("optimizer.moments int8 and train.clip_scope unit", 64) == {
        "optimizer.moments": "int8",
        "train.clip_scope": "unit",
    }
    assert _changes("sequences of 1,024 tokens", 4096) == {"data.seq_len": "1024"}
    assert _changes("engine.nvme on a local disk", 64) is None
