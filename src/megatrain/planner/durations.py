"""How long each operation of a step takes: from a machine's figures, or from units that were timed on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatrain.memory.pieces import cut
from megatrain.planner.hardware import Hardware
from megatrain.planner.placement import DEVICE, NVME, Placement, StepShape, state_bytes
from megatrain.planner.workload import UnitWork, Workload

_MOST_PIECES = 32  # of a unit's state on NVMe that are told apart: more would take long to play, and change little

# passes over what a graph holds, beside products: written and read going forward, twice that going back
_FORWARD_PASSES, _BACKWARD_PASSES = 2, 4


@dataclass(frozen=True, slots=True)
class UnitTimes:
    """Seconds of one micro-batch of `sequences`: forward, and backward once the forward has been run (again)."""

    sequences: int
    forward: float
    backward: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What was timed on this machine: units for one micro-batch (a head: all of its chunks), and seconds of a step that
    belong to none of them."""

    units: Mapping[int, UnitTimes] = field(default_factory=dict)
    overhead_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of a step by unit, over all micro-batches: `forward` and `backward` without repetition; `update` of its
    state, where that is; `land`: the host reads the gradient that has arrived; `pack`: the device rounds it and lays it
    out. Bytes per second of copies; bytes of state that NVMe has to read and to write by unit, and in how many pieces.
    `overhead`: of a step, beside all this."""

    forward: Mapping[int, float]
    backward: Mapping[int, float]
    update: Mapping[int, float]
    land: Mapping[int, float]
    pack: Mapping[int, float]
    h2d_bandwidth: float
    d2h_bandwidth: float
    nvme_read: float
    nvme_write: float
    nvme_bytes: Mapping[int, int]
    nvme_pieces: Mapping[int, int]
    overhead: float = 0.0


def durations(
    workload: Workload, placement: Placement, hardware: Hardware, sequences: int, measured: Measured | None = None
) -> Durations:
    """Of one step over `sequences`."""
    timed = measured.units if measured is not None else {}
    forward, backward = {}, {}
    for unit in workload.units:
        if unit.index in timed:
            times = timed[unit.index]
            count = sequences / times.sequences
            forward[unit.index], backward[unit.index] = times.forward * count, times.backward * count
        else:
            forward[unit.index], backward[unit.index] = _computed(unit, workload, hardware, sequences)
    for unit in workload.units:  # a part of a sequence is run once more to be differentiated
        if placement.chunked and unit.in_parts is not None:
            backward[unit.index] += unit.in_parts.repeated * forward[unit.index]
    several = StepShape(sequences, placement.micro_batch).micro_batches - 1
    for unit in workload.units:  # each further micro-batch adds its gradient to an fp32 sum: read two, write one
        added = unit.link_gradient_bytes + 2 * unit.sum_bytes
        backward[unit.index] += several * added / hardware.device_bandwidth
    on_nvme = [u for u in workload.homes if placement.tiers[u.index] == NVME]
    return Durations(
        forward=forward,
        backward=backward,
        update={u.index: _update(u, placement, hardware) for u in workload.homes},
        land={u.index: u.gradient_bytes / hardware.host_bandwidth for u in workload.homes},
        pack={u.index: (u.sum_bytes + u.gradient_bytes) / hardware.device_bandwidth for u in workload.homes},
        h2d_bandwidth=hardware.h2d_bandwidth,
        d2h_bandwidth=hardware.d2h_bandwidth,
        nvme_read=hardware.nvme_read,
        nvme_write=hardware.nvme_write,
        nvme_bytes={u.index: state_bytes(u, placement) for u in on_nvme},
        nvme_pieces={u.index: min(_MOST_PIECES, len(cut(u.index, u.slabs))) for u in on_nvme},
        overhead=measured.overhead_seconds if measured is not None else 0.0,
    )


def _computed(unit: UnitWork, workload: Workload, hardware: Hardware, sequences: int) -> tuple[float, float]:
    """(forward, backward): products at the rate of products, and passes over what a graph holds. The scores of
    attention are computed once more in its backward."""
    products = unit.flops.products_forward(workload.seq_len) * sequences / hardware.product_rate
    attention = unit.flops.attention_forward(workload.seq_len) * sequences / hardware.attention_rate
    moved = unit.graph * sequences / hardware.device_bandwidth
    flops = unit.flops
    return (
        products + attention + _FORWARD_PASSES * moved,
        (flops.trained + flops.passes) * products + 2.5 * flops.differentiated * attention + _BACKWARD_PASSES * moved,
    )


def _update(unit: UnitWork, placement: Placement, hardware: Hardware) -> float:
    on_device = placement.tiers[unit.index] == DEVICE
    bandwidth = hardware.device_bandwidth if on_device else hardware.host_bandwidth
    return update_bytes(unit, placement) / bandwidth


def update_bytes(unit: UnitWork, placement: Placement) -> int:
    """What AdamW reads and writes: weights, remainders and moments both, the gradient once."""
    trained = sum(s.gradient_bytes for s in unit.slabs)  # as many bytes as the weights that carry state
    return 2 * (trained + state_bytes(unit, placement)) + trained
