"""Which units lie in a device's memory for good, and whose optimizer state goes to disk. Pure arithmetic."""

from collections.abc import Callable, Collection, Mapping, Sequence

from megatrain.memory.plan import MemoryPlan


def choose_spilled(
    units: Sequence[int], plan_of: Callable[[frozenset[int]], MemoryPlan], host_bytes: int
) -> frozenset[int]:
    """The fewest of `units` with which `plan_of` them fits into `host_bytes`; all where none does.

    They are spread evenly over the order of updates, so that the disk works while other units are updated from memory.
    """
    for count in range(len(units) + 1):
        chosen = spread(units, count)
        if plan_of(chosen).total_bytes <= host_bytes:
            return chosen
    return frozenset(units)


def spread(units: Sequence[int], count: int) -> frozenset[int]:
    """`count` of `units`, at even distances."""
    return frozenset(units[(2 * i + 1) * len(units) // (2 * count)] for i in range(count))


def movable_units(reads: Mapping[int, Collection[int]]) -> list[int]:
    """Units that can lie in a device's memory, in order: they share no parameter. `reads`: by unit, the units in which
    the parameters that it reads are at home."""
    shared = {home for unit, homes in reads.items() for home in homes if home != unit}
    return sorted(unit for unit, homes in reads.items() if set(homes) == {unit} and unit not in shared)
