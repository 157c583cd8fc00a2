"""The placement for a workload on a machine: micro-batch, slots, tiers, kept graphs.

Where the device has memory left over, as many of the first units as it holds are tried there for good. Where host
memory is short and there is a disk, state of units goes to that.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

from megatrain.device.cuda import USABLE_SHARE
from megatrain.engine.kept_graphs import graph_budget, last_that_fit
from megatrain.engine.setup import SMALL_UNIT_SHARE, check_resident_count, device_chunk_tokens, require_own_memory
from megatrain.engine.weight_stream import DEFAULT_SLOTS
from megatrain.memory.placement import movable_units, spread
from megatrain.model.head import BYTES_PER_LOGIT
from megatrain.planner.durations import Measured, durations
from megatrain.planner.hardware import Hardware
from megatrain.planner.placement import (
    DEVICE,
    DEVICE_PROCESS_BYTES,
    HOST,
    NVME,
    PROCESS_BYTES,
    Ledger,
    Placement,
    held_before_steps,
    ledger,
    state_bytes,
    step_schedule,
)
from megatrain.planner.simulate import Simulation, simulate
from megatrain.planner.workload import Workload

_SPARE_SHARE = 0.05  # of device memory that units leave free: what a step needs there is estimated
_AS_GOOD_AS_EQUAL = (
    0.01  # of step times that are predicted; the simpler placement, which takes less memory, comes first
)
_ENOUGH_TOKENS = 16 * 1024  # of a micro-batch: beyond, products do not become faster, and memory grows


@dataclass(frozen=True, slots=True)
class Settings:
    """What a plan has to keep to. None: the planner chooses.

    sequences: of one optimizer step. clip_scope: 'global', 'unit', or 'none'. keep_graphs: as in the engine. chunked:
    long sequences run in parts. resident: first units in device memory. Memory limits in bytes, None: the hardware's;
    nvme: bytes that may be used there, 0 for none. process_bytes: of host memory, beside the plan's own. emulated: the
    device lies in host memory and does not count what units compute there, as the lagged one.
    """

    sequences: int
    micro_batch: int | None = None
    slots: int | None = None
    resident: int | None = None
    clip_scope: str = "global"
    moments: str = "fp32"
    chunked: bool = True
    keep_graphs: str | int = "auto"
    device_memory: int | None = None
    host_memory: int | None = None
    nvme: int = 0
    process_bytes: int = PROCESS_BYTES
    emulated: bool = False


@dataclass(frozen=True)
class Candidate:
    """A placement with its bytes, what of them is missing by tier, and its step, which is simulated when asked for."""

    placement: Placement
    ledger: Ledger
    missing: dict[str, int]
    simulate: Callable[[], Simulation]

    @property
    def fits(self) -> bool:
        return not self.missing

    @cached_property
    def simulation(self) -> Simulation:
        return self.simulate()


def limits(hardware: Hardware, settings: Settings) -> dict[str, int]:
    """Bytes that may be used, by tier. Of a device's memory libraries and gaps take some, unless a limit is given."""
    host = settings.host_memory if settings.host_memory is not None else hardware.host_memory
    found = {HOST: host, NVME: settings.nvme}
    if hardware.device_memory is not None:
        usable = int(hardware.device_memory * USABLE_SHARE)
        found[DEVICE] = settings.device_memory if settings.device_memory is not None else usable
    return found


def _with_its_chunks(workload: Workload, hardware: Hardware, settings: Settings) -> Workload:
    """The head in chunks as the engine would choose them for the device."""
    unlimited = settings.emulated and settings.device_memory is None
    if hardware.computes_in_host_memory or unlimited or not workload.head_in_chunks:
        return workload
    held = held_before_steps(workload)
    tokens = device_chunk_tokens(limits(hardware, settings)[DEVICE], held, BYTES_PER_LOGIT * workload.vocabulary)
    return _with_chunks_of(workload, tokens)


@lru_cache(maxsize=32)  # the same workload for the same tokens: schedules are remembered by it
def _with_chunks_of(workload: Workload, tokens: int) -> Workload:
    return replace(workload, chunk_tokens=tokens)


def choose(workload: Workload, hardware: Hardware, settings: Settings, measured: Measured | None = None) -> Candidate:
    """The fastest placement that fits; where none does, the one that is missing least."""
    chooser = _Chooser(_with_its_chunks(workload, hardware, settings), hardware, settings, measured)
    found = chooser.best(map(chooser.evaluate, chooser.placements()))
    if not found.fits and settings.nvme:
        found = chooser.best([found, *map(chooser.evaluate, map(chooser.with_nvme, chooser.placements()))])
    return found


class _Chooser:
    def __init__(self, workload: Workload, hardware: Hardware, settings: Settings, measured: Measured | None) -> None:
        self.workload, self.hardware, self.settings, self.measured = workload, hardware, settings, measured
        self.limits = limits(hardware, settings)
        self.all_host = {u.index: HOST for u in workload.homes}
        self.movable = [u for u in movable_units({u.index: u.reads for u in workload.units}) if u in self.all_host]
        if settings.resident:
            require_own_memory(settings.resident, hardware.name, there_is=not hardware.computes_in_host_memory)
            check_resident_count(settings.resident, len(self.movable))

    def best(self, candidates: Iterable[Candidate]) -> Candidate:
        """The fastest that fits, or else what is missing least; of those that are as good as equal the first."""
        found = list(candidates)
        fitting = [c for c in found if c.fits]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            least = min(c.simulation.step_seconds for c in fitting)
            return next(c for c in fitting if c.simulation.step_seconds <= least * (1 + _AS_GOOD_AS_EQUAL))
        return min(found, key=lambda c: sum(c.missing.values()))

    def evaluate(self, placement: Placement) -> Candidate:
        placement = self._with_kept_graphs(placement)
        bytes_needed = self.ledger(placement)
        return Candidate(placement, bytes_needed, self.missing(bytes_needed), partial(self.simulate, placement))

    def simulate(self, placement: Placement) -> Simulation:
        sequences = self.settings.sequences
        times = durations(self.workload, placement, self.hardware, sequences, self.measured)
        in_host_memory = self.hardware.computes_in_host_memory
        return simulate(self.workload, placement, times, sequences, in_host_memory=in_host_memory)

    def ledger(self, placement: Placement) -> Ledger:
        return ledger(
            self.workload,
            placement,
            self.settings.sequences,
            in_host_memory=self.hardware.computes_in_host_memory,
            process=self.settings.process_bytes,
            # a limit that is given is one on what the engine allocates
            device_process=DEVICE_PROCESS_BYTES if self.settings.device_memory is None else 0,
            emulated=self.settings.emulated,
        )

    def missing(self, bytes_needed: Ledger) -> dict[str, int]:
        excess = {tier: sum(held.values()) - self.limits.get(tier, 0) for tier, held in bytes_needed.items()}
        return {tier: n for tier, n in excess.items() if n > 0}

    def placements(self) -> Iterator[Placement]:
        """With all state in host memory, and with as much of it in device memory as that has room for."""
        for base in self._bases():
            if self.hardware.computes_in_host_memory:
                yield base
            elif self.settings.resident is not None:
                yield self._resident(base, self.movable[: self.settings.resident])
            else:
                yield base
                yield from self._with_resident(base)

    def _bases(self) -> Iterator[Placement]:
        settings = self.settings
        ways = [False] if self.hardware.computes_in_host_memory else [False, True]
        all_slots = [settings.slots] if settings.slots else [DEFAULT_SLOTS, 1]
        for micro_batch in self._micro_batches():
            for slots in all_slots if len(ways) > 1 else all_slots[:1]:
                for inputs_leave in ways:
                    yield Placement(
                        self.all_host,
                        micro_batch,
                        slots,
                        inputs_leave,
                        settings.moments,
                        settings.clip_scope,
                        chunked=settings.chunked and self.workload.part_tokens is not None,
                    )

    def _micro_batches(self) -> list[int]:
        """Sequences that pass together: as given; else divisors of a step's, the largest that is of use and smaller
        ones, which take less memory."""
        sequences = self.settings.sequences
        if self.settings.micro_batch is not None:
            return [min(self.settings.micro_batch, sequences)]
        most = max(1, _ENOUGH_TOKENS // self.workload.seq_len)
        return [n for n in range(min(most, sequences), 0, -1) if sequences % n == 0][:4]

    def _with_resident(self, base: Placement) -> Iterator[Placement]:
        """As many of the first units as there is room for, with some to spare: they stay, whatever a step needs. Where
        the very first is much larger than the next ones, as an embedding is, also as many without it."""
        found = set()
        for units in (self.movable, self.movable[1:]):

            def fits(count: int, units: list[int] = units) -> bool:
                held = sum(self.ledger(self._resident(base, units[:count]))[DEVICE].values())
                return held <= self.limits[DEVICE] * (1 - _SPARE_SHARE)

            chosen = tuple(units[: _most(len(units), fits)])
            if chosen and chosen not in found:
                found.add(chosen)
                yield self._resident(base, chosen)

    def _resident(self, base: Placement, units: Iterable[int]) -> Placement:
        return replace(base, tiers=self.all_host | dict.fromkeys(units, DEVICE))

    def with_nvme(self, base: Placement) -> Placement:
        """As few units as host memory asks for, spread as the engine does. Small ones stay."""
        sizes = {u.index: state_bytes(u, base) for u in self.workload.homes}
        worth = [u for u, n in sizes.items() if n * SMALL_UNIT_SHARE > max(sizes.values()) and base.tiers[u] == HOST]

        def away(count: int) -> Placement:
            return replace(base, tiers={**base.tiers, **dict.fromkeys(spread(worth, count), NVME)})

        fitting = (n for n in range(len(worth) + 1) if HOST not in self.missing(self.ledger(away(n))))
        return away(next(fitting, len(worth)))

    def _with_kept_graphs(self, placement: Placement) -> Placement:
        """By the engine's own rule, from what is left of the memory in which it computes."""
        setting, sequences = self.settings.keep_graphs, self.settings.sequences
        if self.missing(self.ledger(placement)):
            return placement  # nothing is left for them
        units = self.workload.units
        if isinstance(setting, int):
            chosen = {u.index for u in units[max(0, len(units) - setting) :]}
        elif setting == "off":
            chosen = set()
        else:
            tier = HOST if self.hardware.computes_in_host_memory else DEVICE
            free = self.limits[tier] - sum(self.ledger(placement)[tier].values())
            held = {u.index: u.held_graph(chunked=placement.chunked) * sequences for u in units}
            graphs = {u: 0 if u in self.workload.head else n for u, n in held.items()}
            chosen = last_that_fit(graphs, graph_budget(max(0, free)))
        if not self.hardware.computes_in_host_memory:  # a graph is kept over weights that stay in their slot
            schedule = step_schedule(self.workload, placement, sequences).schedule
            chosen &= schedule.held | set(placement.units_in(DEVICE))
        return replace(placement, kept=frozenset(chosen - set(self.workload.head)))


def _most(count: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `count` for which `fits` holds, which it does for all below; 0 where for none."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
