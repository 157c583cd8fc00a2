"""Bytes by category before anything is allocated, and the refusal when they do not fit."""

from dataclasses import dataclass

from megatrain.errors import CapacityError
from megatrain.memory.layout import SlabLayout
from megatrain.sizes import format_bytes

ARRIVING_UNITS = 2  # gradients that come from a device and have no place of their own: one arrives, one is used


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Host bytes that the engine will hold for good (`state`), and for the length of a step (`transient`). The
    categories `page_locked` among them are what a streaming device copies from and to."""

    parameters: int
    state: dict[str, int]
    transient: dict[str, int]
    page_locked: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(self.state.values()) + sum(self.transient.values())

    @property
    def page_locked_bytes(self) -> int:
        held = self.state | self.transient
        return sum(held[name] for name in self.page_locked)

    def lines(self) -> list[str]:
        """One line per category: bytes, and bytes per parameter."""
        rows = [*self.state.items(), *self.transient.items(), ("total", self.total_bytes)]
        if self.page_locked:
            rows.append(("page-locked", self.page_locked_bytes))
        return [f"{name:<12} {format_bytes(n):>10}  {n / self.parameters:6.2f} B/parameter" for name, n in rows]


def plan_memory(units: dict[int, list[SlabLayout]], *, keep_gradients: bool, streaming: bool = False) -> MemoryPlan:
    """Plan for slab layouts by unit. `keep_gradients`: all gradients stay on the host until the global norm is known;
    otherwise one unit's at a time. `streaming`: units compute on a device with memory of its own."""
    slabs = [slab for unit in units.values() for slab in unit]
    gradient_bytes = [sum(slab.gradient_bytes for slab in unit) for unit in units.values()]
    largest_gradient = max(gradient_bytes, default=0)
    state = {
        "weights": sum(s.weight_bytes for s in slabs),
        "remainders": sum(s.remainder_bytes for s in slabs),
        "exp_avg": sum(s.moment_bytes for s in slabs),
        "exp_avg_sq": sum(s.moment_bytes for s in slabs),
        "gradients": sum(gradient_bytes) if keep_gradients else largest_gradient,
    }
    parameters = sum(place.count for slab in slabs for place in slab.places)
    if streaming:  # gradients add up on the device; a further one of a step, of a caller's own loop, is added here
        arriving = ARRIVING_UNITS * largest_gradient
        state["gradients"] = sum(gradient_bytes) if keep_gradients else arriving
        transient = {"arriving gradients": arriving} if keep_gradients else {}
        return MemoryPlan(parameters, state, transient, ("weights", "gradients", *transient))
    # while a unit is differentiated: its fp32 sum over micro-batches, and one gradient in its own dtype
    largest = max((sum(s.moment_bytes + s.gradient_bytes for s in unit) for unit in units.values()), default=0)
    return MemoryPlan(parameters, state, {"gradient sum": largest})


def require_fit(plan: MemoryPlan, free_bytes: int, already_held_bytes: int) -> None:
    """Raise CapacityError naming the missing bytes. `already_held_bytes`: the model's own tensors, which the store
    replaces one by one."""
    available = free_bytes + already_held_bytes
    missing = plan.total_bytes - available
    if missing > 0:
        parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in (plan.state | plan.transient).items() if n)
        raise CapacityError(
            f"host memory: {format_bytes(missing)} missing: {plan.parameters:,} parameters need "
            f"{format_bytes(plan.total_bytes)} ({parts}) and {format_bytes(available)} can be had"
        )
