"""A model tried out on the meta device, in shapes alone, before anything expensive.

What transformers finds out only when the model first runs (heads that do not divide, a dropout of 2, a start token
that is missing) shows here.
"""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatrain.config import Config
from megatrain.errors import ConfigError
from megatrain.model.loading import build_on_meta, load_config, one_line
from megatrain.train.model_settings import ModelSettings, Vocabulary, blame

_TOKENS = 32


def try_out(config: Config, settings: ModelSettings, vocabulary: Vocabulary) -> None:
    """Build the model and run it on text, all without memory. Raises ConfigError where it cannot be trained on text.

    The error names the entry of model.config that is wrong where that can be told.
    """
    attention, seq_len = config.model.attn_implementation, config.data.seq_len

    def attempt(entries: Mapping[str, Any]) -> Any:
        other = ModelSettings(load_config(entries), entries)
        other.fit(vocabulary)
        _run(other.config, attention, seq_len)
        return other.config

    with _quiet():
        try:
            _run(settings.config, attention, seq_len)
        except Exception as error:  # transformers' own code raises whatever a wrong setting makes it stumble over
            if attention is not None and _runs(settings.config, None, seq_len):
                raise ConfigError(f"model.attn_implementation: {attention!r} is wrong: {one_line(error)}") from None
            if not settings.entries:
                found = ConfigError(f"model.path: {config.model.path} cannot be trained on text: {one_line(error)}")
            else:
                found = blame(settings.entries, error, attempt)
            # meta tensors cannot do all that others can: such an error counts only where an entry is its cause
            if not isinstance(error, RuntimeError) or str(found).startswith("model.config."):
                raise found from None
        if config.data.eval is not None:
            _check_measurable(settings.config, attention, seq_len)


def _runs(model_config: Any, attention: str | None, seq_len: int) -> bool:
    try:
        _run(model_config, attention, seq_len)
    except Exception:
        return False
    return True


def _run(model_config: Any, attention: str | None, seq_len: int) -> None:
    """Train on one sequence without memory. Raises whatever goes wrong in it, but for what meta tensors cannot do."""
    # some kernels know meta tensors in bf16 only, some models cannot compute in it: one of the two has to go well
    try:
        _run_in(torch.bfloat16, model_config, attention, seq_len)
    except RuntimeError as error:
        try:
            _run_in(torch.float32, model_config, attention, seq_len)
        except RuntimeError:
            raise error from None


def _run_in(dtype: torch.dtype, model_config: Any, attention: str | None, seq_len: int) -> None:
    model, ids = _on_meta(model_config, attention, seq_len, dtype)
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as scratch:
        model.config.save_pretrained(scratch)  # it has checks of its own, which would fail after the training
    with torch.device("meta"), torch.no_grad(), _what_meta_tensors_can_do():
        if model.train()(input_ids=ids, labels=ids).loss is None:
            raise ConfigError(f"{type(model).__name__} computes no loss from labels")


def _check_measurable(model_config: Any, attention: str | None, seq_len: int) -> None:
    """Raise ConfigError where the model does not predict the next token of a text, as evaluation wants it."""
    model, ids = _on_meta(model_config, attention, seq_len, torch.bfloat16)
    try:
        with torch.device("meta"), torch.no_grad(), _what_meta_tensors_can_do():
            shape = model.eval()(input_ids=ids, use_cache=False).logits.shape
            if tuple(shape[:-1]) != tuple(ids.shape):
                raise ConfigError(f"it gives {list(shape)} logits for {list(ids.shape)} tokens")
    except RuntimeError:
        return  # as above: nothing that can be told from meta tensors
    except Exception as error:
        raise ConfigError(
            f"data.eval: {type(model).__name__} cannot be measured on text ({one_line(error)}); leave data.eval out"
        ) from None


def _on_meta(model_config: Any, attention: str | None, seq_len: int, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    layers = getattr(model_config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise ConfigError("a model needs at least one layer")
    if getattr(model_config, "quantization_config", None) is not None:
        raise ConfigError("training needs weights in bf16, fp16 or fp32")
    model = build_on_meta(model_config, dtype=dtype, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            raise ConfigError(f"{name} would be empty, of shape {list(parameter.shape)}")
    return model, torch.zeros(1, min(seq_len, _TOKENS), dtype=torch.int64, device="meta")


@contextlib.contextmanager
def _what_meta_tensors_can_do() -> Iterator[None]:
    """Pass over errors that say that a meta tensor has no values, or that an operation does not know them."""
    try:
        yield
    except NotImplementedError:
        return
    except RuntimeError as error:
        if "meta" not in str(error):
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings: the model is built again in earnest, and they are given then."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
