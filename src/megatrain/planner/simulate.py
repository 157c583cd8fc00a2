"""A step played in time: the engine's own operations over computation, the two directions of the link, the host's
optimizer and NVMe.

Each resource carries out what it is given one after the other, in the order of issue, as the streams and the host
thread of the engine do. An operation starts when its resource is free and what it depends on is over; the dependencies
are the engine's waits (`device/base.py`) and the order of its updates (`engine/updates.py`). Several steps are played,
since updates of one step run beside the forward of the next; the last one is reported.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatrain.engine.gradient_stream import STAGING_BUFFERS
from megatrain.memory.spilled_states import BUFFERS
from megatrain.memory.store import ALL_UNITS_STRAY
from megatrain.planner.durations import Durations
from megatrain.planner.placement import DEVICE, NVME, Placement, step_schedule
from megatrain.planner.visits import planned_visits
from megatrain.planner.workload import Workload
from megatrain.schedule.operations import Kind, Operation, Schedule

COMPUTE, UP, DOWN, HOST_WORK, NVME_WORK = "compute", "up", "down", "host", "nvme"
RESOURCES = (COMPUTE, UP, DOWN, HOST_WORK, NVME_WORK)
_STEPS = 5  # played; what one leaves to the next has settled by then


@dataclass(frozen=True, slots=True)
class Task:
    """Something that a resource did. `after`: what it waited for; `before`: what its resource did before it."""

    resource: str
    label: str
    start: float
    end: float
    after: tuple["Task", ...] = field(repr=False)  # shown, all that ever came before would be
    before: "Task | None" = field(repr=False)


@dataclass(frozen=True, slots=True)
class Simulation:
    """The steady step. `busy`: seconds that each resource worked. `exposed`: seconds that computation stood still, by
    the resource that it waited for. `bound_by`: where most of the time went along the chain of what waited for what."""

    step_seconds: float
    busy: Mapping[str, float]
    exposed: Mapping[str, float]
    bound_by: str
    h2d_bytes: int
    d2h_bytes: int
    tasks: tuple[Task, ...]
    begin: float


@dataclass(slots=True)
class _Clock:
    """Resources and what they have been given."""

    last: dict[str, Task] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)

    def add(self, resource: str, label: str, seconds: float, after: Iterable[Task | None] = ()) -> Task:
        waits = tuple(t for t in after if t is not None)
        before = self.last.get(resource)
        start = max([0.0 if before is None else before.end, *(t.end for t in waits)])
        task = Task(resource, label, start, start + seconds, waits, before)
        self.last[resource] = task
        self.tasks.append(task)
        return task


def simulate(
    workload: Workload,
    placement: Placement,
    durations: Durations,
    sequences: int,
    *,
    in_host_memory: bool = False,
    prefetch: bool = True,
) -> Simulation:
    """Play steps of `sequences` until they are alike. `in_host_memory`: the host is its own device: nothing is copied,
    and updates run where computation does. `prefetch`: whether weights and inputs come before they are needed."""
    player = _HostPlayer if in_host_memory else _StreamPlayer
    game = player(workload, placement, durations, sequences, prefetch)
    ends = [game.play_step() for _ in range(_STEPS)]
    begin, end = ends[-2].end, ends[-1].end
    path = critical_path(ends[-1], begin)
    return Simulation(
        step_seconds=end - begin,
        busy=_busy(game.clock.tasks, begin, end),
        exposed={name: seconds for name, seconds in path.items() if name != COMPUTE},
        bound_by=max(path, key=lambda name: path[name]) if path else COMPUTE,
        h2d_bytes=game.h2d_bytes,
        d2h_bytes=game.d2h_bytes,
        tasks=tuple(t for t in game.clock.tasks if t.end > begin and t.start < end),
        begin=begin,
    )


def critical_path(last: Task, begin: float) -> dict[str, float]:
    """Seconds by resource, from `last` back to `begin` along what made each task start when it did."""
    seconds: dict[str, float] = defaultdict(float)
    task: Task | None = last
    while task is not None and task.end > begin:
        seconds[task.resource] += task.end - max(task.start, begin)
        causes = [t for t in (*task.after, task.before) if t is not None]
        # of those that ended last the resource's own comes last: it was busy, and waited for nobody
        task = max(causes, key=lambda t: (t.end, t.resource == task.resource), default=None)  # type: ignore[union-attr]
    return dict(seconds)


def _busy(tasks: Iterable[Task], begin: float, end: float) -> dict[str, float]:
    busy = dict.fromkeys(RESOURCES, 0.0)
    for task in tasks:
        busy[task.resource] += max(0.0, min(task.end, end) - max(task.start, begin))
    return busy


class _Player:
    """Steps of one placement, one after the other on one clock."""

    h2d_bytes = 0
    d2h_bytes = 0

    def __init__(
        self, workload: Workload, placement: Placement, durations: Durations, sequences: int, prefetch: bool
    ) -> None:
        self.workload, self.placement, self.durations = workload, placement, durations
        self.prefetch = prefetch
        self.clock = _Clock()
        self.visits = planned_visits(workload, placement.tiers)
        self.names = {u.index: u.name or "model" for u in workload.homes}
        self.reads = {u.index: u.reads for u in workload.units}
        self.trained = {u.index for u in workload.homes if u.state_count}
        self.updated: dict[int, Task] = {}  # by unit, the last update of its state
        self.ended: Task | None = None  # all that the last step's norm is of
        self.sequences = sequences

    def play_step(self) -> Task:
        """Returns the task that ends the step."""
        raise NotImplementedError

    def compute_seconds(self, visit: int, held: frozenset[int] | None) -> float:
        """Of one visit: forward; or, going back, the forward again and the backward; a head does both at once."""
        seconds = 0.0
        for unit in self.visits[visit].runs:
            forward, backward = self.durations.forward[unit], self.durations.backward[unit]
            if unit in self.workload.head:
                seconds += forward + backward
            elif not self._is_backward(visit, unit):
                seconds += forward
            else:
                kept = unit in self.placement.kept and (held is None or unit in held)
                seconds += backward + (0.0 if kept else forward)
        return seconds

    def _is_backward(self, visit: int, unit: int) -> bool:
        return self.visits[visit].visit.backward

    def label(self, visit: int) -> str:
        names = " and ".join(self.names[u] for u in self.visits[visit].runs)
        return f"{names}{' backward' if self.visits[visit].visit.backward else ''}"

    def host_update(self, home: int, resource: str, after: Iterable[Task | None]) -> Task:
        task = self.clock.add(resource, f"update of {self.names[home]}", self.durations.update[home], after)
        self.updated[home] = task
        return task

    def _update_all(self, homes: Iterable[int]) -> None:
        """By the host, in forward order, when the step is decided."""
        ordered = sorted(homes)
        self._expect(ordered)
        for home in ordered:
            self._stored_update(home, self.ended)

    def _expect(self, homes: Iterable[int]) -> None:
        """The order in which state on NVMe will be asked for."""
        pieces = self.durations.nvme_pieces
        on_disk = [home for home in homes if self.placement.tiers.get(home) == NVME]
        self.away = [home for home in on_disk for _ in range(pieces[home])]
        self.pieces_read: list[Task] = []
        self.pieces_written: list[Task] = []

    def _stored_update(self, home: int, after: Task | None) -> Task:
        """State on NVMe is read ahead of the update and written behind it, piece by piece."""
        self._read_ahead(after)
        if self.placement.tiers[home] != NVME:
            return self.host_update(home, HOST_WORK, (after,))
        count = self.durations.nvme_pieces[home]
        for _ in range(count):
            self._read_ahead(after)
            read = self.pieces_read[len(self.pieces_written)]
            seconds = self.durations.update[home] / count
            done = self.clock.add(HOST_WORK, f"update of {self.names[home]}", seconds, (after, read))
            self.pieces_written.append(self._nvme(home, "write", self.durations.nvme_write, (done,)))
        self.updated[home] = done
        return done

    def _read_ahead(self, after: Task | None) -> None:
        """As many pieces as there are buffers: into those of pieces that have been written."""
        while len(self.pieces_read) < min(len(self.away), len(self.pieces_written) + BUFFERS):
            number = len(self.pieces_read)
            free = self.pieces_written[number - BUFFERS] if number >= BUFFERS else after
            self.pieces_read.append(self._nvme(self.away[number], "read", self.durations.nvme_read, (free,)))

    def _nvme(self, home: int, what: str, bandwidth: float, after: Iterable[Task | None]) -> Task:
        seconds = self.durations.nvme_bytes[home] / self.durations.nvme_pieces[home] / bandwidth
        return self.clock.add(NVME_WORK, f"{what} state of {self.names[home]}", seconds, after)


class _HostPlayer(_Player):
    """The host as its own device: updates are carried out before the step ends, or each right after its backward."""

    def play_step(self) -> Task:
        completed = [h for v in self.visits if v.visit.backward for h in sorted({*_reads(self, v.runs)})]
        self._expect(reversed(dict.fromkeys(reversed(completed))))  # each after its last backward
        self.offloaded: list[int] = []
        for number, planned in enumerate(self.visits):
            self.clock.add(COMPUTE, self.label(number), self.compute_seconds(number, None))
            if planned.visit.backward:
                self._land(number, planned.runs)
        if self.workload.strays is not None and self.workload.strays.index in self.trained:
            self._written(self.workload.strays.index)
        self.ended = self.clock.add(COMPUTE, "the rest of the step", self.durations.overhead)
        if self.placement.keeps_gradients:
            self._update_all(self.offloaded)
        return self._wait()

    def _land(self, number: int, runs: Iterable[int]) -> None:
        for home in sorted({*_reads(self, runs)} & self.trained):
            readers = [n for n, v in enumerate(self.visits) if v.visit.backward and home in {*_reads(self, v.runs)}]
            if readers and readers[-1] == number:
                self._written(home)

    def _written(self, home: int) -> None:
        landed = self.clock.add(COMPUTE, f"gradient of {self.names[home]}", self.durations.land[home])
        self.offloaded.append(home)
        if not self.placement.keeps_gradients:
            self._stored_update(home, landed)
            self._wait()

    def _wait(self) -> Task:
        """Computation has the threads of the host's updates, and goes on after them."""
        return self.clock.add(COMPUTE, "wait", 0.0, (self.clock.last.get(HOST_WORK),))


def _reads(player: _Player, units: Iterable[int]) -> Iterable[int]:
    return (home for unit in units for home in player.reads[unit])


class _StreamPlayer(_Player):
    """A device with memory of its own: copies beside computation, updates on a host thread."""

    def __init__(
        self, workload: Workload, placement: Placement, durations: Durations, sequences: int, prefetch: bool
    ) -> None:
        super().__init__(workload, placement, durations, sequences, prefetch)
        schedule = step_schedule(workload, placement, sequences).schedule
        self.schedule: Schedule = schedule
        beside_slots = {*workload.small, ALL_UNITS_STRAY} - set(placement.units_in(DEVICE))
        self.own_memory = [u for u in workload.homes if u.index in beside_slots]
        self.small = {u.index for u in self.own_memory}
        copied = {u.index: u.copied_bytes for u in workload.homes}
        fetched = [copied[op.unit] for op in schedule.operations if op.kind is Kind.FETCH]
        restored = schedule.total_bytes(Kind.RESTORE)
        self.copied = copied
        self.h2d_bytes = sum(fetched) + restored + sum(u.copied_bytes for u in self.own_memory)
        strays = workload.strays.link_gradient_bytes if workload.strays and workload.strays in self.own_memory else 0
        self.d2h_bytes = schedule.d2h_bytes + strays
        self.slot_free: dict[int, Task] = {}

    def play_step(self) -> Task:
        self.computed: dict[int, Task] = {}
        self.fetched: dict[int, Task] = {}
        self.saved: dict[int, Task] = {}
        self.restored: dict[int, Task] = {}
        self.left: list[Task] = []
        self.consumed: list[Task] = []
        self.landed: list[Task] = []
        self.offloaded: list[int] = []
        self.away: list[int] = []  # the unit of each piece on NVMe, in the order of updates
        if not self.placement.keeps_gradients:
            leaving = [op.unit for op in self.schedule.operations if op.kind is Kind.OFFLOAD]
            self._expect([*leaving, ALL_UNITS_STRAY])
        if self.workload.strays is not None and self.workload.strays in self.own_memory:
            self._copy_up(self.workload.strays.index, ())
        apply = {
            Kind.FETCH: self._fetch,
            Kind.RELEASE: self._release,
            Kind.COMPUTE: self._compute,
            Kind.SAVE: self._save,
            Kind.RESTORE: self._restore,
            Kind.OFFLOAD: self._offload,
        }
        for operation in self.schedule.operations:
            apply[operation.kind](operation)
        if self.workload.strays is not None and self.workload.strays in self.own_memory:
            self._send(self.workload.strays.index, self.clock.last[COMPUTE], self.workload.strays.link_gradient_bytes)
        return self._end_step()

    def _end_step(self) -> Task:
        """The norm is known when every gradient has been read; then updates in forward order."""
        last = self.clock.last[COMPUTE]
        self.ended = self.clock.add(COMPUTE, "the rest of the step", self.durations.overhead, (last, *self.landed))
        for slot in range(sum(c.count for c in self.schedule.classes)):
            self.slot_free[slot] = last
        if self.placement.keeps_gradients:
            self._update_all(self.offloaded)
        for home in self.placement.units_in(DEVICE):
            if home in self.trained:
                self.host_update(home, COMPUTE, (self.ended,))
        return self.ended

    def _copy_up(self, unit: int, after: Iterable[Task | None]) -> Task:
        homes = self.reads.get(unit, (unit,))
        seconds = self.copied[unit] / self.durations.h2d_bandwidth
        waits = [self.ended, *after, *(self.updated.get(home) for home in homes)]
        return self.clock.add(UP, self.names[unit], seconds, waits)

    def _ahead(self, visit: int) -> Task | None:
        """Without prefetch: what is for a visit comes only when the visit before is over."""
        return None if self.prefetch else self.computed.get(visit - 1)

    def _fetch(self, op: Operation) -> None:
        self.fetched[op.unit] = self._copy_up(op.unit, (self.slot_free.get(op.slot), self._ahead(op.visit)))

    def _release(self, op: Operation) -> None:
        self.slot_free[op.slot] = self.computed[op.visit]
        self.fetched.pop(op.unit, None)

    def _compute(self, op: Operation) -> None:
        planned = self.visits[op.visit]
        for unit in planned.runs:
            if unit in self.small and unit not in self.fetched:  # brought when it is first called
                self.fetched[unit] = self._copy_up(unit, ())
        waits: list[Task | None] = [self.fetched.get(u) for u in planned.runs]
        waits += [self.updated.get(h) for u in planned.runs for h in self.reads[u] if u not in self.fetched]
        if planned.visit.backward:
            waits += [self.restored.get(u) for u in planned.runs]
        seconds = self.compute_seconds(op.visit, self.schedule.held | set(self.placement.units_in(DEVICE)))
        self.computed[op.visit] = self.clock.add(COMPUTE, self.label(op.visit), seconds, (self.ended, *waits))

    def _save(self, op: Operation) -> None:
        seconds = op.n_bytes / self.durations.d2h_bandwidth
        self.saved[op.unit] = self.clock.add(
            DOWN, f"inputs of {self.names[op.unit]}", seconds, (self.computed[op.visit],)
        )

    def _restore(self, op: Operation) -> None:
        # into memory that computation up to here may still read
        after = (self.saved[op.unit], self.computed.get(op.visit - 2), self._ahead(op.visit))
        seconds = op.n_bytes / self.durations.h2d_bandwidth
        self.restored[op.unit] = self.clock.add(UP, f"inputs of {self.names[op.unit]}", seconds, after)

    def _offload(self, op: Operation) -> None:
        self._send(op.unit, self.computed[op.visit], op.n_bytes)

    def _send(self, home: int, computed: Task, n_bytes: int) -> None:
        staging_free = self.left[-STAGING_BUFFERS] if len(self.left) >= STAGING_BUFFERS else None
        # gradients that nobody keeps are lent a buffer each: two at most
        lent = self.consumed[-2] if not self.placement.keeps_gradients and len(self.consumed) >= 2 else None
        packed = self.clock.add(
            COMPUTE, f"pack {self.names[home]}", self.durations.pack[home], (computed, staging_free, lent)
        )
        left = self.clock.add(DOWN, self.names[home], n_bytes / self.durations.d2h_bandwidth, (packed,))
        self.left.append(left)
        landed = self.clock.add(HOST_WORK, f"gradient of {self.names[home]}", self.durations.land[home], (left,))
        self.landed.append(landed)
        self.offloaded.append(home)
        if not self.placement.keeps_gradients:
            self.consumed.append(self._stored_update(home, landed))
            self.landed[-1] = self.consumed[-1]
