"""A whole plan: the placement, its bytes and its time; and where it does not fit, the nearest thing that does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatrain.planner.choose import Candidate, Settings, choose, limits
from megatrain.planner.durations import Measured
from megatrain.planner.flops import StepFlops, flops_of_units
from megatrain.planner.hardware import Hardware
from megatrain.planner.placement import RESERVED, Ledger, Placement
from megatrain.planner.simulate import Simulation
from megatrain.planner.visits import backward_order
from megatrain.planner.workload import Workload
from megatrain.sizes import format_bytes

_STATE = ("weights", "remainders", "moments", "gradients")
_GROWS_WITH_CONTEXT = ("token ids", "saved inputs", "saved inputs and gradient sums", "kept graphs", "working set")
_SHORTEST_CONTEXT = 256
ALL_THE_NVME = 1 << 62


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of settings: what it saves of the bytes that are missing, and what is missing then."""

    change: str
    saves_bytes: int
    missing_bytes: int

    @property
    def fits(self) -> bool:
        return self.missing_bytes == 0


@dataclass(frozen=True)
class Plan:
    """`candidate` is what was chosen for `workload` on `hardware` under `settings`; `report` shows it."""

    workload: Workload
    hardware: Hardware
    settings: Settings
    candidate: Candidate
    remedies: tuple[Remedy, ...]

    @property
    def placement(self) -> Placement:
        return self.candidate.placement

    @property
    def ledger(self) -> Ledger:
        return self.candidate.ledger

    @property
    def simulation(self) -> Simulation:
        return self.candidate.simulation

    @property
    def available(self) -> dict[str, int]:
        return limits(self.hardware, self.settings)

    @property
    def fits(self) -> bool:
        return self.candidate.fits

    @property
    def missing_bytes(self) -> int:
        return sum(self.candidate.missing.values())

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.settings.sequences * self.workload.seq_len

    @property
    def bytes_per_parameter(self) -> float:
        """Of weights and optimizer state, wherever they are, and of gradients that are kept."""
        lent = set() if self.placement.keeps_gradients else {"gradients"}
        state = sum(n for held in self.ledger.values() for name, n in held.items() if name in set(_STATE) - lent)
        return state / self.workload.parameters

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.simulation.step_seconds if self.simulation.step_seconds else 0.0

    @property
    def flops(self) -> StepFlops:
        """Of one step."""
        again = {u for u in backward_order(self.workload) if u not in self.placement.kept}
        units = [(u.flops, u.index in again) for u in self.workload.units]
        found = flops_of_units(units, [self.workload.seq_len] * self.settings.sequences)
        return StepFlops(found.model, found.hardware + self._repeated_in_parts)

    @property
    def _repeated_in_parts(self) -> int:
        """Operations of parts of sequences that are run once more to be differentiated."""
        parts = [(u, u.in_parts.repeated) for u in self.workload.units if self.placement.chunked and u.in_parts]
        whole = sum(u.flops.forward(self.workload.seq_len) * repeated for u, repeated in parts)
        return round(whole) * self.settings.sequences

    def peak_bytes(self, tier: str) -> int:
        return sum(self.ledger.get(tier, {}).values())

    def used_bytes(self, tier: str) -> int:
        """Of the peak, what a step of `train_step` uses."""
        return sum(n for name, n in self.ledger.get(tier, {}).items() if name not in RESERVED)

    def refusal(self) -> str:
        """One line that says what is missing, and what would fit."""
        parts = []
        for tier, missing in self.candidate.missing.items():
            held = ", ".join(f"{name} {format_bytes(n)}" for name, n in self.ledger[tier].items())
            needed, available = format_bytes(self.peak_bytes(tier)), format_bytes(self.available.get(tier, 0))
            parts.append(
                f"{tier} memory: {format_bytes(missing)} missing: {self.workload.parameters:,} parameters need "
                f"{needed} ({held}) and {available} can be had"
            )
        fitting = [r.change for r in self.remedies if r.fits]
        fewer = [change for change in fitting if change.startswith(("train.tokens_per_step", "engine.micro_batch"))]
        advice = " or with ".join(dict.fromkeys([*fitting[:1], *fewer[:1]]))
        return "; ".join(parts) + (f"; it would fit with {advice}" if advice else "")


def make_plan(
    workload: Workload,
    hardware: Hardware,
    settings: Settings,
    *,
    measured: Measured | None = None,
    at_length: Callable[[int], Workload] | None = None,
) -> Plan:
    """`at_length`: the same model at another sequence length, to look for a context that fits."""
    hardware = hardware.in_precision(workload.precision)
    found = choose(workload, hardware, settings, measured)
    remedies = () if found.fits else tuple(_remedies(workload, hardware, settings, found, at_length))
    return Plan(workload, hardware, settings, found, remedies)


def _remedies(
    workload: Workload,
    hardware: Hardware,
    settings: Settings,
    found: Candidate,
    at_length: Callable[[int], Workload] | None,
) -> Iterator[Remedy]:
    """Each change alone that saves something, in this order; where none of them is enough, all together so far."""
    missing = sum(found.missing.values())
    changes = list(_changes(settings, streams=not hardware.computes_in_host_memory))
    enough = False
    for remedy in _smaller_micro_batch(workload, hardware, settings, missing):
        enough = True
        yield remedy
    for name, change in changes:
        remedy = _tried(name, missing, choose(workload, hardware, replace(settings, **change)))
        enough |= remedy.fits
        if remedy.saves_bytes > 0:
            yield remedy
    if missing <= _bytes_of_context(found.ledger):
        shorter = [] if at_length is None else _shorter(workload, hardware, settings, missing, at_length)
        for remedy in (*_fewer(workload, hardware, settings, missing), *shorter):
            enough |= remedy.fits
            yield remedy
    together, names = settings, ""
    for number, (name, change) in enumerate(changes):
        together, names = replace(together, **change), f"{names} and {name}".removeprefix(" and ")
        if enough:
            return
        tried = choose(workload, hardware, together)
        if number:
            remedy = _tried(names, missing, tried)
            enough = remedy.fits
            if remedy.saves_bytes > 0:
                yield remedy
        if not enough and sum(tried.missing.values()) <= _bytes_of_context(tried.ledger):
            given = (workload, hardware, together, missing, f"{names} and ")
            for remedy in list(_smaller_micro_batch(*given)) or _fewer(*given):
                enough = True
                yield remedy


def _bytes_of_context(bytes_needed: Ledger) -> int:
    """The most that a shorter context could save."""
    return sum(n for held in bytes_needed.values() for name, n in held.items() if name in _GROWS_WITH_CONTEXT)


def _changes(settings: Settings, *, streams: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """First those that change no number of what is trained."""
    if settings.resident and streams:
        yield "engine.resident_units auto", {"resident": None}
    if isinstance(settings.keep_graphs, int) and settings.keep_graphs:
        yield "engine.keep_graphs auto", {"keep_graphs": "auto"}
    if settings.slots is not None and settings.slots > 1 and streams:
        yield "engine.slots 1", {"slots": 1}
    if settings.clip_scope == "global":
        yield "train.clip_scope unit", {"clip_scope": "unit"}
    if not settings.chunked:
        yield "engine.sequence_chunk_tokens auto", {"chunked": True}
    if settings.moments == "fp32":
        yield "optimizer.moments int8", {"moments": "int8"}
    if not settings.nvme and streams:
        yield "engine.nvme on a local disk", {"nvme": ALL_THE_NVME}


def _tried(change: str, missing: int, found: Candidate) -> Remedy:
    left = sum(found.missing.values())
    return Remedy(change, missing - left, left)


def _smaller_micro_batch(
    workload: Workload, hardware: Hardware, settings: Settings, missing: int, beside: str = ""
) -> Iterator[Remedy]:
    """Fewer sequences at a time, and as many per step. Said only where it fits. `beside`: as for `_fewer`."""
    size = settings.micro_batch
    while size is not None and size > 1:
        size = next(n for n in range(size // 2, 0, -1) if settings.sequences % n == 0)
        found = choose(workload, hardware, replace(settings, micro_batch=size))
        remedy = _tried(f"{beside}engine.micro_batch {size}", missing, found)
        if remedy.fits:
            yield remedy
            return


def _fewer(
    workload: Workload, hardware: Hardware, settings: Settings, missing: int, beside: str = ""
) -> Iterator[Remedy]:
    """Half the tokens per step, and half of that, until it fits; whole micro-batches of the set size as long as there
    are any. Said only where it does. `beside`: the changes that `settings` holds already."""
    sequences, micro_batch = settings.sequences, settings.micro_batch
    least = replace(settings, sequences=1, micro_batch=None if micro_batch is None else 1)
    if not choose(workload, hardware, least).fits:
        return  # nor does anything between
    while sequences > 1:
        if micro_batch is not None and sequences <= micro_batch:
            sequences = micro_batch = max(1, micro_batch // 2)
        else:
            together = micro_batch or 1
            sequences = max(together, sequences // together // 2 * together)
        found = choose(workload, hardware, replace(settings, sequences=sequences, micro_batch=micro_batch))
        change = f"train.tokens_per_step {sequences * workload.seq_len}"
        change = change if micro_batch == settings.micro_batch else f"engine.micro_batch {micro_batch} and {change}"
        remedy = _tried(f"{beside}{change}", missing, found)
        if remedy.fits:
            yield remedy
            return


def _shorter(
    workload: Workload, hardware: Hardware, settings: Settings, missing: int, at_length: Callable[[int], Workload]
) -> Iterator[Remedy]:
    """Half the context, and half of that, with as many tokens per step, until it fits. Said only where it does: what
    does not depend on the context cannot be had from it."""
    seq_len, sequences = workload.seq_len, settings.sequences
    halvings = max(0, (seq_len // _SHORTEST_CONTEXT).bit_length() - 1)
    shortest = choose(at_length(seq_len >> halvings), hardware, replace(settings, sequences=sequences << halvings))
    if not shortest.fits:
        return  # nor does anything between
    while seq_len // 2 >= _SHORTEST_CONTEXT:
        seq_len, sequences = seq_len // 2, sequences * 2
        other = replace(settings, sequences=sequences)
        remedy = _tried(f"sequences of {seq_len:,} tokens", missing, choose(at_length(seq_len), hardware, other))
        if remedy.fits:
            yield remedy
            return
