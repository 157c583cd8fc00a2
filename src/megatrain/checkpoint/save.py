"""Writing a checkpoint beside training.

When a save begins, training stands still only for what is small and changes: buffers, counters, random states. A thread
then writes one unit after the other, weights and optimizer state, straight from where they lie, in the order in which
units are updated. Training goes on meanwhile: forward and backward read weights only, and the update of a unit waits
until that unit is written (`wait_until_written`). Nothing is copied, so a checkpoint needs no memory of its own but for
one group of weights that is converted, or one parameter's state that lies on a disk or in a device's memory.

Everything is written into a folder with another name beside its place, flushed, and renamed: a checkpoint is whole or
not there.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from megatrain import files
from megatrain.checkpoint import description
from megatrain.checkpoint.description import Description
from megatrain.checkpoint.state_files import StateWriter
from megatrain.errors import ConfigError, IntegrityError, MegaTrainError
from megatrain.memory.store import HostStore
from megatrain.memory.unit_hashes import BUFFERS, UnitHash, hash_buffers
from megatrain.model.folder_swap import remove_leftovers, temporary_for
from megatrain.model.loading import one_line
from megatrain.model.saving import ModelFolder

MODEL, STATE = "model", "state"
_HASH_THREADS = 2  # together as fast as a disk takes what they have hashed


class Save:
    """A checkpoint of `model`, whose parameters `store` holds, on its way to `folder`, which must not exist.

    `order`: units as they are updated. `dtype`: of the weights on disk, that of the store's. `buffers`, by id: their
    values now; `others`: tensors beside the parameters' state. `extra`: further files, by name. `key`: to seal the
    state's files with. `seal` is called with the folder once all else is in it. `unit_names`: units whose SHA-256
    `unit_hashes` holds when it is over, None: of none; it is taken beside the writing. Raises MegaTrainError where the
    folder cannot be made; what fails later is raised by `wait`: IntegrityError where what training holds is not what it
    should be, MegaTrainError where it could not be written. After any of them nothing is left behind, and training is
    as if nothing had been saved.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        store: HostStore,
        order: Sequence[int],
        *,
        dtype: torch.dtype,
        told: Description,
        buffers: Mapping[int, Tensor],
        others: Mapping[str, Tensor],
        extra: Mapping[str, bytes],
        tokenizer: Any,
        key: bytes | None,
        seal: Callable[[Path], object],
        unit_names: Mapping[int, str] | None = None,
        replaces: bool = False,
    ) -> None:
        self.folder, self._replaces = folder, replaces
        self.unit_hashes: dict[str, str] = {}
        self.stall_seconds = 0.0  # that updates have waited
        self.seconds = 0.0  # that writing took, once it is over
        self._store, self._order, self._told, self._seal = store, order, told, seal
        self._unit_names = unit_names
        self._buffers = {n.removeprefix("buffer."): t for n, t in others.items() if n.startswith("buffer.")}
        self._hash: UnitHash | None = None  # of the unit that is being written
        self._versions = {slot: entry.slot.parameter._version for slot, entry in store.slots.items()}
        self._slots: dict[int, list[int]] = {unit: [] for unit in order}
        for index, entry in store.slots.items():
            self._slots[entry.unit].append(index)
        self._changed = threading.Condition()
        self._written: set[int] = set()
        self._over = False
        self._error: BaseException | None = None
        self._temporary = temporary_for(folder)
        self._made: list[Path] = []  # folders above it
        self._started = time.perf_counter()
        try:
            self._prepare(model, dtype, buffers, others, extra, tokenizer, key)
        except BaseException as error:
            self._clean_up()
            self._raise(error)
        self._thread = threading.Thread(target=self._run, name="megatrain-save", daemon=True)
        self._thread.start()

    def _prepare(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        buffers: Mapping[int, Tensor],
        others: Mapping[str, Tensor],
        extra: Mapping[str, bytes],
        tokenizer: Any,
        key: bytes | None,
    ) -> None:
        """The folders, and what is small."""
        if os.path.lexists(self.folder) and not self._replaces:
            raise ConfigError(f"cannot save to {self.folder}: it is there already; give a new folder")
        self._made = files.make_folders(self.folder.parent)
        remove_leftovers(self.folder)
        files.make_folder(self._temporary, 0o700)
        for part in (MODEL, STATE):
            files.make_folder(self._temporary / part)
        for name, content in extra.items():
            files.write_file(self._temporary / name, content, files.PRIVATE)

        def read(_name: str, tensor: Tensor) -> Tensor:
            return buffers.get(id(tensor), tensor.detach())

        self._weights = ModelFolder(model, self._temporary / MODEL, read, dtype, tokenizer)
        order = [slot for unit in self._order for slot in self._slots[unit]]
        self._state = StateWriter(self._temporary / STATE, self._store, order, others, key, self._hash_parameter)
        homes = {id(entry.slot.parameter): entry.unit for entry in self._store.slots.values()}
        named = model.state_dict(keep_vars=True)
        self._unit_of = {name: homes[id(tensor)] for name, tensor in named.items() if id(tensor) in homes}

    # -- training, meanwhile ----------------------------------------------------------------------------------

    def wait_until_written(self, unit: int) -> None:
        """Return when `unit` may change."""
        with self._changed:
            if unit in self._written or self._over:
                return
            started = time.perf_counter()
            while unit not in self._written and not self._over:
                self._changed.wait()
            self.stall_seconds += time.perf_counter() - started

    @property
    def over(self) -> bool:
        """Whether `wait` would return at once."""
        return self._over

    def wait(self) -> None:
        """Return when the checkpoint is on disk. Raises MegaTrainError where it could not be written."""
        self._thread.join()
        if self._error is not None:
            self._raise(self._error)

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write_units()
            self._finish()
        except BaseException as error:
            self._error = error
            self._clean_up()
        finally:
            self.seconds = time.perf_counter() - self._started
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _write_units(self) -> None:
        missing: dict[int, set[str]] = {unit: set() for unit in self._order}
        for name, unit in self._unit_of.items():
            missing[unit].add(name)
        more = True
        with ThreadPoolExecutor(_HASH_THREADS, "megatrain-save-hash") as pool:
            for unit in self._order:
                self._hash = UnitHash(pool) if self._unit_names is not None else None
                for slot in self._slots[unit]:
                    self._state.write(slot)
                    if self._hash is not None:
                        self._hash.wait()  # nothing of the parameter is held beside the next
                while more and missing[unit]:
                    sources = self._weights.write_group()
                    more = bool(sources)
                    for name in sources:
                        missing[self._unit_of.get(name, unit)].discard(name)
                if self._unit_names is not None and self._hash is not None:
                    self.unit_hashes[self._unit_names[unit]] = self._hash.hexdigest()
                self._note_written(unit)  # or all of the model is
            if self._unit_names is not None:
                self.unit_hashes[BUFFERS] = hash_buffers(pool, self._buffers)
        while more:
            more = bool(self._weights.write_group())

    def _hash_parameter(self, slot: int, state: Mapping[str, Tensor]) -> None:
        """It is hashed while it is written, and does not change before its unit is."""
        if self._hash is not None:
            entry = self._store.slots[slot]
            self._hash.add_parameter(entry, state, self._told.steps[entry.slot.name])

    def _note_written(self, unit: int) -> None:
        with self._changed:
            self._written.add(unit)
            self._changed.notify_all()

    def _finish(self) -> None:
        """Everything is written; what is here becomes the checkpoint."""
        self._state.close()
        self._refuse_writes()
        files.write_file(self._temporary / description.FILE, self._told.to_bytes(), files.PRIVATE)
        try:
            self._seal(self._temporary)
        except IntegrityError as error:  # of what lies in the folder, and not of what training holds
            raise MegaTrainError(f"cannot save to {self.folder}: {error}") from error
        files.sync_tree(self._temporary)
        if os.path.lexists(self.folder):
            raise MegaTrainError(f"cannot save to {self.folder}: it has come into being meanwhile")
        files.rename_durably(self._temporary, self.folder)

    def _refuse_writes(self) -> None:
        """Somebody else's writes into parameters may be in what was written, or not."""
        for slot, version in self._versions.items():
            parameter = self._store.slots[slot].slot
            if parameter.parameter._version != version:
                raise IntegrityError(
                    f"parameter {parameter.name} was written while it was being saved; wait for the save first"
                )

    def _clean_up(self) -> None:
        for part in ("_weights", "_state"):
            if hasattr(self, part):
                getattr(self, part).abandon()
        files.remove_tree(self._temporary)
        files.remove_empty(self._made)

    def _raise(self, error: BaseException) -> NoReturn:
        """One line for whatever went wrong. Of a full disk, tokenizers' own writer raises a plain Exception."""
        if isinstance(error, MegaTrainError) or not isinstance(error, Exception):
            raise error
        kind = "" if isinstance(error, OSError) or type(error) is Exception else f"{type(error).__name__}: "
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise MegaTrainError(
            f"cannot save to {self.folder}: {kind}{reason}; what was saved before is untouched"
        ) from error
