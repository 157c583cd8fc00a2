"""The public Engine: takes a model over and trains it."""

import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from megatrain.device.base import ComputeDevice, streams
from megatrain.device.trace import Trace
from megatrain.engine import setup
from megatrain.engine.compiled import check_compile, compile_blocks
from megatrain.engine.executor import Executor
from megatrain.engine.gradient_stream import GradientStream
from megatrain.engine.gradients import GradientBook
from megatrain.engine.host_thread import HostThread
from megatrain.engine.kept_graphs import KeepGraphs, KeptGraphs
from megatrain.engine.step import Batch, StepClock, StepStats, train_step
from megatrain.engine.targets import labels_are_shifted
from megatrain.engine.updates import PendingUpdates, gradient_arrays, unit_updates
from megatrain.engine.weight_stream import DEFAULT_SLOTS, WeightStream
from megatrain.engine.weights import HostWeights, Weights
from megatrain.errors import ConfigError, NonFiniteGradientError
from megatrain.memory.arena import keep_large_allocations_out_of_heap, reuse_freed_memory, trim_freed_memory
from megatrain.memory.limits import host_memory_limits
from megatrain.memory.plan import MemoryPlan, require_fit
from megatrain.memory.store import TORCH_DTYPE, HostStore, SlotState, gradient_buffers
from megatrain.model.block import LOOK_STEPS, UnitForward, install_units
from megatrain.model.fused_loss import liger_loss
from megatrain.model.head import ChunkedHead
from megatrain.model.hidden import HiddenParameters
from megatrain.model.kernels import choose_kernels, install_kernels
from megatrain.model.partition import partition
from megatrain.model.root import RootForward, guard, report_device, unguard
from megatrain.optim.adamw import AdamW, EngineOptimizer, check_learning_rate
from megatrain.optim.compilation import compile_kernels
from megatrain.optim.workers import Workers


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
    threads:       of the optimizer's kernels; None: as many as torch computes with.
    keep_graphs:   units that keep their graph instead of being recomputed, the same bits in less time: 'auto' (from
                   the second step on, as many as fit into half of the free memory), 'off', or a number of last units.
    slots:         units of a size whose weights may be on a streaming device at once; None: 2.
    compile:       'off', or 'blocks': blocks run as graphs of torch.compile, one per kind. Sums inside a block may then
                   be added up in another order (last bits), and the first steps wait for the compiler.
    kernels:       'torch': the model's own code; 'liger': Liger's kernels in place of parts of it, and for the head,
                   until `close()`; 'auto': liger where it is installed, the device is cuda and it knows the model.

    Raises ConfigError for a wrong setting and CapacityError when the plan does not fit into host memory.
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
        kernels: str = "auto",
        *,
        _mapped: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is a {type(model).__name__}; pass an nn.Module, or use Engine.from_pretrained")
        if any(isinstance(m.__dict__.get("forward"), UnitForward) for m in model.modules()):
            raise ConfigError("model: another Engine owns it or a part of it; close that one first")
        settings = {"clip_norm": clip_norm, "clip_scope": clip_scope, "device_memory": device_memory, "seed": seed}
        setup.check_arguments(optimizer, settings | {"threads": threads, "keep_graphs": keep_graphs, "slots": slots})
        self.model, self._compile = model, compile
        self.precision = setup.resolve_precision(precision, setup.make_device(device))
        self.device = setup.make_device(device, self.precision, setup.device_memory_bytes(device_memory))
        check_compile(compile, self.device.torch_device)
        chosen = choose_kernels(kernels, model, self.device)
        self.clip_norm, self.clip_scope, self.seed = clip_norm, clip_scope, seed
        self.keeps_gradients = setup.keeps_gradients(clip_norm, clip_scope)
        self.step_count = 0
        self.last_touched: frozenset[int] = frozenset()  # slots that got a gradient in the last step
        self._clip_override: float | None = None
        self._attached = False
        self._warned = False

        self.partition = partition(model)
        groups, group_of = (optimizer or AdamW()).group_slots(self.partition.slots)
        if not groups:
            raise ConfigError("model: all of its parameters are frozen; at least one must require a gradient")
        dtypes = setup.weight_dtypes(model, self.partition, self.precision)
        layouts = setup.lay_out_units(self.partition, dtypes, group_of)
        self.plan: MemoryPlan = setup.plan_for(layouts, clip_norm, clip_scope)
        _refuse_meta(model)
        held = sum(slot.parameter.nbytes for slot in self.partition.slots)
        require_fit(self.plan, host_memory_limits().free_bytes, held)
        self.kernels, self._remove_kernels = install_kernels(chosen, model, required=kernels == "liger")

        keep_large_allocations_out_of_heap()
        compile_kernels()
        self.store = HostStore(Workers(threads or torch.get_num_threads()))
        for unit, slabs in layouts.items():
            self.store.take_over(unit, slabs, {slot.index: slot for slot in self.partition.slots}, mapped=_mapped)
        setup.cast_buffers(model, dtypes)
        if self.keeps_gradients:
            for state in self.store.units.values():
                for slab, buffer in zip(state.slabs, gradient_buffers(state.slabs), strict=True):
                    slab.gradient = buffer
        self._connect(slots)
        self.optimizer = EngineOptimizer(groups, optimizer or AdamW(), self)
        self.kept_graphs = KeptGraphs(keep_graphs, self.partition.units)
        self.executor = Executor(self.device, self.weights, self.gradients, self.kept_graphs)
        self._attach()
        trim_freed_memory()  # of taking the model over and probing its head
        reuse_freed_memory()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], optimizer: AdamW | None = None, **settings: Any) -> Self:
        """Load a transformers folder or hub id and take it over; settings as for `Engine`, and attn_implementation.

        The plan is checked before a weight is read. Weights come in the checkpoint's own precision and are released
        one by one as the store takes them, so host memory never holds more than the final state.
        """
        from megatrain.model.loading import build_on_meta, load_config, load_pretrained

        attention = settings.pop("attn_implementation", None)
        setup.check_arguments(optimizer, settings)
        device = setup.make_device(settings.get("device", "auto"))
        # in fp32 the model is made in fp32, so that what it computes from its dtype (tables, scales) is too
        exact = setup.resolve_precision(settings.get("precision", "auto"), device) == "fp32"
        check_plan(build_on_meta(load_config(str(path))), optimizer, settings)
        return cls(
            load_pretrained(str(path), attn_implementation=attention, dtype=torch.float32 if exact else None),
            optimizer,
            **settings,
            _mapped=True,
        )

    # -- training ---------------------------------------------------------------------------------------------

    def train_step(self, batches: Iterable[Batch], lr: float | None = None) -> StepStats:
        """One optimizer step over `batches`, its micro-batches: mappings of the model's arguments with `labels`.

        Labels are not shifted and -100 is ignored, as in transformers. The loss is the mean over the target tokens of
        all micro-batches, whatever their shapes. Weights are updated as if synchronously; a non-finite gradient norm
        skips the step and changes nothing (NonFiniteGradientError where units are updated before the norm is known).
        """
        self._require_open()
        return train_step(self, _checked_batches(batches), lr)

    def step(self, lr: float | None = None) -> StepStats:
        """Apply the gradients of the backward calls since the last step (`engine.model(**batch).loss.backward()`)."""
        self._require_open()
        clock = StepClock(self)
        self.begin_step(lr)
        self.gradients.finish()
        norm = self.gradients.norm()
        skipped = not self.decide_update(norm)
        return clock.stats(None, norm, 0, skipped)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The norm of the gradients gathered so far, fp64; the next `step` clips to `max_norm` instead of clip_norm."""
        self._require_open()
        self.gradients.finish()
        self._clip_override = float(max_norm)
        return torch.tensor(self.gradients.norm(), dtype=torch.float64)

    def flush(self) -> None:
        """Return when all decided updates are in the weights."""
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

    # -- parts of a step --------------------------------------------------------------------------------------

    def begin_step(self, lr: float | None) -> None:
        if lr is not None:
            check_learning_rate(lr)
        self.store.check_addresses()
        self._notice_writes()
        if lr is not None:
            self.optimizer.set_lr(lr)

    def _require_open(self) -> None:
        if not self._attached:
            raise RuntimeError("this engine is closed")

    def _notice_writes(self) -> None:
        self.store.notice_writes(self.updates.is_pending)

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

    def watch_attributes(self) -> None:
        """In the first steps, notice what micro-batches in turns would read of one another."""
        if self.executor.generation < LOOK_STEPS:
            for block in self._blocks:
                block.attributes.watch()

    def seed_micro_batch(self, number: int) -> None:
        """Give the calling thread the random stream of micro-batch `number` of this step."""
        torch.manual_seed(stream_seed(self.seed, self.step_count, number))

    def decide_update(self, norm: float) -> bool:
        """Schedule the update of everything that has a gradient; False, with nothing changed, if norm is not finite."""
        finite = norm < float("inf")
        self.last_touched = frozenset(self.gradients.squares)
        if finite and self.gradients.keep:
            scale = self._clip_scale(norm) if self._scope == "global" else None
            for home, entries in sorted(self.gradients.touched().items()):
                unit_scale = self._clip_scale(self.gradients.unit_norm(entries)) if scale is None else scale
                self._schedule(home, entries, unit_scale)
            self.weights.before_update()
            self.updates.start()
        self.end_step()
        self.step_count += 1
        return finite

    def end_step(self) -> None:
        """Nothing of this step goes on: no gradient, no call whose backward is still to come."""
        self.gradients.clear()
        self._clip_override = None
        self.executor.weights_changed()

    def abort_step(self) -> None:
        """The step ended in an exception: weights are as they were, and the engine is ready for another one."""
        self.executor.abort_step()
        self.end_step()

    def _update_complete_unit(self, home: int, entries: list[SlotState]) -> None:
        """Without a global norm to wait for, a unit is updated as soon as its gradient is complete."""
        norm = self.gradients.unit_norm(entries)
        if not norm < float("inf"):
            name = self.partition.units[home].name if home >= 0 else "stray parameters"
            raise NonFiniteGradientError(
                f"step {self.step_count}: the gradient of {name} has norm {norm}; other units are already updated, so"
                " the step cannot be skipped. Go on from the last save, or use clip_norm with clip_scope='global'"
            )
        self._schedule(home, entries, self._clip_scale(norm) if self.clip_norm is not None else 1.0)
        self.updates.settle(home)

    def _schedule(self, home: int, entries: list[SlotState], scale: float) -> None:
        groups = self.optimizer.param_groups
        self.updates.schedule(home, unit_updates(entries, groups, scale, gradient_arrays(entries)))

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
        by_id = {id(slot.parameter): slot.index for slot in self.partition.slots}

        def read(_name: str, parameter: nn.Parameter) -> Tensor:
            index = by_id.get(id(parameter))
            exact = dtype == "fp32" and index is not None and index in self.store.slots
            return self.store.read_master(index) if exact and index is not None else parameter.detach()

        save_model(self.model, Path(folder), read, TORCH_DTYPE[dtype], tokenizer=tokenizer, **options)

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        """By parameter number in the param groups: step, exp_avg and exp_avg_sq (views, in the parameter's shape)."""
        self.flush()
        return {number: self._state_of(entry) for number, entry in self._numbered() if entry.steps}

    def load_optimizer_state(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        self.flush()
        for number, entry in self._numbered():
            if number not in state:
                self.store.reset_moments(entry.slot.index)
                continue
            entry.steps = int(state[number]["step"])
            views = self._state_of(entry)
            for name in ("exp_avg", "exp_avg_sq"):
                views[name].copy_(state[number][name])

    def _numbered(self) -> list[tuple[int, SlotState]]:
        slot_of = {id(slot.parameter): slot.index for slot in self.partition.slots}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [(number, self.store.slots[slot_of[id(p)]]) for number, p in enumerate(parameters)]

    def _state_of(self, entry: SlotState) -> dict[str, Any]:
        slab = entry.slab
        return {
            "step": torch.tensor(float(entry.steps)),
            "exp_avg": entry.view(torch.from_numpy(slab.exp_avg)),
            "exp_avg_sq": entry.view(torch.from_numpy(slab.exp_avg_sq)),
        }

    def memory_report(self) -> dict[str, int]:
        """Bytes that the store holds now, by category."""
        return self.store.bytes_by_category()

    # -- attaching to the model -------------------------------------------------------------------------------

    def _connect(self, slots: int | None) -> None:
        """Weights and gradients where they lie, or on their way to a device with memory of its own and back."""
        store, part, device = self.store, self.partition, self.device
        self.weights: Weights
        self._host_thread: HostThread | None = None
        gradient_stream = None
        if streams(device):
            self._host_thread = HostThread("host-updates")
            self.updates = PendingUpdates(store, part, device, self._host_thread)
            self.weights = WeightStream(device, store, part, self.updates, slots or DEFAULT_SLOTS)
            gradient_stream = GradientStream(device, self._host_thread, setup.largest_gradient_bytes(store))
            for unit in store.units:
                device.pin(store.unit_memory(unit))
                for slab in store.units[unit].slabs:
                    if slab.gradient is not None:
                        device.pin(slab.gradient)
        else:
            self.updates = PendingUpdates(store, part, device)
            self.weights = HostWeights(store, part, self.updates)
        self.gradients = GradientBook(
            store, part, settle=self.updates.settle, complete=self._update_complete_unit, stream=gradient_stream
        )

    @property
    def exposed_seconds(self) -> float:
        """Time that computation has spent waiting for the optimizer so far."""
        return self.updates.exposed_seconds + self.weights.exposed_seconds

    def _attach(self) -> None:
        model = self.model
        self._blocks = install_units(self.partition.units, self.executor)
        if self._compile == "blocks":
            compile_blocks(self._blocks)
        self.executor.hand_over.carried = [block.attributes.save for block in self._blocks]
        self.executor.watched = [block.attributes for block in self._blocks]
        self._undo: list[Callable[[], None]] = []
        flush: Callable[[], None] = self.flush
        hiding: Callable[[], AbstractContextManager[None]] = nullcontext
        if isinstance(self.weights, WeightStream):
            # what the model's own code may read is the stray parameters; units wait for theirs
            hidden = HiddenParameters(
                self.partition, self.device.torch_device, self.weights.strays, self.gradients.add_from_leaf
            )
            flush, hiding = _nothing, hidden.hiding
            setup.move_buffers(model, self.device.torch_device)
            self._undo.append(report_device(model, self.device.torch_device))
            self._undo.append(lambda: setup.move_buffers(model, torch.device("cpu")))
        self._root = RootForward(model, flush, self.executor.forward_pass, hiding, self.device.torch_device)
        model.forward = self._root  # type: ignore[assignment]
        self._hooks: list[Any] = []
        for index, entry in self.store.slots.items():
            if entry.slot.parameter.requires_grad:
                self._hooks.append(
                    entry.slot.parameter.register_post_accumulate_grad_hook(self._leaf_hook(index))  # type: ignore[func-returns-value]
                )
        for module in model.modules():
            self._hooks.append(module.register_state_dict_pre_hook(lambda *_: self.flush()))
            self._hooks.append(module.register_load_state_dict_pre_hook(lambda *_: self.flush()))
            self._hooks.append(
                module.register_load_state_dict_post_hook(lambda *_: self.store.notice_writes(self.updates.is_pending))
            )
        guard(model, self.device.torch_device)
        self.head = ChunkedHead(model, self._root, self.device.torch_device, self.executor.direct)
        if self.kernels.name == "liger":
            self.head.fuse(liger_loss())
            self.executor.abort_step()  # the probe was none
        self.executor.forget_order()
        # a head that was shown to run in chunks of shifted labels does shift them
        self.shifts_labels = self.head.reason is None or labels_are_shifted(model)
        model.__dict__["zero_grad"] = lambda set_to_none=True: self.discard_gradients()
        self._attached = True

    def _leaf_hook(self, index: int) -> Any:
        gradients = weakref.ref(self.gradients)  # the garbage collector does not see what a parameter's hook holds

        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            book = gradients()
            if gradient is not None and book is not None:
                book.add_from_leaf(index, gradient)

        return take

    def close(self) -> None:
        """Finish the updates and give the model its own forward back; its parameters keep their values."""
        if not self._attached:
            return
        self._attached = False
        self.flush()
        self.head.remove()
        for block in self._blocks:
            block.remove()
        self._remove_kernels()
        self.model.__dict__.pop("forward", None)
        self.model.__dict__.pop("zero_grad", None)
        for hook in self._hooks:
            hook.remove()
        unguard(self.model)
        for undo in self._undo:
            undo()
        self.executor.hand_over.close()
        self.weights.close()
        if self._host_thread is not None:
            self._host_thread.close()
        if streams(self.device):
            self.device.close()
        self.store.workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The micro-batches of a step as a list. Raises ConfigError where they are not mappings with labels."""
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        raise ConfigError(f"batches is a {type(batches).__name__}; it must be a list of micro-batches, such as [batch]")
    batches = list(batches)
    if not batches:
        raise ConfigError("batches is empty; a step needs at least one micro-batch")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"batches[{number}] is a {type(batch).__name__}; it must be a dict of the model's arguments with labels"
            )
        if "labels" not in batch:
            raise ConfigError(f"batches[{number}] has no labels; it has {', '.join(map(str, batch)) or 'nothing'}")
        if not isinstance(batch["labels"], Tensor):
            kind = type(batch["labels"]).__name__
            raise ConfigError(f"batches[{number}]['labels'] is of type {kind}; it must be a tensor of token ids")
    return batches


def _nothing() -> None:
    """Nothing to wait for."""


def stream_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of one micro-batch's random stream: distinct inputs give unrelated streams (SplitMix64's finalizer)."""
    mask = (1 << 64) - 1
    value = seed & mask
    for part in (step, micro_batch):
        value = (value + 0x9E3779B97F4A7C15 * (part + 1)) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value >> 1  # torch takes signed 64 bits


def _refuse_meta(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"model: {name} is on the meta device and has no value; load or initialise the model first"
            )
        if parameter.device.type != "cpu":
            raise ConfigError(f"model: {name} is on {parameter.device}; build the model on the cpu")


def check_plan(model: nn.Module, optimizer: AdamW | None, settings: Mapping[str, Any]) -> None:
    """Raise CapacityError where a model that exists only as shapes (on the meta device) would not fit."""
    setup.check_arguments(optimizer, settings)
    part = partition(model)
    _, group_of = (optimizer or AdamW()).group_slots(part.slots)
    device = setup.make_device(settings.get("device", "auto"))
    choose_kernels(settings.get("kernels", "auto"), model, device)
    precision = setup.resolve_precision(settings.get("precision", "auto"), device)
    layouts = setup.lay_out_units(part, setup.weight_dtypes(model, part, precision), group_of)
    plan = setup.plan_for(layouts, settings.get("clip_norm", 1.0), settings.get("clip_scope", "global"))
    require_fit(plan, host_memory_limits().free_bytes, 0)
