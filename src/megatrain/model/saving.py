"""Writing a model as a plain transformers folder, weight by weight, without a second copy of it.

Names, shapes and dtypes come first, from meta tensors, and with them every byte's place in the files. Then one group
of weights after the other is read, converted and written; beside the model only one group is held. The folder is
written beside its target and then takes its place: the target is always the whole old save or the whole new one.
"""

import copy
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from megatrain.errors import ConfigError
from megatrain.model.folder_swap import check_target, replacing
from megatrain.model.saved_weights import ReadTensor, SavedWeights
from megatrain.model.shards import DTYPE_NAMES, ShardWriter, plan_shards, write_index

logger = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 5_000_000_000


def save_model(
    model: torch.nn.Module,
    folder: str | os.PathLike[str],
    read_tensor: ReadTensor,
    dtype: torch.dtype,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write `model` to `folder` so that transformers' `from_pretrained` reads it back; returns the folder.

    Floating parameters are written as `dtype`, those that the model pins to float32 as float32, buffers as they
    are. `read_tensor(name, tensor)` returns the values to write of a parameter or buffer, on any device, in any
    floating dtype: one of more precision is rounded to nearest even, one that is in `dtype` (an engine's bf16
    weights, which it rounds half away from zero) stays as it is. It is called once per tensor, in the order of
    writing, and what it returned is let go before the next group is read. Tied parameters are read once and written
    under the name that transformers expects. Of a module that is not transformers', `model.safetensors` holds its
    state dict under all its names.

    An existing folder is replaced only if it holds a model, and only once the new one is complete; files in
    it that are no weights (a tokenizer, a README) are kept. On any error the old folder stands.

    Raises ConfigError where `folder` is a file, or a folder with other things than a model in it, or `dtype`
    is no floating dtype.
    """
    if not dtype.is_floating_point or dtype not in DTYPE_NAMES:
        raise ConfigError(f"cannot save as {dtype}; use float32, bfloat16 or float16")
    target = Path(os.path.realpath(Path(folder).expanduser()))
    check_target(target)
    with replacing(target) as temporary:
        written = ModelFolder(model, temporary, read_tensor, dtype, tokenizer, max_shard_bytes)
        while written.write_group():
            pass
    return target


class ModelFolder:
    """A model being written into an empty folder, group by group of weights; complete when `write_group` says so.

    Settings and the tokenizer are written at once. The arguments are those of `save_model`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        folder: Path,
        read_tensor: ReadTensor,
        dtype: torch.dtype,
        tokenizer: Any = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        weights = SavedWeights(model, dtype, read_tensor)
        shards = plan_shards(weights.shapes, max_shard_bytes)
        _write_settings(model, folder, dtype, tokenizer)
        write_index(shards, weights.shapes, folder)
        self._groups = weights.groups()
        self._writer = ShardWriter(shards, folder)

    def write_group(self) -> list[str]:
        """Write the next weights; returns the names in the model of what they are made of, none once all are written.
        After an error nothing more can be written."""
        sources, values = next(self._groups, ([], iter(())))
        try:
            for name, tensor in values:
                self._writer.write(name, tensor)
                del tensor  # before the next is read
        except BaseException:
            self._writer.abandon()
            raise
        if not sources:
            self._writer.close()
        return sources

    def abandon(self) -> None:
        """Close the files as they are."""
        self._writer.abandon()


def _write_settings(model: torch.nn.Module, folder: Path, dtype: torch.dtype, tokenizer: Any) -> None:
    """config.json, generation_config.json, and the files of the tokenizer or processor, if there are any."""
    if isinstance(model, PreTrainedModel):
        # a copy: neither the architecture nor the dtype of the files is a change of the model at hand
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
        for part in [config, *(part for part in parts if part is not None)]:
            part.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        if model.can_generate() and getattr(model, "generation_config", None) is not None:
            try:
                model.generation_config.save_pretrained(folder)
            except (ValueError, TypeError) as error:  # transformers refuses settings that contradict each other
                logger.warning("generation_config.json is saved as it is, but: %s", str(error).split("\n")[0])
                model.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
