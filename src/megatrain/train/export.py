"""A run's model as a folder that others serve: weights, settings, tokenizer, and a card that says what it is."""

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from megatrain.data.tokenizer import load_tokenizer
from megatrain.errors import ConfigError, MegaTrainError
from megatrain.report.model_card import CARD_NAME, model_card
from megatrain.train.run_folder import check_writable, model_folder

# of a tokenizer or processor; what transformers' own writing leaves out of these comes along as it is
_KEPT_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"),
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_log = logging.getLogger(__name__)


def export(run: str, out: str, *, dtype: str = "bf16") -> None:
    """Write the model of `run` (a run's folder or a model's) to `out`, a new transformers folder in `dtype`.

    The tokenizer comes along where there is one, with its chat template. Raises ConfigError where `run` holds no
    model, or `out` is not empty, inside the model's folder, or cannot be written.
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
    tokenizer = _tokenizer(source)
    if tokenizer is not None and tokenizer.chat_template and tokenizer.split_special_tokens:
        tokenizer.split_special_tokens = False
        _log.warning("tokenizer: split_special_tokens is off in %r: a chat's special tokens are whole, as learned", out)
    model = load_pretrained(source)
    if tokenizer is not None and model.can_generate():
        _take_special_tokens(model.generation_config, tokenizer)
    stored = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    try:
        save_model(model, target, lambda _, parameter: parameter.detach(), stored, tokenizer=tokenizer)
    except MegaTrainError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # of transformers, over settings of the model
        raise ConfigError(f"{run!r} cannot be written again, as its settings are wrong: {one_line(error)}") from error
    _keep_files(Path(os.path.expanduser(source)), target)
    _name_for_older_readers(target)
    card = model_card(run, model.config, sum(p.numel() for p in model.parameters()), dtype)
    (target / CARD_NAME).write_text(card, encoding="utf-8")


def _tokenizer(source: str) -> Any:
    """None where there is none that can be read; its files, if there are any, come along as they are."""
    try:
        return load_tokenizer(source, key="tokenizer")
    except ConfigError as error:
        _log.warning("%s; its files are copied as they are, if there are any", error)
        return None


def _take_special_tokens(generation: Any, tokenizer: Any) -> None:
    """What a generation has to know and nobody said so far."""
    for name in _SPECIAL_TOKENS:
        if getattr(generation, name, None) is None:
            setattr(generation, name, getattr(tokenizer, name, None))


def _keep_files(source: Path, target: Path) -> None:
    for name in _KEPT_FILES:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)


def _name_for_older_readers(target: Path) -> None:
    """Names that programs on transformers 4 know, beside or in place of those of transformers 5, which reads both."""
    _edit(target / "config.json", lambda content: {**content, "torch_dtype": content.get("dtype")})
    _edit(
        target / "tokenizer_config.json",
        lambda content: {
            **content,
            "tokenizer_class": _OLDER.get(str(content.get("tokenizer_class"))) or content.get("tokenizer_class"),
        },
    )


_OLDER = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def _edit(path: Path, change: Any) -> None:
    with contextlib.suppress(FileNotFoundError):
        content = change(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
