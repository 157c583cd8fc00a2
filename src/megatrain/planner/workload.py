"""A model as a plan sees it: for each unit its bytes, laid out by the engine's own functions, and what it computes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from megatrain.engine import setup
from megatrain.engine.device_slots import image_ends
from megatrain.engine.gradient_stream import largest_staging_bytes
from megatrain.engine.weight_stream import small_units
from megatrain.errors import ConfigError
from megatrain.memory.layout import BYTES, SlabLayout
from megatrain.memory.store import ALL_UNITS_STRAY, TORCH_DTYPE
from megatrain.model.freezing import freeze as freeze_parameters
from megatrain.model.head import base_of
from megatrain.model.loading import build_on_meta
from megatrain.model.partition import ParameterSlot, Partition, Unit, partition
from megatrain.model.sequence_chunks import part_tokens
from megatrain.optim.adamw import AdamW
from megatrain.planner.flops import UnitFlops
from megatrain.planner.meta_pass import MetaPass, UnitRun, attentions, run_on_meta

_ROUTED_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True, slots=True)
class InParts:
    """A unit over a part of the sequence at a time, as far as it can: bytes of its graph for one sequence, what
    one part of it takes while it is differentiated, how much of its forward each backward repeats, and bytes of its
    inputs without a gradient."""

    graph: int
    part: int
    repeated: float
    constants: int


@dataclass(frozen=True, slots=True)
class UnitWork:
    """One unit. Bytes of its state are in `slabs`; `image_bytes` are its weights in a device slot, those that are homed
    in other units included; `copied_bytes` is what of them crosses the link; `link_gradient_bytes` what leaves as its
    gradient, `staging_bytes` with every parameter on a cache line of its own. `inputs` and `graph` are bytes that one
    sequence leaves: what it keeps from forward to backward, what its graph holds beside that; `constants` are inputs
    without a gradient, which units share. `in_parts`: where it runs over a part of the sequence at a time."""

    index: int
    name: str
    parameters: int
    slabs: tuple[SlabLayout, ...]
    image_bytes: int
    copied_bytes: int
    link_gradient_bytes: int
    staging_bytes: int
    flops: UnitFlops
    inputs: int
    graph: int
    constants: int
    in_parts: InParts | None
    reads: tuple[int, ...]

    def held_graph(self, *, chunked: bool) -> int:
        """Bytes of the graph of one sequence."""
        return self.in_parts.graph if chunked and self.in_parts is not None else self.graph

    def held_constants(self, *, chunked: bool) -> int:
        """Bytes of the inputs without a gradient: no masks of sequence x sequence where it runs in parts."""
        return self.in_parts.constants if chunked and self.in_parts is not None else self.constants

    @property
    def weight_bytes(self) -> int:
        return sum(s.weight_bytes for s in self.slabs)

    @property
    def gradient_bytes(self) -> int:
        """As the host keeps it."""
        return sum(s.gradient_bytes for s in self.slabs)

    @property
    def sum_bytes(self) -> int:
        """Of its gradient as an fp32 sum."""
        return sum(s.moment_bytes for s in self.slabs)

    @property
    def remainder_bytes(self) -> int:
        return sum(s.remainder_bytes for s in self.slabs)

    @property
    def state_count(self) -> int:
        """Elements that carry optimizer state."""
        return sum(s.state_count for s in self.slabs)


@dataclass(frozen=True, eq=False)  # as itself alone it is what schedules are remembered by
class Workload:
    """A model in one precision at one sequence length. `order`: units of the base in the order of their calls; `head`:
    units that run together, forward and backward at once, chunk by chunk. `chunk_tokens`: of the head, on the host.
    `part_tokens`: of the parts in which units may run; None where sequences are too short for that."""

    name: str
    precision: str
    seq_len: int
    vocabulary: int
    units: tuple[UnitWork, ...]
    strays: UnitWork | None
    order: tuple[int, ...]
    head: tuple[int, ...]
    chunk_tokens: int
    part_tokens: int | None
    head_in_chunks: bool
    complete: bool
    runs: Mapping[int, UnitRun]
    model: nn.Module

    @cached_property
    def homes(self) -> tuple[UnitWork, ...]:
        """All that holds state: units, and stray parameters."""
        return (*self.units, *([self.strays] if self.strays else []))

    @cached_property
    def small(self) -> frozenset[int]:
        """Units that have device memory of their own instead of a slot."""
        return frozenset(small_units({u.index: u.image_bytes for u in self.units}))

    @property
    def parameters(self) -> int:
        return sum(u.parameters for u in self.homes)

    @property
    def active_parameters(self) -> int:
        """Of the matrices, what one token passes (the embedding is looked up, not passed)."""
        return sum(u.flops.matrix_elements for u in self.units)

    @property
    def layouts(self) -> dict[int, list[SlabLayout]]:
        return {u.index: list(u.slabs) for u in self.homes if u.slabs}

    @property
    def itemsize(self) -> int:
        return BYTES[self.precision]


def build_workload(
    model_config: Any,
    *,
    precision: str,
    seq_len: int,
    optimizer: AdamW | None = None,
    attention: str | None = None,
    sequence_chunk_tokens: int | str = "auto",
    name: str = "",
    freeze: str | Sequence[str] = (),
) -> Workload:
    """From a transformers configuration. Nothing is allocated. `sequence_chunk_tokens`: the parts in which units would
    run. `freeze`: as the engine's. Raises ConfigError."""
    model = build_on_meta(model_config, attn_implementation=attention)
    freeze_parameters(model, freeze)
    part = partition(model)
    _, group_of = (optimizer or AdamW()).group_slots(part.slots)
    dtypes = setup.weight_dtypes(model, part, precision)
    layouts = setup.lay_out_units(part, dtypes, group_of)
    compute = build_on_meta(model_config, dtype=TORCH_DTYPE[precision], attn_implementation=attention)
    unfreeze = freeze_parameters(compute, freeze)
    passed = run_on_meta(compute, seq_len)
    if any(u.trainable and u.index not in passed.runs for u in part.units):
        unfreeze()  # of what text alone does not reach, as images do, gradients come in with the first hidden states
        passed = run_on_meta(compute, seq_len)
    part_of_sequence = part_tokens(sequence_chunk_tokens, seq_len)
    in_parts = MetaPass() if part_of_sequence is None else run_on_meta(compute, seq_len, sequence_chunk_tokens)
    freeze_parameters(compute, freeze)
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    share = _expert_share(text)
    base = base_of(model)
    inside = _units_inside(part, base) if base is not None else {u.index for u in part.units}
    units = tuple(
        _unit_work(u, part, layouts, dtypes, passed, in_parts, seq_len, share, text, in_head=u.index not in inside)
        for u in part.units
    )
    order = tuple(u for u in passed.order if u in inside)
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ConfigError(f"model type {model_config.model_type} has no vocabulary; plans are for models of text")
    return Workload(
        name=name or str(model_config.model_type),
        precision=precision,
        seq_len=seq_len,
        vocabulary=vocabulary,
        units=units,
        strays=_strays_work(part, layouts, dtypes),
        order=order,
        head=tuple(u for u in passed.order if u not in inside),
        chunk_tokens=setup.host_chunk_tokens(vocabulary) if base is not None else seq_len,
        part_tokens=part_of_sequence,
        head_in_chunks=base is not None,
        complete=passed.complete,
        runs=passed.runs,
        model=compute,
    )


def _units_inside(part: Partition, module: nn.Module) -> set[int]:
    inside = {id(m) for m in module.modules()}
    return {u.index for u in part.units if id(u.module) in inside}


def _unit_work(
    unit: Unit,
    part: Partition,
    layouts: Mapping[int, list[SlabLayout]],
    dtypes: Mapping[int, str],
    passed: MetaPass,
    in_parts: MetaPass,
    seq_len: int,
    expert_share: float,
    text: Any,
    *,
    in_head: bool,
) -> UnitWork:
    slabs = tuple(layouts.get(unit.index, ()))
    homed = part.homes(unit)
    foreign = [_bytes_of(s, dtypes) for s in unit.slots if s.units[0] != unit.index]
    home_bytes = sum(s.weight_bytes for s in slabs)
    pieces = [*([home_bytes] if home_bytes else []), *foreign]
    run = passed.runs.get(unit.index, UnitRun(0, 0))
    # the head's hidden states are differentiated in any case
    passes = in_head or unit.index not in passed.runs or run.input_bytes > 0
    flops = replace(_unit_flops(unit, expert_share, text), trained=unit.trainable, passes=passes)
    return UnitWork(
        index=unit.index,
        name=unit.name,
        parameters=sum(s.parameter.numel() for s in homed),
        slabs=slabs,
        image_bytes=image_ends(pieces)[-1] if pieces else 0,
        copied_bytes=sum(pieces),
        link_gradient_bytes=sum(_bytes_of(s, dtypes) for s in homed if s.parameter.requires_grad),
        staging_bytes=_staging(homed, dtypes),
        flops=flops,
        inputs=run.input_bytes,
        graph=run.graph_bytes,
        constants=run.constant_bytes,
        in_parts=_in_parts(in_parts.runs.get(unit.index), seq_len, flops),
        reads=tuple(sorted({s.units[0] for s in unit.slots})),
    )


def _in_parts(run: UnitRun | None, seq_len: int, flops: UnitFlops) -> InParts | None:
    """None where nothing of the unit runs in parts."""
    if run is None or not run.part_bytes:
        return None
    whole = flops.forward(seq_len)
    repeated = 2 * run.part_elements * seq_len + (flops.attention_forward(seq_len) if run.blockwise else 0)
    return InParts(run.graph_bytes, run.part_bytes, repeated / whole if whole else 1.0, run.constant_bytes)


def _strays_work(
    part: Partition, layouts: Mapping[int, list[SlabLayout]], dtypes: Mapping[int, str]
) -> UnitWork | None:
    slabs = tuple(layouts.get(ALL_UNITS_STRAY, ()))
    if not slabs:
        return None
    n_bytes = sum(s.weight_bytes for s in slabs)
    return UnitWork(
        index=ALL_UNITS_STRAY,
        name="stray parameters",
        parameters=sum(s.parameter.numel() for s in part.strays),
        slabs=slabs,
        image_bytes=n_bytes,
        copied_bytes=n_bytes,
        link_gradient_bytes=sum(_bytes_of(s, dtypes) for s in part.strays if s.parameter.requires_grad),
        staging_bytes=_staging(part.strays, dtypes),
        flops=UnitFlops(0),
        inputs=0,
        graph=0,
        constants=0,
        in_parts=None,
        reads=(ALL_UNITS_STRAY,),
    )


def _bytes_of(slot: ParameterSlot, dtypes: Mapping[int, str]) -> int:
    return slot.parameter.numel() * BYTES[dtypes[slot.index]] if slot.index in dtypes else 0


def _staging(slots: list[ParameterSlot], dtypes: Mapping[int, str]) -> int:
    trained = [s for s in slots if s.parameter.requires_grad and s.index in dtypes]
    return largest_staging_bytes([[(s.parameter.numel(), BYTES[dtypes[s.index]]) for s in trained]])


def _unit_flops(unit: Unit, expert_share: float, text: Any) -> UnitFlops:
    """Matrices by their shape: what has two dimensions or more multiplies, but for an embedding's table."""
    elements = 0.0
    for owner, attribute, slot in unit.places:
        matrix = slot.parameter.ndim >= 2 and not isinstance(owner, nn.Embedding)
        # biases of fused experts have two dimensions, too
        if matrix and not attribute.endswith("bias"):
            elements += slot.parameter.numel() * (expert_share if _ROUTED_EXPERTS.search(slot.name) else 1.0)
    width, window = 0, None
    for module in attentions(unit.module):
        width += _attention_width(module, text)
        found = getattr(module, "sliding_window", None)
        window = found if isinstance(found, int) and found > 0 else window
    return UnitFlops(round(elements), width, window)


def _attention_width(module: nn.Module, text: Any) -> int:
    """Heads x (width of a key + width of a value)."""
    heads: Any = getattr(module, "num_heads", None) or getattr(text, "num_attention_heads", 0)
    if hasattr(module, "qk_head_dim") and hasattr(module, "v_head_dim"):
        return int(heads * (module.qk_head_dim + module.v_head_dim))  # type: ignore[operator]
    head_dim = getattr(module, "head_dim", None) or getattr(text, "head_dim", None)
    if not isinstance(head_dim, int):
        head_dim = getattr(text, "hidden_size", 0) // max(1, heads)
    return int(2 * heads * head_dim)


def _expert_share(text: Any) -> float:
    """The share of routed experts that a token passes; 1 without experts."""
    count = next((getattr(text, n) for n in _EXPERT_COUNTS if isinstance(getattr(text, n, None), int)), 0)
    active = next((getattr(text, n) for n in _EXPERTS_PER_TOKEN if isinstance(getattr(text, n, None), int)), 0)
    return active / count if count and active else 1.0
