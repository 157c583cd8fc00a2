"""A step played in time: what must hold whatever the machine."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import LENGTH, machine, placed, workload

from megatrain.memory.spilled_states import BUFFERS
from megatrain.planner.choose import Settings
from megatrain.planner.durations import Durations, Measured, UnitTimes, durations, update_bytes
from megatrain.planner.placement import DEVICE, HOST, NVME, Placement
from megatrain.planner.plan import make_plan
from megatrain.planner.report import write_timeline
from megatrain.planner.simulate import COMPUTE, DOWN, HOST_WORK, NVME_WORK, UP, Simulation, simulate

WORK = workload(num_hidden_layers=6)
SEQUENCES = 4


def durations_of(
    placement: Placement, seconds: dict[str, float], h2d: float = 1e6, d2h: float = 1e6, pieces: int = 1
) -> Durations:
    """Each unit alike: what a forward, a backward and so on take."""
    every = [u.index for u in WORK.homes]
    return Durations(
        **{name: dict.fromkeys(every, seconds[name]) for name in ("forward", "backward", "update", "land", "pack")},
        h2d_bandwidth=h2d,
        d2h_bandwidth=d2h,
        nvme_read=1e6,
        nvme_write=1e6,
        nvme_bytes=dict.fromkeys(every, 10_000),
        nvme_pieces=dict.fromkeys(every, pieces),
    )


SECONDS = {"forward": 0.02, "backward": 0.04, "update": 0.03, "land": 0.005, "pack": 0.001}
TIERS = st.lists(st.sampled_from([DEVICE, HOST, NVME]), min_size=len(WORK.homes), max_size=len(WORK.homes))


@st.composite
def cases(draw: Any) -> tuple[Placement, Durations]:
    tiers = dict(zip((u.index for u in WORK.homes), draw(TIERS), strict=True))
    placement = Placement(
        tiers,
        micro_batch=draw(st.sampled_from([1, 2, 4])),
        slots=draw(st.integers(1, 4)),
        inputs_leave=draw(st.booleans()),
        clip_scope=draw(st.sampled_from(["global", "unit"])),
    )
    seconds = {name: draw(st.floats(0.001, 0.1)) for name in SECONDS}
    bandwidths = st.floats(1e5, 1e8)
    return placement, durations_of(placement, seconds, draw(bandwidths), draw(bandwidths), draw(st.integers(1, 9)))


def play(placement: Placement, times: Durations, **options: Any) -> Simulation:
    return simulate(WORK, placement, times, SEQUENCES, **options)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_no_resource_works_longer_than_the_step(case: tuple[Placement, Durations]) -> None:
    found = play(*case)
    assert all(busy <= found.step_seconds * (1 + 1e-9) for busy in found.busy.values())
    assert sum(found.exposed.values()) + found.busy[COMPUTE] >= found.step_seconds * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_nothing_runs_before_what_it_waits_for_nor_two_things_at_once(case: tuple[Placement, Durations]) -> None:
    by_resource = defaultdict(list)
    for task in play(*case).tasks:
        assert all(task.start >= one.end for one in task.after)
        by_resource[task.resource].append(task)
    for tasks in by_resource.values():
        assert all(one.end <= other.start for one, other in pairwise(tasks))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_without_prefetch_it_is_never_faster(case: tuple[Placement, Durations]) -> None:
    assert play(*case, prefetch=False).step_seconds >= play(*case).step_seconds * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_a_faster_link_is_never_slower(case: tuple[Placement, Durations]) -> None:
    placement, times = case
    faster = replace(times, h2d_bandwidth=2 * times.h2d_bandwidth, d2h_bandwidth=2 * times.d2h_bandwidth)
    assert play(placement, faster).step_seconds <= play(placement, times).step_seconds * (1 + 1e-9)


def test_copies_that_take_no_time_leave_computation_alone() -> None:
    """By hand: forwards, the head at once, recomputation and backwards, and the packing of every gradient."""
    placement = placed(WORK)
    times = durations_of(placement, SECONDS | {"update": 0.0, "land": 0.0}, h2d=1e18, d2h=1e18)
    base, head = len(WORK.order), len(WORK.head)
    expected = base * (2 * 0.02 + 0.04) + head * (0.02 + 0.04) + (base + head) * 0.001
    found = play(placement, times)
    assert found.step_seconds == pytest.approx(expected)
    assert found.bound_by == COMPUTE
    last_block, first_block = WORK.order[-2], WORK.order[1]
    kept = play(replace(placement, kept=frozenset({last_block, first_block})), times)
    # the first block's weights make room for others in between, and a graph over them cannot be kept
    assert found.step_seconds - kept.step_seconds == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("slow", "bound_by"),
    [({"h2d": 1e5}, UP), ({"d2h": 2e4}, DOWN), ({"seconds": {"update": 3.0}}, HOST_WORK), ({}, COMPUTE)],
)
def test_what_is_slow_is_what_bounds(slow: dict[str, Any], bound_by: str) -> None:
    placement = placed(WORK)
    seconds = {"forward": 1.0, "backward": 2.0, "update": 0.01, "land": 0.0, "pack": 0.0} | slow.pop("seconds", {})
    if bound_by != COMPUTE:
        seconds |= {"forward": 0.01, "backward": 0.02}
    rates = {"h2d": 1e9, "d2h": 1e9} | slow
    assert play(placement, durations_of(placement, seconds, **rates)).bound_by == bound_by


def test_state_on_nvme_is_read_and_written_each_step() -> None:
    placement = placed(WORK, NVME)
    found = play(placement, durations_of(placement, SECONDS))
    assert found.busy[NVME_WORK] == pytest.approx(2 * len(WORK.homes) * 0.01)


def test_a_piece_is_updated_while_others_are_read_and_written() -> None:
    """An update begins when its first piece is there; no more is read ahead than there are buffers for."""
    placement = placed(WORK, NVME)

    def step_seconds(update: float, pieces: int) -> float:
        seconds = {"forward": 0.001, "backward": 0.001, "update": update, "land": 0.0, "pack": 0.0}
        return play(placement, durations_of(placement, seconds, h2d=1e9, d2h=1e9, pieces=pieces)).step_seconds

    assert step_seconds(0.1, 1) - step_seconds(0.1, 10) == pytest.approx(0.01 * (1 - 1 / 10), rel=0.01)
    # small pieces, and as many of them as before: computation and the disk wait for each other
    assert step_seconds(0.001, 1) < step_seconds(0.001, 10)
    kinds = [t.label.split()[0] for t in play(placement, durations_of(placement, SECONDS, pieces=10)).tasks]
    assert "".join(k[0] for k in kinds if k in ("read", "write")).count("r" * (BUFFERS + 1)) == 0


def test_resident_units_need_no_copies() -> None:
    placement = placed(WORK, DEVICE)
    found = play(placement, durations_of(placement, SECONDS))
    assert (found.h2d_bytes, found.d2h_bytes, found.busy[UP], found.busy[DOWN]) == (0, 0, 0.0, 0.0)
    assert found.busy[HOST_WORK] == 0.0


def test_updates_hide_behind_the_next_forward() -> None:
    """With exact global clipping they cannot begin before backward ends; what they take is hidden all the same."""
    placement = placed(WORK)
    slow = durations_of(placement, {"forward": 0.1, "backward": 0.2, "update": 0.05, "land": 0.0, "pack": 0.0}, h2d=1e9)
    none = replace(slow, update=dict.fromkeys(slow.update, 0.0))
    exposed = play(placement, slow).step_seconds - play(placement, none).step_seconds
    assert exposed == pytest.approx(0.05, rel=0.02)  # the first unit's, which the forward begins with


def test_the_host_as_device_does_one_thing_after_the_other() -> None:
    placement = placed(WORK)
    times = replace(durations_of(placement, SECONDS), overhead=0.5)
    base, units = len(WORK.order), len(WORK.homes)
    expected = base * (2 * 0.02 + 0.04) + len(WORK.head) * 0.06 + units * (0.03 + 0.005) + 0.5
    for scope in ("global", "unit"):
        found = play(replace(placement, clip_scope=scope), times, in_host_memory=True)
        assert found.step_seconds == pytest.approx(expected)


@pytest.mark.parametrize("scope", ["global", "unit"])
def test_a_disk_takes_its_time_on_the_host_as_device_too(scope: str) -> None:
    """All of it is read and written; what updates and computation leave, the step waits for."""
    placement = replace(placed(WORK, NVME), clip_scope=scope)
    times = durations_of(placement, SECONDS, pieces=3)
    found = play(placement, times, in_host_memory=True)
    moved = sum(times.nvme_bytes.values()) * (1 / times.nvme_read + 1 / times.nvme_write)
    assert found.busy[NVME_WORK] == pytest.approx(moved)
    memory = play(replace(placed(WORK), clip_scope=scope), durations_of(placed(WORK), SECONDS), in_host_memory=True)
    slow = replace(times, nvme_read=times.nvme_read / 100, nvme_write=times.nvme_write / 100)
    assert memory.step_seconds < found.step_seconds <= memory.step_seconds + moved
    assert play(placement, slow, in_host_memory=True).step_seconds > 50 * moved


def test_measured_units_come_before_the_machines_figures() -> None:
    placement, hardware = placed(WORK), machine()
    times = durations(WORK, placement, hardware, 4, Measured({1: UnitTimes(2, 0.5, 1.5)}))
    assert times.forward[1] == 1.0
    assert times.backward[1] == pytest.approx(3.0, rel=1e-3)
    unit = WORK.units[2]
    products = 2 * unit.flops.matrix_elements * LENGTH * 4 / hardware.product_rate
    attention = unit.flops.attention_forward(LENGTH) * 4 / hardware.attention_rate
    passes = 2 * unit.graph * 4 / hardware.device_bandwidth
    assert times.forward[2] == pytest.approx(products + attention + passes)


def test_an_update_moves_twenty_six_bytes_per_parameter() -> None:
    unit = WORK.units[1]
    assert update_bytes(unit, placed(WORK)) == 26 * unit.parameters
    assert update_bytes(workload("fp32").units[1], placed(WORK)) == 28 * unit.parameters


def test_a_timeline_has_the_tracks_of_a_profile(tmp_path: Path) -> None:
    plan = make_plan(WORK, machine(), Settings(SEQUENCES, process_bytes=0, resident=1))
    write_timeline(plan, tmp_path / "step.json")
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [e for e in events if e["ph"] == "X"]
    assert {"compute", "up", "down", "host"} <= {tracks[e["tid"]] for e in spans}
    assert {"model.layers.0", "model.layers.0 backward"} <= {e["name"] for e in spans}
