"""Runs that are evaluated while they train: the same training, the best checkpoint, an early end, and going on."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import SETTINGS, model_of, write_texts

from megatrain import cli
from megatrain.checkpoint.folders import list_checkpoints
from megatrain.train import planning
from megatrain.train.best import best_checkpoint

EVALUATED: dict[str, Any] = {
    "data": {"eval": "noise.txt"},  # of which training makes the model ever more wrongly sure
    "train": {"steps": 14, "log_to": "tensorboard"},
    "engine": {"precision": "fp32"},
    "checkpoint": {"every": 5, "keep": 1},
    "eval": {"every": 2, "at_start": True, "prompts": ["def"], "max_new_tokens": 4, "max_tokens": 60},
}
PLAIN: dict[str, Any] = {"train": {"steps": 14}, "engine": {"precision": "fp32"}, "checkpoint": {"every": 5, "keep": 1}}


@pytest.fixture(autouse=True)
def nothing_is_measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measured_here", lambda _c, _w, device: (planning.describe_machine(device), None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write_texts(folder)
    noise = random.Random(1)
    (folder / "noise.txt").write_text("".join(noise.choice("defx7 (:)\n") for _ in range(300)))
    return folder


def train(folder: Path, run: str, settings: dict[str, Any], *more: str, code: int = cli.DONE) -> Path:
    whole = {
        section: {**SETTINGS.get(section, {}), **settings.get(section, {})} for section in {**SETTINGS, **settings}
    }
    whole["data"] = {name: str(folder / v) if name in ("train", "eval") else v for name, v in whole["data"].items()}
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(whole))
    assert cli.main(["train", str(path), "--output", str(folder / run), *more]) == code
    return folder / run


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "measured_here", lambda _c, _w, device: (planning.describe_machine(device), None))
        return train(folder, "evaluated", EVALUATED)


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [{k: line[k] for k in ("step", "loss", "grad_norm", "lr")} for line in lines(run) if "eval" not in line]


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    """What of them is the same in every run."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(run) if "eval" in line]


def losses_of(run: Path) -> dict[int, float]:
    return {line["step"]: line["eval"]["loss"] for line in evaluations_of(run)}


def test_evaluation_changes_nothing_of_a_run(folder: Path, evaluated: Path) -> None:
    plain = train(folder, "plain", PLAIN)
    assert steps_of(evaluated) == [{k: line[k] for k in ("step", "loss", "grad_norm", "lr")} for line in lines(plain)]
    assert model_of(evaluated) == model_of(plain)
    last = [run / "checkpoints" / "step-000014" for run in (evaluated, plain)]
    for name in ("state/state.safetensors", "model/model.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()


def test_the_best_checkpoint_stays_and_is_what_was_measured(
    folder: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = losses_of(evaluated)
    assert list(losses) == [0, 2, 4, 6, 8, 10, 12, 14]
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert best not in (5, 10, 14), "the data are made so that it is none of those that are saved anyway"
    names = [path.name for path in list_checkpoints(evaluated / "checkpoints")]
    assert names == [f"step-{best:06d}", "step-000014"]
    assert (evaluated / "checkpoints" / "best.txt").read_text() == f"{names[0]}\n"
    assert best_checkpoint(str(evaluated)) == (evaluated / "checkpoints" / names[0], losses[best])
    assert cli.main(["export", str(evaluated), str(folder / "exported"), "--best", "--dtype", "fp32"]) == cli.DONE
    assert f"{names[0]}, with loss {losses[best]:.4f}" in capsys.readouterr().err
    weights = [
        path / "model.safetensors" for path in (folder / "exported", evaluated / "checkpoints" / names[0] / "model")
    ]
    assert (
        weights[0].read_bytes() == weights[1].read_bytes() != (evaluated / "model" / "model.safetensors").read_bytes()
    )
    assert cli.main(["generate", str(evaluated), "--best", "--prompt", "x", "--max-new-tokens", "1"]) == cli.DONE
    assert cli.main(["verify", str(evaluated)]) == cli.DONE
    assert cli.main(["export", str(folder / "exported"), str(folder / "nothing"), "--best"]) == cli.WRONG
    assert "has no checkpoint that was evaluated" in capsys.readouterr().err


def test_samples_are_written(evaluated: Path) -> None:
    samples = lines(evaluated, "samples.jsonl")
    assert [one["step"] for one in samples] == [0, 2, 4, 6, 8, 10, 12, 14]
    assert all(one["prompt"] == "def" and one["text"] for one in samples)
    assert (evaluated / "samples.jsonl").stat().st_mode & 0o077 == 0


def test_evaluations_are_in_the_ledger_and_the_audit_passes(
    evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [line for line in lines(evaluated, "ledger.jsonl") if line["kind"] == "evaluation"]
    assert {line["step"]: line["results"]["eval"]["loss"] for line in entries} == losses_of(evaluated)
    assert cli.main(["audit", str(evaluated), "--steps", "1:3"]) == cli.DONE
    assert "steps 1 to 3 come from the recorded data, code and settings" in capsys.readouterr().out


def test_a_run_that_goes_on_is_the_one_that_was(folder: Path, evaluated: Path) -> None:
    """From its best checkpoint, although metrics, samples, curves and the pointer are ahead of it."""
    best = best_checkpoint(str(evaluated))[0]
    run = folder / "again"
    shutil.copytree(evaluated, run)
    resumed = train(folder, "again", EVALUATED, "--resume", str(run / "checkpoints" / best.name))
    assert steps_of(resumed) == steps_of(evaluated) and evaluations_of(resumed) == evaluations_of(evaluated)
    assert lines(resumed, "samples.jsonl") == lines(evaluated, "samples.jsonl")
    for path in list_checkpoints(evaluated / "checkpoints"):
        for name in ("training.json", "state/state.safetensors"):
            assert (resumed / "checkpoints" / path.name / name).read_bytes() == (path / name).read_bytes()
    assert {path.name for path in (resumed / "checkpoints").iterdir()} == {
        path.name for path in (evaluated / "checkpoints").iterdir()
    }
    assert cli.main(["verify", str(resumed)]) == cli.DONE
    assert curve(resumed, "eval/loss") == pytest.approx(losses_of(evaluated))
    assert curve(resumed, "train/loss") == pytest.approx({line["step"]: line["loss"] for line in steps_of(evaluated)})


def curve(run: Path, tag: str) -> dict[int, float]:
    """As TensorBoard shows it; each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    events = found.Scalars(tag)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_tensorboard_has_curves_settings_and_samples(evaluated: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert curve(evaluated, "eval/loss") == pytest.approx(losses_of(evaluated))
    found = EventAccumulator(str(evaluated / "tensorboard"))
    found.Reload()
    assert {"config/text_summary", "samples/0/text_summary"} <= set(found.Tags()["tensors"])
    assert (evaluated / "tensorboard").stat().st_mode & 0o077 == 0


def test_patience_ends_a_run_and_a_resumed_one_at_the_same_step(
    folder: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patient = EVALUATED | {"eval": EVALUATED["eval"] | {"patience": 3}, "checkpoint": {"every": 1, "keep": None}}
    patient["train"] = {"steps": 14}
    run = train(folder, "patient", patient)
    losses = losses_of(evaluated)
    best = min(losses, key=lambda step: losses[step])
    ended = best + 6
    assert f"training ends here, at step {ended}: no improvement in 3 evaluations" in capsys.readouterr().err
    assert [line["step"] for line in steps_of(run)][-1] == ended < 14
    assert evaluations_of(run)[-1]["enough"]
    assert lines(run, "ledger.jsonl")[-1]["kind"] == "end" and lines(run, "ledger.jsonl")[-1]["step"] == ended
    assert (run / "model").is_dir() and (run / "checkpoints" / f"step-{ended:06d}").is_dir()
    # from between two evaluations that were no improvement; and from where it ended
    for name, step in (("patient-again", best + 3), ("patient-over", ended)):
        whence = run / "checkpoints" / f"step-{step:06d}"
        resumed = train(folder, name, patient, "--resume", str(whence))
        assert evaluations_of(resumed) == [line for line in evaluations_of(run) if line["step"] > step]
        assert model_of(resumed) == model_of(run)
