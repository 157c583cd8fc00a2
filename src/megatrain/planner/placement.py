"""Where a plan puts every byte, and how many bytes that takes. Pure arithmetic.

Tiers of a unit's state:

    host     weights, remainders and moments in host memory; weights stream through device slots; the host updates them
    device   all of it in device memory, updated there; nothing of the unit crosses the link
    nvme     remainders and moments on NVMe, read ahead of the host's update and written behind it; weights in host
             memory, streamed as above
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from megatrain.engine.gradient_stream import STAGING_BUFFERS
from megatrain.memory import slab_state
from megatrain.memory.layout import BYTES
from megatrain.memory.plan import plan_memory
from megatrain.model.head import BYTES_PER_LOGIT
from megatrain.planner.visits import PlannedVisit, gradient_sums, planned_visits, saved_inputs, streamed_units
from megatrain.planner.workload import UnitWork, Workload
from megatrain.schedule.build import build_schedule
from megatrain.schedule.check import check_schedule
from megatrain.schedule.operations import Schedule, Sizes, slot_classes

DEVICE, HOST, NVME = "device", "host", "nvme"
BYTES_PER_TOKEN_ID = 16  # of a step's micro-batches: input_ids and labels in int64
PROCESS_BYTES = 10**9  # Python, torch, kernels and the driver's share of host memory, where it cannot be measured
DEVICE_PROCESS_BYTES = 600 * 10**6  # of a CUDA context and its libraries
THREAD_BYTES = (
    35 * 10**6
)  # of each micro-batch's thread but the first: stacks and buffers of the math library (measured)
HEAP_GAPS = 0.2  # of kept graphs in the C heap, between what stays and what has gone (measured: 0 to 0.3)
RESERVED = frozenset({"arriving gradients"})  # which a step does not use: a caller's own loop does, which adds up here
_MOST_THREADS = 8  # for which that was measured; an allowance must not refuse a run of many small micro-batches


@dataclass(frozen=True, slots=True)
class Placement:
    """`tiers` by unit (-1: stray parameters). `slots`: units of a size whose weights may be on the device at once.
    `inputs_leave`: saved inputs wait on the host. `clip_scope`: 'global' keeps all gradients until the norm is known;
    'unit' and 'none' consume each as it is complete. `kept`: units that keep their graph instead of being run again.
    `chunked`: inside a unit norms and feed-forward run over a part of the sequence at a time."""

    tiers: Mapping[int, str]
    micro_batch: int
    slots: int = 2
    inputs_leave: bool = False
    moments: str = "fp32"
    clip_scope: str = "global"
    kept: frozenset[int] = field(default_factory=frozenset)
    chunked: bool = False

    @property
    def keeps_gradients(self) -> bool:
        return self.clip_scope == "global"

    def units_in(self, tier: str) -> list[int]:
        return sorted(unit for unit, where in self.tiers.items() if where == tier)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one optimizer step consists of."""

    sequences: int
    micro_batch: int

    @property
    def micro_batches(self) -> int:
        return -(-self.sequences // self.micro_batch)


Ledger = dict[str, dict[str, int]]  # bytes by tier and category


def moment_bytes(unit: UnitWork, moments: str) -> int:
    """Of both moments: fp32, or int8 with a scale in fp32 for each block of each of the two."""
    return 2 * sum(slab_state.moment_bytes(slab, moments) for slab in unit.slabs)


def state_bytes(unit: UnitWork, placement: Placement) -> int:
    """What the update needs beside weights: remainders and moments."""
    return unit.remainder_bytes + moment_bytes(unit, placement.moments)


def step_schedule(
    workload: Workload, placement: Placement, sequences: int, working: tuple[tuple[int, int], ...] = ()
) -> "StepSchedule":
    """The engine's operations of one step with this placement. `working`: what units hold while they run."""
    on_device = frozenset(placement.units_in(DEVICE))
    count = micro_batches(sequences, placement)
    return _step_schedule(workload, on_device, placement.slots, placement.inputs_leave, sequences, count, working)


@dataclass(frozen=True)
class StepSchedule:
    """`peak_bytes`: of device memory, slots included."""

    schedule: Schedule
    sizes: Sizes

    @cached_property
    def peak_bytes(self) -> int:
        return check_schedule(self.schedule, self.sizes)


@lru_cache(maxsize=256)  # many placements of a plan have one in common
def _step_schedule(
    workload: Workload,
    on_device: frozenset[int],
    slots: int,
    inputs_leave: bool,
    sequences: int,
    micro_batches: int,
    working: tuple[tuple[int, int], ...],
) -> StepSchedule:
    tiers = {u.index: DEVICE if u.index in on_device else HOST for u in workload.homes}
    visits = planned_visits(workload, tiers)
    streamed = streamed_units(workload, tiers)
    classes = slot_classes(streamed, [v.visit for v in visits if v.visit.units], slots) if streamed else ()
    gradients, readers = _leaving_gradients(workload, tiers, visits)
    sizes = Sizes(
        weights=streamed,
        gradients=gradients,
        saved_inputs={u: n for u, n in saved_inputs(workload, sequences).items() if u in streamed},
        inputs_leave=inputs_leave,
        gradient_sums=gradient_sums(workload, micro_batches),
        working=dict(working),
    )
    return StepSchedule(build_schedule([v.visit for v in visits], sizes, classes, readers=readers), sizes)


def micro_batches(sequences: int, placement: Placement) -> int:
    return StepShape(sequences, placement.micro_batch).micro_batches


def _leaving_gradients(
    workload: Workload, tiers: Mapping[int, str], visits: Sequence[PlannedVisit]
) -> tuple[dict[int, int], dict[int, list[int]]]:
    """(bytes that cross the link by unit, the streamed units after whose backward each is complete)."""
    gradients: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    for unit in workload.units:
        if unit.link_gradient_bytes and tiers[unit.index] != DEVICE:
            gradients[unit.index] = unit.link_gradient_bytes
            reading = [u.index for u in workload.units if unit.index in u.reads]
            # a small unit has no visit of its own: the streamed one beside it stands for it
            beside = {v.visit.units[0] for v in visits if v.visit.backward and v.visit.units and {*reading} & {*v.runs}}
            readers[unit.index] = sorted(beside) or reading
    return gradients, readers


def ledger(
    workload: Workload,
    placement: Placement,
    sequences: int,
    *,
    in_host_memory: bool,
    process: int,
    device_process: int = 0,
    emulated: bool = False,
) -> Ledger:
    """Bytes by tier and category while a step of `sequences` runs. `in_host_memory`: the host is its own device.
    `process`: what the process holds of host memory beside all this, `device_process` of the device's. `emulated`: the
    device is a part of host memory, and counts what the engine asks it for, which activations are not among."""
    host = _host_state(workload, placement, streaming=not in_host_memory)
    host["token ids"] = sequences * workload.seq_len * BYTES_PER_TOKEN_ID
    host["process"] = process
    inputs = sum(saved_inputs(workload, sequences).values())
    nvme = {"remainders": 0, "moments": 0}
    for unit in workload.homes:
        if placement.tiers[unit.index] == NVME:
            nvme["remainders"] += unit.remainder_bytes
            nvme["moments"] += moment_bytes(unit, placement.moments)
    if in_host_memory:
        host["gradient sum"] = _largest_sum(workload)
        host["saved inputs"] = inputs
        host |= _computing_on_the_host(workload, placement, sequences)
        return {HOST: _present(host)} | ({NVME: nvme} if any(nvme.values()) else {})
    device = _device_bytes(workload, placement, sequences, emulated=emulated)
    if emulated:
        host["device"] = sum(device.values())
        host |= _computing_on_the_host(workload, placement, sequences)
    else:
        device["process"] = device_process
    if placement.inputs_leave:
        schedule = step_schedule(workload, placement, sequences).schedule
        host["saved inputs"] = sum(op.n_bytes for op in schedule.operations if op.kind.value == "save")
    return {DEVICE: _present(device), HOST: _present(host), NVME: _present(nvme)}


def _computing_on_the_host(workload: Workload, placement: Placement, sequences: int) -> dict[str, int]:
    gaps = 0 if placement.chunked else HEAP_GAPS
    return {
        "kept graphs": int(kept_bytes(workload, placement, sequences) * (1 + gaps)),
        "working set": working_bytes(workload, placement, sequences, in_host_memory=True),
        "threads": _thread_bytes(workload, placement) * min(micro_batches(sequences, placement) - 1, _MOST_THREADS),
    }


def _thread_bytes(workload: Workload, placement: Placement) -> int:
    """Of each micro-batch's thread but the first. Most are gaps in the heap: of small graphs twice what these take in
    fp32, in which the host computes (measured)."""
    graph = max((u.graph for u in workload.units), default=0) * BYTES["fp32"] // workload.itemsize
    return min(THREAD_BYTES, 2 * placement.micro_batch * graph)


def _host_state(workload: Workload, placement: Placement, *, streaming: bool) -> dict[str, int]:
    """What the host holds for good of units that are not in device memory."""
    at_home = {u: slabs for u, slabs in workload.layouts.items() if placement.tiers[u] != DEVICE}
    plan = plan_memory(
        at_home,
        keep_gradients=placement.keeps_gradients,
        streaming=streaming,
        moments=placement.moments,
        spilled=placement.units_in(NVME),
    )
    return {
        "weights": plan.state["weights"],
        "remainders": plan.state["remainders"],
        "moments": plan.state["exp_avg"] + plan.state["exp_avg_sq"],
        "gradients": plan.state["gradients"],
        "arriving gradients": plan.transient.get("arriving gradients", 0),
        "witnesses": plan.state["witnesses"],
        "NVMe buffers": plan.state.get("disk buffers", 0),
    }


def held_before_steps(workload: Workload) -> int:
    """Device memory of an engine that has not run yet: small units, one slot of each size, staging."""
    streamed = {u.index: u.image_bytes for u in workload.units if u.index not in workload.small}
    slots = sum(c.slot_bytes for c in slot_classes(streamed, (), 1)) if streamed else 0
    small = sum(u.image_bytes for u in workload.homes if u.index not in streamed)
    return small + slots + STAGING_BUFFERS * max((u.staging_bytes for u in workload.homes), default=0)


def _device_bytes(workload: Workload, placement: Placement, sequences: int, *, emulated: bool) -> dict[str, int]:
    resident = [u for u in workload.homes if placement.tiers[u.index] == DEVICE]
    logits = tuple(dict.fromkeys(workload.head[-1:], logits_bytes(workload, placement.micro_batch)).items())
    planned = step_schedule(workload, placement, sequences, logits if emulated else ())
    schedule, sizes = planned.schedule, planned.sizes
    moving = planned.peak_bytes - schedule.slot_bytes
    # inputs of units without a slot stay where they are
    moving += sum(n for u, n in saved_inputs(workload, sequences).items() if u not in sizes.weights)
    small = sum(u.image_bytes for u in workload.units if u.index in workload.small and u not in resident)
    strays = workload.strays.image_bytes if workload.strays and workload.strays not in resident else 0
    sent = [u.staging_bytes for u in workload.homes if placement.tiers[u.index] != DEVICE]
    held = {
        "weights": sum(u.weight_bytes for u in resident),
        "remainders": sum(u.remainder_bytes for u in resident),
        "moments": sum(moment_bytes(u, placement.moments) for u in resident),
        "gradients": sum(u.gradient_bytes for u in resident),  # which wait for the end of the step in any case
        "weight slots": schedule.slot_bytes + small + strays,
        "gradient staging": STAGING_BUFFERS * max(sent, default=0),
        "saved inputs and gradient sums": moving,
    }
    if not emulated:
        held["kept graphs"] = kept_bytes(workload, placement, sequences)
        held["working set"] = working_bytes(workload, placement, sequences, in_host_memory=False)
    return held


def kept_bytes(workload: Workload, placement: Placement, sequences: int) -> int:
    kept = [u for u in workload.units if u.index in placement.kept]
    return sum(u.held_graph(chunked=placement.chunked) * sequences for u in kept)


def working_bytes(workload: Workload, placement: Placement, sequences: int, *, in_host_memory: bool) -> int:
    """While the most demanding unit is differentiated; or a chunk of the head with its logits. In the C heap what the
    one has freed is of little use to the other (measured), but where sequences run in parts, it gives all back. Beside
    the head there are all hidden states and their gradients; and all the time what units read without a gradient, such
    as rotary embeddings, of each micro-batch."""
    unit = max((_unit_bytes(u, placement) for u in workload.units if u.index not in workload.head), default=0)
    head = head_bytes(workload, placement.micro_batch)
    each = [u.held_constants(chunked=placement.chunked) for u in workload.units]
    constants = micro_batches(sequences, placement) * max(each, default=0)
    before = unit + head if in_host_memory and not placement.chunked else unit
    return constants + max(before, head + 2 * sequences * _hidden_bytes(workload))


def _hidden_bytes(workload: Workload) -> int:
    """Of one sequence, as the head gets them."""
    return max((u.inputs for u in workload.units), default=0)


def _unit_bytes(unit: UnitWork, placement: Placement) -> int:
    """The unit's graph for one micro-batch, as much again for gradients inside it, the gradients of its output and
    input, its weights' gradient before it is added up.

    In parts: the graph, without the norms and the feed-forward; then either a part of those while it is differentiated,
    or the gradients inside attention; the unit's output and the gradients of output and input; its weights' gradients
    as fp32 sums, too."""
    if not placement.chunked or unit.in_parts is None:
        return placement.micro_batch * (2 * unit.graph + 2 * unit.inputs) + unit.link_gradient_bytes
    graph = unit.in_parts.graph
    inside = max(unit.in_parts.part, graph - 2 * unit.inputs)
    return placement.micro_batch * (graph + inside + 3 * unit.inputs) + unit.link_gradient_bytes + unit.sum_bytes


def logits_bytes(workload: Workload, micro_batch: int) -> int:
    """Of a chunk of the head, as the engine tells the device."""
    return min(workload.chunk_tokens, micro_batch * workload.seq_len) * workload.vocabulary * BYTES_PER_LOGIT


def head_bytes(workload: Workload, micro_batch: int) -> int:
    """The logits of a chunk in the model's precision and in fp32, their softmax and its gradient; and beside them the
    gradients of the head's weights, of this chunk and of those before."""
    tokens = min(workload.chunk_tokens, micro_batch * workload.seq_len)
    trained = [u for u in workload.units if u.index in workload.head and u.flops.trained]
    weights = sum(u.flops.matrix_elements for u in trained) * workload.itemsize
    return tokens * workload.vocabulary * (2 * workload.itemsize + 3 * 4) + 2 * weights


def _largest_sum(workload: Workload) -> int:
    """Of a unit whose gradient adds up in fp32 beside its place."""
    return max((u.sum_bytes for u in workload.homes), default=0)


def _present(categories: dict[str, int]) -> dict[str, int]:
    return {name: n for name, n in categories.items() if n}
