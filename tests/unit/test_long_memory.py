"""Long sequences take the memory that the plan says, and no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.model.loading import load_config
from megatrain.planner.choose import Settings
from megatrain.planner.hardware import load_hardware
from megatrain.planner.plan import Plan, make_plan
from megatrain.planner.workload import build_workload

_SCRIPT = Path(__file__).with_name("long_step.py")
_QWEN = Path(__file__).parents[2] / "examples" / "plans" / "qwen2.5-7b.json"


def step(tokens: int, hidden: int, setting: str, *window: int) -> dict[str, float]:
    """In a process of its own: a peak is that of a whole process."""
    command = [sys.executable, str(_SCRIPT), *map(str, (tokens, hidden, setting, *window))]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(tokens, setting, found)
    return found


def test_a_long_step_takes_what_is_planned() -> None:
    """A third of what it takes over whole sequences, and gives the same. What an earlier step has left free is not seen
    to be taken, and how much that is depends on chance: the larger of two measurements."""
    parts = max((step(8_192, 256, "1024") for _ in range(2)), key=lambda found: found["measured_bytes"])
    whole = step(8_192, 256, "whole")
    assert parts["measured_bytes"] == pytest.approx(parts["predicted_bytes"], rel=0.05)
    assert parts["measured_bytes"] < whole["measured_bytes"] / 3
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-6)


@pytest.mark.long
def test_a_long_step_in_a_window_takes_what_is_planned() -> None:
    """The mask of sequence x sequence alone would take as much."""
    found = step(12_288, 256, "1024", 512)
    assert found["measured_bytes"] == pytest.approx(found["predicted_bytes"], rel=0.05)
    assert found["measured_bytes"] < 1.25 * 12_288**2


@pytest.mark.long
def test_131072_tokens_take_what_is_planned() -> None:
    found = step(131_072, 64, "auto")
    assert found["measured_bytes"] == pytest.approx(found["predicted_bytes"], rel=0.05)


def planned(seq_len: int, *, chunked: bool = True) -> Plan:
    work = build_workload(load_config(str(_QWEN)), precision="bf16", seq_len=seq_len)
    return make_plan(work, load_hardware("h200"), Settings(sequences=1, chunked=chunked))


def test_7b_at_524288_tokens_fits_and_can_be_carried_out() -> None:
    found = planned(524_288)
    assert found.fits and found.placement.chunked
    assert found.workload.part_tokens == 8192


def test_over_whole_sequences_it_does_not_and_the_plan_says_what_would_help() -> None:
    found = planned(524_288, chunked=False)
    assert not found.fits and not found.placement.chunked
    remedy = next(r for r in found.remedies if r.change == "engine.sequence_chunk_tokens auto")
    assert remedy.fits
    assert "it would fit with engine.sequence_chunk_tokens auto" in found.refusal()


def test_short_sequences_are_planned_whole() -> None:
    found = planned(8192)
    assert not found.placement.chunked and found.workload.part_tokens is None
    assert found.ledger == planned(8192, chunked=False).ledger


def test_parts_that_are_run_twice_count_as_work() -> None:
    parts, whole = planned(32_768), planned(32_768, chunked=False)
    assert parts.flops.model == whole.flops.model
    repeated = parts.flops.hardware - whole.flops.hardware
    # at the most all products once more
    assert 0 < repeated <= sum(u.flops.products_forward(32_768) for u in parts.workload.units)
    block = parts.workload.units[1]
    assert block.in_parts is not None and block.in_parts.graph < block.graph / 3
    assert block.in_parts.part < 8192 * 18944 * 2 * 8  # some of one part's wide tensors, not of the whole sequence's
