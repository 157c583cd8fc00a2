"""The part of a checkpoint that the model's own folder does not hold: `state/*.safetensors`.

    remainder.NAME      int16, the low bits of a bf16 weight's master
    exp_avg.NAME ...    the moments, in the parameter's shape; with moments of one byte their scales, too
    buffer.NAME         every buffer of the model, as it was
    random.DEVICE       torch's random state there

One parameter after the other is read from the store and written; beside the store one parameter is held at most, and
nothing of what lies in host memory is copied.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatrain import files
from megatrain.checkpoint.sealed_state import SUFFIX, SealedNewFile, SealedTensors
from megatrain.errors import ConfigError, IntegrityError
from megatrain.memory.arena import discard_pages
from megatrain.memory.store import HostStore, SlotState
from megatrain.model.shards import DTYPE_NAMES, ShardWriter, plan_shards

_SHARD_BYTES = 5_000_000_000
_STEM = "state"


class StateWriter:
    """Writes the state of `store` into the empty folder `folder`, parameter by parameter in the order of `slots`, and
    `others` at once. `key`: to seal the files with."""

    def __init__(
        self,
        folder: Path,
        store: HostStore,
        slots: Iterable[int],
        others: Mapping[str, Tensor],
        key: bytes | None,
        look: Callable[[int, Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        self._store, self._look = store, look
        shapes = {name: tensor.to("meta") for name, tensor in others.items()}
        for slot in slots:
            shapes |= names_of(store.slots[slot], store.state_shapes(slot))
        shards = plan_shards(shapes, _SHARD_BYTES, _STEM, aligned=key is None)
        new_file = partial(files.NewFile, mode=files.PRIVATE) if key is None else partial(SealedNewFile, key=key)
        self._writer = ShardWriter(shards, folder, new_file)
        for name, tensor in others.items():
            self._writer.write(name, tensor)

    def write(self, slot: int) -> None:
        """What the optimizer holds of a parameter. `look` is shown it before it is written."""
        entry = self._store.slots[slot]
        state: Mapping[str, Tensor] = {}
        if entry.place.trainable:
            self._store.notice_silent_write(entry)
            state = self._store.read_state(slot)
        if self._look is not None:
            self._look(slot, state)
        for name, tensor in names_of(entry, state).items():
            self._writer.write(name, tensor)

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        self._writer.abandon()


def names_of(entry: SlotState, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's state by its names on disk."""
    return {f"{kind}.{entry.slot.name}": tensor for kind, tensor in state.items()}


class StateReader:
    """The tensors of `state/*.safetensors` below `folder`, one at a time. Raises IntegrityError where a file is damaged
    or a name is there twice, ConfigError where files are sealed and there is no `key`."""

    def __init__(self, folder: Path, key: bytes | None = None) -> None:
        self._folder = folder
        self._files: dict[str, _PlainTensors | SealedTensors] = {}
        self._paths: dict[str, Path] = {}
        paths = sorted([*folder.glob(f"{_STEM}*.safetensors"), *folder.glob(f"{_STEM}*.safetensors{SUFFIX}")])
        if not paths:
            raise IntegrityError(f"{folder} has no {_STEM}*.safetensors; a checkpoint holds them")
        for path in paths:
            file = _open_tensors(path, key)
            for name in file.names:
                if name in self._files:
                    raise IntegrityError(f"{path} holds {name}, which {self._paths[name].name} holds too")
                self._files[name], self._paths[name] = file, path

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        """Pages of the file, which `discard` gives back; of a sealed one memory of its own."""
        return self._files[name].read(name)

    def read_like(self, name: str, like: Tensor, *, any_float: bool = False) -> Tensor:
        """Raises IntegrityError where it is not there, or of another shape or dtype than `like`; `any_float`: another
        floating dtype will do."""
        if name not in self._files:
            raise IntegrityError(f"{self._folder} lacks {name}; it is of another model, or damaged")
        found = self.read(name)
        other = found.dtype != like.dtype and not (any_float and found.is_floating_point() and like.is_floating_point())
        if found.shape != like.shape or other:
            raise IntegrityError(
                f"{self._paths[name]}: {name} is {DTYPE_NAMES.get(found.dtype, found.dtype)} {list(found.shape)}; this"
                f" model needs {DTYPE_NAMES.get(like.dtype, like.dtype)} {list(like.shape)}"
            )
        return found

    def having_prefix(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(rest of the name, tensor) of those whose names begin so."""
        for name in sorted(n for n in self._files if n.startswith(prefix)):
            yield name.removeprefix(prefix), self.read(name)

    @staticmethod
    def discard(tensor: Tensor) -> None:
        """It has been copied."""
        discard_pages(tensor)


def _open_tensors(path: Path, key: bytes | None) -> "_PlainTensors | SealedTensors":
    if path.suffix != SUFFIX:
        return _PlainTensors(path)
    if key is None:
        raise ConfigError(f"{path} is sealed; give the key that it was sealed with (checkpoint.key_file)")
    return SealedTensors(path, key)


class _PlainTensors:
    """As SealedTensors: pages of the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as file:
            self.names = list(file.keys())

    def read(self, name: str) -> Tensor:
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self._path, framework="pt", device="cpu") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{self._path} is damaged: {str(error).splitlines()[0]}") from error


def random_states() -> dict[str, Tensor]:
    """torch's random states by their names on disk: uint8."""
    found = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found |= {f"random.cuda:{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def set_random_states(reader: StateReader) -> None:
    """Those of devices that are not here are left out."""
    for device, state in reader.having_prefix("random."):
        if device == "cpu":
            torch.set_rng_state(state.clone())
        elif torch.cuda.is_available() and int(device.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state.clone(), device)
