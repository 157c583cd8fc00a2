"""The public Engine: takes a model over and trains it."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from megatrain.checkpoint.save import Save
from megatrain.device.base import ComputeDevice, streams
from megatrain.device.trace import Trace
from megatrain.engine import setup
from megatrain.engine.attachment import Attachment
from megatrain.engine.batches import Batch, checked_batches
from megatrain.engine.compiled import check_compile
from megatrain.engine.device_checks import DeviceChecks
from megatrain.engine.executor import Executor
from megatrain.engine.gradient_memory import GradientMemory
from megatrain.engine.gradient_stream import GradientStream
from megatrain.engine.gradients import GradientBook
from megatrain.engine.host_checks import HostChecks
from megatrain.engine.host_thread import HostThread
from megatrain.engine.kept_graphs import KeepGraphs, KeptGraphs
from megatrain.engine.optimizer_state import OptimizerState
from megatrain.engine.random_streams import stream_seed
from megatrain.engine.resident_gradients import ResidentGradients
from megatrain.engine.step import StepClock, StepStats, train_step
from megatrain.engine.structure import Structure
from megatrain.engine.token_loss import log_probabilities
from megatrain.engine.updates import PendingUpdates, SlabUpdate, held_gradients, unit_updates
from megatrain.engine.weight_stream import DEFAULT_SLOTS, WeightStream
from megatrain.engine.weights import HostWeights, Weights
from megatrain.errors import ConfigError, NonFiniteGradientError
from megatrain.losses import TokenLoss
from megatrain.memory.arena import keep_large_allocations_out_of_heap, reuse_freed_memory, trim_freed_memory
from megatrain.memory.layout import SlabLayout
from megatrain.memory.limits import host_memory_limits
from megatrain.memory.plan import MemoryPlan
from megatrain.memory.store import TORCH_DTYPE, HostStore, SlotState, gradient_buffers
from megatrain.model.block import LOOK_STEPS
from megatrain.model.freezing import freeze as freeze_parameters
from megatrain.model.kernels import choose_kernels, install_kernels
from megatrain.model.partition import partition
from megatrain.model.sequence_chunks import ChunkTokens, part_tokens
from megatrain.optim.adamw import AdamW, EngineOptimizer, check_learning_rate
from megatrain.optim.compilation import compile_kernels
from megatrain.optim.workers import Workers
from megatrain.trust.encryption import read_key


class Engine:
    """Trains `model` in place, with exact fp32 masters on the host.

    optimizer:     `megatrain.AdamW`.
    device:        'auto' (a GPU where there is one), 'cpu', 'cuda', 'cuda:1', 'lagged' (for tests), a torch.device,
                   or a device object.
    precision:     'bf16' (bf16 compute, fp32 master), 'fp32', or 'auto' (bf16 where the device computes it natively).
    clip_norm:     largest gradient norm, or None. With clip_scope 'global' it is the norm over all parameters, and
                   gradients are kept until it is known (2 bytes per parameter in bf16); with 'unit' each unit is
                   clipped by its own norm and updated at once.
    device_memory: bytes that the compute device may use, or a size such as '24GiB'; None: all. The host as device has
                   no limit of its own.
    seed:          of the random streams of micro-batches (dropout).
    threads:       of the optimizer's kernels; None: as many as torch computes with, but beside a streaming device two
                   less than there are cores.
    keep_graphs:   units that keep their graph instead of being recomputed, the same bits in less time: 'auto' (from
                   the second step on, as many as fit into half of the free memory), 'off', or a number of last units.
    slots:         units of a size whose weights may be on a streaming device at once; None: 2.
    compile:       'off', or 'blocks': blocks run as graphs of torch.compile, one per kind. Sums inside a block may then
                   be added up in another order (last bits), and the first steps wait for the compiler.
    host_memory:   bytes of host memory to plan with at most, or a size such as '100GiB'; None: what is free.
    nvme:          folder on a local disk for the optimizer state that host memory has no room for (10 of 12 bytes per
                   parameter, of as many units as it takes); None: what does not fit is refused.
    nvme_encryption: what goes to `nvme` is sealed with a key that lives in memory alone; needs the extra `encryption`.
    resident_units: so many of the first units, or those with these names (as in named_modules), lie in a streaming
                   device's memory for good, with their optimizer state (14 bytes per parameter in bf16, gradients
                   included), and are updated there: nothing of them crosses the link, and the host holds none of them
                   until `close()`. Units that share parameters with others are passed over.
    head_chunk_tokens: tokens whose logits exist at once where the head runs in chunks; None: as many as suit the
                   device. Sums over tokens are added up chunk by chunk, so the last bits depend on it.
    kernels:       'torch': the model's own code; 'liger': Liger's kernels in place of parts of it, and for the head,
                   until `close()`; 'auto': liger where it is installed, the device is cuda and it knows the model.
    integrity:     'off'; 'full': a checksum is taken of all weights and optimizer state that the engine writes, and has
                   to hold where they are used next, also as they arrive in a device's memory; so has that of a
                   gradient which leaves it. Bits that change by themselves end in IntegrityError; 'sampled': of a
                   sixteenth of the units in each step, by turns. Parameters cannot be written by `.data` then.
    sequence_chunk_tokens: what acts token by token inside a unit (norms, feed-forward) runs over so many tokens of
                   each sequence at a time, forward and backward, so that its activations exist for those alone;
                   'auto': 8192, where sequences are longer; None: over whole sequences. Its weights' gradients add up
                   part by part (last bits). Not together with compile 'blocks'.
    freeze:        regular expressions of names: parameters that one of them finds (`re.search`) are not trained until
                   `close()`, as if they came with requires_grad False: they have no optimizer state, and a unit that
                   is frozen runs a second time only where a gradient has to pass through it.

    Raises ConfigError for a wrong setting and CapacityError when the plan does not fit into host memory, or the weights
    not into the device's. The model is then as it was, but for gradients it had and low bits of frozen fp32 weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AdamW | None = None,
        device: str | torch.device | ComputeDevice = "auto",
        precision: str = "auto",
        clip_norm: float | None = 1.0,
        clip_scope: str = "global",
        device_memory: int | str | None = None,
        seed: int = 0,
        threads: int | None = None,
        keep_graphs: KeepGraphs = "auto",
        slots: int | None = None,
        compile: str = "off",
        head_chunk_tokens: int | None = None,
        kernels: str = "auto",
        host_memory: int | str | None = None,
        nvme: str | Path | None = None,
        resident_units: int | Sequence[str] = 0,
        sequence_chunk_tokens: ChunkTokens = "auto",
        nvme_encryption: bool = False,
        integrity: str = "off",
        freeze: str | Sequence[str] = (),
        *,
        _mapped: bool = False,
        _frozen: bool = False,
    ) -> None:
        setup.check_model(model)
        settings = {"clip_norm": clip_norm, "clip_scope": clip_scope, "device_memory": device_memory, "seed": seed}
        settings |= {"threads": threads, "keep_graphs": keep_graphs, "slots": slots}
        settings |= {"head_chunk_tokens": head_chunk_tokens, "host_memory": host_memory}
        settings |= {"sequence_chunk_tokens": sequence_chunk_tokens, "integrity": integrity}
        where = {"nvme": nvme, "nvme_encryption": nvme_encryption, "resident_units": resident_units}
        setup.check_arguments(optimizer, settings | where)
        self.model, optimizer = model, optimizer or AdamW()
        self.precision = setup.resolve_precision(precision, setup.make_device(device))
        self.device = setup.make_device(device, self.precision, setup.memory_bytes("device_memory", device_memory))
        check_compile(compile, self.device.torch_device)
        self.sequence_chunk_tokens = setup.resolve_sequence_chunks(sequence_chunk_tokens, compile)
        chosen = choose_kernels(kernels, model, self.device.torch_device)
        self.clip_norm, self.clip_scope, self.seed = clip_norm, clip_scope, seed
        self.keeps_gradients = setup.keeps_gradients(clip_norm, clip_scope)
        self.is_frozen = _frozen
        self.step_count = 0
        self.last_touched: frozenset[int] = frozenset()  # slots that got a gradient in the last step
        self._updated: list[str] = []  # units, in a step that updates them at once
        self._clip_override: float | None = None
        self._warned = self._in_parts = False

        self.model_dtype = setup.main_dtype(model)  # that it was made in, from which it may have computed tables
        self._save: Save | None = None  # the last that has begun
        self._closing, unmade = ExitStack(), ExitStack()  # what `close` undoes; what is undone if this fails
        try:
            self._closing.callback(freeze_parameters(model, freeze))
            self.partition = partition(model)
            self.structure = Structure(model, self.partition)
            setup.refuse_untrainable(model, self.partition)
            groups, group_of = setup.parameter_groups(optimizer, self.partition, frozen=_frozen)
            dtypes = setup.weight_dtypes(model, self.partition, self.precision)
            layouts = setup.lay_out_units(self.partition, dtypes, group_of, optimizer.moments)
            setup.refuse_meta(model)
            setup.refuse_shared_memory(self.partition)
            resident = setup.choose_resident(self.partition, layouts, resident_units, self.device, optimizer.moments)
            self.plan = self._plan_memory(layouts, optimizer.moments, nvme, host_memory, resident)
            self.kernels, remove_kernels = install_kernels(chosen, model, required=kernels == "liger")
            self._closing.callback(remove_kernels)
            workers = Workers(setup.optimizer_threads(threads, self.device))
            unmade.callback(workers.close)
            spilled = setup.open_spill(self.plan, layouts, optimizer.moments, nvme, encrypted=nvme_encryption)
            book = setup.open_checksum_book(integrity, workers, self.partition)
            self.store = HostStore(workers, optimizer.moments, spilled, book)
            unmade.callback(self.store.close)
            unmade.callback(self.store.give_back, {s.index: s.parameter.dtype for s in self.partition.slots})
            self._take_over(layouts, _mapped)
            unmade.callback(setup.cast_buffers(model, dtypes))
            self._connect(slots)
            self.optimizer = EngineOptimizer(groups, optimizer, self)
            self.kept_graphs = KeptGraphs(keep_graphs, self.partition.units)
            self.executor = Executor(self.device, self.weights, self.gradients, self.kept_graphs)
            self._closing.callback(self.executor.hand_over.close)
            self.attachment = Attachment(self, compile, head_chunk_tokens, self.sequence_chunk_tokens)
            self._closing.callback(self.attachment.remove)
        except BaseException:
            with unmade:
                self._closing.close()
            raise
        self.head, self.shifts_labels = self.attachment.head, self.attachment.shifts_labels
        self._attached = True
        self._take_checksums()
        trim_freed_memory()  # of taking the model over and probing its head
        reuse_freed_memory()

    def _plan_memory(
        self,
        layouts: dict[int, list[SlabLayout]],
        moments: str,
        nvme: str | Path | None,
        host_memory: int | str | None,
        resident: Mapping[int, int],
    ) -> MemoryPlan:
        """Raises CapacityError where the host has no room for it all."""
        held = sum(slot.parameter.nbytes for slot in self.partition.slots)
        return setup.plan_for(
            layouts,
            keep_gradients=self.keeps_gradients,
            streaming=streams(self.device),
            moments=moments,
            nvme=nvme,
            host_memory=host_memory,
            resident=resident,
            available_bytes=host_memory_limits().free_bytes + held,
        )

    def _take_over(self, layouts: dict[int, list[SlabLayout]], mapped: bool) -> None:
        """Move the model's parameters into the host store, unit by unit."""
        setup.drop_gradients(self.partition)
        keep_large_allocations_out_of_heap()
        compile_kernels(self.store.moments)
        slots = {slot.index: slot for slot in self.partition.slots}
        for unit, slabs in layouts.items():
            there = None
            if unit in self.plan.resident and streams(self.device):
                there = self.device.allocate(self.plan.resident[unit], "units that stay on the device")
            self.store.take_over(unit, slabs, slots, mapped=mapped, device_memory=there)
        if self.keeps_gradients:
            for unit in self.store.units.keys() - self.store.on_device:
                slabs_held = self.store.units[unit].slabs
                for slab, buffer in zip(slabs_held, gradient_buffers(slabs_held), strict=True):
                    slab.gradient = buffer

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], optimizer: AdamW | None = None, **settings: Any) -> Self:
        """Load a transformers folder or hub id and take it over; settings as for `Engine`, and attn_implementation.

        The plan is checked before a weight is read. Weights come in the checkpoint's own precision and are released
        one by one as the store takes them, so host memory never holds more than the final state.
        """
        return cls._from_folder(str(path), optimizer, None, settings)

    @classmethod
    def frozen(cls, model: nn.Module, **settings: Any) -> Self:
        """An engine that runs `model` without ever training it (a reference, a judge): all parameters are frozen, so
        that the host holds the weights alone. Settings as for `Engine`."""
        return cls(model.requires_grad_(False), **settings, _frozen=True)

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | os.PathLike[str],
        optimizer: AdamW | None = None,
        *,
        verify: bool = True,
        key_file: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> Self:
        """An engine that goes on as the one that saved `folder` would have: of a transformers model, with the same
        settings and optimizer. Host memory holds no more than training does. Raises IntegrityError where the checkpoint
        is not as it was written (`verify`: all files are hashed), ConfigError where it is of other settings.
        """
        from megatrain.checkpoint.description import read_description
        from megatrain.checkpoint.save import MODEL
        from megatrain.engine import checkpoints
        from megatrain.trust.manifest import require_unchanged

        if verify:
            require_unchanged(Path(folder))
        told, key = read_description(Path(folder)), None if key_file is None else read_key(key_file)
        dtype = getattr(torch, told.model_dtype)
        engine = cls._from_folder(str(Path(folder) / MODEL), optimizer, dtype, settings)
        try:
            held = TORCH_DTYPE[told.precision]  # which a model in another precision may have lost
            lossless = dtype == held or (dtype, held) == (torch.float32, torch.bfloat16)
            checkpoints.load(engine, Path(folder), weights=not lossless, verify=False, key=key)
        except BaseException:
            engine.close()
            raise
        return engine

    @classmethod
    def _from_folder(
        cls, path: str, optimizer: AdamW | None, dtype: torch.dtype | None, settings: dict[str, Any]
    ) -> Self:
        """`dtype`: of the model; None: as its weights are stored, or fp32."""
        from megatrain.model.loading import build_on_meta, check_weights, is_here, load_config, load_pretrained

        attention = settings.pop("attn_implementation", None)
        arguments = set(signature(cls).parameters) - {"model", "_mapped", "_frozen"}
        setup.check_names(settings, arguments | {"attn_implementation"})
        setup.check_arguments(optimizer, settings)
        device = setup.make_device(settings.get("device", "auto"))
        # in fp32 the model is made in fp32, so that what it computes from its dtype (tables, scales) is too
        exact = setup.resolve_precision(settings.get("precision", "auto"), device) == "fp32"
        described = build_on_meta(load_config(path))
        if is_here(path):
            check_weights(path, described)
        setup.check_plan(described, optimizer, settings)
        dtype = dtype or (torch.float32 if exact else None)
        return cls(
            load_pretrained(path, attn_implementation=attention, dtype=dtype),
            optimizer,
            **settings,
            _mapped=True,
        )

    # -- training ---------------------------------------------------------------------------------------------

    def train_step(self, batches: Iterable[Batch], lr: float | None = None, loss: TokenLoss | None = None) -> StepStats:
        """One optimizer step over `batches`, its micro-batches: mappings of the model's arguments with `labels`.

        Labels are not shifted and -100 is ignored, as in transformers; num_items_in_batch and shift_labels are refused,
        since a step counts and shifts its labels itself. A module of one's own whose loss takes each label at its own
        position (a tagger) says so by an attribute `shifts_labels = False`. The loss is the mean over the target tokens
        of all micro-batches, whatever their shapes. Weights are updated as if synchronously; a non-finite gradient norm
        skips the step: no weight and nothing of the optimizer changes (NonFiniteGradientError where units are updated
        before the norm is known). After an error weights are as they were; where units are updated at once, a note of
        the error says which had been. Buffers that the forward has updated (BatchNorm's running statistics) stay
        updated, as with torch.amp.GradScaler. Gradients gathered before it are dropped. `lr` is written into the param
        groups, in their proportions, so that it holds for later steps too.

        `loss`: a function of the target tokens' log-probabilities (see `megatrain.losses`, such as `losses.DPO()`) in
        the place of the model's own loss function; the mean is then over its units instead of target tokens.
        """
        self._require_trains()
        return train_step(self, checked_batches(batches), lr, loss)

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Log-probabilities that the model gives the target tokens of `batch`, fp32 in the shape of `labels`, each at
        the place of its label; 0 where there is no target. Weights stream as in a forward, and logits exist for a chunk
        of tokens at a time. No gradients; dropout is as the model's training mode has it."""
        self._require_open()
        (batch,) = checked_batches([batch])
        return log_probabilities(self, batch)

    def step(self, lr: float | None = None) -> StepStats:
        """Apply the gradients of the backward calls since the last step (`engine.model(**batch).loss.backward()`).

        Gradients are what the parameters' `.grad` shows: clipped by torch, set or taken away by hand, they count as in
        plain PyTorch, and clip_norm applies to what they are. They are dropped here, as by `zero_grad()`, also where
        bringing them to the host fails.
        """
        self._require_trains()
        clock = StepClock(self)
        self.begin_step(lr)
        norm = self._gathered_norm()
        skipped = not self.decide_update(norm)
        return clock.stats(None, norm, 0, skipped)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The norm of the gradients gathered so far, fp64; the next `step` clips to `max_norm` instead of clip_norm."""
        self._require_open()
        norm = self._gathered_norm()
        self._clip_override = float(max_norm)
        return torch.tensor(norm, dtype=torch.float64, device="cpu")

    def _gathered_norm(self) -> float:
        """Of the gradients of a caller's own loop, complete now. After an error none is left: a part is no gradient."""
        try:
            self.gradients.finish()
            self.gradients.follow_caller()
        except BaseException as error:
            self.abort_step(error)
            raise
        return self.gradients.norm()

    def flush(self) -> None:
        """Return when all decided updates are in the weights. Raises IntegrityError where somebody has written into a
        parameter while its update was still under way."""
        self.refuse_early_writes()
        self.updates.flush()

    def start_trace(self) -> None:
        """From here on note what runs when: computation and copies unit by unit, host work, waits by name."""
        self.device.trace = Trace()

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write what was noted since `start_trace` for Perfetto (ui.perfetto.dev), and stop noting."""
        self.flush()
        trace, self.device.trace = self.device.trace, None
        if trace is None:
            raise RuntimeError("write_trace: no trace was started")
        trace.write(Path(path), self.device.seconds)

    def discard_gradients(self) -> None:
        """Forget the gradients gathered since the last step."""
        self.gradients.forget_gradients()
        self._clip_override = None

    def _require_trains(self) -> None:
        self._require_open()
        if self.is_frozen:
            raise ConfigError(
                "this engine was made by Engine.frozen, which trains nothing; make an Engine of the model"
            )

    def _require_open(self) -> None:
        if not self._attached:
            raise RuntimeError("this engine is closed")

    # -- parts of a step --------------------------------------------------------------------------------------

    def begin_step(self, lr: float | None) -> None:
        if lr is not None:
            check_learning_rate(lr)
        self._updated.clear()
        self.store.check_addresses()
        self.structure.check()
        self.notice_writes()
        self._take_checksums()
        if lr is not None:
            self.optimizer.set_lr(lr)

    def notice_writes(self) -> None:
        """Weights that somebody has written become masters."""
        self.refuse_early_writes()
        self.store.notice_writes()

    def _take_checksums(self) -> None:
        """Of what is looked at in this step and has none: after the take-over, or since somebody has written it."""
        if self.store.book is not None:
            self.store.take_checksums(self.updates.is_pending)
        if self.checks is not None:
            self.checks.take_residents()

    def refuse_early_writes(self) -> None:
        """Raise IntegrityError where a parameter was written before anybody waited for its update. Whether that had
        ended by then does not matter: the next run might be slower."""
        if self.updates.unseen:
            self.store.refuse_writes()

    def warn_of_whole_logits(self) -> None:
        """Once, where a language model's head cannot be run in chunks."""
        embeddings = getattr(self.model, "get_output_embeddings", lambda: None)()
        if self.head.reason is not None and embeddings is not None and not self._warned:
            self._warned = True
            warnings.warn(f"the logits of each micro-batch exist as a whole: {self.head.reason}", stacklevel=4)

    def choose_kept_graphs(self, label_elements: int) -> None:
        """Decide which units keep their graphs in a step of this size."""
        chosen = self.kept_graphs.choose(label_elements)
        if chosen is not None:
            self.executor.kept_units = chosen

    def free_compute_bytes(self) -> int:
        """Memory that is left over where graphs would be kept."""
        if streams(self.device) and self.device.memory_bytes is not None:
            return max(0, self.device.memory_bytes - self.device.peak_bytes())
        return host_memory_limits().free_bytes

    def choose_heap(self, tokens: int) -> None:
        """On the host, large tensors of a step whose sequences run in parts are mappings of their own, gone when they
        are freed: memory is what is short there, and the gaps that they leave in the heap would take a third of it."""
        if not streams(self.device):
            in_parts = part_tokens(self.sequence_chunk_tokens, tokens) is not None
            if in_parts and not self._in_parts:
                trim_freed_memory()
            (keep_large_allocations_out_of_heap if in_parts else reuse_freed_memory)()
            self._in_parts = in_parts

    def watch_attributes(self) -> None:
        """In the first steps, notice what micro-batches in turns would read of one another."""
        if self.executor.generation < LOOK_STEPS:
            for block in self.attachment.blocks:
                block.attributes.watch()

    def seed_micro_batch(self, number: int) -> None:
        """Give the calling thread the random stream of micro-batch `number` of this step."""
        torch.manual_seed(stream_seed(self.seed, self.step_count, number))

    def decide_update(self, norm: float) -> bool:
        """Schedule the update of everything that has a gradient; False, with nothing changed, if norm is not finite."""
        try:
            self.weights.before_update()
        except BaseException as error:
            self.abort_step(error)
            raise
        finite = norm < float("inf")
        self.last_touched = frozenset(self.gradients.squares)
        if finite and self.gradients.keep:
            scale = self._clip_scale(norm) if self._scope == "global" else None
            for home, entries in sorted(self.gradients.touched().items()):
                unit_scale = self._clip_scale(self.gradients.unit_norm(entries)) if scale is None else scale
                self.updates.schedule(home, self._updates_of(entries, unit_scale))
        self.end_step()
        self.step_count += 1
        self.updates.start()
        if self.store.book is not None:
            self.store.book.step = self.step_count  # what was started belongs to the step before
        return finite

    def end_step(self) -> None:
        """Nothing of this step goes on: no gradient, no call whose backward is still to come."""
        self.gradients.clear()
        self._clip_override = None
        self.executor.weights_changed()

    def abort_step(self, error: BaseException) -> None:
        """The step ended in `error`: the engine is ready for another one. Weights are as they were, but for units that
        were updated at once; then `error` says which."""
        self.gradients.give_up()
        self.executor.abort_step()
        self.end_step()
        if self._updated and not isinstance(error, NonFiniteGradientError):  # which says so itself
            error.add_note(
                f"step {self.step_count} is half done: {', '.join(self._updated)} had been updated before, other units"
                " have not been. Go on from the last save, or use clip_norm with clip_scope='global', where an error"
                " changes no weight"
            )

    def _update_complete_unit(self, home: int, entries: list[SlotState]) -> None:
        """Without a global norm to wait for, a unit is updated as soon as its gradient is complete."""
        norm = self.gradients.unit_norm(entries)
        name = self.unit_name(home)
        if not norm < float("inf"):
            raise NonFiniteGradientError(
                f"step {self.step_count}: the gradient of {name} has norm {norm}; other units are already updated, so"
                " the step cannot be skipped. Go on from the last save, or use clip_norm with clip_scope='global'"
            )
        scale = self._clip_scale(norm) if self.clip_norm is not None else 1.0
        self.updates.carry_out_now(home, self._updates_of(entries, scale))
        self._updated.append(name)

    def _updates_of(self, entries: list[SlotState], scale: float) -> list[SlabUpdate]:
        return unit_updates(entries, self.optimizer.param_groups, scale, held_gradients(entries))

    def unit_name(self, home: int) -> str:
        """For people."""
        return (self.partition.units[home].name or "the model") if home >= 0 else "stray parameters"

    @property
    def _scope(self) -> str:
        return "global" if self._clip_override is not None else self.clip_scope

    def _clip_scale(self, norm: float) -> float:
        """min(1, clip / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it."""
        limit = self.clip_norm if self._clip_override is None else self._clip_override
        return 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))

    # -- reading and writing state ----------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | os.PathLike[str], dtype: str | None = None, tokenizer: Any = None, **options: Any
    ) -> None:
        """Write a plain transformers folder. dtype 'bf16', 'fp32' (the exact masters), or None for the precision."""
        from megatrain.model.saving import save_model

        dtype = dtype or self.precision
        if dtype not in TORCH_DTYPE:
            raise ConfigError(f"dtype is {dtype!r}; it must be bf16 or fp32")
        self.flush()
        self.store.check_checksums()  # what is saved is what training has left, or nothing is
        by_id = {id(slot.parameter): slot.index for slot in self.partition.slots}

        def read(_name: str, tensor: Tensor) -> Tensor:
            index = by_id.get(id(tensor))
            exact = dtype == "fp32" and index is not None and index in self.store.slots
            return self.store.read_master(index) if exact and index is not None else tensor.detach()

        save_model(self.model, Path(folder), read, TORCH_DTYPE[dtype], tokenizer=tokenizer, **options)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        run: Mapping[str, Any] | None = None,
        extra: Mapping[str, bytes] | None = None,
        tokenizer: Any = None,
        key_file: str | os.PathLike[str] | None = None,
        seal: Callable[[Path], object] | None = None,
        background: bool = False,
        hash_units: bool = False,
        replaces: bool = False,
    ) -> Save:
        """Write the whole training state into `folder`, which must not exist: `model/`, a transformers folder;
        `state/`, remainders, moments, buffers and random states; `training.json`; and a manifest. `load` and
        `from_checkpoint` read it back to the last bit.

        `background`: return once it is safe to train on, and write meanwhile; `wait` of what is returned says whether
        it worked, as does the next save. Writing into parameters oneself has to wait for it, too. `run`: what `load`
        gives back, of what JSON holds; `extra`: further files by name; `key_file`: to seal `state/` with (weights stay
        plain); `seal` writes the manifest of the folder once all is in it; None: one that names code, libraries and
        host. `hash_units`: what is returned has SHA-256 of each unit in `unit_hashes` when it is over, as
        `unit_hashes()` would give them now. `replaces`: `folder` may exist as long as `seal` removes it.
        Raises MegaTrainError where it cannot be written: then nothing of it is left, and training can go on.
        """
        from megatrain.engine import checkpoints

        self._require_open()
        self.wait_for_save()
        save = self._save = checkpoints.begin_save(
            self,
            Path(folder).expanduser(),
            run=run or {},
            extra=extra or {},
            tokenizer=tokenizer,
            key=None if key_file is None else read_key(key_file),
            seal=seal,
            hash_units=hash_units,
            replaces=replaces,
        )
        self.updates.before_update = save.wait_until_written
        if not background:
            self.wait_for_save()
        return save

    def set_param_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Give the optimizer other param groups: `params` (of this model, each that is trained in one of them), lr,
        betas, eps and weight_decay. Moments and step counts stay. Raises ConfigError where a parameter is missing."""
        self.flush()
        self.store.check_addresses()
        self.structure.check()  # or what came later would be said to be missing from the groups, or too much there
        entries = {id(e.slot.parameter): e for e in self.store.slots.values() if e.place.trainable}
        given = [id(parameter) for group in groups for parameter in group["params"]]
        if sorted(given) != sorted(entries):
            raise ConfigError(
                f"param_groups hold {len(given)} parameters; they must hold each of the {len(entries)} that this engine"
                " trains once, and no other"
            )
        self.optimizer.replace_groups(groups)
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                entry = entries[id(parameter)]
                entry.place = replace(entry.place, group=number)

    def show_weights(self, module: nn.Module) -> None:
        """Inside a forward of the model, for code that reads the parameters of one of its units instead of calling it:
        until that forward is over they are copies where the model computes, and gradients that reach these count."""
        hidden = self.attachment.hidden
        unit = next((unit for unit in self.partition.units if unit.module is module), None)
        if hidden is None or unit is None:
            return  # what is read is where the model computes already
        weights = self.weights.fetch(unit, backward=False, together=False)
        with torch.no_grad(), self.device.computing():
            copies = {slot: weight.clone() for slot, weight in weights.items()}  # the slot is taken for other units
        hidden.show(module, copies)

    def unit_hashes(self) -> dict[str, str]:
        """SHA-256 of what is held of each unit (layer) by its name: weights, optimizer state, step counters; and of the
        model's buffers. Two engines of which they are equal train on alike."""
        from megatrain.engine import checkpoints

        self._require_open()
        return checkpoints.unit_hashes(self)

    def wait_for_save(self) -> None:
        """Return when no save is under way. Raises MegaTrainError, once, where the last one has failed."""
        save, self._save = self._save, None
        if save is not None:
            save.wait()

    def load(
        self, folder: str | os.PathLike[str], *, verify: bool = True, key_file: str | os.PathLike[str] | None = None
    ) -> dict[str, Any]:
        """Take on the state that `save` has written, of the same model, precision, optimizer and param groups; returns
        its `run`. Gradients gathered so far are dropped. Where the checkpoint is not as it was written or does not fit,
        IntegrityError or ConfigError says so, and nothing is changed. A model whose weights are fused when they are
        loaded needs memory for them a second time here; `from_checkpoint` needs none."""
        from megatrain.engine import checkpoints

        self._require_open()
        self.wait_for_save()
        self.discard_gradients()
        key = None if key_file is None else read_key(key_file)
        return dict(checkpoints.load(self, Path(folder).expanduser(), weights=True, verify=verify, key=key).run)

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        """By parameter number in the param groups: step, exp_avg and exp_avg_sq in the parameter's shape (views where
        they are in host memory, float32; with moments of one byte int8 and uint8, and their scales)."""
        self.flush()
        return OptimizerState(self.store, self.partition, self.optimizer.param_groups).read()

    def load_optimizer_state(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """The inverse. Raises ConfigError for moments of another kind."""
        self.wait_for_save()
        self.flush()
        OptimizerState(self.store, self.partition, self.optimizer.param_groups).write(state)

    def memory_report(self) -> dict[str, int]:
        """Bytes that the host holds now, by category; of saved inputs, the most in the last pass."""
        inputs = self.weights.inputs
        return self.store.bytes_by_category() | {"saved inputs": inputs.host_bytes if inputs is not None else 0}

    # -- devices, and the end -----------------------------------------------------------------------------------

    def _connect(self, slots: int | None) -> None:
        """Weights and gradients where they lie, or on their way to a device with memory of its own and back."""
        store, part, device = self.store, self.partition, self.device
        self.weights: Weights
        self.checks: DeviceChecks | None
        gradient_stream = resident = self.checks = None
        book = store.book
        for reader in part.units if book is not None else ():
            store.regions_read(reader.index, reader.slots)
        if streams(device):
            self._closing.callback(device.close)
            host_thread = HostThread("host-updates")
            self._closing.callback(host_thread.close)
            self.checks = DeviceChecks(device, store, book) if book is not None else None
            self.updates = PendingUpdates(store, part, device, host_thread, self.checks)
            for slot in part.slots:
                if slot.index not in store.slots:
                    device.pin(store.take_over_as_it_is(slot))
            self.weights = WeightStream(device, store, part, self.updates, slots or DEFAULT_SLOTS, self.checks)
            self._closing.callback(self.weights.close)
            largest_bytes = setup.largest_gradient_bytes(store)
            gradient_stream = GradientStream(device, host_thread, largest_bytes, self.checks)
            resident = ResidentGradients(device) if store.on_device else None
            for unit in store.units.keys() - store.on_device:
                device.pin(store.unit_memory(unit))
                for slab in store.units[unit].slabs:
                    if slab.gradient is not None:
                        device.pin(slab.gradient)
        else:
            self.updates = PendingUpdates(store, part, device)
            host_checks = HostChecks(store, part, book) if book is not None else None
            self.weights = HostWeights(part, self.updates, host_checks)
        memory = GradientMemory(store, device, lends=not self.keeps_gradients)
        settle, complete = self.updates.settle, self._update_complete_unit
        self.gradients = GradientBook(
            store, part, memory, settle=settle, complete=complete, stream=gradient_stream, resident=resident
        )
        self._closing.callback(self.gradients.close)

    @property
    def exposed_seconds(self) -> float:
        """Time that computation has spent waiting for the optimizer so far."""
        return self.updates.exposed_seconds + self.weights.exposed_seconds

    def close(self) -> None:
        """Finish the updates and give the model its own forward back; its parameters keep their values. An error of an
        update is raised when all is closed."""
        if not self._attached:
            return
        self._attached = False
        with closing(self.store), self._closing:  # from the last to the first, whatever one of them raises
            try:
                self.wait_for_save()
            finally:
                try:
                    self.updates.flush()
                finally:
                    self.store.bring_home()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
