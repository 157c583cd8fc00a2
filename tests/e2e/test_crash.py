"""Runs that are killed at any moment, and taken up again: nothing is lost beyond the last checkpoint, nothing is left
lying around, and what comes out is what an uninterrupted run gives, to the last bit."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_runs import ForkedRuns, kill
from small_runs import SETTINGS, assert_same_run, metrics_of, settings_of, train, write_texts

from megatrain import cli
from megatrain.checkpoint.folders import list_checkpoints, step_of
from megatrain.trust.manifest import require_unchanged

pytestmark = [
    pytest.mark.xdist_group("crash"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are forked as Linux does"),
]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    folder = tmp_path_factory.mktemp("crash")
    write_texts(folder)
    with ForkedRuns(folder) as runs:
        yield runs


def last_step(run: Path) -> int:
    """Of the last checkpoint, 0 where there is none."""
    there = list_checkpoints(run / "checkpoints")
    return step_of(there[-1]) or 0 if there else 0


# -- SIGKILL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.long)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(kills: int, forked: ForkedRuns) -> None:
    """Optimizer state lies on a disk, too. Every other kill is aimed at a save or a removal, the rest come at any
    moment of a step."""
    seed = int(os.environ.get("CRASH_SEED", time.time_ns() % 2**32))
    print(f"CRASH_SEED={seed}")
    chance = random.Random(seed)
    spill = forked.folder / "spill"
    spill.mkdir(exist_ok=True)
    model = SETTINGS["model"]["config"] | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    engine = {"nvme": str(spill), "host_memory": "2.5MB", "micro_batch": 4}
    settings = settings_of(forked, f"kills{kills}", model={"config": model}, train={"steps": 6 * kills}, engine=engine)
    expected, run = forked.folder / f"whole{kills}", forked.folder / f"killed{kills}"
    train(forked, settings, str(expected))
    caught = 0
    for number in range(kills):
        before, left = last_step(run), _unfinished(run)
        process, log = forked.start("train", settings, "--output", str(run), "--resume", "auto")
        if number % 2:
            # none (the run has only begun), or some steps on
            _wait_for_step(run, before + chance.choice([0, 1, 2, 3]), process)
            time.sleep(chance.uniform(0, 0.15))
        else:
            _wait_for_step(run, before + chance.choice([0, 1]), process)
            _wait_for_save(run, left, process)
        kill(process)
        ended = forked.wait(process, log)
        assert ended.code == -9, f"it has ended before kill {number + 1} of {kills}: {ended.output}"
        assert last_step(run) >= before, "the last checkpoint is lost"
        assert "Traceback" not in ended.output and "was not saved" not in ended.output
        for checkpoint in list_checkpoints(run / "checkpoints"):
            require_unchanged(checkpoint)
        if last_step(run):
            assert cli.main(["verify", str(run)]) == 0
        caught += bool(_unfinished(run) - left)
        assert list(spill.iterdir()) == []
    saved = last_step(run)
    ended = train(forked, settings, str(run), "--resume", "auto")
    if saved:
        assert f"step-{saved:06d}, step {saved:,}\n" in ended.output
    assert_same_run(run, expected)
    assert list(spill.iterdir()) == []
    print(f"{caught} of {kills} kills met a save or a removal")
    assert 3 * caught >= kills


def _unfinished(run: Path) -> set[str]:
    """What a save or a removal is at work on, or has left."""
    folder = run / "checkpoints"
    return {name for name in os.listdir(folder) if name.startswith(".")} if folder.exists() else set()


def _wait_for_save(run: Path, left: set[str], process: int) -> None:
    """Until there is something unfinished beside what was `left` by others, or the run is over."""
    deadline = time.monotonic() + 60
    while not _unfinished(run) - left and _alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def _wait_for_step(run: Path, step: int, process: int) -> None:
    """Until a checkpoint of `step` is there, or the run is over; for 0 until it has a folder."""
    deadline = time.monotonic() + 60
    while (last_step(run) < step or not (run / "metrics.jsonl").exists()) and _alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_killed_while_its_model_is_written_goes_on(forked: ForkedRuns) -> None:
    """What that save had begun is in the run's folder."""
    settings = settings_of(forked, "short", train={"steps": 4})
    expected, run = forked.folder / "short", forked.folder / "short-killed"
    train(forked, settings, str(expected))
    train(forked, settings, str(run))
    (run / "model").rename(run / ".model.saving-host-123")
    (run / "model").mkdir()
    (run / "model").rename(run / ".model.saving-elsewhere-4194399")
    train(forked, settings, str(run), "--resume", "auto")
    assert_same_run(run, expected)


# -- a full disk ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_saved_costs_a_line_and_no_run(forked: ForkedRuns) -> None:
    settings = settings_of(forked, "full", train={"steps": 4}, checkpoint={"keep": None})
    run = forked.folder / "full"
    ended = forked.run("train", settings, "--output", str(run), no_room_for=".step-000002")
    assert ended.code == 0, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("megatrain: ")]
    assert line.startswith("megatrain: checkpoint: step 2 was not saved: cannot save to ")
    assert "No space left on device" in line
    assert line.endswith("the last checkpoint is step-000001; training goes on")
    assert "saved 3 checkpoints in " in ended.output and ", 1 could not be; " in ended.output
    assert (run / "model" / "model.safetensors").exists()
    assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == [1, 3, 4]
    assert cli.main(["verify", str(run)]) == 0


def test_a_plan_that_cannot_be_written_costs_a_line_and_no_model(forked: ForkedRuns) -> None:
    settings = settings_of(forked, "no-plan", train={"steps": 1}, checkpoint={"every": None})
    ended = forked.run("train", settings, "--output", str(forked.folder / "no-plan"), no_room_for="plan.json")
    assert ended.code == 0 and "plan.json': No space left on device" in ended.output, ended.output
    left = {path.name for path in (forked.folder / "no-plan").iterdir()}
    assert left == {"config.yaml", "ledger.jsonl", "metrics.jsonl", "model", "report.html"}


@pytest.mark.parametrize("interrupted", [False, True])
def test_where_the_last_checkpoint_cannot_be_saved_the_exit_code_says_so(interrupted: bool, forked: ForkedRuns) -> None:
    """Who goes on from it has to know; all else is done, and the model saved."""
    steps = 100_000 if interrupted else 3
    settings = settings_of(forked, "last", train={"steps": steps}, checkpoint={"every": 2})
    run = forked.folder / f"last-{interrupted}"
    process, log = forked.start("train", settings, "--output", str(run), no_room_for=".step-")
    if interrupted:
        while not (run / "metrics.jsonl").exists() or not metrics_of(run):
            assert _alive(process)
            time.sleep(0.05)
        os.kill(process, signal.SIGINT)
    ended = forked.wait(process, log)
    done = len(metrics_of(run))
    of_all = " of 100,000" if interrupted else ""
    assert ended.code == 1 and f"trained {done:,}{of_all} steps\n" in ended.output, ended.output
    last = ended.output.splitlines()[-1]
    assert last.startswith(f"megatrain: checkpoint: step {done} was not saved: cannot save to ")
    assert "No space left on device" in last
    assert (run / "model" / "model.safetensors").exists()
    assert not (run / "checkpoints").exists()


# -- two runs on one folder -------------------------------------------------------------------------------------------


def test_a_second_run_on_a_folder_is_refused_and_the_first_unharmed(forked: ForkedRuns) -> None:
    """Also one that would go on from the first one's checkpoints, which the first removes meanwhile."""
    settings = settings_of(forked, "two", train={"steps": 6})
    expected, run = forked.folder / "one", forked.folder / "two"
    process, log = forked.start("train", settings, "--output", str(run))
    _wait_for_step(run, 2, process)
    os.kill(process, signal.SIGSTOP)  # it stands in its middle until the others have been refused
    for more in (["--resume", "auto"], ["--resume", str(run)], []):
        began = time.monotonic()
        second = forked.run("train", settings, "--output", str(run), *more)
        assert second.code == 2 and time.monotonic() - began < 3, second.output
        said = "another run is writing to" if more else "already holds files; give another folder or remove it"
        assert second.output.startswith("megatrain: output: ") and second.output.count("\n") == 1
        assert said in second.output
    assert _alive(process)
    os.kill(process, signal.SIGCONT)
    first = forked.wait(process, log)
    assert first.code == 0, first.output
    train(forked, settings, str(expected))
    assert_same_run(run, expected)
