"""Text from a trained model."""

import logging
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatrain.data.bad_rows import BadRowError
from megatrain.data.chat_template import ChatTemplate
from megatrain.data.formats import Chat
from megatrain.data.tokenizer import load_tokenizer
from megatrain.errors import ConfigError
from megatrain.sizes import format_bytes
from megatrain.train.run_folder import model_folder

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS_SHARE = 0.8  # of a GPU's free memory; the rest is for keys, values and activations
_ADVICE = "the prompt goes in as it is; the model has a chat template: --chat asks it as a user's turn"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Question:
    """What the model takes for a prompt, and the tokens that end its answer besides those that its settings name."""

    inputs: Mapping[str, "Tensor"]
    ends: tuple[int, ...] = ()


def generate(
    folder: str,
    prompts: list[str],
    *,
    images: Sequence[str] = (),
    chat: bool = False,
    max_new_tokens: int = 200,
    seed: int = 0,
    temperature: float = 0.8,
) -> list[str]:
    """Each prompt with the text that the model in `folder` continues it with, drawn anew from `seed`.

    With `chat`, each prompt is what a user says, through the tokenizer's chat template, and what is returned is the
    answer alone; so it is with `images`, files, of which `<image>` in the prompt is the place of one (else they come
    first). `temperature` 0 always takes the likeliest token. Raises ConfigError where there is no model, tokenizer,
    template or processor.
    """
    from megatrain.model.loading import load_config, load_pretrained
    from megatrain.train.row_data import chat_template

    source = model_folder(folder)
    load_config(source)  # no model is a clearer error than no tokenizer, and cheap to find
    tokenizer = load_tokenizer(source, key="tokenizer")
    template = chat_template(tokenizer)
    asks = chat or bool(images)
    if images:
        questions = _about_images(source, tokenizer, template, prompts, images)
    elif chat:
        questions = [_said(prompt, template, tokenizer) for prompt in prompts]
    else:
        # in training a document follows the end of the one before
        questions = [_Question(as_inputs(_ids(tokenizer, one) or [tokenizer.eos_token_id])) for one in prompts]
        if template is not None:
            print(_ADVICE, file=sys.stderr, flush=True)
    model = _placed(load_pretrained(source)).eval()
    positions = learned_positions(model)
    texts = []
    for prompt, question in zip(prompts, questions, strict=True):
        if positions is not None:
            check_length(question.inputs["input_ids"].shape[1], max_new_tokens, positions, key="max-new-tokens")
        text = go_on(
            model,
            tokenizer,
            question.inputs,
            max_new_tokens=max_new_tokens,
            seed=seed,
            temperature=temperature,
            ends=question.ends,
        )
        texts.append(text if asks else prompt + text)
    return texts


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def template_tokens(tokenizer: Any, text: str) -> list[int]:
    """Of what a chat template has written, whose special tokens are special, whatever the tokenizer does with those in
    a text: as in training."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])


def _said(prompt: str, template: ChatTemplate | None, tokenizer: Any) -> _Question:
    """`prompt` as a user's turn, with the model's to come. Raises ConfigError."""
    if template is None:
        raise ConfigError("--chat: the model's tokenizer has no chat template; leave it out, to go on from the text")
    try:
        asked = template.asking(Chat([{"role": "user", "content": prompt}]))
    except BadRowError as error:
        raise ConfigError(f"--chat: the prompt {error}") from None
    return _Question(as_inputs(template_tokens(tokenizer, asked)), _end_of_turn(template, tokenizer))


def _end_of_turn(template: ChatTemplate | None, tokenizer: Any) -> tuple[int, ...]:
    """A model that learnt to answer from a base model ends its turns with a token that its settings may not name."""
    token = template.end_of_turn() if template is not None else None
    return () if token is None else (tokenizer.convert_tokens_to_ids(token),)


def _about_images(
    source: str, tokenizer: Any, template: ChatTemplate | None, prompts: list[str], images: Sequence[str]
) -> list[_Question]:
    """What a user says about all of `images`, for each prompt. Raises ConfigError."""
    from megatrain.data.image_files import ImageReference, require_pillow
    from megatrain.data.images import ImageEncoder
    from megatrain.train.processor import load_processor, template_of

    key = "--image"
    require_pillow(key)
    processor = load_processor(source, tokenizer, key=key)
    asked = template_of(processor, template, chosen=False)
    encoder, ends = ImageEncoder(processor, asked, everything=False), _end_of_turn(asked, tokenizer)
    references = [ImageReference(f"image {name!r}", path=Path(name).expanduser()) for name in images]
    try:
        return [_Question(encoder.question(prompt, references), ends) for prompt in prompts]
    except BadRowError as error:
        raise ConfigError(f"{key}: the prompt {error}") from None


def as_inputs(ids: list[int]) -> dict[str, "Tensor"]:
    """What a model of texts takes for the tokens `ids`."""
    import torch

    tokens = torch.tensor([ids])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def go_on(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, "Tensor"],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float,
    ends: Sequence[int] = (),
) -> str:
    """What `model`, in evaluation mode, writes after the one row of `inputs`, drawn from torch's generators, which
    `seed` begins anew. `ends`: tokens at which it is over, besides those of the model's settings. Raises ConfigError
    where its generation settings name what is no token."""
    import torch
    from transformers import GenerationConfig

    settings = _generation_settings(model, tokenizer) | {"max_new_tokens": max_new_tokens}
    if ends:
        settings["eos_token_id"] = sorted({*settings.get("eos_token_id", ()), *ends})
    if temperature > 0:
        settings |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95}
    # the model's own, too: transformers takes from it whatever is left open here
    own, model.generation_config = model.generation_config, GenerationConfig(**settings)
    placed = {name: _as_the_model_has_it(value, model) for name, value in inputs.items()}
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            made = model.generate(**placed, generation_config=model.generation_config)
    finally:
        model.generation_config = own
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _as_the_model_has_it(value: "Tensor", model: Any) -> "Tensor":
    """Pixels in the model's precision, too."""
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _generation_settings(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Where a text begins and ends, as the model's own settings have it. All else in them (beams, forbidden words) is
    of no account: what is shown is what the model continues with. Raises ConfigError for what is no token."""
    n_tokens = getattr(model.config.get_text_config(decoder=True), "vocab_size", None) or len(tokenizer)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": pad}
    for name in ("eos_token_id", "bos_token_id", "decoder_start_token_id"):
        given = getattr(model.generation_config, name, None)
        tokens = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(token) is int for token in tokens) or (name != "eos_token_id" and len(tokens) > 1):
            raise ConfigError(
                f"{name} is {reprlib.repr(given)} in the model's generation settings; expected the number of a token"
            )
        known = [token for token in tokens if 0 <= token < n_tokens]  # no other is ever drawn
        if known:
            settings[name] = known if name == "eos_token_id" else known[0]
    return settings


def _placed(model: Any) -> Any:
    """On the GPU where there is one with room for it, else on the host."""
    import torch

    from megatrain.device.cpu import CpuDevice

    if torch.cuda.is_available():
        needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        free, _ = torch.cuda.mem_get_info()
        if needed < free * _WEIGHTS_SHARE:
            return model.cuda()
        _log.warning(
            "the model's %s leave too little of the GPU's %s free; generating on the host",
            format_bytes(needed),
            format_bytes(free),
        )
    # bf16 is emulated where the CPU has no arithmetic for it, several times slower
    return model if CpuDevice().native_bf16() else model.float()


def learned_positions(model: Any) -> int | None:
    """How many positions the model has learned a vector for; None where it computes them, without a limit."""
    import torch

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        # some tables begin with a few rows for padding
        if isinstance(module, torch.nn.Embedding) and ("pos" in last or last == "wpe"):
            if 0 <= module.num_embeddings - limit <= 8:
                return limit
    return None


def check_length(prompt_tokens: int, max_new_tokens: int, positions: int, *, key: str) -> None:
    """Raise ConfigError, naming `key`, where a model that has learned so many positions has no room."""
    most = positions - prompt_tokens + 1  # the last token is not read again
    if most < 1:
        raise ConfigError(f"the prompt has {prompt_tokens} tokens and the model {positions} positions; shorten it")
    if max_new_tokens > most:
        raise ConfigError(
            f"{key} is {max_new_tokens}; the model has {positions} positions and the prompt {prompt_tokens} "
            f"tokens, so it must be at most {most}"
        )
