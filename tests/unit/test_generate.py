"""`megatrain generate` on a model with a chat template: the prompt as it is, or as what a user says."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from megatrain import cli
from megatrain.data.tokenizer import load_tokenizer, train_bpe
from megatrain.model import loading
from megatrain.train import generate as generation

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config("llama")
    config.vocab_size = 288
    loading.initialise(config, seed=0).save_pretrained(folder)
    tokenizer = train_bpe(["hello world, how are you? fine, thanks " * 9], 280)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def run(model: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    command = ["generate", str(model), "--prompt", "hello", "--max-new-tokens", "6", "--temperature", "0", *arguments]
    code = cli.main(command)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def greedy(model: Path, text: str) -> Any:
    """(text, its tokens) of what transformers has the model go on with, special tokens in `text` being whole."""
    tokenizer = load_tokenizer(str(model), key="tokenizer")
    ids = torch.tensor([tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]])
    made = AutoModelForCausalLM.from_pretrained(model).generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0)
    tokens = made[0, ids.shape[1] :].tolist()
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens


def test_a_prompt_goes_in_as_it_is_and_it_is_said_what_would_ask_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(model, capsys)
    assert code == cli.DONE and out == "hello" + greedy(model, "hello")[0] + "\n"
    assert err == "the prompt goes in as it is; the model has a chat template: --chat asks it as a user's turn\n"


def test_a_chat_prompt_is_what_a_user_says(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(model, capsys, "--chat")
    assert (code, out, err) == (cli.DONE, greedy(model, ASKED)[0] + "\n", "")
    assert out != run(model, capsys)[1].removeprefix("hello")


def test_an_answer_ends_with_its_turn(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the template's token, which the model's settings do not name: a run's own begin as a base model's are."""
    seen: list[Any] = []
    go_on = generation.go_on
    monkeypatch.setattr(generation, "go_on", lambda *a, **k: seen.append(k["ends"]) or go_on(*a, **k))
    run(model, capsys, "--chat")
    run(model, capsys)
    tokenizer = load_tokenizer(str(model), key="tokenizer")
    assert seen == [(tokenizer.convert_tokens_to_ids("<|im_end|>"),), ()]

    tokens = greedy(model, ASKED)[1]
    inputs = generation.as_inputs(generation.template_tokens(tokenizer, ASKED))
    settings = {"max_new_tokens": 6, "seed": 0, "temperature": 0.0}
    text = go_on(AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer, inputs, **settings, ends=tokens[1:2])
    assert text == tokenizer.decode(tokens[: tokens.index(tokens[1]) + 1], skip_special_tokens=True)
    assert text != tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (None, "--chat: the model's tokenizer has no chat template; leave it out, to go on from the text"),
        ("{{ raise_exception('not you') }}", "--chat: the prompt is refused by the chat template: not you"),
    ],
)
def test_no_chat_without_a_template_that_takes_it(
    template: str | None, line: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(model, tmp_path / "model"))
    tokenizer = load_tokenizer(str(other), key="tokenizer")
    (other / "chat_template.jinja").unlink()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(other)
    code, out, err = run(other, capsys, "--chat")
    assert code == 2 and out == "" and err.splitlines() == [f"megatrain: {line}"]
    if template is None:
        assert run(other, capsys)[2] == ""
