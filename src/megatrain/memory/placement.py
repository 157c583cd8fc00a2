"""Which units' optimizer state goes to disk, when host memory does not hold all. Pure arithmetic."""

from collections.abc import Callable, Sequence

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
