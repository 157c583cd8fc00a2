"""Evaluation while training: it changes no bit of training, and what follows from it is right."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

import megatrain as mt
from megatrain.config import EvalConfig
from megatrain.data.encode import Encoder, encoder_settings
from megatrain.data.examples import Examples
from megatrain.data.formats import Layout
from megatrain.data.packing import TokenStream
from megatrain.data.tokenizer import train_bpe
from megatrain.device.lagged import LaggedDevice
from megatrain.train.evaluate import EvalSet, Evaluation, eval_set
from megatrain.train.generate import _said
from megatrain.train.held_out import HeldOut, Measured, Standing
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.journal import lines_of
from megatrain.train.row_data import chat_template
from megatrain.train.samples import Prompt, Sample, Sampler, read_prompts
from megatrain.train.undisturbed import undisturbed

CPU = torch.device("cpu")


class Words:
    """A tokenizer whose tokens are numbers, with 0 as the end of a text."""

    eos_token_id = pad_token_id = 0
    chat_template: str | None = None
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
    all_special_tokens = ()

    def __call__(self, text: str, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(str(int(token)) for token in tokens)


def tiny_stream() -> TokenStream:
    tokens = np.random.default_rng(1).integers(1, 96, 70).astype(np.uint16)
    tokens[[0, 20, 69]] = 0
    return TokenStream(tokens, utf8_bytes=200)


# -- no effect --------------------------------------------------------------------------------------------------------


def dropout_model() -> nn.Module:
    config = tiny_config("gpt2")
    config.resid_pdrop = config.embd_pdrop = 0.2
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def train(device: Any, settings: EvalConfig | None, precision: str = "fp32", steps: int = 4) -> dict[str, Any]:
    """What is left of a training, with evaluations as `settings` say: everything of it."""
    engine = mt.Engine(dropout_model(), optimizer=mt.AdamW(lr=1e-2), device=device, precision=precision, threads=1)
    engine.model.train()
    torch.manual_seed(5)
    told: list[Measured] = []
    sampler = Sampler(EvalConfig(max_new_tokens=3), engine.model, Words(), [Prompt("3 4", [3, 4])], seed=1)
    sets = {"eval": eval_set(tiny_stream(), seq_len=16, micro_batch=2)}
    with StopOnInterrupt() as stop:
        held_out = HeldOut(
            settings or EvalConfig(), engine, sets if settings else {}, sampler=sampler, stop=stop, tell=told.append
        )
        found: dict[str, Any] = {"steps": []}
        held_out.before_training()
        for step in range(steps):
            ids = torch.arange(2 * 2 * 12).view(2, 2, 12).add(step) % 96
            stats = engine.train_step([{"input_ids": one, "labels": one} for one in ids], lr=1e-2)
            found["steps"].append((stats.loss, stats.grad_norm))
            held_out.after_step(step + 1, last=False)
    if engine.device.name == "lagged":
        weights: Any = engine.weights
        found["order"] = weights._orders["step"].visits
        found["schedules"] = {key: schedule for key, schedule in weights._schedules.items() if key[0] == "step"}
        found["inputs"] = weights._orders["step"].inputs
    found |= {"units": engine.unit_hashes(), "random": torch.get_rng_state().tolist(), "numpy": np.random.random()}
    found["training"] = [module.training for module in engine.model.modules()]
    engine.close()
    assert len(told) == (steps + 1 if settings else 0)
    assert all(len(one.samples) == 1 for one in told)
    return found


@pytest.mark.parametrize("where", ["cpu", "lagged", "lagged, little memory", "cpu, bf16"])
def test_training_is_bit_equal_with_an_evaluation_after_every_step(where: str) -> None:
    def device() -> Any:
        if where.startswith("cpu"):
            return "cpu"
        # with little, a step has no room for what an evaluation could take beside it
        return LaggedDevice("fp32", memory_bytes=254_500 if "little" in where else None)

    precision = "bf16" if "bf16" in where else "fp32"
    found = []
    for settings in (None, EvalConfig(every=1, at_start=True)):
        np.random.seed(3)
        found.append(train(device(), settings, precision))
    without, evaluated = found
    assert evaluated.keys() == without.keys()
    for name in without:
        assert evaluated[name] == without[name], name


class Forgetful(nn.Module):
    """Notes on itself what it has seen, as models do; draws in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout(0.5).eval()
        self.longest = 1
        self.register_buffer("table", torch.ones(3))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, tokens: int) -> None:
        self.longest = max(self.longest, tokens)
        self.seen = tokens
        self.table = torch.zeros(tokens)
        self.scale.mul_(2)
        torch.rand(1), np.random.random()


def test_the_model_is_left_as_it_was_found() -> None:
    model = Forgetful()
    model.train()
    model.inner.eval()
    table = model.table
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state()
    with undisturbed(model, CPU):
        assert not model.training and not torch.is_grad_enabled()
        model(7)
    assert model.longest == 1 and not hasattr(model, "seen") and model.table is table
    assert model.scale.tolist() == [1, 1] and model.table.tolist() == [1, 1, 1]
    assert model.training and not model.inner.training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    first = np.random.random()
    np.random.seed(0)
    assert np.random.random() == first


# -- when, and what follows -------------------------------------------------------------------------------------------


class Losses:
    """In the role of what is measured: the losses of one evaluation after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
        self._losses = iter(losses)
        monkeypatch.setattr("megatrain.train.held_out.evaluate", self.evaluate)

    def evaluate(self, engine: Any, one: EvalSet, stop: StopOnInterrupt) -> Any:
        return None if stop.requested else Evaluation(next(self._losses), 10, one.utf8_bytes)


class Still:
    """An engine of which nothing is asked."""

    def __init__(self) -> None:
        self.model, self.device = nn.Linear(1, 1), type("Device", (), {"torch_device": CPU})()


def no_batches() -> Iterator[dict[str, torch.Tensor]]:
    return iter(())


SETS = {"eval": EvalSet(no_batches, 20, "a1")}


def held_out(settings: EvalConfig, told: object = None, first_step: int = 0, **others: Any) -> Any:
    found: list[Measured] = []
    stop = StopOnInterrupt()
    one = HeldOut(
        settings,
        Still(),
        SETS,
        first_step=first_step,
        told=told,
        stop=stop,
        tell=found.append,
        **others,  # type: ignore[arg-type]
    )
    return one, found


def test_evaluations_are_due_every_so_many_steps_and_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    Losses(monkeypatch, [5.0] * 9)
    one, found = held_out(EvalConfig(every=3, at_start=True))
    one.before_training()
    for step in range(1, 8):
        one.after_step(step, last=step == 7)
    assert [measured.step for measured in found] == [0, 3, 6, 7]
    assert one.at_end(7)["eval"].loss == 5.0 and len(found) == 4  # it is known
    one, found = held_out(EvalConfig())
    one.before_training()
    one.after_step(3, last=True)
    assert found == [] and one.at_end(3)["eval"].target_tokens == 10 and [m.step for m in found] == [3]


@pytest.mark.parametrize(
    ("losses", "min_delta", "ends"),
    [
        ([5, 4, 3, 2, 1, 0], 0.0, None),
        ([5, 4, 4, 4, 1, 0], 0.0, 4),  # an equal one is no improvement
        ([5, 6, 4, 6, 3, 7], 0.0, None),
        ([5, 4.9, 4.8, 4.7, 1, 1], 0.5, 3),  # but small ones add up until one counts: 5 - 4.7 is too little
        ([5, 4.7, 4.4, 4.1, 3.8, 3.5], 0.5, None),
        ([5, math.nan, math.nan, 4, 3, 2], 0.0, 3),
        ([math.nan, math.nan, 4, 3, 2, 1], 0.0, 2),
    ],
)
def test_training_ends_where_it_does_not_improve(
    losses: list[float], min_delta: float, ends: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses(monkeypatch, losses)
    one, found = held_out(EvalConfig(every=1, patience=2, min_delta=min_delta))
    steps = [step for step in range(1, 7) if not one.enough and (one.after_step(step, last=False) or True)]
    assert (steps[-1] if one.enough else None) == ends
    assert [measured.enough for measured in found] == [*[False] * (len(found) - 1), ends is not None]
    if ends is not None:
        assert lines_of(found[-1])[-1].startswith(f"training ends here, at step {ends}: no improvement in 2 eval")


@pytest.mark.parametrize("cut", range(7))
def test_what_goes_on_from_a_checkpoint_counts_as_it_would_have(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvalConfig(every=2, patience=3)
    losses = {2: 5.0, 4: 4.0, 6: 4.5, 8: math.nan, 10: 4.2, 12: 1.0}

    def go_on(told: object, first: int, last: int) -> Any:
        Losses(monkeypatch, [loss for step, loss in losses.items() if step > first])
        one, _ = held_out(settings, told, first)
        one.before_training()
        for step in range(first + 1, last + 1):
            if not one.enough:
                one.after_step(step, last=False)
        return one

    first = go_on(None, 0, cut)
    told = json.loads(json.dumps(vars(first.standing), allow_nan=False))
    assert go_on(told, cut, 12).standing == go_on(None, 0, 12).standing
    assert go_on(None, 0, 12).standing.step == 10 and go_on(None, 0, 12).enough


def test_what_ctrl_c_kept_from_being_measured_is_measured_when_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    Losses(monkeypatch, [4.0, 3.0])
    one, found = held_out(EvalConfig(every=2))
    one._stop.requested = True
    one.after_step(2, last=False)
    assert found == [] and one.loss_at(2) is None and one.at_end(2) == {}
    one, found = held_out(EvalConfig(every=2), vars(one.standing), first_step=2)
    one.before_training()
    assert one.loss_at(2) == 4.0 and [measured.step for measured in found] == [2]


@pytest.mark.parametrize(
    "told", [None, 3, {}, {"of": "a1"}, {"of": "a1", "step": "x", "results": 1, "best": 0, "without": 0}]
)
def test_a_checkpoint_that_says_nothing_of_the_same_text_begins_anew(told: object) -> None:
    assert Standing.read("a1", told) == Standing("a1")


def test_losses_of_other_texts_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    Losses(monkeypatch, [4.0])
    one, _ = held_out(EvalConfig(every=1))
    one.after_step(1, last=False)
    assert Standing.read("a1", vars(one.standing)) == one.standing != Standing("a1")
    assert Standing.read("b2", vars(one.standing)) == Standing("b2")
    stream = tiny_stream()
    sets = [eval_set(stream, seq_len=n, micro_batch=1, max_tokens=most) for n, most in ((8, None), (9, None), (8, 40))]
    assert len({one.sha256 for one in sets}) == 3


# -- what is measured -------------------------------------------------------------------------------------------------


def test_no_more_tokens_than_wanted() -> None:
    stream = tiny_stream()
    for most in (1, 7, 15, 16, 30, 68):
        one = eval_set(stream, seq_len=8, micro_batch=2, max_tokens=most)
        labels = torch.cat([batch["labels"] for batch in one.batches()])
        assert int((labels[:, 1:] != -100).sum()) == most and one.utf8_bytes is None
    assert eval_set(stream, seq_len=8, micro_batch=2, max_tokens=69).utf8_bytes == 200


def test_bits_per_byte_only_of_a_whole_text() -> None:
    assert Evaluation(math.log(4), 10, None).bits_per_byte is None
    assert "bits" not in lines_of(Measured(1, {"eval": Evaluation(1.0, 10, None)}, [], 0.1, 0, False))[0]
    assert Evaluation(1e9, 10, 20).perplexity == math.inf


def test_a_line_of_one_set_and_of_several() -> None:
    one = Evaluation(2.0, 10, 20)
    line = Measured(4, {"eval": one}, [], 0.5, 1, False).line()
    assert line["step"] == 4 and line["eval"]["loss"] == 2.0 and "enough" not in line
    assert Measured(4, {"a": one, "b": one}, [], 0.5, 1, False).line()["eval"]["b"]["perplexity"] == math.exp(2)


# -- samples ----------------------------------------------------------------------------------------------------------


def test_prompts_are_beginnings_of_texts() -> None:
    stream = tiny_stream()
    config = dropout_model().config  # of 64 positions
    prompts = read_prompts(EvalConfig(prompts=5, max_new_tokens=3), Words(), stream, config)
    assert [prompt.tokens for prompt in prompts] == [stream.tokens[1:11].tolist(), stream.tokens[21:45].tolist()]
    assert read_prompts(EvalConfig(prompts=1, max_new_tokens=3), Words(), stream, config) == prompts[:1]
    short = read_prompts(EvalConfig(prompts=5, max_new_tokens=60), Words(), stream, config)
    assert [prompt.tokens for prompt in short] == [prompt.tokens[:5] for prompt in prompts]


def test_prompts_of_examples_are_those_that_the_model_has_room_for() -> None:
    targets = np.array([False] * 5 + [True, False, True])
    rows = Examples(np.arange(1, 9, dtype=np.uint16), targets, np.array([0, 6, 8]), 10)
    config = dropout_model().config
    for new_tokens, expected in ((60, [[1, 2, 3, 4, 5], [7]]), (61, [[7]])):
        found = read_prompts(EvalConfig(prompts=2, max_new_tokens=new_tokens), Words(), rows, config)
        assert [prompt.tokens for prompt in found] == expected


def test_prompts_are_texts_and_chats() -> None:
    words, config = Words(), dropout_model().config
    chat = [{"role": "user", "content": "5 6"}]

    def read(prompts: list[Any]) -> list[Prompt]:
        return read_prompts(EvalConfig(prompts=tuple(prompts), max_new_tokens=3), words, None, config)

    with pytest.raises(mt.ConfigError, match=r"^eval.prompts\[1\]: is a chat, and the tokenizer has no chat template"):
        read(["1 2", chat])
    said = "{{ messages | map(attribute='content') | join(' ') }} 9"
    in_parts = said.replace("'content'", "'content.0.text'")  # as a model's that sees: a string has no parts
    for words.chat_template in (said, in_parts):
        assert read(["1 2", chat]) == [Prompt("1 2", [1, 2]), Prompt("5 6 9", [5, 6, 9])]
    words.chat_template = "{{ raise_exception('only users begin') }}"
    with pytest.raises(mt.ConfigError, match=r"^eval.prompts\[0\]: is refused by the chat template: only users begin$"):
        read([chat])
    with pytest.raises(mt.ConfigError, match=r"^eval.prompts\[0\]: has role 'x' in message 1; expected one of system"):
        read([[{"role": "x", "content": "5"}]])


def test_chats_to_sample_from_have_the_tokens_of_training() -> None:
    """Also where the tokenizer takes special tokens in a text apart, as those do that a run has trained."""
    tokenizer = train_bpe(["hello world, how are you? fine, thanks " * 9], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
    )
    assert tokenizer.split_special_tokens
    question, answer = {"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "fine"}
    template = chat_template(tokenizer)
    settings = encoder_settings(tokenizer, Layout("messages"), template=template, seq_len=99, everything=False)
    learned = Encoder(settings).encode([{"messages": [question, answer]}])
    prompts = EvalConfig(prompts=([question],), max_new_tokens=3)
    (prompt,) = read_prompts(prompts, tokenizer, None, dropout_model().config)
    assert prompt.tokens == learned.tokens[: len(prompt.tokens)].tolist()
    assert learned.targets.tolist().index(True) == len(prompt.tokens)
    assert _said("how are you?", template, tokenizer).inputs["input_ids"][0].tolist() == prompt.tokens


def test_samples_are_the_same_each_time_and_other_ones_from_another_seed() -> None:
    model = dropout_model().eval()

    def write(seed: int) -> list[Sample]:
        settings = EvalConfig(max_new_tokens=8, temperature=1.0)
        return Sampler(settings, model, Words(), [Prompt("3", [3]), Prompt("4", [4])], seed=seed).write(
            StopOnInterrupt()
        )

    assert write(1) == write(1) != write(2)
    assert [len(sample.text.split()) for sample in write(1)] == [8, 8]


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # learns a vector for each position, computes them
@pytest.mark.parametrize("prompts", [("3",), 1])
def test_prompts_that_the_model_has_no_room_for_are_refused(family: str, prompts: Any) -> None:
    config = tiny_config(family)
    config.max_position_embeddings = 64
    with pytest.raises(mt.ConfigError, match=r"^eval.max_new_tokens is 65; the model has 64 positions"):
        read_prompts(EvalConfig(prompts=prompts, max_new_tokens=65), Words(), None, config)
    with pytest.raises(mt.ConfigError, match=r"eval.max_new_tokens is 64; .* 2 tokens, so it must be at most 63"):
        read_prompts(EvalConfig(prompts=("3 4",)), Words(), None, config)
    assert read_prompts(EvalConfig(prompts=0, max_new_tokens=65), Words(), None, config) == []


def test_what_is_shown_of_samples_moves_no_cursor() -> None:
    sample = Sample("a prompt", "one\x1b[2J\rtwo\nthree")
    lines = lines_of(Measured(4, {"eval": Evaluation(2.0, 10, 20)}, [sample], 0.5, 0, False))
    assert lines[1:] == ["  1. 'a prompt' goes on:", "     | one\\x1b[2J\\rtwo", "     | three"]
    assert all(character.isprintable() for line in lines for character in line)
