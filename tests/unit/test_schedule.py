"""The schedule of a pass: built from an order of visits, proved by an independent checker, and broken on purpose."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.schedule.build import build_schedule
from megatrain.schedule.check import ScheduleError, check_schedule, held_over_backward
from megatrain.schedule.operations import Kind, Operation, Schedule, Sizes, SlotClass, Visit, slot_classes
from megatrain.schedule.walk import Walk


def there_and_back(units: int) -> list[Visit]:
    forward = [Visit((u,)) for u in range(units)]
    return [*forward, *(Visit((u,), backward=True) for u in reversed(range(units)))]


def sizes_of(units: int, saved: int = 0) -> Sizes:
    return Sizes(
        weights={u: 100 for u in range(units)},
        gradients={u: 100 for u in range(units)},
        saved_inputs={u: saved for u in range(units)} if saved else {},
    )


def schedule_of(units: int, slots: int, saved: int = 0) -> tuple[Schedule, Sizes]:
    sizes = sizes_of(units, saved)
    schedule = build_schedule(there_and_back(units), sizes, (SlotClass(100, slots),))
    return schedule, sizes


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 9])
def test_two_passes_less_what_is_still_there_at_the_turn(slots: int) -> None:
    schedule, sizes = schedule_of(8, slots)
    assert check_schedule(schedule, sizes) == 100 * slots
    fetches = [op for op in schedule.operations if op.kind is Kind.FETCH]
    assert len(fetches) == 16 - min(slots, 8)
    assert schedule.held == set(range(8 - min(slots, 8), 8))
    assert schedule.d2h_bytes == 800


def test_the_next_unit_is_fetched_while_one_computes() -> None:
    """With two slots, at any time after the first visit, the fetch for the next visit has been issued."""
    schedule, _ = schedule_of(6, 2)
    issued: set[int] = set()
    for op in schedule.operations:
        if op.kind is Kind.FETCH:
            issued.add(op.visit)
        if op.kind is Kind.COMPUTE and op.visit + 1 < len(schedule.visits):
            following = op.visit + 1
            needs_fetch = any(o.kind is Kind.FETCH and o.visit == following for o in schedule.operations)
            assert not needs_fetch or following in issued, f"nothing prefetched for visit {following}"


def test_one_slot_cannot_prefetch_and_is_still_right() -> None:
    schedule, sizes = schedule_of(4, 1)
    check_schedule(schedule, sizes)
    kinds = [op.kind for op in schedule.operations[:5]]
    assert kinds == [Kind.FETCH, Kind.COMPUTE, Kind.RELEASE, Kind.FETCH, Kind.COMPUTE]


def test_saved_inputs_leave_and_come_back_one_visit_ahead() -> None:
    schedule, sizes = schedule_of(4, 2, saved=7)
    peak = check_schedule(schedule, sizes)
    # the last unit comes to its backward before its inputs could have left
    assert schedule.total_bytes(Kind.SAVE) == schedule.total_bytes(Kind.RESTORE) == 21
    assert peak == 200 + 14  # of the unit that runs, and of the next
    restores = {op.visit: n for n, op in enumerate(schedule.operations) if op.kind is Kind.RESTORE}
    computes = {op.visit: n for n, op in enumerate(schedule.operations) if op.kind is Kind.COMPUTE}
    assert all(restores[v] < computes[v - 1] for v in restores if v > 4)


def test_tied_gradient_leaves_after_the_last_reader() -> None:
    """Unit 3 reads a parameter of unit 0; its backward comes first, unit 0's last."""
    sizes = Sizes({u: 100 for u in range(4)}, {0: 100, 1: 100, 2: 100, 3: 0}, {})
    schedule = build_schedule(there_and_back(4), sizes, (SlotClass(100, 2),), readers={0: (0, 3)})
    check_schedule(schedule, sizes)
    assert [op.visit for op in schedule.operations if op.kind is Kind.OFFLOAD and op.unit == 0] == [7]


def test_size_classes_waste_little_and_have_no_slot_too_many() -> None:
    visits = there_and_back(7)
    unit_bytes = {0: 1000, 1: 100, 2: 100, 3: 90, 4: 100, 5: 100, 6: 990}
    assert slot_classes(unit_bytes, visits, 3) == (SlotClass(1000, 1), SlotClass(100, 3))
    close = [Visit((0,)), Visit((6,)), Visit((0,), True)]
    assert slot_classes({0: 1000, 6: 990}, close, 3) == (SlotClass(1000, 2),)
    together = [Visit((0, 6))]
    assert slot_classes({0: 1000, 6: 990}, together, 1) == (SlotClass(1000, 2),)


def broken(schedule: Schedule, change: str) -> Sequence[Operation]:
    ops = list(schedule.operations)
    first = {kind: next(n for n, op in enumerate(ops) if op.kind is kind) for kind in Kind if kind is not Kind.UPDATE}
    if change == "fetch before release":
        release = first[Kind.RELEASE]
        ops[release], ops[release + 1] = ops[release + 1], ops[release]
    elif change == "release before its reader":
        release = ops.pop(first[Kind.RELEASE])
        ops.insert(first[Kind.COMPUTE], release)
    elif change == "no restore":
        ops.pop(first[Kind.RESTORE])
    elif change == "no fetch":
        ops.pop(first[Kind.FETCH])
    elif change == "gradient stays":
        ops.pop(first[Kind.OFFLOAD])
    elif change == "gradient leaves twice":
        ops.append(ops[first[Kind.OFFLOAD]])
    elif change == "gradient leaves early":
        op = ops[first[Kind.OFFLOAD]]
        ops[first[Kind.OFFLOAD]] = replace(op, visit=0)
    elif change == "visit left out":
        ops.pop(first[Kind.COMPUTE])
    elif change == "slot too small":
        ops[first[Kind.FETCH]] = replace(ops[first[Kind.FETCH]], slot=99)
    return ops


CHANGES = [
    "fetch before release",
    "release before its reader",
    "no restore",
    "no fetch",
    "gradient stays",
    "gradient leaves twice",
    "gradient leaves early",
    "visit left out",
    "slot too small",
]


@pytest.mark.parametrize("change", CHANGES)
def test_checker_refuses(change: str) -> None:
    schedule, sizes = schedule_of(5, 2, saved=3)
    check_schedule(schedule, sizes)
    with pytest.raises(ScheduleError):
        check_schedule(replace(schedule, operations=tuple(broken(schedule, change))), sizes)


@st.composite
def passes(draw: st.DrawFn) -> tuple[list[Visit], Sizes, int]:
    """Any forward order, with units visited again (shared blocks) or together (a head), then backward in reverse."""
    count = draw(st.integers(1, 8))
    order = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=14))
    visits = [Visit((u,)) for u in order]
    if draw(st.booleans()) and count > 1:
        visits.append(Visit(tuple(draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=2)))))
    visits += [replace(v, backward=True) for v in reversed(visits)]
    weights = {u: draw(st.sampled_from([10, 60, 70, 100, 1000])) for u in range(count)}
    saved = {u: draw(st.sampled_from([0, 5])) for u in range(count)}
    return visits, Sizes(weights, {u: 8 for u in range(count)}, saved), draw(st.integers(1, 4))


@settings(max_examples=300, deadline=None)
@given(passes())
def test_any_order_gives_a_schedule_that_the_checker_accepts(case: tuple[list[Visit], Sizes, int]) -> None:
    visits, sizes, per_class = case
    visited = {u for v in visits for u in v.units}
    sizes = replace(sizes, weights={u: n for u, n in sizes.weights.items() if u in visited})
    schedule = build_schedule(visits, sizes, slot_classes(sizes.weights, visits, per_class))
    peak = check_schedule(schedule, sizes)
    assert peak >= schedule.slot_bytes
    held = held_over_backward(schedule)
    assert {u for u, stays in held.items() if stays} == schedule.held


def test_elements_of_a_pass_are_those_that_are_open_at_a_time() -> None:
    walk = Walk("free", None, 4)
    walk.further_forward(3)
    assert walk.elements == 7
    walk.arrive(0, backward=True, together=False)
    walk.further_forward(5)
    assert walk.elements == 7
    walk.further_forward(5)
    assert walk.elements == 10


def test_visits_outside_of_passes_are_numbered_and_not_kept() -> None:
    walk = Walk("", None)
    for number in range(100):
        assert walk.arrive(number % 3, backward=False, together=False)
        assert not walk.arrive(number % 3, backward=False, together=False)
        assert walk.number == number and len(walk.visits) == 1
