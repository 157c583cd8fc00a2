"""Writing a model as a plain transformers folder, weight by weight, without a second copy of it.

A save has two passes. The first works on meta tensors: it runs transformers' own inverse weight conversion on
shapes alone, and notes which parameters each weight on disk is made of. From that come the shards, every
byte's place, and the groups of parameters that a conversion needs together (the fused experts of one layer).
The second pass reads one group after the other, converts it, and writes its bytes to their places. Beside the
model only one group is held.

The folder is written under another name next to its target, flushed to disk, and then takes the target's
place: at any moment the target is the whole old save or the whole new one.
"""

import contextlib
import copy
import ctypes
import errno
import glob
import json
import logging
import os
import re
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from megatrain.errors import ConfigError
from megatrain.model.loading import INDEX_NAME, WEIGHTS_NAME, kept_in_fp32

logger = logging.getLogger(__name__)

DEFAULT_SHARD_BYTES = 5_000_000_000

ReadParameter = Callable[[str, torch.nn.Parameter], torch.Tensor]

# the names that the safetensors format gives to dtypes
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# files of an earlier save that must not outlive it; everything else in the folder is kept
_REPLACED = re.compile(
    r"(generation_)?config\.json|model.*\.safetensors|.*\.safetensors\.index\.json"
    r"|pytorch_model.*\.bin(\.index\.json)?"
)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def save_model(
    model: torch.nn.Module,
    folder: str | os.PathLike[str],
    read_parameter: ReadParameter,
    dtype: torch.dtype,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write `model` to `folder` so that transformers' `from_pretrained` reads it back; returns the folder.

    Floating parameters are written as `dtype` (rounded to nearest even), those that the model pins to float32
    as float32, buffers as they are. `read_parameter(name, parameter)` returns the values to write, on any
    device, in any floating dtype; it is called once per parameter, in the order of writing, and what it
    returned is let go before the next group is read. Tied parameters are read once and written under the name
    that transformers expects. Of a module that is not transformers', `model.safetensors` holds its state dict
    under all its names.

    An existing folder is replaced only if it holds a model, and only once the new one is complete; files in
    it that are no weights (a tokenizer, a README) are kept. On any error the old folder stands.

    Raises ConfigError where `folder` is a file, or a folder with other things than a model in it, or `dtype`
    is no floating dtype.
    """
    if not dtype.is_floating_point or dtype not in _DTYPE_NAMES:
        raise ConfigError(f"cannot save as {dtype}; use float32, bfloat16 or float16")
    target = Path(os.path.realpath(Path(folder).expanduser()))
    _check_target(target)
    tensors = _tensors_to_save(model)
    source = _Source(tensors, _dtypes_on_disk(model, tensors, dtype), read_parameter)
    traced = _trace_conversion(model, source)
    if traced is None:
        source, traced = _convert_all(model, source)
    plan = _plan_files(*traced, max_shard_bytes)
    with _replacing(target) as temporary:
        _write_settings(model, temporary, dtype, tokenizer)
        _write_weights(model, source, plan, temporary)
        _write_index(plan, temporary)
    return target


# ---- what goes where -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """What is saved: the model's tensors, and how to read one."""

    tensors: dict[str, torch.Tensor]
    """Name in the model -> its parameter or buffer, without names that loading ties again."""
    dtypes: dict[str, torch.dtype]
    """Name in the model -> dtype on disk."""
    read_parameter: ReadParameter

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` on the CPU, in its dtype on disk; a view where nothing has to change."""
        tensor = self.tensors[name]
        value = self.read_parameter(name, tensor) if isinstance(tensor, torch.nn.Parameter) else tensor
        if value.shape != tensor.shape:
            raise ValueError(f"{name} was read with shape {list(value.shape)}, not {list(tensor.shape)}")
        return value.detach().to(device="cpu", dtype=self.dtypes[name])


@dataclass(slots=True)
class _Group:
    """Tensors of the model that are converted together, and the weights on disk that come of them."""

    sources: list[str]
    outputs: list[str]
    renamed_only: bool = False
    """One tensor goes to disk as it is, perhaps under another name."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one weight's bytes go."""

    file: str
    offset: int
    """From the start of the file, in bytes."""


@dataclass(frozen=True, slots=True)
class _FilePlan:
    """Everything about the files that does not need the numbers."""

    outputs: dict[str, torch.Tensor]
    """Name on disk -> meta tensor of its shape and dtype, in the order of writing."""
    groups: list[_Group]
    places: dict[str, _Place] = field(default_factory=dict)
    headers: dict[str, bytes] = field(default_factory=dict)
    """File -> its first bytes: length and description of its weights."""


def _tensors_to_save(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, less the names that transformers ties again on loading."""
    # the objects themselves: tied names are one object, while views of one buffer may share an address
    state = model.state_dict(keep_vars=True)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    for name in state.keys() - tensors.keys():
        logger.warning("%s is no tensor and is not saved", name)
    if not isinstance(model, PreTrainedModel):
        return tensors
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        tensors.pop(name, None)
    # {tied name: name that holds the weight}, submodels included. A pair that is two tensors is written
    # twice, and so are names that share a tensor without saying so: loading would not tie them
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    redundant = {name for name, holder in ties.items() if name in tensors and tensors.get(holder) is tensors[name]}
    return {name: tensor for name, tensor in tensors.items() if name not in redundant}


def _dtypes_on_disk(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Each tensor's dtype in the files."""
    in_fp32 = kept_in_fp32(model) if dtype in (torch.bfloat16, torch.float16) else set()

    def choose(name: str, tensor: torch.Tensor) -> torch.dtype:
        if not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if name in in_fp32 else dtype

    return {name: choose(name, tensor) for name, tensor in tensors.items()}


class _Provenance(TorchDispatchMode):
    """Notes, during a conversion of meta tensors, which named tensors each result was computed from."""

    def __init__(self, sources: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): frozenset([name]) for name, tensor in sources.items()}
        self._alive: list[torch.Tensor] = list(sources.values())  # so that no id is used again

    def names_of(self, tensor: torch.Tensor) -> frozenset[str]:
        return self._names.get(id(tensor), frozenset())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, torch.Tensor)]
        names = frozenset[str]().union(*(self.names_of(x) for x in inputs))
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor):
                self._alive.append(x)
                self._names[id(x)] = self.names_of(x) | names
        return result


def _trace_conversion(model: torch.nn.Module, source: _Source) -> tuple[dict[str, torch.Tensor], list[_Group]] | None:
    """Weights on disk as meta tensors, and the groups that are converted together, in the order of writing.

    None where the conversion needs the numbers, or loses a weight on the way.
    """
    shapes = {
        name: torch.empty(tensor.shape, dtype=source.dtypes[name], device="meta")
        for name, tensor in source.tensors.items()
    }
    trace = _Provenance(shapes)
    try:
        with trace:
            outputs = _revert(model, shapes)
    except Exception as error:
        logger.debug("weights cannot be converted without their numbers: %s", error)
        return None
    origins = {name: trace.names_of(tensor) for name, tensor in outputs.items()}
    if frozenset[str]().union(*origins.values()) != shapes.keys():
        return None
    groups = _group_by_origin(origins)
    for group in groups:
        first = group.outputs[0]
        group.renamed_only = len(group.outputs) == 1 and outputs[first] is shapes[group.sources[0]]
    return {name: outputs[name] for group in groups for name in group.outputs}, groups


def _group_by_origin(origins: dict[str, frozenset[str]]) -> list[_Group]:
    """Groups of outputs that share sources, directly or through others, in order of their first output."""
    group_of: dict[str, _Group] = {}
    for output, names in origins.items():
        merged = _Group([name for name in sorted(names) if name not in group_of], [])
        for group in {id(group_of[name]): group_of[name] for name in sorted(names) if name in group_of}.values():
            merged.sources += group.sources
            merged.outputs += group.outputs
        merged.outputs.append(output)
        group_of |= dict.fromkeys(merged.sources, merged)
    # in a group, too, the order of the whole conversion: a conversion of the group alone gives them in that
    # order
    place = {name: i for i, name in enumerate(origins)}
    groups = list({id(group): group for group in group_of.values()}.values())
    for group in groups:
        group.outputs.sort(key=place.__getitem__)
    return sorted(groups, key=lambda group: place[group.outputs[0]])


def _convert_all(
    model: torch.nn.Module, source: _Source
) -> tuple[_Source, tuple[dict[str, torch.Tensor], list[_Group]]]:
    """The way of transformers' own save, where a conversion needs the numbers: a second copy of the model."""
    converted = _revert(model, {name: source.read(name) for name in source.tensors})
    dtypes = {name: tensor.dtype for name, tensor in converted.items()}
    shapes = {name: tensor.to("meta") for name, tensor in converted.items()}
    groups = [_Group([name], [name], renamed_only=True) for name in converted]
    return _Source(converted, dtypes, source.read_parameter), (shapes, groups)


def _revert(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' inverse weight conversion; other modules' names are those on disk already."""
    if not isinstance(model, PreTrainedModel):
        return tensors
    with torch.no_grad():
        result: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return result


def _plan_files(outputs: dict[str, torch.Tensor], groups: list[_Group], max_shard_bytes: int) -> _FilePlan:
    """Places of all weights; a file passes `max_shard_bytes` of weights only where a single weight does."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in outputs.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    plan = _FilePlan(outputs, groups)
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _lay_out_file(plan, file, names)
    return plan


def _lay_out_file(plan: _FilePlan, file: str, names: list[str]) -> None:
    """Place `names` in one safetensors file: 8 bytes of length, a JSON header, then the weights without gaps.

    Wider dtypes come first, so that every weight is aligned to its own size; readers map the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(names, key=lambda name: -plan.outputs[name].dtype.itemsize):
        tensor = plan.outputs[name]
        starts[name], end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    plan.headers[file] = len(text).to_bytes(8, "little") + text
    for name, start in starts.items():
        plan.places[name] = _Place(file, len(plan.headers[file]) + start)


# ---- writing -------------------------------------------------------------------------------------


def _write_weights(model: torch.nn.Module, source: _Source, plan: _FilePlan, folder: Path) -> None:
    """Write every group's weights to their places; each file is flushed to disk once it is whole."""
    left = Counter(place.file for place in plan.places.values())
    descriptors = {file: _create(folder / file, plan.headers[file]) for file in plan.headers if not left[file]}
    try:
        for group in plan.groups:
            for name, tensor in _consume(_convert_group(model, source, plan, group)):
                place = plan.places[name]
                if place.file not in descriptors:
                    descriptors[place.file] = _create(folder / place.file, plan.headers[place.file])
                _write_tensor(descriptors[place.file], tensor, place.offset)
                del tensor  # before the next is read
                left[place.file] -= 1
                if not left[place.file]:
                    _sync_and_close(descriptors.pop(place.file))
    finally:
        # a file of a model without weights, or what an error left open
        for descriptor in descriptors.values():
            os.close(descriptor)


def _convert_group(model: torch.nn.Module, source: _Source, plan: _FilePlan, group: _Group) -> dict[str, torch.Tensor]:
    """Read one group and convert it: name on disk -> CPU tensor with the planned shape and dtype."""
    values = {name: source.read(name) for name in group.sources}
    if group.renamed_only:
        return {group.outputs[0]: values[group.sources[0]]}
    converted = _revert(model, values)
    # by position: a renaming that looks at other weights may name a part of the model differently
    result = dict(zip(group.outputs, converted.values(), strict=True))
    for name, tensor in result.items():
        planned = plan.outputs[name]
        if tensor.shape != planned.shape or tensor.dtype != planned.dtype:
            raise RuntimeError(f"{name} came out as {tensor.dtype} {list(tensor.shape)}, not as planned")
    return result


def _consume(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Items in order, each removed before it is handed out, so that it can be freed before the next."""
    while tensors:
        name = next(iter(tensors))
        yield name, tensors.pop(name)


def _create(path: Path, header: bytes) -> int:
    """A new file that begins with `header`; its descriptor."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    _write_all(descriptor, memoryview(header), 0)
    return descriptor


def _write_tensor(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    """The tensor's elements, row by row, at `offset` bytes of the file."""
    flat = tensor.contiguous().reshape(-1)
    if flat.numel():
        _write_all(descriptor, flat.view(torch.uint8).numpy().data, offset)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data`; one system call writes at most 2 GiB."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + (1 << 30)], offset + done)


def _sync_and_close(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_index(plan: _FilePlan, folder: Path) -> None:
    """The map from weight to file, where there are several files."""
    if len(plan.headers) == 1:
        return
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in plan.outputs.values()),
            "total_size": sum(tensor.nbytes for tensor in plan.outputs.values()),
        },
        "weight_map": {name: plan.places[name].file for name in sorted(plan.places)},
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
            except ValueError as error:  # transformers refuses settings that contradict each other
                logger.warning("generation_config.json is saved as it is, but: %s", str(error).split("\n")[0])
                model.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


# ---- one folder for another ----------------------------------------------------------------------


def _check_target(target: Path) -> None:
    """Refuse a target that is not a folder, or that holds anything but a model: it would be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"cannot save to {target}: it is a file; give a folder")
    entries = [entry.name for entry in target.iterdir()]
    model_files = ("config.json", ".safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    if entries and not any(name.endswith(model_files) for name in entries):
        raise ConfigError(f"cannot save to {target}: it holds files but no model; give an empty or a new folder")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place, on disk, when the block ends without error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.parent / f".{target.name}.saving-{socket.gethostname()}-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            _carry_over(target, temporary)
        _sync_tree(temporary)
        _put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def _remove_leftovers(target: Path) -> None:
    """Remove what saves to `target` left behind whose process on this machine was killed."""
    prefix = f".{target.name}.saving-{socket.gethostname()}-"
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _carry_over(old: Path, new: Path) -> None:
    """Give `new` the files of `old` that are no part of a model, without copying bytes."""
    for entry in old.iterdir():
        if _REPLACED.fullmatch(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(entry, new / entry.name)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Make `temporary` be `target`; what was there before is removed afterwards."""
    if not target.exists():
        os.rename(temporary, target)
    elif _exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        # the file system cannot swap two names at once: for an instant, `target` is missing and `aside` is it
        aside = temporary.with_name(temporary.name + ".old")
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders' names in one atomic step. False where the system or file system has no such step."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    if rename(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder; not every system lets a folder be opened."""
    with contextlib.suppress(OSError):
        _sync_and_close(os.open(folder, os.O_RDONLY))
