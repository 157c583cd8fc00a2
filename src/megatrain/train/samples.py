"""What the model writes at an evaluation: a few prompts, gone on from in the same way each time."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatrain.config import EvalConfig
from megatrain.data.bad_rows import BadRowError
from megatrain.data.examples import NO_TARGET, Examples, HeldOutData, PreferenceExamples, of_one_epoch
from megatrain.data.formats import Chat
from megatrain.data.images import ImageRows
from megatrain.data.messages import OPENAI, messages_of
from megatrain.data.packing import TokenStream
from megatrain.errors import ConfigError
from megatrain.train.generate import as_inputs, check_length, go_on, template_tokens
from megatrain.train.interrupt import StopOnInterrupt
from megatrain.train.row_data import chat_template

_PROMPT_TOKENS = 32  # of a text of data.eval, or half of it where it is short


@dataclass(frozen=True)
class Sample:
    """A prompt, and how the model went on."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """As people read it, and as the model does."""

    text: str
    tokens: list[int]


def read_prompts(
    settings: EvalConfig, tokenizer: Any, held_out: HeldOutData | ImageRows, model_config: Any
) -> list[Prompt]:
    """What eval.prompts says: a number of beginnings of texts, as long as the model has room for, or texts and chats.
    Raises ConfigError, also where the model has fewer positions than eval.max_new_tokens and a prompt take."""
    wanted = settings.prompts
    found = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    positions = found if isinstance(found, int) else sys.maxsize
    if isinstance(wanted, int):
        if isinstance(held_out, ImageRows):
            if wanted:
                raise ConfigError(
                    f"eval.prompts: {wanted} is wrong for a data.eval whose rows have images; expected prompts of text "
                    "or chats"
                )
            return []
        if wanted:
            check_length(1, settings.max_new_tokens, positions, key="eval.max_new_tokens")
        most = positions - settings.max_new_tokens + 1
        if isinstance(held_out, PreferenceExamples):
            held_out = of_one_epoch(held_out.chosen)
        if isinstance(held_out, Examples):
            return _before_targets(wanted, tokenizer, held_out, most)
        return _beginnings(wanted, tokenizer, held_out, most) if held_out is not None else []
    prompts = [_prompt(prompt, f"eval.prompts[{number}]", tokenizer) for number, prompt in enumerate(wanted)]
    for prompt in prompts:
        check_length(len(prompt.tokens), settings.max_new_tokens, positions, key="eval.max_new_tokens")
    return prompts


def _prompt(prompt: Any, key: str, tokenizer: Any) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(prompt, list(tokenizer(prompt, add_special_tokens=False)["input_ids"]))
    template = chat_template(tokenizer)
    if template is None:
        raise ConfigError(f"{key}: is a chat, and the tokenizer has no chat template; give a text")
    try:
        text = template.asking(Chat(messages_of(prompt, OPENAI)))
    except BadRowError as error:
        raise ConfigError(f"{key}: {error}") from None
    return Prompt(text, template_tokens(tokenizer, text))


def _beginnings(count: int, tokenizer: Any, held_out: TokenStream, most: int) -> list[Prompt]:
    """Of the first texts, which an end-of-text follows each; `most` tokens of one."""
    ends = np.flatnonzero(held_out.tokens == tokenizer.eos_token_id)
    starts, stops = ends, [*ends[1:], len(held_out.tokens)]
    prompts: list[Prompt] = []
    for start, stop in zip(starts, stops, strict=True):
        if len(prompts) == count:
            break
        text = held_out.tokens[start + 1 : stop]
        tokens = [int(token) for token in text[: min(_PROMPT_TOKENS, (len(text) + 1) // 2, most)]]
        if tokens:
            prompts.append(Prompt(str(tokenizer.decode(tokens)), tokens))
    return prompts


def _before_targets(count: int, tokenizer: Any, held_out: Examples, most: int) -> list[Prompt]:
    """Of the first examples in which that is no more than `most` tokens, what comes before the first target: the
    question to which the answer is to be written."""
    prompts: list[Prompt] = []
    for number in range(len(held_out)):
        if len(prompts) == count:
            break
        targets = np.flatnonzero(held_out.labels_of(number) != NO_TARGET)
        tokens = held_out.tokens_of(number)[: int(targets[0]) if len(targets) else 0].tolist()
        if 0 < len(tokens) <= most:
            prompts.append(Prompt(str(tokenizer.decode(tokens)), tokens))
    return prompts


class Sampler:
    """Goes on from `prompts` as `settings` say, drawn anew from `seed` each time."""

    def __init__(
        self, settings: EvalConfig, model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, seed: int
    ) -> None:
        self._settings, self._model, self._tokenizer = settings, model, tokenizer
        self._prompts, self._seed = prompts, seed

    def write(self, stop: StopOnInterrupt) -> list[Sample]:
        """What there is until `stop` is requested. The model is in evaluation mode, see `undisturbed`."""
        samples = []
        for prompt in self._prompts:
            if stop.requested:
                break
            text = go_on(
                self._model,
                self._tokenizer,
                as_inputs(prompt.tokens),
                max_new_tokens=self._settings.max_new_tokens,
                seed=self._seed,
                temperature=self._settings.temperature,
            )
            samples.append(Sample(prompt.text, text))
        return samples
