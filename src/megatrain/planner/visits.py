"""The order in which a step visits units, as the engine records it. Pure.

Units that are on the device anyway have no slot: small ones run within the visit before them, resident ones have a
visit without a fetch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatrain.planner.workload import Workload
from megatrain.schedule.operations import Visit


@dataclass(frozen=True, slots=True)
class PlannedVisit:
    """`visit` is the schedule's, with the units that need a slot; `runs` are all units that compute in it."""

    visit: Visit
    runs: tuple[int, ...]


def streamed_units(workload: Workload, tiers: Mapping[int, str]) -> dict[int, int]:
    """Bytes in a slot, of the units that go through slots."""
    return {
        u.index: u.image_bytes for u in workload.units if u.index not in workload.small and tiers[u.index] != "device"
    }


def planned_visits(workload: Workload, tiers: Mapping[int, str]) -> list[PlannedVisit]:
    """Forward in the order of calls, the head with its backward, and back as far as gradients are wanted."""
    streamed = streamed_units(workload, tiers)
    turns: list[tuple[tuple[int, ...], bool]] = [((unit,), False) for unit in workload.order]
    turns += [(workload.head, True)] if workload.head else []
    turns += [((unit,), True) for unit in backward_order(workload)]
    visits: list[PlannedVisit] = []
    for units, backward in turns:
        needing = tuple(u for u in units if u in streamed)
        alone = bool(visits) and all(u in workload.small and tiers[u] != "device" for u in units)
        if alone and visits[-1].visit.backward == backward:
            visits[-1] = PlannedVisit(visits[-1].visit, (*visits[-1].runs, *units))
        else:
            visits.append(PlannedVisit(Visit(needing, backward), tuple(units)))
    return visits


def backward_order(workload: Workload) -> list[int]:
    """Units of the base that have a backward: trained, or with something trained before them."""
    wanted = {u.index for u in workload.units if u.flops.differentiated}
    return [unit for unit in reversed(workload.order) if unit in wanted]


def saved_inputs(workload: Workload, sequences: int) -> dict[int, int]:
    """By unit, what all sequences of a step leave from forward to backward. A head keeps nothing: its backward follows
    at once."""
    return {u.index: u.inputs * sequences for u in workload.units if u.index not in workload.head and u.inputs}


def gradient_sums(workload: Workload, micro_batches: int) -> dict[int, int]:
    """By unit, its gradient as it adds up on the device: in fp32 once there is a second contribution. A parameter that
    several units read counts with the one whose backward is first."""
    chunks = micro_batches * -(-workload.seq_len // workload.chunk_tokens)
    backwards = [*workload.head, *backward_order(workload)]
    homes = {u.index: u for u in workload.units}
    counted: set[int] = set()
    sums: dict[int, int] = {}
    for reader in backwards:
        repeated = chunks > 1 if reader in workload.head else micro_batches > 1
        for home in homes[reader].reads:
            if home >= 0 and home not in counted:
                counted.add(home)
                several = repeated or sum(home in homes[r].reads for r in backwards) > 1
                n_bytes = homes[home].sum_bytes if several else homes[home].link_gradient_bytes
                sums[reader] = sums.get(reader, 0) + n_bytes
    return sums
