"""Models from transformers folders, hub ids and configurations, in the checkpoint's own numbers.

transformers does the work (class, renames, fused experts, tying); this module decides which class and which
dtype, turns what transformers would only warn about (weights that the checkpoint lacks) into errors, and says
in one line what is wrong. Code from a model repository is never run and nothing is unpickled: configurations are
checked first (`config_entries.py`), and of a folder transformers sees what was checked alone (`weight_files.py`).

Memory. transformers maps safetensors files and hands out views of the mapping: a weight that needs no
conversion costs no anonymous memory, its pages are the file's and the kernel can drop them at any time.
Weights that are converted (fused experts, another dtype) are allocated. So what loading holds is at most the
checkpoint's size. A copied weight's pages go with `memory.arena.discard_pages`, the mapping itself with the
last tensor of its shard.
"""

import contextlib
import copy
import difflib
import inspect
import logging
import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers import initialization as transformers_initialization
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from megatrain.errors import ConfigError
from megatrain.hub import check_hub_is_reachable
from megatrain.model.config_entries import check_entries, has_code, read_entries
from megatrain.model.weight_files import (
    INDEX_NAME,
    WEIGHTS_NAME,
    WeightFiles,
    find_file,
    find_others,
    find_weights,
    refuse_pickles,
    some,
)

logger = logging.getLogger(__name__)

# In this order where the configuration does not name a class of its own
_AUTO_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
)
_FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_MOST_TIMES_HELD, _ALWAYS_ALLOWED = 4, 64 << 20  # numbers that loading may allocate, by those that the files hold
_FROM_MAIN: dict[str, Any] = {"local_files_only": False, "revision": "main"}


def load_config(path_or_id: str | os.PathLike[str] | Mapping[str, Any], **overrides: Any) -> PretrainedConfig:
    """A configuration from a transformers folder, a JSON file, a hub id, or a mapping with `model_type`.

    `overrides` replace entries of it. Raises ConfigError where it cannot be read, its type is unknown to the
    installed transformers, or an override names no entry.
    """
    try:
        if isinstance(path_or_id, Mapping):
            config = _config_from_entries(copy.deepcopy({**path_or_id}), "")  # transformers writes into nested entries
        elif os.path.isfile(path := os.path.expanduser(path_or_id)):
            config = _config_from_entries(read_entries(Path(path)), path)
        else:
            config = _config_from_source(_existing_source(path_or_id), _FROM_MAIN)
    except ConfigError:
        raise
    except Exception as error:  # the checks of 600 configurations raise whatever they come across
        raise _unreadable(path_or_id, error) from error
    for key, value in overrides.items():
        if not hasattr(config, key):
            raise ConfigError(f"a {config.model_type} configuration has no entry {key!r}")
        setattr(config, key, value)
    return config


def model_class_for(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class with a head that `config` describes.

    The class that the configuration names comes first (a classifier's folder is loaded as a classifier);
    otherwise the causal-LM, image-text-to-text, sequence-to-sequence or classification class of its type.
    Raises ConfigError where transformers has none.
    """
    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, str(name), None)
        # a bare `LlamaModel` has no loss
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and _has_head(named):
            if _understands(named, config):
                return named
    found = [getattr(transformers, mapping, {}).get(type(config), None) for mapping in _AUTO_MAPPINGS]
    # some types map to several classes, the usual one first
    choices = [_as_model_class(one[0] if isinstance(one, (tuple, list)) else one) for one in found if one is not None]
    if choices:
        # the causal LM of a model that also sees may be one of its text part only
        return next((choice for choice in choices if _understands(choice, config)), choices[0])
    raise ConfigError(
        f"transformers {transformers.__version__} has no model with a head for type "
        f"{config.model_type!r}; use a causal-LM, image-text-to-text, seq2seq or classification model"
    )


def build_on_meta(
    config: PretrainedConfig, *, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The model's modules with all tensors on the meta device: names, shapes and dtypes without memory.

    `dtype` is that of parameters which the model's own code does not pin; None takes the configuration's, or
    float32. Raises ConfigError where transformers refuses the configuration.
    """
    # some models read numbers out of `torch.linspace` while they are built, which meta tensors do not have
    readable_linspace = getattr(transformers_initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)
    with torch.device("meta"), readable_linspace():
        return _from_config(config, dtype or _config_dtype(config), attn_implementation)


def initialise(
    config: PretrainedConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A model with fresh weights on the CPU: what transformers' own `from_config` makes.

    That is, as after `torch.manual_seed(seed)`. The caller's random state is left as it was. Raises
    ConfigError where transformers refuses the configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _from_config(config, dtype, attn_implementation)


def check_config(source: str) -> None:
    """Raise ConfigError where the config.json of a folder or hub id, if it has one, must not be acted upon."""
    try:
        file = find_file(source, "config.json", _FROM_MAIN)
    except (OSError, ValueError):
        return  # whoever needs the file will say so
    if file is not None:
        read_entries(file)


def is_here(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether it is a folder, of which nothing has to be downloaded."""
    return os.path.isdir(os.path.expanduser(path_or_id))


def check_weights(path_or_id: str | os.PathLike[str], model: PreTrainedModel | None = None) -> None:
    """Raise ConfigError where the safetensors weights of a transformers folder or hub id are missing or damaged, or far
    too few for `model`, where it is given, which its configuration describes (on the meta device will do).

    Reads only their headers; of a hub id, after a download.
    """
    weights = _weights_of(_existing_source(path_or_id), _FROM_MAIN)
    _stored_dtype(weights)
    if model is not None:
        _check_size(path_or_id, model, weights)


def _check_size(path_or_id: str | os.PathLike[str], model: PreTrainedModel, weights: WeightFiles) -> None:
    """Refuse a configuration that describes a far larger model than the files hold: it would be allocated before one
    weight after the other turned out to be wrong. What is smaller is left to that: files may lack tied weights, and
    hold others in a packed form."""
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(math.prod(tensor.shape) for tensors in weights.tensors.values() for tensor in tensors.values())
    if described > _MOST_TIMES_HELD * held + _ALWAYS_ALLOWED:
        raise ConfigError(
            f"{path_or_id} does not fit its config.json, which describes a model of {described:,} weights; its files "
            f"hold {held:,}"
        )


def load_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    attn_implementation: str | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A model from a transformers folder or hub id, on the CPU, in `dtype` or as its weights are stored.

    The dtype that holds most bytes of the checkpoint counts, not what `config.json` says: float32 weights
    under a configuration that says bfloat16 stay float32. Parameters that the model pins to float32 are
    float32.

    Raises ConfigError where the folder, configuration or safetensors weights are missing, a weight has
    another shape or is absent (transformers would draw it at random), or the weights are quantized.
    """
    source = _existing_source(path_or_id)
    where: dict[str, Any] = {"local_files_only": local_files_only, "revision": revision or "main"}
    try:
        config = _config_from_source(source, where)
    except ConfigError:
        raise
    except Exception as error:
        raise _unreadable(path_or_id, error) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"the weights in {path_or_id} are quantized; training needs bf16, fp16 or fp32 weights")
    weights = _weights_of(source, where)
    model_class = model_class_for(config)
    _check_size(path_or_id, build_on_meta(config), weights)  # before anything is as large as the configuration says
    others = find_others(source, getattr(type(config), "extra_files", ()), where)
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if getattr(config, "transformers_weights", None) is not None:
        config.transformers_weights = None  # names one of our own files, which have other names in the folder of links
    try:
        with _without_loading_report(), weights.as_folder(others) as folder:
            model, found = model_class.from_pretrained(
                folder,
                config=config,
                dtype=dtype or _stored_dtype(weights),
                use_safetensors=True,
                output_loading_info=True,
                # mismatched shapes come back in `found` instead of as a page of text
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=False,
                **extra,
            )
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        raise ConfigError(f"cannot load {path_or_id} as {model_class.__name__}: {one_line(error)}") from error
    _check_completeness(path_or_id, model_class.__name__, found)
    model.name_or_path = model.config.name_or_path = source  # and not the folder of links
    return _as_model(model)


def kept_in_fp32(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that stay float32 when transformers loads this model in bfloat16.

    These are the ones that a model's list of strictly kept modules matches, and those that its own code
    creates as float32 whatever the dtype of the rest. Empty for models that are not transformers'.
    """
    if not isinstance(model, PreTrainedModel):
        return set()
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return _strictly_kept(model, names) | _created_in_fp32(model, names)


def _strictly_kept(model: PreTrainedModel, names: set[str]) -> set[str]:
    """The names that transformers' own cast plan for bfloat16 leaves in float32."""
    # private, but the only place where the flags of a model and its submodels come together
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda dtype: {})(torch.bfloat16)
    if not plan:
        return set()
    from transformers.core_model_loading import build_glob_alternation

    pattern = build_glob_alternation(list(plan))[0]
    return {name for name in names if pattern.search(name)}


def _created_in_fp32(model: PreTrainedModel, names: set[str]) -> set[str]:
    """The names that the model's constructor makes float32 under a default dtype of bfloat16."""
    if "config" not in inspect.signature(type(model).__init__).parameters:
        return set()
    try:
        with torch.device("meta"):
            config = copy.deepcopy(model.config)
            twin = type(model)._from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # a user's subclass may need more arguments; then only the declared names count
        logger.debug("cannot rebuild %s to see its float32 parameters: %s", type(model).__name__, error)
        return set()
    return {name for name, p in twin.named_parameters() if p.dtype == torch.float32} & names


def _from_config(config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """transformers' `_from_config` of the right class on a copy of `config`; ConfigError where it refuses."""
    model_class = model_class_for(config)
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        # a copy: transformers writes dtype and attention into the configuration that it is given
        return _as_model(model_class._from_config(copy.deepcopy(config), dtype=dtype, **extra))
    except Exception as error:  # a model's constructor raises whatever a wrong setting makes it stumble over
        if _is_out_of_memory(error):
            raise
        raise ConfigError(f"cannot build {model_class.__name__}: {one_line(error)}") from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _existing_source(path_or_id: str | os.PathLike[str]) -> str:
    """A readable model folder's path, or the text of a hub id; ConfigError on a path that is neither."""
    text = os.fspath(path_or_id)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        if not os.path.lexists(path / "config.json"):
            raise ConfigError(f"{text} has no config.json; give a folder that transformers can load or a run has saved")
        return str(path)
    looks_like_path = isinstance(path_or_id, Path) or text.count("/") > 1 or text.startswith((".", "/", "~"))
    if looks_like_path or os.path.exists(path):
        raise ConfigError(f"{text} is not a folder; give a transformers folder or a hub id such as org/name")
    return text


def _unreadable(path_or_id: object, error: Exception) -> ConfigError:
    """What to say where no configuration could be read."""
    if isinstance(path_or_id, str) and not os.path.exists(os.path.expanduser(path_or_id)):
        return ConfigError(f"{path_or_id} is no folder here, and the hub did not give it: {one_line(error)}")
    if isinstance(path_or_id, Mapping):
        return ConfigError(one_line(error))
    return ConfigError(f"cannot read a model configuration from {path_or_id}: {one_line(error)}")


def _config_from_source(source: str, where: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a model folder or hub id. Raises ConfigError, and whatever transformers does."""
    check_hub_is_reachable(source, "config.json")
    file = find_file(source, "config.json", where)
    if file is not None:
        entries = read_entries(file)
        _check_model_type(entries.get("model_type"), str(file))
        _warn_of_code(source, has_code(entries))
    if os.path.isdir(source):
        refuse_pickles(Path(source))
    config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    for part in _parts(config):  # its modules give each other what their own code takes when nobody asks for more
        part.return_dict, part.output_hidden_states = True, False
        if part.output_attentions:
            part.output_attentions = False
    return _without_code(config)


def _without_code(config: PretrainedConfig) -> PretrainedConfig:
    """What is saved of the model must not name code that does not come along."""
    vars(config).pop("auto_map", None)
    return config


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The configuration and those nested in it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            yield from _parts(part)


def _weights_of(source: str, where: dict[str, Any]) -> WeightFiles:
    """A checkpoint's safetensors files, downloaded if `source` is a hub id; ConfigError if there are none."""
    if not where["local_files_only"]:
        try:
            check_hub_is_reachable(source, WEIGHTS_NAME, INDEX_NAME)
        except ConnectionError as error:
            raise ConfigError(f"cannot fetch the weights of {source}: {error}") from error
    return find_weights(source, where)


def _stored_dtype(weights: WeightFiles) -> torch.dtype:
    """The floating dtype of most bytes in the files; ConfigError on quantized ones."""
    most = weights.most_common_dtype()
    if most not in _FILE_DTYPES:
        raise ConfigError(f"the weights are stored as {most}; training needs bf16, fp16 or fp32 weights")
    return _FILE_DTYPES[most]


@cache  # once for a model, which is looked at several times
def _warn_of_code(source: str, has_code: bool) -> None:
    if has_code:
        logger.warning(
            "%s comes with code of its own (auto_map), which is not run; transformers' own code is used", source
        )


def _check_completeness(path_or_id: str | os.PathLike[str], class_name: str, found: Mapping[str, Any]) -> None:
    """Refuse wrong shapes and absent weights by name; warn of weights that the model has no place for."""
    mismatched = sorted(f"{name} ({list(a)}, not {list(b)})" for name, a, b in found["mismatched_keys"])
    if mismatched:
        raise ConfigError(f"{path_or_id} does not fit its config.json: {some(mismatched)}")
    missing = sorted(found["missing_keys"])
    if missing:
        raise ConfigError(
            f"{path_or_id} lacks {len(missing)} of the weights of {class_name} (they would be random): {some(missing)}"
        )
    if found.get("error_msgs"):
        raise ConfigError(f"cannot load {path_or_id}: {one_line(found['error_msgs'][0])}")
    unexpected = sorted(found["unexpected_keys"])
    if unexpected:
        logger.warning("%s: %s has no place for %s", path_or_id, class_name, some(unexpected))


@contextlib.contextmanager
def _without_loading_report() -> Iterator[None]:
    """Keep transformers' bar and its table of missing and unexpected weights off the terminal.

    Weights are mapped before the bar could help, and we report ourselves.
    """

    # a filter, because a raised level makes transformers run (and report) further checks
    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    noisy, shows_bars = logging.getLogger("transformers.modeling_utils"), is_progress_bar_enabled()
    noisy.addFilter(is_no_report)
    disable_progress_bar()
    try:
        yield
    finally:
        noisy.removeFilter(is_no_report)
        if shows_bars:
            enable_progress_bar()


def _config_from_entries(entries: dict[str, Any], file: str) -> PretrainedConfig:
    """`file`: where they come from, for messages; "" where they are a mapping."""
    check_entries(entries, "")
    _check_model_type(entries.get("model_type"), file)
    return _without_code(AutoConfig.for_model(**entries))


def _check_model_type(model_type: object, file: str) -> None:
    """Refuse, with the nearest names, a type that transformers does not know (it would list all 600)."""
    prefix = f"{file}: " if file else ""
    if model_type is None:
        raise ConfigError(f"{prefix}a model configuration needs an entry model_type, for example llama")
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return
    near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(
        f"{prefix}model_type {reprlib.repr(model_type)} is unknown to transformers {transformers.__version__}, and "
        f"code from a model repository is never run{hint}"
    )


def _config_dtype(config: PretrainedConfig) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _understands(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    expected = getattr(model_class, "config_class", None)
    return expected is None or isinstance(config, expected)


def _has_head(model_class: type[PreTrainedModel]) -> bool:
    return "For" in model_class.__name__ or model_class.__name__.endswith(("LMHeadModel", "DoubleHeadsModel"))


def _as_model(model: Any) -> PreTrainedModel:
    result: PreTrainedModel = model
    return result


def _as_model_class(model_class: Any) -> type[PreTrainedModel]:
    result: type[PreTrainedModel] = model_class
    return result


def one_line(error: object) -> str:
    """The first line of an error's text that says something."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # what is wrong, without the name of the check that found it
    text = str(error)
    if isinstance(error, KeyError) and error.args:  # its text is the key's repr, or that of a whole sentence
        text = str(error.args[0]) if " " in str(error.args[0]) else f"unknown name {error.args[0]!r}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
