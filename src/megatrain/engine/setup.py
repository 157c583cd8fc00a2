"""From what the user asked for to what the engine works with: device, precision, layouts, plan."""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.device.base import ComputeDevice, streams
from megatrain.device.cpu import CpuDevice
from megatrain.device.cuda import CudaDevice
from megatrain.device.lagged import LaggedDevice
from megatrain.engine.gradient_stream import largest_staging_bytes
from megatrain.engine.kept_graphs import check_keep_graphs
from megatrain.errors import CapacityError, ConfigError
from megatrain.memory.checksum_book import LEVELS, ChecksumBook
from megatrain.memory.layout import BYTES, Request, SlabLayout, lay_out
from megatrain.memory.limits import host_memory_limits
from megatrain.memory.pieces import cut
from megatrain.memory.placement import choose_spilled, movable_units
from megatrain.memory.plan import MemoryPlan, plan_memory, require_fit
from megatrain.memory.sealed_spill import SealedSpillFile
from megatrain.memory.slab_state import elements_bytes, unit_state_bytes
from megatrain.memory.spill_file import SpillFile
from megatrain.memory.spilled_states import SpilledStates
from megatrain.memory.store import ALL_UNITS_STRAY, HostStore, home_layouts, resident_bytes
from megatrain.model.block import UnitForward
from megatrain.model.freezing import freeze
from megatrain.model.kernels import choose_kernels
from megatrain.model.partition import ParameterSlot, Partition, partition
from megatrain.model.sequence_chunks import ChunkTokens, check_sequence_chunk_tokens
from megatrain.optim.adamw import AdamW
from megatrain.optim.workers import Workers
from megatrain.sizes import format_bytes, parse_bytes
from megatrain.trust.encryption import ProcessCipher, require_library

PRECISIONS = ("auto", "bf16", "fp32")
CLIP_SCOPES = ("global", "unit")
_LOGITS_IN_CACHES_BYTES = 16 * 1024**2  # of one chunk in fp32
_DEVICE_CHUNK_TOKENS = 4096
SMALL_UNIT_SHARE = 64  # the state of units below this fraction of the largest is not worth a disk's time
_CORES_OF_A_DEVICE = 2  # one launches computation, one issues copies
_log = logging.getLogger(__name__)


def check_model(model: nn.Module) -> None:
    """Raise ConfigError where `model` is no module, or one that an engine runs already."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; pass an nn.Module, or use Engine.from_pretrained")
    if any(isinstance(m.__dict__.get("forward"), UnitForward) for m in model.modules()):
        raise ConfigError("model: another Engine owns it or a part of it; close that one first")


def check_arguments(optimizer: AdamW | None, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where one of the Engine's arguments is of a wrong type or out of its range.

    Left out: model, device, precision and compile, which are checked where they are put to use.
    """
    if optimizer is not None and not isinstance(optimizer, AdamW):
        kind = optimizer if isinstance(optimizer, type) else type(optimizer)
        what = repr(optimizer) if isinstance(optimizer, str) else f"{kind.__module__}.{kind.__qualname__}"
        raise ConfigError(f"optimizer is {what}; pass mt.AdamW(...), megatrain's own, or None for its defaults")
    check_clipping(settings.get("clip_norm"), settings.get("clip_scope", "global"))
    check_threads(settings.get("threads"))
    check_slots(settings.get("slots"))
    check_head_chunk_tokens(settings.get("head_chunk_tokens"))
    check_keep_graphs(settings.get("keep_graphs", "auto"))
    check_sequence_chunk_tokens(settings.get("sequence_chunk_tokens", "auto"))
    for name in ("device_memory", "host_memory"):
        memory_bytes(name, settings.get(name))
    resident = settings.get("resident_units", 0)
    names = isinstance(resident, (tuple, list)) and all(isinstance(name, str) for name in resident)
    if not names and not (_is_whole(resident) and resident >= 0):
        raise ConfigError(f"engine.resident_units is {resident!r}; it must be a number of units, 0 for none, or names")
    nvme = settings.get("nvme")
    if nvme is not None and not (isinstance(nvme, (str, Path)) and Path(nvme).is_dir()):
        raise ConfigError(f"engine.nvme is {str(nvme)!r}; it must be a folder that exists, on a local disk")
    if not isinstance(encrypts := settings.get("nvme_encryption", False), bool):
        raise ConfigError(f"engine.nvme_encryption is {encrypts!r}; it must be True or False")
    if encrypts:
        require_library("engine.nvme_encryption")
    integrity = settings.get("integrity", "off")
    if integrity not in LEVELS:
        raise ConfigError(f"engine.integrity is {integrity!r}; it must be one of {', '.join(LEVELS)}")
    if not _is_whole(seed := settings.get("seed", 0)) or not 0 <= seed < 1 << 63:
        raise ConfigError(f"train.seed is {seed!r}; it must be a whole number from 0 up, below 2**63")


def check_names(settings: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ConfigError where one of `settings` is no argument of `Engine.from_pretrained`."""
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"from_pretrained: there is no argument {name}; it takes {', '.join(sorted(known))}. For another"
                " revision or part of a checkpoint, load the model with transformers and pass it to Engine"
            )


def memory_bytes(name: str, value: int | str | None) -> int | None:
    """The setting `name` (device_memory, host_memory) in bytes. Raises ConfigError where it is no size."""
    right = "it must be a number of bytes > 0, a size such as '24GiB', or None for all there is"
    size: Any = value
    if isinstance(value, str):
        try:
            size = parse_bytes(value)
        except ValueError:
            size = None
    elif value is None:
        return None
    if not _is_whole(size) or size <= 0:
        raise ConfigError(f"engine.{name} is {value!r}; {right}")
    return int(size)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def make_device(
    device: str | torch.device | ComputeDevice, precision: str = "auto", memory_bytes: int | None = None
) -> ComputeDevice:
    """The compute device called `device` (auto: a GPU where there is one, else the host), or `device` itself where it
    is one. Raises ConfigError for anything else."""
    if isinstance(device, torch.device):
        device = device.type if device.type == "cpu" else str(device)
    if not isinstance(device, str):
        if not hasattr(device, "torch_device"):
            raise ConfigError(f"engine.device is {device!r}; it must be auto, cpu, cuda, cuda:NUMBER or lagged")
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if memory_bytes is not None:
            _log.warning("engine.device_memory has no effect on cpu, which computes in the host's own memory")
        return CpuDevice(precision)
    if device == "lagged":
        return LaggedDevice(precision, memory_bytes)
    kind, _, index = device.partition(":")
    if kind == "cuda" and (index.isdecimal() or device == "cuda"):
        return CudaDevice(int(index or 0), memory_bytes)
    raise ConfigError(f"engine.device is {device!r}; it must be auto, cpu, cuda, cuda:NUMBER or lagged")


def check_slots(slots: int | None) -> None:
    if slots is not None and not (_is_whole(slots) and 1 <= slots <= 64):
        raise ConfigError(f"engine.slots is {slots!r}; it must be a number from 1 to 64")


def largest_gradient_bytes(store: HostStore) -> int:
    """Of all units, as gradients are packed to leave a device."""
    units: dict[int, list[tuple[int, int]]] = {}
    for entry in store.slots.values():
        if entry.place.trainable and not entry.slab.on_device:
            units.setdefault(entry.unit, []).append((entry.place.count, BYTES[entry.slab.layout.dtype]))
    return largest_staging_bytes(list(units.values()))


def head_chunk_tokens(setting: int | None, device: ComputeDevice, token_bytes: int, vocabulary: int) -> int:
    """Tokens of one chunk of the head, in whole multiples of 64 where the user has not chosen.

    On the host as many as its caches can hold. A device wants many at once: an eighth of its memory, or 4096 tokens if
    that is more, and at most half of what weights and gradients have left. `token_bytes`: what the logits of one token
    take there.
    """
    if setting is not None:
        return setting
    if not streams(device) or device.memory_bytes is None:
        return host_chunk_tokens(vocabulary)
    device.start_step()  # its peak counts from what is allocated now
    return device_chunk_tokens(device.memory_bytes, device.peak_bytes(), token_bytes)


def device_chunk_tokens(memory_bytes: int, held_bytes: int, token_bytes: int) -> int:
    """`held_bytes` of the memory: weights' and gradients', before the first step."""
    free_bytes = max(0, memory_bytes - held_bytes)
    wanted_bytes = max(memory_bytes // 8, _DEVICE_CHUNK_TOKENS * token_bytes)
    return max(64, min(wanted_bytes, free_bytes // 2) // token_bytes // 64 * 64)


def host_chunk_tokens(vocabulary: int) -> int:
    """Tokens whose fp32 logits take about 16 MiB."""
    return max(64, _LOGITS_IN_CACHES_BYTES // (4 * vocabulary) // 64 * 64)


def check_head_chunk_tokens(setting: int | None) -> None:
    if setting is not None and not (_is_whole(setting) and setting >= 1):
        raise ConfigError(
            f"engine.head_chunk_tokens is {setting!r}; it must be a number of tokens > 0, or None to fit the device"
        )


def resolve_sequence_chunks(setting: ChunkTokens, compile: str) -> ChunkTokens:
    """`auto` is whole sequences where blocks are compiled: a graph of torch.compile has no parts. Raises ConfigError
    where both are asked for."""
    if compile == "off":
        return setting
    if isinstance(setting, int):
        raise ConfigError(
            f"engine.sequence_chunk_tokens is {setting} and engine.compile {compile!r}, which do not go together; use"
            " compile off, or sequence_chunk_tokens null"
        )
    return None


def resolve_precision(name: str, device: ComputeDevice) -> str:
    """'bf16' or 'fp32'; `auto` is bf16 where the device computes it natively."""
    if name not in PRECISIONS:
        raise ConfigError(f"engine.precision is {name!r}; it must be one of {', '.join(PRECISIONS)}")
    if name == "auto":
        return "bf16" if device.native_bf16() else "fp32"
    return name


def check_clipping(norm: float | None, scope: str) -> None:
    number = isinstance(norm, Real) and not isinstance(norm, bool)
    if norm is not None and not (number and norm > 0):
        raise ConfigError(f"train.clip_norm is {norm!r}; it must be a number > 0, or None for no clipping")
    if scope not in CLIP_SCOPES:
        raise ConfigError(f"train.clip_scope is {scope!r}; it must be one of {', '.join(CLIP_SCOPES)}")


def check_threads(threads: int | None) -> None:
    most = 4 * (os.cpu_count() or 1)
    if threads is not None and not (_is_whole(threads) and 1 <= threads <= most):
        raise ConfigError(f"engine.threads is {threads!r}; it must be a number from 1 to {most} on this machine")


def optimizer_threads(setting: int | None, device: ComputeDevice) -> int:
    """Threads of the optimizer's kernels. They work beside a streaming device, where the thread that launches
    computation and the one that issues copies need a core each: a late launch leaves the device idle."""
    if setting is not None:
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = torch.get_num_threads()
    return max(1, min(most, cores - _CORES_OF_A_DEVICE)) if streams(device) else most


def main_dtype(model: nn.Module) -> str:
    """The name of the floating dtype that most of the model's parameters have."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return str(max(counts, key=lambda dtype: counts[dtype], default=torch.float32)).removeprefix("torch.")


def weight_dtypes(model: nn.Module, part: Partition, precision: str) -> dict[int, str]:
    """'bf16' or 'fp32' by slot index. In bf16, what the model keeps in fp32 stays so: fp32 parameters beside others
    of lower precision, and those that transformers never casts."""
    floating = [s for s in part.slots if s.parameter.is_floating_point()]
    if precision == "fp32":
        return {s.index: "fp32" for s in floating}
    mixed = any(s.parameter.dtype != torch.float32 for s in floating)
    kept = _kept_in_fp32(model)

    def dtype(slot: ParameterSlot) -> str:
        stays = slot.parameter.dtype == torch.float32 and (mixed or slot.name in kept)
        return "fp32" if stays else "bf16"

    return {s.index: dtype(s) for s in floating}


def _kept_in_fp32(model: nn.Module) -> set[str]:
    if not hasattr(model, "_keep_in_fp32_modules"):
        return set()
    from megatrain.model.loading import kept_in_fp32

    return kept_in_fp32(model)


def lay_out_units(
    part: Partition, dtypes: dict[int, str], group_of: dict[int, int], moments: str = "fp32"
) -> dict[int, list[SlabLayout]]:
    """Slab layouts by home unit (-1: stray parameters). Parameters that are not floating point stay where they are."""
    layouts = {}
    for unit, slots in home_layouts(part):
        requests = [
            Request(
                s.index,
                tuple(s.parameter.shape),
                dtypes[s.index],
                group_of.get(s.index, 0),
                s.parameter.requires_grad,
            )
            for s in slots
            if s.index in dtypes
        ]
        if requests:
            layouts[unit] = lay_out(requests, whole_blocks=moments == "int8")
    return layouts


def parameter_groups(
    optimizer: AdamW | None, part: Partition, *, frozen: bool = False
) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """(the optimizer's param groups, number of its group by slot index). `frozen`: there is nothing to train."""
    groups, group_of = (optimizer or AdamW()).group_slots(part.slots)
    if frozen:
        return [{"params": []}], {}
    if not groups:
        raise ConfigError("model: all of its parameters are frozen; at least one must require a gradient")
    return groups, group_of


def refuse_meta(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"model: {name} is on the meta device and has no value; load or initialise the model first"
            )
        if parameter.device.type != "cpu":
            raise ConfigError(f"model: {name} is on {parameter.device}; build the model on the cpu")


def refuse_untrainable(model: nn.Module, part: Partition) -> None:
    """Raise ConfigError for a trainable parameter that AdamW on fp32 masters cannot train."""
    for slot in part.slots:
        parameter = slot.parameter
        if parameter.requires_grad and not parameter.is_floating_point():
            raise ConfigError(
                f"model: {slot.name} is {parameter.dtype}; a trainable parameter must be of real floating point numbers"
                " (a complex one: hold torch.view_as_real of it), or be frozen"
            )
    for name, module in model.named_modules():
        sparse = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
        if sparse and module.weight.requires_grad:
            raise ConfigError(
                f"model: {name or type(module).__name__} has sparse=True; AdamW takes no sparse gradients, make it with"
                " sparse=False"
            )


def refuse_shared_memory(part: Partition) -> None:
    """Raise ConfigError where a trainable parameter and another one lie in the same memory (`a.data = b.data`): each
    gets a place of its own here, and a write into one would not reach the other any more."""
    ends: dict[int, tuple[int, ParameterSlot]] = {}
    for slot in sorted(part.slots, key=lambda s: s.parameter.data_ptr()):
        parameter = slot.parameter
        storage, start = parameter.untyped_storage().data_ptr(), parameter.data_ptr()
        end, other = ends.get(storage, (0, slot))
        if start < end and (parameter.requires_grad or other.parameter.requires_grad):
            raise ConfigError(
                f"model: {other.name} and {slot.name} are two parameters in the same memory; tie them by making them"
                " one parameter (module.weight = other.weight), or give one a clone"
            )
        if parameter.numel():
            # of one whose elements do not lie together only the first is looked at: those of others may lie between
            lies = parameter.nbytes if parameter.is_contiguous() else parameter.element_size()
            ends[storage] = max((end, other), (start + lies, slot), key=lambda found: found[0])


def drop_gradients(part: Partition) -> None:
    """Parameters come without gradients from before, which the engine has no place for."""
    holding = [slot for slot in part.slots if slot.parameter.grad is not None]
    if holding:
        _log.warning("%s and %d more parameters had a gradient, which was dropped", holding[0].name, len(holding) - 1)
    for slot in holding:
        slot.parameter.grad = None


def plan_for(
    layouts: dict[int, list[SlabLayout]],
    *,
    keep_gradients: bool,
    streaming: bool,
    moments: str = "fp32",
    nvme: str | Path | None = None,
    host_memory: int | str | None = None,
    resident: Mapping[int, int] | None = None,
    available_bytes: int | None = None,
) -> MemoryPlan:
    """The host's memory. `resident`: units in the device's, with their bytes there. With `nvme`, the optimizer state of
    as many units goes to disk as the rest needs in order to fit into `available_bytes` and `host_memory`.

    Raises CapacityError where the plan does not fit all the same; without `available_bytes` nothing is held against it.
    """

    def plan_of(spilled: Collection[int]) -> MemoryPlan:
        return plan_memory(
            layouts,
            keep_gradients=keep_gradients,
            streaming=streaming,
            moments=moments,
            spilled=spilled,
            resident=resident,
        )

    if available_bytes is None:
        return plan_of(())
    most = memory_bytes("host_memory", host_memory)
    room = available_bytes if most is None else min(most, available_bytes)
    here = {unit: slabs for unit, slabs in layouts.items() if unit not in (resident or {})}
    sizes = {unit: unit_state_bytes(slabs, moments) for unit, slabs in here.items()}
    movable = [unit for unit, n in sizes.items() if n * SMALL_UNIT_SHARE > max(sizes.values())]
    plan = plan_of(choose_spilled(movable, plan_of, room) if nvme is not None else ())
    require_fit(plan, available_bytes, most)
    return plan


def require_own_memory(asked: int | Sequence[str], name: str, *, there_is: bool) -> None:
    """Raise ConfigError where units are to stay on a device, `name`, that computes in the host's memory."""
    if asked and not there_is:
        raise ConfigError(
            f"engine.resident_units is {asked}; it must be 0 on {name}, which has no memory of its own for units to"
            " stay in"
        )


def check_resident_count(asked: int, movable: int) -> None:
    """Raise ConfigError where more units are to stay than there are that can."""
    if asked > movable:
        raise ConfigError(f"engine.resident_units is {asked}; it must be at most {movable}: so many units can stay")


def choose_resident(
    part: Partition,
    layouts: dict[int, list[SlabLayout]],
    asked: int | Sequence[str],
    device: ComputeDevice,
    moments: str,
) -> dict[int, int]:
    """Units that lie in the device's memory, with the bytes that they take there: the first so many that can, or those
    with these names. Raises ConfigError for a device without memory of its own and for other names, CapacityError
    where there is no room for them."""
    require_own_memory(asked, device.name, there_is=streams(device))
    if not asked or not streams(device):
        return {}
    fixed = {unit.index for unit in part.units if any(not s.parameter.is_floating_point() for s in unit.slots)}
    movable = movable_units({u.index: {slot.units[0] for slot in u.slots} for u in part.units if u.slots})
    by_name = {part.units[unit].name: unit for unit in movable if unit in layouts and unit not in fixed}
    if isinstance(asked, int):
        check_resident_count(asked, len(by_name))
    chosen = list(by_name.values())[:asked] if isinstance(asked, int) else [_named(by_name, name) for name in asked]
    sizes = {unit: resident_bytes(layouts[unit], moments) for unit in chosen}
    missing = sum(sizes.values()) - (device.memory_bytes if device.memory_bytes is not None else sum(sizes.values()))
    if missing > 0:
        raise CapacityError(
            f"device memory: {format_bytes(missing)} missing: the {len(sizes)} units of engine.resident_units take"
            f" {format_bytes(sum(sizes.values()))} of {format_bytes(device.memory_bytes or 0)}"
        )
    return sizes


def _named(units: Mapping[str, int], name: str) -> int:
    if name not in units:
        raise ConfigError(f"engine.resident_units: {name!r} is no unit that can stay; these can: {', '.join(units)}")
    return units[name]


def open_spill(
    plan: MemoryPlan,
    layouts: dict[int, list[SlabLayout]],
    moments: str,
    nvme: str | Path | None,
    *,
    encrypted: bool = False,
) -> SpilledStates | None:
    """What holds the planned units' optimizer state on disk, sealed where `encrypted`; None where the plan has none
    there."""
    if not plan.spilled:
        return None
    assert nvme is not None
    pieces = {
        piece: elements_bytes(piece.stop - piece.start, layouts[unit][piece.slab].dtype, moments)
        for unit in plan.spilled
        for piece in cut(unit, layouts[unit])
    }
    file = SpillFile(Path(nvme), plan.disk_bytes)
    return SpilledStates(SealedSpillFile(file, ProcessCipher()) if encrypted else file, pieces)


def open_checksum_book(level: str, workers: Workers, part: Partition) -> ChecksumBook | None:
    """Checksums of what is in host memory; None where nobody looks."""
    if level == "off":
        return None
    names = {unit.index: unit.name for unit in part.units}
    return ChecksumBook(workers, names | ({ALL_UNITS_STRAY: "stray parameters"} if part.strays else {}), level)


def keeps_gradients(clip_norm: float | None, clip_scope: str) -> bool:
    """All gradients have to wait for the global norm; otherwise a unit is updated as its gradient arrives."""
    return clip_norm is not None and clip_scope == "global"


def cast_buffers(model: nn.Module, dtypes: dict[int, str]) -> Callable[[], None]:
    """With bf16 weights, persistent floating buffers follow, as `model.to(bfloat16)` would have them; tables that are
    not saved (rotary frequencies) keep the precision they were computed in. Returns what undoes it."""
    cast: dict[Tensor, Tensor] = {}  # a buffer that several modules hold stays one
    changed: list[tuple[nn.Module, str, Tensor]] = []
    for module in model.modules() if "bf16" in dtypes.values() else ():
        for name, buffer in module._buffers.items():
            saved = name not in module._non_persistent_buffers_set
            if buffer is not None and saved and buffer.dtype == torch.float32 and _all_bf16(module):
                changed.append((module, name, buffer))
                module._buffers[name] = cast.setdefault(buffer, buffer.to(torch.bfloat16))

    def undo() -> None:
        for module, name, buffer in changed:
            module._buffers[name] = buffer

    return undo


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers are small, and where the model computes."""
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = moved.setdefault(buffer, buffer.to(device))


def _all_bf16(module: nn.Module) -> bool:
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return dtypes == {torch.bfloat16}


def check_plan(model: nn.Module, optimizer: AdamW | None, settings: Mapping[str, Any]) -> None:
    """Raise CapacityError where a model that exists only as shapes (on the meta device) would not fit."""
    check_arguments(optimizer, settings)
    freeze(model, settings.get("freeze"))
    part, optimizer = partition(model), optimizer or AdamW()
    refuse_untrainable(model, part)
    _, group_of = optimizer.group_slots(part.slots)
    device = make_device(settings.get("device", "auto"))
    choose_kernels(settings.get("kernels", "auto"), model, device.torch_device)
    precision = resolve_precision(settings.get("precision", "auto"), device)
    layouts = lay_out_units(part, weight_dtypes(model, part, precision), group_of, optimizer.moments)
    plan_for(
        layouts,
        keep_gradients=keeps_gradients(settings.get("clip_norm", 1.0), settings.get("clip_scope", "global")),
        streaming=streams(device),
        moments=optimizer.moments,
        nvme=settings.get("nvme"),
        host_memory=settings.get("host_memory"),
        resident=choose_resident(part, layouts, settings.get("resident_units", 0), device, optimizer.moments),
        available_bytes=host_memory_limits().free_bytes,
    )
