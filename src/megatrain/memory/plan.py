"""Bytes by category before anything is allocated, and the refusal when they do not fit."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from megatrain.errors import CapacityError
from megatrain.memory.layout import SlabLayout
from megatrain.memory.pieces import buffer_bytes, disk_bytes
from megatrain.memory.slab_state import moment_bytes
from megatrain.memory.spilled_states import BUFFERS
from megatrain.memory.witness import witness_bytes
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
    spilled: Mapping[int, int] = field(default_factory=dict)  # bytes of optimizer state on disk, by unit
    resident: Mapping[int, int] = field(default_factory=dict)  # bytes in a device's memory, by unit

    @property
    def disk_bytes(self) -> int:
        return sum(self.spilled.values())

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
        if self.disk_bytes:
            rows.append(("on disk", self.disk_bytes))
        if self.resident:
            rows.append(("on device", sum(self.resident.values())))
        return [f"{name:<12} {format_bytes(n):>10}  {n / self.parameters:6.2f} B/parameter" for name, n in rows]


def plan_memory(
    units: dict[int, list[SlabLayout]],
    *,
    keep_gradients: bool,
    streaming: bool = False,
    moments: str = "fp32",
    spilled: Collection[int] = (),
    resident: Mapping[int, int] | None = None,
) -> MemoryPlan:
    """Plan for slab layouts by unit. `keep_gradients`: all gradients stay on the host until the global norm is known;
    otherwise one unit's at a time. `streaming`: units compute on a device with memory of its own. `moments`: fp32 or
    int8. `spilled`: units whose optimizer state is on disk. `resident`: bytes by unit that lies in the device's memory.
    """
    parameters = sum(place.count for unit in units.values() for slab in unit for place in slab.places)
    resident = resident or {}
    units = {unit: slabs for unit, slabs in units.items() if unit not in resident}
    slabs = [slab for unit in units.values() for slab in unit]
    on_disk = {unit: disk_bytes(slabs, moments) for unit, slabs in units.items() if unit in spilled}
    held = [slab for unit, slabs in units.items() if unit not in on_disk for slab in slabs]
    gradient_bytes = [sum(slab.gradient_bytes for slab in unit) for unit in units.values()]
    largest_gradient = max(gradient_bytes, default=0)
    state = {
        "weights": sum(s.weight_bytes for s in slabs),
        "remainders": sum(s.remainder_bytes for s in held),
        "exp_avg": sum(moment_bytes(s, moments) for s in held),
        "exp_avg_sq": sum(moment_bytes(s, moments) for s in held),
        "gradients": sum(gradient_bytes) if keep_gradients else largest_gradient,
        "witnesses": sum(witness_bytes(p.shape) for s in slabs if s.remainder_bytes for p in s.places if p.trainable),
    }
    if on_disk:
        state["disk buffers"] = BUFFERS * max(buffer_bytes(units[unit], moments) for unit in on_disk)
    if streaming:  # gradients add up on the device; a further one of a step, of a caller's own loop, is added here
        arriving = ARRIVING_UNITS * largest_gradient
        state["gradients"] = sum(gradient_bytes) if keep_gradients else arriving
        transient = {"arriving gradients": arriving} if keep_gradients else {}
        return MemoryPlan(parameters, state, transient, ("weights", "gradients", *transient), on_disk, resident)
    # while a unit is differentiated: its fp32 sum over micro-batches, and one gradient in its own dtype
    largest = max((sum(s.moment_bytes + s.gradient_bytes for s in unit) for unit in units.values()), default=0)
    return MemoryPlan(parameters, state, {"gradient sum": largest}, spilled=on_disk)


def require_fit(plan: MemoryPlan, available_bytes: int, most_bytes: int | None = None) -> None:
    """Raise CapacityError naming the missing bytes. `available_bytes`: free memory, and the model's own tensors, which
    the store replaces one by one. `most_bytes`: the setting host_memory."""
    limited = most_bytes is not None and most_bytes < available_bytes
    room = most_bytes if most_bytes is not None and limited else available_bytes
    missing = plan.total_bytes - room
    if missing > 0:
        parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in (plan.state | plan.transient).items() if n)
        allowed = f"engine.host_memory is {format_bytes(room)}" if limited else f"{format_bytes(room)} can be had"
        raise CapacityError(
            f"host memory: {format_bytes(missing)} missing: {plan.parameters:,} parameters need "
            f"{format_bytes(plan.total_bytes)} ({parts}) and {allowed}"
        )
