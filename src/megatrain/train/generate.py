"""Text from a trained model, and trained models into folders of their own."""

import logging
import os
import reprlib
from pathlib import Path
from typing import Any

from megatrain.data.tokenizer import load_tokenizer
from megatrain.errors import ConfigError, MegaTrainError
from megatrain.sizes import format_bytes
from megatrain.train.run_folder import check_writable, model_folder

_WEIGHTS_SHARE = 0.8  # of a GPU's free memory; the rest is for keys, values and activations
_log = logging.getLogger(__name__)


def generate(
    folder: str, prompts: list[str], *, max_new_tokens: int = 200, seed: int = 0, temperature: float = 0.8
) -> list[str]:
    """Each prompt with the text that the model in `folder` continues it with, drawn anew from `seed`.

    `temperature` 0 always takes the likeliest token. Raises ConfigError where there is no model or tokenizer.
    """
    import torch
    from transformers import GenerationConfig

    from megatrain.model.loading import load_config, load_pretrained

    source = model_folder(folder)
    load_config(source)  # no model is a clearer error than no tokenizer, and cheap to find
    tokenizer = load_tokenizer(source, key="tokenizer")
    model = _placed(load_pretrained(source)).eval()
    positions = _learned_positions(model)
    settings = _generation_settings(model, tokenizer, source)
    settings["max_new_tokens"] = max_new_tokens
    if temperature > 0:
        settings |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 0.95}
    # the model's own, too: transformers takes from it whatever is left open here
    model.generation_config = GenerationConfig(**settings)
    texts = []
    for prompt in prompts:
        # in training a document follows the end of the one before
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
        if positions is not None:
            _check_length(len(ids), max_new_tokens, positions)
        tokens = torch.tensor([ids], device=model.device)
        torch.manual_seed(seed)
        with torch.no_grad():
            made = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), generation_config=model.generation_config
            )
        texts.append(prompt + str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)))
    return texts


def _generation_settings(model: Any, tokenizer: Any, source: str) -> dict[str, Any]:
    """Where a text begins and ends, as the model's own settings have it. All else in them (beams, forbidden words) is
    of no account: what is shown is what the model continues with. Raises ConfigError for what is no token."""
    n_tokens = getattr(model.config.get_text_config(decoder=True), "vocab_size", len(tokenizer))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": pad}
    for name in ("eos_token_id", "bos_token_id", "decoder_start_token_id"):
        given = getattr(model.generation_config, name, None)
        tokens = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(token) is int for token in tokens) or (name != "eos_token_id" and len(tokens) > 1):
            raise ConfigError(
                f"{source}: {name} is {reprlib.repr(given)} in the model's generation settings; expected the number of "
                "a token"
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


def _learned_positions(model: Any) -> int | None:
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


def _check_length(prompt_tokens: int, max_new_tokens: int, positions: int) -> None:
    most = positions - prompt_tokens + 1  # the last token is not read again
    if most < 1:
        raise ConfigError(f"the prompt has {prompt_tokens} tokens and the model {positions} positions; shorten it")
    if max_new_tokens > most:
        raise ConfigError(
            f"max-new-tokens is {max_new_tokens}; the model has {positions} positions and the prompt {prompt_tokens} "
            f"tokens, so it must be at most {most}"
        )


def export(run: str, out: str, *, dtype: str = "bf16") -> None:
    """Write the model of `run` (a run's folder or a model's) to `out`, a new transformers folder in `dtype`.

    The tokenizer comes along where there is one. Raises ConfigError where `run` holds no model, or `out` is
    not empty, inside the model's folder, or cannot be written.
    """
    import torch

    from megatrain.model.loading import load_config, load_pretrained, one_line
    from megatrain.model.saving import save_model

    target, source = Path(os.path.expanduser(out)), model_folder(run)
    if os.path.exists(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{out!r} exists already; give a new folder")
    if os.path.isdir(source) and Path(os.path.realpath(source)) in Path(os.path.realpath(target)).parents:
        raise ConfigError(f"{out!r} is inside the model's own folder, {source!r}; give a folder outside of it")
    load_config(source)
    check_writable(target, "OUT")
    model = load_pretrained(source)
    try:
        tokenizer = load_tokenizer(source)
    except ConfigError:
        tokenizer = None
    stored = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    try:
        save_model(model, target, lambda _, parameter: parameter.detach(), stored, tokenizer=tokenizer)
    except MegaTrainError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # of transformers, over settings of the model
        raise ConfigError(f"{run!r} cannot be written again, as its settings are wrong: {one_line(error)}") from error
