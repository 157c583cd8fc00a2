"""`megatrain train --resume`: what goes on is the run that was, to the last bit; what would not is refused."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_runs import ForkedRuns
from small_runs import SETTINGS, metrics_of, model_of, settings_of, train, write_texts

from megatrain import cli
from megatrain.train.run_folder import RunFolder

pytestmark = [
    pytest.mark.xdist_group("resume"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are forked as Linux does"),
]

# 94 sequences, four in a step: the second epoch begins within step 24
STEPS = {"steps": 30}
EXACT: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"engine": {"precision": "fp32"}},
    "lagged": {"engine": {"device": "lagged", "device_memory": "2MiB"}},
}


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    folder = tmp_path_factory.mktemp("resume")
    write_texts(folder)
    with ForkedRuns(folder) as runs:
        yield runs


def settings_for(forked: ForkedRuns, name: str) -> str:
    return settings_of(forked, name, train=STEPS, checkpoint={"every": 7, "keep": None}, **EXACT[name])


@pytest.fixture(scope="module")
def whole(forked: ForkedRuns) -> dict[str, Path]:
    """Uninterrupted runs, each made when it is first asked for."""

    class Runs(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            train(forked, settings_for(forked, name), str(forked.folder / name))
            return self.setdefault(name, forked.folder / name)

    return Runs()


@pytest.mark.parametrize("name", EXACT)
def test_what_is_taken_up_again_ends_as_if_it_had_not_stopped(
    name: str, forked: ForkedRuns, whole: dict[str, Path]
) -> None:
    """From the middle of an epoch; what came of that, once more from the middle of the next one."""
    expected = whole[name]
    first, second = (forked.folder / f"{name}-{n}" for n in (1, 2))
    checkpoint = expected / "checkpoints" / "step-000007"
    train(forked, settings_for(forked, name), str(first), "--resume", str(checkpoint))
    runs = [(first, 7)]
    if name == "bf16":
        train(forked, settings_for(forked, name), str(second), "--resume", str(first / "checkpoints" / "step-000028"))
        runs.append((second, 28))
    for run, step in runs:
        assert metrics_of(run) == metrics_of(expected)[step:]
        assert model_of(run) == model_of(expected)
        for path in (run / "checkpoints").iterdir():
            for file in ("model/model.safetensors", "state/state.safetensors", "training.json"):
                assert (path / file).read_bytes() == (expected / "checkpoints" / path.name / file).read_bytes()


def test_shuffling_is_no_matter_of_the_moment(forked: ForkedRuns, whole: dict[str, Path]) -> None:
    """A run in the order of the text is another one: the comparisons above do compare orders."""
    settings = settings_of(forked, "in-order", train=STEPS, data={"shuffle": False}, checkpoint={"every": None})
    train(forked, settings, str(forked.folder / "in-order"))
    assert metrics_of(forked.folder / "in-order") != metrics_of(whole["bf16"])


def test_with_other_micro_batches_losses_agree_within_rounding(forked: ForkedRuns, whole: dict[str, Path]) -> None:
    """In fp32 to 1e-4 over 23 steps; each step trains on the same tokens."""
    settings, run = settings_for(forked, "fp32"), forked.folder / "micro"
    checkpoint = whole["fp32"] / "checkpoints" / "step-000007"
    ended = train(forked, settings, str(run), "--engine.micro_batch", "4", "--resume", str(checkpoint))
    assert "megatrain: --resume: engine.micro_batch is 4 and was 2: the data are the same" in ended.output
    found, expected = metrics_of(run), metrics_of(whole["fp32"])[7:]
    for name in ("step", "target_tokens", "lr"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def refused(*arguments: str) -> str:
    """The one line of a command that is refused; in this process, since nothing is trained."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.main(["train", *arguments]) == cli.WRONG
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("megatrain: ")]
    return line


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer.lr", "0.5", "optimizer.lr is 0.5, was 0.01"),
        ("train.seed", "9", "train.seed is 9, was "),
        ("data.seq_len", "8", "data.seq_len is 8, was 16"),
        ("schedule.name", "constant", "schedule.name is 'constant', was "),
        ("engine.precision", "fp32", "engine.precision is 'fp32', was 'bf16'"),
    ],
)
def test_changed_settings_are_refused_by_name(
    key: str, value: str, said: str, forked: ForkedRuns, whole: dict[str, Path]
) -> None:
    before = {path: path.read_bytes() for path in whole["bf16"].rglob("*") if path.is_file()}
    settings = settings_for(forked, "bf16")
    line = refused(settings, "--output", str(whole["bf16"]), "--resume", "auto", f"--{key}", value)
    assert said in line and line.endswith("The run would not go on as it began; give --force to go on all the same")
    assert {path: path.read_bytes() for path in whole["bf16"].rglob("*") if path.is_file()} == before


def test_with_force_a_changed_setting_goes_on(forked: ForkedRuns, whole: dict[str, Path]) -> None:
    checkpoint = str(whole["bf16"] / "checkpoints" / "step-000021")
    run = forked.folder / "forced"
    train(forked, settings_for(forked, "bf16"), str(run), "--resume", checkpoint, "--force", "--optimizer.lr", "0.005")
    found, expected = metrics_of(run), metrics_of(whole["bf16"])[21:]
    assert found[0]["loss"] == expected[0]["loss"]  # before the first update
    assert [line["lr"] for line in found] == pytest.approx([line["lr"] / 2 for line in expected])


def test_changed_training_data_are_refused_by_name(forked: ForkedRuns, whole: dict[str, Path]) -> None:
    checkpoint = str(whole["bf16"] / "checkpoints" / "step-000021")
    text = forked.folder / "text" / "1.py"
    original = text.read_bytes()
    try:
        text.write_bytes(original.replace(b"+ 3", b"+ 4", 1))
        run = forked.folder / "other-data"
        ended = forked.run("train", settings_for(forked, "bf16"), "--output", str(run), "--resume", checkpoint)
        assert ended.code == 2 and not run.exists()
        last = ended.output.splitlines()[-1]
        assert last.startswith("megatrain: --resume: data.train has changed (") and "1.py" in last, last
        assert last.endswith("give --force to go on all the same")
    finally:
        text.write_bytes(original)


@pytest.mark.parametrize("damage", ["flipped bit", "no manifest", "no description", "cut short"])
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_taken(
    damage: str, forked: ForkedRuns, whole: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole["bf16"], run)
    _damage(run / "checkpoints" / "step-000030", damage)
    with contextlib.redirect_stderr(io.StringIO()) as said:  # a setting is changed, so that no training begins
        settings = settings_for(forked, "bf16")
        assert cli.main(["train", settings, "--output", str(run), "--resume", "auto", "--optimizer.lr", "1"]) == 2
    warned, refused = said.getvalue().splitlines() if damage != "no description" else ("step-000030", said.getvalue())
    assert "step-000030" in warned and "optimizer.lr is 1.0, was 0.01" in refused
    explicit = str(run / "checkpoints" / "step-000030")
    assert "step-000030" in refused_for(settings, str(tmp_path / "new"), explicit)


def refused_for(settings: str, output: str, checkpoint: str) -> str:
    return refused(settings, "--output", output, "--resume", checkpoint)


def _damage(folder: Path, damage: str) -> None:
    weights = folder / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flipped bit":
        data[-3] ^= 1
        weights.write_bytes(data)
    elif damage == "cut short":
        weights.write_bytes(data[:-3])
    else:
        (folder / {"no manifest": "manifest.json", "no description": "training.json"}[damage]).unlink()


def test_no_good_checkpoint_is_one_line(forked: ForkedRuns, whole: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole["bf16"], run)
    for path in (run / "checkpoints").iterdir():
        _damage(path, "flipped bit")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert cli.main(["train", settings_for(forked, "bf16"), "--output", str(run), "--resume", "auto"]) == 2
    assert "--resume: no checkpoint is as it was written: " in said.getvalue().splitlines()[-1]
    assert "model.safetensors" in said.getvalue().splitlines()[-1]


def test_a_resumed_run_that_fails_keeps_what_the_first_one_left(tmp_path: Path) -> None:
    """Also where no line of metrics is there yet."""
    folder = RunFolder(str(tmp_path / "run"))
    assert not folder.has_results
    (tmp_path / "run" / "checkpoints" / "step-000003").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-000003" / "training.json").write_text("{}")
    assert folder.has_results


def test_going_on_takes_no_more_memory_than_not_having_stopped(forked: ForkedRuns) -> None:
    """20 million parameters: the peak of the process at most 2% above."""
    wide = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
    settings = settings_of(
        forked,
        "wide",
        model={"config": SETTINGS["model"]["config"] | wide},
        train={"steps": 3, "tokens_per_step": 32},
        checkpoint={"every": 1, "keep": 3},
    )
    run, resumed = forked.folder / "wide", forked.folder / "wide-resumed"
    uninterrupted = train(forked, settings, str(run))
    parameters = next(line for line in uninterrupted.output.splitlines() if " parameters, " in line)
    assert "with 20," in parameters
    again = train(forked, settings, str(resumed), "--resume", str(run / "checkpoints" / "step-000001"))
    assert model_of(resumed) == model_of(run)
    print(f"peaks: {uninterrupted.peak_bytes:,} bytes, resumed {again.peak_bytes:,}")
    assert again.peak_bytes <= 1.02 * uninterrupted.peak_bytes
