"""From a running engine to a checkpoint, and back: what of it is saved, and that it fits where it is loaded."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megatrain import files
from megatrain.checkpoint import description
from megatrain.checkpoint.description import Description, read_description
from megatrain.checkpoint.save import MODEL, STATE, Save
from megatrain.checkpoint.state_files import StateReader, names_of, random_states, set_random_states
from megatrain.errors import ConfigError, IntegrityError
from megatrain.memory.store import TORCH_DTYPE
from megatrain.memory.unit_hashes import hash_units as hash_units_of
from megatrain.model.loading import load_pretrained
from megatrain.trust.facts import code_sha256, describe_host, library_versions
from megatrain.trust.hashing import usable_cores
from megatrain.trust.manifest import require_unchanged, write_manifest

if TYPE_CHECKING:
    from megatrain.engine.engine import Engine


def begin_save(
    engine: "Engine",
    folder: Path,
    *,
    run: Mapping[str, Any],
    extra: Mapping[str, bytes],
    tokenizer: Any,
    key: bytes | None,
    seal: Callable[[Path], object] | None,
    hash_units: bool,
    replaces: bool = False,
) -> Save:
    """Training stands still until this returns: updates are finished, and what is small and changes is copied."""
    engine.flush()
    engine.notice_writes()
    engine.store.check_checksums()  # what is saved is what training has left, or nothing is
    store, first = engine.store, engine.updates.first
    buffers = {name: buffer for name, buffer in engine.model.named_buffers() if not buffer.is_meta}
    copies = {name: buffer.detach().to("cpu", copy=True) for name, buffer in buffers.items()}
    told = describe(engine, run)
    told.to_bytes()  # what could not be read back is not begun
    return Save(
        folder,
        engine.model,
        store,
        sorted(store.units, key=lambda unit: (unit not in first, unit)),  # as updates come
        dtype=TORCH_DTYPE[engine.precision],
        told=told,
        buffers={id(buffers[name]): copy for name, copy in copies.items()},
        others={f"buffer.{name}": copy for name, copy in copies.items()} | random_states(),
        extra=extra,
        tokenizer=tokenizer,
        key=key,
        seal=seal or _write_manifest,
        unit_names=unit_names(engine) if hash_units else None,
        replaces=replaces,
    )


def describe(engine: "Engine", run: Mapping[str, Any]) -> Description:
    """What of the training state is no tensor."""
    return Description(
        step=engine.step_count,
        seed=engine.seed,
        precision=engine.precision,
        moments=engine.store.moments,
        model_dtype=engine.model_dtype,
        steps={entry.slot.name: entry.steps for entry in engine.store.slots.values()},
        param_groups=list(_described_groups(engine)),
        random=description.random_numbers(),
        run=dict(run),
    )


def unit_names(engine: "Engine") -> dict[int, str]:
    """Of all that the store holds."""
    return {unit: engine.unit_name(unit) for unit in engine.store.units}


def unit_hashes(engine: "Engine") -> dict[str, str]:
    """SHA-256 of each unit's weights and optimizer state by its name, and of the buffers: what a save that goes on now
    would find."""
    engine.flush()
    engine.notice_writes()
    buffers = {name: buffer for name, buffer in engine.model.named_buffers() if not buffer.is_meta}
    return hash_units_of(engine.store, unit_names(engine), buffers, threads=usable_cores())


def differing_weight(engine: "Engine", folder: Path) -> str | None:
    """The first parameter that the model in `folder`, saved in the engine's precision, has with another value."""
    engine.flush()
    for index, saved in _weights(engine, folder).items():
        entry = engine.store.slots.get(index)
        held = entry.weight.to("cpu") if entry is not None else None
        if entry is not None and held is not None and not torch.equal(_bits(held), _bits(saved)):
            return entry.slot.name
    return None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _write_manifest(folder: Path) -> None:
    facts = {"code": {"sha256": code_sha256()}, "libraries": library_versions(), "hardware": describe_host()}
    write_manifest(folder, facts, write=files.write_file)


def load(engine: "Engine", folder: Path, *, weights: bool, verify: bool, key: bytes | None) -> Description:
    """Set the engine to what the checkpoint in `folder` holds, to the last bit; nothing is changed where it does not
    fit. `weights`: False where the model comes from the checkpoint already."""
    if verify:
        require_unchanged(folder)
    told = read_description(folder)
    reader = StateReader(folder / STATE, key)
    _require_same_kind(engine, folder, told)
    state = dict(_states(engine, folder, reader))
    buffers = {name: buffer for name, buffer in engine.model.named_buffers() if not buffer.is_meta}
    saved = {name: reader.read_like(f"buffer.{name}", b, any_float=True) for name, b in buffers.items()}
    found = _weights(engine, folder / MODEL) if weights else {}
    engine.flush()
    description.set_random_numbers(told.random)
    for index, entry in engine.store.slots.items():
        engine.store.write_state(index, found.pop(index, None), state[index])
        entry.steps = told.steps[entry.slot.name]
        for tensor in state.pop(index).values():
            reader.discard(tensor)
    with torch.no_grad():
        for slot in (s for s in engine.partition.slots if s.index in found):  # no floating point: never trained
            slot.parameter.data.copy_(found[slot.index])
        for name, buffer in buffers.items():
            _set_buffer(engine.model, name, buffer, saved[name])
    set_random_states(reader)
    for group, settings in zip(engine.optimizer.param_groups, told.param_groups, strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k != "params"})
    engine.step_count, engine.seed = told.step, told.seed
    if engine.store.book is not None:
        engine.store.book.step = told.step
    engine.executor.weights_changed()
    return told


def _set_buffer(model: nn.Module, name: str, buffer: Tensor, saved: Tensor) -> None:
    """In place; one that had been cast gives way to what it had been cast to."""
    if buffer.dtype == saved.dtype:
        buffer.copy_(saved)
        return
    owner, _, attribute = name.rpartition(".")
    model.get_submodule(owner)._buffers[attribute] = saved.to(buffer.device, copy=True)


def _described_groups(engine: "Engine") -> Iterator[dict[str, Any]]:
    names = {id(slot.parameter): slot.name for slot in engine.partition.slots}
    for group in engine.optimizer.param_groups:
        settings = {k: v for k, v in group.items() if isinstance(v, (bool, int, float, str, list, tuple))}
        yield settings | {"params": [names[id(p)] for p in group["params"]]}


def _require_same_kind(engine: "Engine", folder: Path, told: Description) -> None:
    """Raises ConfigError for an engine that holds another kind of state, IntegrityError for another model's."""
    for what, has, saved in (
        ("precision", engine.precision, told.precision),
        ("optimizer.moments", engine.store.moments, told.moments),
    ):
        if has != saved:
            raise ConfigError(f"{what} is {has!r}; the checkpoint {folder} was made with {saved!r}")
    groups = [group["params"] for group in _described_groups(engine)]
    if [list(group.get("params", ())) for group in told.param_groups] != groups:
        raise ConfigError(
            f"optimizer.param_groups: the checkpoint {folder} has {len(told.param_groups)} groups with other parameters"
            f" than the {len(groups)} of this engine"
        )
    names = {entry.slot.name for entry in engine.store.slots.values()}
    for name in sorted(names ^ set(told.steps)):
        where = "this model has no" if name in told.steps else "it lacks the"
        raise IntegrityError(f"{folder / description.FILE} is of another model: {where} parameter {name}")


def _states(engine: "Engine", folder: Path, reader: StateReader) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """By slot, pages of the files; every name that is there is asked for."""
    known: set[str] = set()
    for index, entry in engine.store.slots.items():
        shapes = engine.store.state_shapes(index)
        on_disk = names_of(entry, shapes)
        known |= set(on_disk)
        read = [reader.read_like(name, like) for name, like in on_disk.items()]
        yield index, dict(zip(shapes, read, strict=True))
    extra = sorted(name for name in reader.names - known if not name.startswith(("buffer.", "random.")))
    if extra:
        raise IntegrityError(f"{folder / STATE} is of another model: this one has no {extra[0]}")


def _weights(engine: "Engine", folder: Path) -> dict[int, Tensor]:
    """By slot, in the dtype that it is held in: pages of the files where nothing has to be converted."""
    saved = dict(_saved_tensors(engine.model, folder))
    found = {}
    for slot in engine.partition.slots:
        held = engine.store.slots[slot.index].weight if slot.index in engine.store.slots else slot.parameter
        tensor = saved.get(slot.name)
        if tensor is None or tensor.shape != slot.parameter.shape or tensor.dtype != held.dtype:
            has = "lacks it" if tensor is None else f"has it as {tensor.dtype} {list(tensor.shape)}"
            raise IntegrityError(f"{slot.name} is {held.dtype} {list(slot.parameter.shape)}; {folder} {has}")
        found[slot.index] = tensor
    return found


def _saved_tensors(model: nn.Module, folder: Path) -> Iterator[tuple[str, Tensor]]:
    if hasattr(model, "save_pretrained"):  # transformers converts names and fused weights
        yield from load_pretrained(folder).named_parameters(remove_duplicate=False)
        return
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)
