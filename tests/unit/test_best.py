"""Which checkpoints stay because they are the best ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from failing_disk import FailingDisk
from test_crash_faults import engine_of, run_checkpoints
from test_engine_toys import batches_of

import megatrain as mt
from megatrain.checkpoint.folders import list_checkpoints
from megatrain.train.best import best_checkpoint, evaluated_checkpoints, lowest, point_to
from megatrain.train.evaluate import Evaluation
from megatrain.train.held_out import Standing


class Measures:
    """In the role of what is measured: a loss by step."""

    measures_during_training = True

    def __init__(self, losses: dict[int, float]) -> None:
        self.standing = Standing("a1")
        self._losses = losses
        self.losses: dict[int, float] = {}

    def after_step(self, step: int) -> None:
        if step in self._losses:
            self.standing = self.standing.after(step, {"eval": Evaluation(self._losses[step], 10, None)}, 0.0)
            self.losses[step] = self._losses[step]

    def loss_at(self, step: int) -> float | None:
        return self.standing.loss if self.standing.step == step else None


def save(folder: Path, losses: dict[int, float], steps: int, first_step: int = 0, **settings: Any) -> Any:
    """Checkpoints of a run with these losses; `disk`: what fails, by step."""
    disks = settings.pop("disk", {})
    engine, measures = engine_of(), Measures(losses)
    checkpoints = run_checkpoints(engine, folder, first_step, held_out=measures, **settings)
    measures.after_step(first_step)
    for done in range(first_step + 1, steps + 1):
        engine.train_step(batches_of(done, 1))
        measures.after_step(done)
        if done in disks:
            disks[done].arm(40, "ENOSPC")
        checkpoints.after_step(done, last=done == steps)
        if checkpoints._running is not None:
            checkpoints._running[1]._thread.join()
        if done in disks:
            disks[done].disarm()
    engine.close()
    return checkpoints


def there(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("losses", "settings", "stay", "best"),
    [
        ({2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}, {}, [4, 8], 4),
        ({2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}, {"keep_best": 2}, [4, 6, 8], 4),
        ({2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5}, {"keep_best": 0}, [8], None),
        ({2: 3.0, 4: 2.0, 6: 2.0, 8: math.nan}, {}, [4, 8], 4),  # of equal ones the first
        ({2: math.nan, 4: math.nan}, {}, [8], None),
        ({3: 1.0, 5: 2.0}, {"every": 4}, [3, 8], 3),  # between two that are saved anyway
        ({2: 1.0}, {"keep": None, "every": 3}, [2, 3, 6, 8], 2),
    ],
)
def test_the_best_ones_stay(
    losses: dict[int, float], settings: dict[str, Any], stay: list[int], best: int | None, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = save(folder, losses, 8, **{"every": 2, **settings})
    assert there(folder) == stay
    pointer = folder / "best.txt"
    assert (pointer.read_text() if pointer.exists() else None) == (None if best is None else f"step-{best:06d}\n")
    if best is not None:
        assert best_checkpoint(str(tmp_path)) == (folder / f"step-{best:06d}", losses[best])
        assert checkpoints.best(Path("x")) == (Path(f"x/step-{best:06d}"), losses[best])
    for path in list_checkpoints(folder):
        json.loads((path / "training.json").read_text(), parse_constant=pytest.fail)  # no NaN, which is no JSON


def test_a_run_that_goes_on_knows_the_best_of_before(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, {2: 1.0, 4: 3.0}, 6, every=2)
    assert there(folder) == [2, 6]
    save(folder, {8: 2.0, 10: 1.5}, 10, first_step=6, every=2)
    assert there(folder) == [2, 10]
    save(folder, {11: 0.5}, 12, first_step=10, every=2)
    assert there(folder) == [11, 12]
    save(folder, {}, 3, first_step=2, every=1)  # back to before the best one
    assert there(folder) == [3] and not (folder / "best.txt").exists()


def test_what_was_measured_after_it_was_saved_counts_from_the_next_one_on(tmp_path: Path) -> None:
    """Ctrl-C came in an evaluation, and the run went on with it."""
    folder = tmp_path / "checkpoints"
    save(folder, {}, 2, every=2)
    save(folder, {2: 1.0, 4: 2.0, 6: 2.0}, 6, first_step=2, every=2)
    assert there(folder) == [2, 6] and best_checkpoint(str(tmp_path)) == (folder / "step-000002", 1.0)


def test_a_best_one_that_cannot_be_saved_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints = save(folder, {2: 2.0, 4: 1.0, 6: 3.0}, 6, every=2, disk={4: FailingDisk(tmp_path, monkeypatch)})
    assert checkpoints.failed == 1 and there(folder) == [2, 6]
    assert best_checkpoint(str(tmp_path)) == (folder / "step-000002", 2.0)


def test_losses_of_other_texts_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, {2: 1.0}, 2, every=2)
    assert evaluated_checkpoints(folder) == evaluated_checkpoints(folder, "a1") == {2: 1.0}
    assert evaluated_checkpoints(folder, "b2") == {}


@pytest.mark.parametrize("told", [None, 3, {}, {"of": "a1", "losses": [1]}, {"of": "a1", "losses": {"x": 1, "2": "y"}}])
def test_checkpoints_that_say_nothing_of_it(told: object, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, {}, 1, every=1)
    path = folder / "step-000001" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": {"evaluation": told}}))
    assert evaluated_checkpoints(folder) == {}
    with pytest.raises(mt.ConfigError, match=r"^--best: .* has no checkpoint that was evaluated; train with data.eval"):
        best_checkpoint(str(tmp_path))


def test_the_lowest_come_first() -> None:
    assert lowest({1: 2.0, 2: 1.0, 3: math.nan, 4: 1.0, 5: 0.5}, 3) == [5, 2, 4]


def test_the_pointer_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for losses, name in (({2: 1.0}, "step-000002\n"), ({2: 1.0, 3: 0.5}, "step-000003\n")):
        point_to(tmp_path, losses)
        assert (tmp_path / "best.txt").read_text() == name
    point_to(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
