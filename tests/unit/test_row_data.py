"""Rows to examples as a run has them: the same for any number of processes, from the cache or anew, and mixed."""

import copy
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_config

import megatrain as mt
from megatrain import cli
from megatrain.config import Config, parse_config
from megatrain.data import tokenising
from megatrain.data.batches import StepBatches
from megatrain.data.examples import Drawn, Examples, PreferenceExamples
from megatrain.data.pairs import REFERENCE, PairRows
from megatrain.data.rows import PackedRows, SeparateRows
from megatrain.data.tokenizer import load_tokenizer, train_bpe
from megatrain.errors import ConfigError
from megatrain.model.loading import initialise
from megatrain.train import build
from megatrain.train.data_command import data_command
from megatrain.train.evaluate import eval_set, evaluate
from megatrain.train.model_settings import read_model_settings
from megatrain.train.resume import settings_that_changed
from megatrain.train.row_data import RowData, prepare_rows
from megatrain.train.run import run

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = train_bpe(["hello world, how are you? fine, thanks " * 9], 280)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    made.save_pretrained(folder)
    return folder


def chat(number: int) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"hello {number}"},
        {"role": "assistant", "content": "fine " * (number % 7 + 1)},
    ]
    return {"messages": turns * (number % 3 + 1)}


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder: Path, train: Any, **data: Any) -> dict[str, Any]:
    model = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 288}
    return {
        "model": {"config": model, "tokenizer": str(folder)},
        "data": {"train": train if isinstance(train, list) else [str(train)], "seq_len": 64, "cache": "off", **data},
        "train": {"steps": 2, "tokens_per_step": 128, "seed": 3},
        "engine": {"device": "cpu", "precision": "fp32", "micro_batch": 2},
    }


def prepared(config: Config) -> RowData:
    tokenizer = build.given_tokenizer(config)
    return prepare_rows(config, build.find_corpora(config).train, tokenizer)


def rows_of(folder: Path, train: Any, **data: Any) -> RowData:
    return prepared(parse_config(settings(folder, train, **data)))


def listed(examples: Any) -> list[list[int]]:
    return [examples.labels_of(number).tolist() for number in range(len(examples))]


def test_any_number_of_processes_gives_the_same(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "_ROWS_PER_BLOCK", 5)
    path = write(tmp_path / "a.jsonl", [chat(number) for number in range(37)] + [{"messages": []}])
    one, two = (rows_of(chat_folder, path, workers=workers, bad_rows="skip") for workers in (1, 2))
    assert isinstance(one.examples, Examples) and isinstance(two.examples, Examples) and len(one.examples) == 37
    for name in ("tokens", "targets", "offsets"):
        assert np.array_equal(getattr(one.examples, name), getattr(two.examples, name))
    assert one.sources[0].counts == two.sources[0].counts and one.sources[0].counts.skipped == 1


def test_bad_rows_end_the_run_or_are_left_out_by_name(
    chat_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", [chat(0), {"x": 1}, chat(1), {"messages": []}])
    with path.open("a") as stream:
        stream.write("{\n")
    with pytest.raises(ConfigError) as caught:
        rows_of(chat_folder, path)
    assert str(caught.value) == (
        f"data.train: {path} line 2 has no field 'messages' or 'conversations'; its fields are: x; "
        "data.bad_rows: skip leaves such rows out"
    )
    kept = rows_of(chat_folder, path, bad_rows="skip")
    assert len(kept.examples) == 2 and kept.sources[0].counts.rows == 5
    (warning,) = caplog.messages
    assert warning.startswith(f"data.train: skipped 3 bad rows of {path}: {path} line 2 has no field")
    assert f"{path} line 4 has an empty conversation" in warning and f"{path} line 5 is not JSON" in warning


def test_bad_lines_of_texts_are_left_out_by_name(
    chat_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": 3}, {"text": "two"}])
    config = parse_config(settings(chat_folder, path, bad_rows="skip"))
    mixture = build.find_corpora(config).train
    assert list(mixture.documents()) == list(mixture.documents()) == ["one", "two"]
    assert caplog.messages == [
        f"data.train: skipped 1 bad rows of {path}: {path} line 2 has a number in field 'text'; expected a string"
    ]


# -- the cache -------------------------------------------------------------------------------------------


def test_what_is_in_the_cache_is_not_made_again(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [chat(number) for number in range(9)])
    cache = str(tmp_path / "cache")
    fresh = rows_of(chat_folder, path)
    first = rows_of(chat_folder, path, cache=cache)
    (entry,) = (tmp_path / "cache").iterdir()
    assert {file.name for file in entry.iterdir()} == {"tokens.npy", "targets.npy", "offsets.npy", "facts.json"}
    assert all(file.stat().st_mode & 0o077 == 0 for file in (entry.parent, entry, *entry.iterdir()))
    monkeypatch.setattr(tokenising, "Encoder", None)
    again = rows_of(chat_folder, path, cache=cache)
    assert isinstance(again.examples.tokens, np.memmap)  # type: ignore[union-attr]
    assert listed(fresh.examples) == listed(first.examples) == listed(again.examples)
    assert again.sources[0].counts == fresh.sources[0].counts


@pytest.mark.parametrize("change", ["tokens.npy", "targets.npy", "facts.json", "short", "gone"])
def test_a_damaged_cache_is_made_anew(chat_folder: Path, tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "a.jsonl", [chat(number) for number in range(9)])
    cache = str(tmp_path / "cache")
    good = listed(rows_of(chat_folder, path, cache=cache).examples)
    (entry,) = (tmp_path / "cache").iterdir()
    whole = {file.name: file.read_bytes() for file in entry.iterdir()}
    if change == "gone":
        (entry / "offsets.npy").unlink()
    elif change == "short":
        (entry / "tokens.npy").write_bytes(whole["tokens.npy"][:-2])
    else:
        data = bytearray(whole[change])
        data[-3] ^= 1
        (entry / change).write_bytes(bytes(data))
    assert listed(rows_of(chat_folder, path, cache=cache).examples) == good
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == whole


def test_a_pickle_in_the_cache_is_not_read(chat_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(0)])
    cache = str(tmp_path / "cache")
    good = listed(rows_of(chat_folder, path, cache=cache).examples)
    (entry,) = (tmp_path / "cache").iterdir()
    np.save(entry / "tokens.npy", np.array([{"a": 1}], object), allow_pickle=True)
    assert listed(rows_of(chat_folder, path, cache=cache).examples) == good


@pytest.mark.parametrize("data", [{"seq_len": 32}, {"train_on": "all"}, {"chat_template": "{# another #}" + CHATML}])
def test_other_settings_are_another_entry(chat_folder: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", [chat(number) for number in range(9)])
    cache = str(tmp_path / "cache")
    rows_of(chat_folder, path, cache=cache)
    other = settings(chat_folder, path, cache=cache, **data)
    other["train"]["tokens_per_step"] = None
    prepared(parse_config(other))
    write(path, [chat(number) for number in range(8)])
    assert len(rows_of(chat_folder, path, cache=cache).examples) == 8
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_one_line(chat_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(0)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^data\.cache: cannot write in '.*file/cache': "):
        rows_of(chat_folder, path, cache=str(tmp_path / "file" / "cache"))


# -- mixtures --------------------------------------------------------------------------------------------


def test_an_epoch_has_of_each_source_what_its_weight_says(chat_folder: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [chat(number) for number in range(10)])
    second = write(tmp_path / "b.jsonl", [{"instruction": f"q{number}", "output": "b"} for number in range(5)])
    sources = [{"path": str(first), "weight": 0.5}, {"path": str(second), "weight": 2.4}]
    found = rows_of(chat_folder, sources)
    alone = [listed(rows_of(chat_folder, path).examples) for path in (first, second)]
    mixed = listed(found.examples)
    assert len(mixed) == 5 + 12
    assert mixed[5:15] == alone[1] * 2 and all(one in alone[1] for one in mixed[15:])
    assert len({str(one) for one in mixed[:5]}) == 5 and all(one in alone[0] for one in mixed[:5])
    assert f"{first}: 10 examples of 10 rows, 5 in an epoch (weight 0.5)" in found.said
    assert f"{second}: 5 examples of 5 rows, 12 in an epoch (weight 2.4)" in found.said
    assert listed(rows_of(chat_folder, sources).examples) == mixed
    other = settings(chat_folder, sources)
    other["train"]["seed"] = 4
    assert listed(prepared(parse_config(other)).examples) != mixed


def test_a_weight_counts_the_samples_of_a_source(chat_folder: Path, tmp_path: Path) -> None:
    """LLaMA-Factory's num_samples, of which a weight gives more or fewer."""
    path = write(tmp_path / "a.jsonl", [chat(number) for number in range(5)])
    columns, tags = {"messages": "messages"}, {"role_tag": "role", "content_tag": "content"}
    entry = {"file_name": "a.jsonl", "formatting": "sharegpt", "num_samples": 2, "columns": columns, "tags": tags}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))

    def mixed(**more: Any) -> tuple[list[Any], list[str]]:
        source = {"path": "mine", "dataset_info": str(tmp_path / "dataset_info.json"), **more}
        found = rows_of(chat_folder, [source])
        return listed(found.examples), found.said[:1]

    drawn, said = mixed()
    assert len(drawn) == 2 and said == [f"{path}: 5 examples of 5 rows, 2 in an epoch (num_samples 2)"]
    thrice, said = mixed(weight=3)
    assert thrice == drawn * 3 and said == [f"{path}: 5 examples of 5 rows, 6 in an epoch (num_samples 2, weight 3)"]
    half, _ = mixed(weight=0.5)
    assert len(half) == 1 and half[0] in drawn
    text = {"file_name": "a.jsonl", "num_samples": 2, "columns": {"prompt": "text"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": text}))
    with pytest.raises(ConfigError, match=r"^data.train: num_samples 2 of '.*a.jsonl' is wrong; expected none: joined"):
        mixed()


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_epoch_has_another_part_of_a_source(
    chat_folder: Path, tmp_path: Path, packing: str, shuffle: bool
) -> None:
    """Of 10 examples 4 in an epoch: after three epochs, which have 12, all have been seen."""
    words = [{"prompt": f"q{number}", "completion": "a" * (9 + number % 3)} for number in range(10)]
    first = write(tmp_path / "a.jsonl", words)
    second = write(tmp_path / "b.jsonl", [{"prompt": f"other{number}", "completion": "b"} for number in range(3)])
    sources = [{"path": str(first), "weight": 0.4}, {"path": str(second)}]
    config = parse_config(settings(chat_folder, sources, packing=packing, shuffle=shuffle))
    tokenizer = build.given_tokenizer(config)
    found = prepare_rows(config, build.find_corpora(config).train, tokenizer, every_epoch=True).examples
    assert isinstance(found, Drawn) and len(found) == 13
    epochs = [found.of_epoch(epoch).tolist() for epoch in range(5)]
    assert all(len(set(one)) == 7 and {10, 11, 12} <= set(one) for one in epochs)
    assert {number for one in epochs[:3] for number in one} == set(range(13))
    same = rows_of(chat_folder, sources).examples
    assert isinstance(same, Examples)
    assert [found.tokens_of(one).tolist() for one in epochs[0]] == [same.tokens_of(n).tolist() for n in range(7)]
    assert [found.labels_of(one).tolist() for one in epochs[0]] == listed(same)
    # what steps are given: the examples of the epochs, one after the other, wherever they begin
    kind: Any = PackedRows if packing == "best_fit" else SeparateRows
    rows, of_first = (kind(one, 64, shuffle=shuffle, seed=3) for one in (found, same))
    places = [rows.place(n) if packing == "best_fit" else divmod(n, rows.count) for n in range(4 * rows.count)]
    again = kind(found, 64, shuffle=shuffle, seed=3)  # which is asked for a late one first
    for number, (epoch, row) in reversed(list(enumerate(places))):
        if packing == "best_fit":
            assert again.place(number) == (epoch, row)
        assert torch.equal(again.batch([(epoch, row)])["input_ids"], rows.batch([(epoch, row)])["input_ids"])
    of_step = StepBatches(rows, micro_batch=1, rows_per_step=2).of_step
    for step in range(len(places) // 2):
        for batch, place in zip(of_step(step), places[2 * step :], strict=False):
            assert torch.equal(batch["labels"], rows.batch([place])["labels"])
    for epoch in range(3):
        batches = [rows.batch([place]) for place in places if place[0] == epoch]
        labels = [label for batch in batches for label in batch["labels"].flatten().tolist() if label >= 0]
        expected = [label for one in epochs[epoch] for label in found.labels_of(one).tolist() if label >= 0]
        assert sorted(labels) == sorted(expected)
        if epoch == 0:
            for place in [place for place in places if place[0] == 0]:
                assert torch.equal(rows.batch([place])["input_ids"], of_first.batch([place])["input_ids"])


def test_each_epoch_has_another_part_of_pairs(chat_folder: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"q{number}", "chosen": "y" * (number + 1), "rejected": "no"} for number in range(9)]
    sources = [{"path": str(write(tmp_path / "a.jsonl", lines)), "weight": 0.34}]
    config = parse_config(settings(chat_folder, sources))
    corpora, tokenizer = build.find_corpora(config).train, build.given_tokenizer(config)
    pairs = prepare_rows(config, corpora, tokenizer, every_epoch=True).examples
    assert isinstance(pairs, PreferenceExamples) and len(pairs) == 9
    rows = PairRows(pairs, np.arange(18, dtype=np.float32).reshape(9, 2), shuffle=True, seed=3)
    assert rows.count == 3
    found = [rows.batch([(epoch, row)]) for epoch in range(3) for row in range(3)]
    assert sorted(float(one[REFERENCE][0]) for one in found) == [float(2 * number) for number in range(9)]
    for one in found:  # each with its own reference
        number = int(one[REFERENCE][0]) // 2
        length = len(pairs.chosen.tokens_of(number))
        assert one["input_ids"][0, :length].tolist() == pairs.chosen.tokens_of(number).tolist()


def test_pairs_stay_pairs(chat_folder: Path, tmp_path: Path) -> None:
    turns = [chat(0)["messages"][:1], chat(1)["messages"][:1]]
    rows = [
        {
            "prompt": turn,
            "chosen": [{"role": "assistant", "content": f"y{n}"}],
            "rejected": [{"role": "assistant", "content": f"no{n}"}],
        }
        for n, turn in enumerate(turns)
    ]
    rows.insert(
        1,
        {
            "prompt": [{"role": "user", "content": "x " * 99}],
            "chosen": rows[0]["chosen"],
            "rejected": rows[0]["rejected"],
        },
    )
    found = rows_of(chat_folder, [{"path": str(write(tmp_path / "a.jsonl", rows)), "weight": 2}])
    assert isinstance(found.examples, PreferenceExamples) and len(found.examples) == 4
    assert found.sources[0].counts.left_out == 1
    tokenizer = load_tokenizer(str(chat_folder))
    for number in range(4):
        chosen, rejected = found.examples.chosen, found.examples.rejected
        texts = [tokenizer.decode(one.tokens_of(number)[one.labels_of(number) >= 0]) for one in (chosen, rejected)]
        assert texts == [f"y{number % 2}<|im_end|>", f"no{number % 2}<|im_end|>"]
        first = int(np.argmax(chosen.labels_of(number) >= 0))
        assert chosen.tokens_of(number)[:first].tolist() == rejected.tokens_of(number)[:first].tolist()


def test_of_a_streaming_source_no_more_is_read_than_the_steps_need(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "_ROWS_PER_BLOCK", 4)
    path = write(tmp_path / "a.jsonl", [chat(number) for number in range(400)])
    source = {"path": str(path), "streaming": True}
    given = settings(chat_folder, [source], cache=str(tmp_path / "cache"))
    found = prepared(parse_config(given))
    whole = rows_of(chat_folder, path)
    count = len(found.examples)
    assert 4 <= count <= 16  # two steps of 128 tokens
    assert isinstance(found.examples, Examples) and found.examples.offsets[-1] >= 256
    assert listed(found.examples) == listed(whole.examples)[:count]
    given["train"]["steps"] = 20
    assert len(prepared(parse_config(given)).examples) > count  # and it is not what the cache has of the shorter run
    given["train"] = {"epochs": 1, "tokens_per_step": 128}
    assert len(prepared(parse_config(given)).examples) == 400


def test_of_streaming_texts_no_more_is_read_than_the_steps_need(chat_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"hello {number}"} for number in range(4000)] + [{"text": 3}])
    given = settings(chat_folder, [{"path": str(path), "streaming": True}])
    config = parse_config(given)
    data = build.build_data(
        config, build.find_corpora(config), build.given_tokenizer(config), read_model_settings(config).config
    )
    assert 256 <= data.tokens < 4000  # the bad row at the end was never reached
    given["data"]["train"] = str(path)
    config = parse_config(given)
    with pytest.raises(ConfigError, match="line 4001 has a number"):
        build.build_data(
            config, build.find_corpora(config), build.given_tokenizer(config), read_model_settings(config).config
        )


def test_a_longer_run_of_a_streaming_source_is_another_run(chat_folder: Path) -> None:
    def changed(source: Any) -> dict[str, Any]:
        given = settings(chat_folder, [source])
        before = parse_config(given | {"schedule": {"name": "constant"}})
        now = parse_config(given | {"schedule": {"name": "constant"}, "train": {**given["train"], "steps": 9}})
        return settings_that_changed(before, now)

    assert changed("a.jsonl") == {}
    assert changed({"path": "a.jsonl", "streaming": True}) == {"train.steps": (2, 9)}


# -- settings that do not fit ----------------------------------------------------------------------------


def test_conversations_need_a_template(chat_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    made = load_tokenizer(str(chat_folder))
    made.chat_template = None
    made.save_pretrained(bare)
    path = write(tmp_path / "a.jsonl", [chat(0)])
    with pytest.raises(
        ConfigError, match=r"^data\.chat_template: the tokenizer has none, and .*a\.jsonl.* is in format messages"
    ):
        rows_of(bare, path)
    (tmp_path / "chat.jinja").write_text(CHATML)
    own = [
        listed(rows_of(bare, path, chat_template=given).examples) for given in (CHATML, str(tmp_path / "chat.jinja"))
    ]
    assert own == [listed(rows_of(chat_folder, path).examples)] * 2
    with pytest.raises(ConfigError, match=r"^data\.chat_template: 'chat\.jinja' is neither a file nor a template"):
        rows_of(bare, path, chat_template="chat.jinja")
    with pytest.raises(ConfigError, match=r"^data\.chat_template: it is no Jinja template: line 1: "):
        rows_of(bare, path, chat_template="{% for m in messages %}")


def test_a_template_that_hides_whose_words_are_whose_is_named(chat_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(0)])
    hiding = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}")
    unlearned = chat(0)
    unlearned["messages"].extend([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}])
    weighted = write(tmp_path / "b.jsonl", [unlearned])
    for rows, train_on, number, advice in (
        (path, "assistant", 2, "data.train_on: all, or "),
        (weighted, "all", 4, "no answer there weight: 0, or "),
    ):
        with pytest.raises(ConfigError) as caught:
            rows_of(chat_folder, rows, chat_template=hiding, train_on=train_on)
        assert str(caught.value) == (
            f"data.train_on: what the assistant says in {rows} line 1 cannot be told from the chat template: before "
            f"message {number} it asks for an answer in other words than it keeps; give {advice}a data.chat_template "
            "with {% generation %} around what is learned (TRL comes with such templates of well-known models, "
            "trl/chat_templates/*_training.jinja)"
        )
    assert len(rows_of(chat_folder, path, chat_template=hiding, train_on="all").examples) == 1


def test_no_example_with_a_target_is_an_error(chat_folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [chat(0)])
    given = settings(chat_folder, path, seq_len=4)
    with pytest.raises(ConfigError, match=r"^data\.train: no example in .*a\.jsonl has a target"):
        prepared(parse_config(given))


# -- training on them ------------------------------------------------------------------------------------


def test_a_model_trains_on_conversations_and_is_measured_on_them(
    chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", [chat(number) for number in range(6)])
    given = settings(chat_folder, path, eval=str(write(tmp_path / "b.jsonl", [chat(9), chat(10)])))
    result = run(parse_config({**given, "output": str(tmp_path / "run")}))
    assert result.loop.steps == 2 and "eval" in result.evaluations
    shown = capsys.readouterr().err
    assert f"data.train: {path} is in format messages" in shown and f"{path}: 6 examples of 6 rows" in shown
    ledger = (tmp_path / "run" / "ledger.jsonl").read_text()
    assert str(path) in ledger  # so that `verify` knows what was trained on
    saved = load_tokenizer(str(tmp_path / "run" / "model"))
    assert saved.chat_template == CHATML


def test_examples_are_measured_by_their_targets(chat_folder: Path, tmp_path: Path) -> None:
    examples = rows_of(chat_folder, write(tmp_path / "a.jsonl", [chat(2), chat(5), chat(0)])).examples
    assert isinstance(examples, Examples)
    config = tiny_config("llama")
    config.vocab_size = 288
    model = initialise(config, 0)
    measured = eval_set(examples, seq_len=64, micro_batch=2)
    with mt.Engine(copy.deepcopy(model), device="cpu", precision="fp32", head_chunk_tokens=5) as engine:
        seen: list[int] = []
        head = engine.model.get_output_embeddings()
        head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.shape[:-1].numel()))
        found = evaluate(engine, measured)
    assert seen and max(seen) == 5  # logits of no more tokens than in training
    assert found is not None and found.utf8_bytes == examples.utf8_bytes
    nats = 0.0
    with torch.no_grad():
        for number in range(3):
            ids, labels = (torch.from_numpy(of(number))[None] for of in (examples.tokens_of, examples.labels_of))
            logits = model(input_ids=ids).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum").item()
    assert found.target_tokens == examples.target_tokens
    assert found.loss == pytest.approx(nats / examples.target_tokens, rel=1e-6)
    first = eval_set(examples, seq_len=64, micro_batch=2, max_tokens=int(examples.lengths[0]) + 1)
    (batch,) = first.batches()
    assert len(batch["input_ids"]) == 1 and first.utf8_bytes is None and first.sha256 != measured.sha256


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_steps_learn_the_targets_of_examples_and_no_others(chat_folder: Path, tmp_path: Path, packing: str) -> None:
    path = write(tmp_path / "a.jsonl", [chat(number) for number in range(5)])
    config = parse_config(settings(chat_folder, path, packing=packing))
    model_config = read_model_settings(config).config
    data = build.build_data(config, build.find_corpora(config), build.given_tokenizer(config), model_config)
    of_step = build.batches_of(config, data)
    assert data.rows is not None
    seen: list[int] = []
    for step in reversed(range(data.rows.count)):  # two rows each: two epochs
        for batch in of_step(step):
            learned = batch["labels"] != -100
            assert torch.equal(batch["input_ids"][learned], batch["labels"][learned])
            seen += batch["labels"][learned].tolist()
    examples = rows_of(chat_folder, path).examples
    assert sorted(seen) == sorted([one for labels in listed(examples) for one in labels if one != -100] * 2)


# -- megatrain data --------------------------------------------------------------------------------------


def test_the_command_shows_what_is_learned(chat_folder: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [{"messages": [{"role": "user", "content": "hi \x1b[2J"}, {"role": "assistant", "content": "fine"}]}, chat(1)],
    )
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(chat_folder, path)))
    shown = io.StringIO()
    data_command(str(file), [("data.shuffle", "false")], examples=1, as_json=False, out=shown)
    text = shown.getvalue()
    assert "<|im_start|>user\nhi \\x1b[2J<|im_end|>\n<|im_start|>assistant\n⟦fine<|im_end|>⟧\n" in text
    assert "example 2" not in text and f"data.train: {path} is in format messages" in text
    assert "data.train: 2 examples, " in text and "lengths: 50% up to " in text
    shown = io.StringIO()
    data_command(str(file), [], examples=2, as_json=True, out=shown)
    told = json.loads(shown.getvalue())["train"]
    assert [piece["target"] for piece in told["examples"][0]["pieces"]] == [False, True, False]
    assert told["mixture"]["examples"] == 2 and told["sources"][0]["format"] == "messages"
    tokens = sum(example["tokens"] for example in told["examples"])
    assert told["mixture"]["tokens"] == tokens and told["mixture"]["fill"] == tokens / 128


def test_the_command_shows_texts_too(chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("hello world " * 30)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(chat_folder, tmp_path / "a.txt")))
    assert cli.main(["data", str(file), "--examples", "1", "--data.seq_len", "32"]) == 0
    shown = capsys.readouterr().out
    assert "<|eos|>⟦hello world" in shown  # nothing stands before the first token of a sequence
    told = next(line for line in shown.splitlines() if line.startswith("data.train: ") and " tokens" in line)
    sequences = int(told.split()[1])
    assert f"{sequences * 32:,} tokens, {sequences * 31:,} of them targets" in told and "packs" not in shown
    assert cli.main(["data", str(file), "--data.eval", str(tmp_path / "a.txt"), "--data.seq_len", "32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["eval"]["mixture"]
    assert told["target_tokens"] == told["tokens"] - 1  # windows overlap


def test_the_command_shows_documents_that_are_not_joined(
    chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    path = write(tmp_path / "a.jsonl", [{"text": "hello"}, {"text": "world " * 20}])
    file.write_text(json.dumps(settings(chat_folder, path)))
    assert cli.main(["data", str(file), "--data.packing", "none"]) == 0
    shown = capsys.readouterr().out
    first = re.search(r"\n([^\n⟦]+)⟦([^\n]*)<\|eos\|>⟧\n", shown)
    assert first is not None and first[1] + first[2] == "hello" and "data.train: 2 examples" in shown


def test_the_command_says_how_full_packed_rows_are(
    chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(chat_folder, write(tmp_path / "a.jsonl", [chat(n) for n in range(20)]))))

    def told(*options: str) -> dict[str, Any]:
        assert cli.main(["data", str(file), "--json", *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["train"]
        return found

    auto = told()
    rows = PackedRows(rows_of(chat_folder, tmp_path / "a.jsonl").examples, 64, shuffle=False, seed=0)  # type: ignore[arg-type]
    assert auto["packed"] == {"packing": "best_fit", "rows": rows.count, "fill": rows.fill}
    assert told("--data.packing", "none")["packed"] is None
    assert cli.main(["data", str(file), "--examples", "0"]) == 0
    assert f"data.train: best_fit packs them into {rows.count} rows, {rows.fill:.1%} full\n" in capsys.readouterr().out
    file.write_text(
        json.dumps(settings(chat_folder, write(tmp_path / "b.jsonl", [{"text": "hello " * 99}, {"text": "x"}])))
    )
    found = told("--data.packing", "best_fit")
    lengths = [len(one["pieces"]) for one in found["examples"]]
    cuts = found["mixture"]["examples"] - 2
    assert (
        lengths and cuts > 0 and found["said"][0].endswith(f"documents longer than data.seq_len are cut {cuts} times")
    )
    assert found["packed"]["rows"] <= found["mixture"]["examples"]


def test_colours_mark_targets_on_a_terminal(chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(chat_folder, write(tmp_path / "a.jsonl", [chat(0)]))))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = io.StringIO()
    data_command(str(file), [], examples=1, as_json=False, out=shown)
    assert "\x1b[32mfine <|im_end|>" in shown.getvalue() and "⟦" not in shown.getvalue()
