"""`megatrain audit`: a clean run is computed again to the bit, and each tampering is named."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ledgers import Line, forge, read_lines, write_chain
from safetensors.torch import load_file, save_file

from megatrain import cli
from megatrain.trust.ledger import LEDGER_NAME, read_ledger
from megatrain.trust.manifest import MANIFEST_NAME, read_manifest, write_manifest

Output = pytest.CaptureFixture[str]
MODEL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SETTINGS: dict[str, Any] = {
    "model": {
        "config": MODEL | {"num_attention_heads": 2, "max_position_embeddings": 64},
        "tokenizer": {"train": "bpe", "vocab_size": 270},
    },
    "data": {"seq_len": 16},
    "optimizer": {"lr": 1e-2},
    "schedule": {"name": "constant"},
    "train": {"steps": 5, "tokens_per_step": 32},
    "engine": {"device": "cpu", "precision": "fp32"},
    "checkpoint": {"every": 2, "keep": None},
}
UNITS = 6  # embedding, two layers, norm, head; and the buffers


def train(folder: Path, *arguments: str, resume: bool = False) -> None:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"x{n} = {n}\n" for n in range(150)))
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"data": SETTINGS["data"] | {"train": str(text)}}))
    output = ("--output", str(folder / "run"))
    assert cli.main(["train", str(path), *output, *(["--resume", "auto"] if resume else []), *arguments]) == cli.DONE


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, five steps, checkpoints after steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("finished")
    train(folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy, to be tampered with; the data are where they were."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def audit(run: Path, *arguments: str) -> int:
    return cli.main(["audit", str(run), *arguments])


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def content(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- clean runs -------------------------------------------------------------------------------------------------------


def test_a_clean_run_is_computed_again_from_its_start(finished: Path, capsys: Output) -> None:
    before = content(finished / "run")
    assert audit(finished / "run") == cli.DONE
    last = capsys.readouterr().out.splitlines()[-1]
    units = UNITS * 5  # of the start, of three checkpoints, of the end
    assert last == f"steps 1 to 5 come from the recorded data, code and settings: 5 steps, {units} units compared"
    assert content(finished / "run") == before


def test_steps_after_a_checkpoint_are_computed_from_it(run: Path, capsys: Output) -> None:
    assert audit(run, "--steps", "4:4") == cli.DONE
    captured = capsys.readouterr()
    assert captured.err == "computing steps 3 to 4 again from step-000002\n"
    assert captured.out.splitlines()[-1].startswith("steps 4 to 4 come from the recorded data, code and settings: 2 st")
    shutil.rmtree(checkpoint(run, 2))  # as retention does
    assert audit(run, "--steps", "4:4") == cli.WRONG
    assert capsys.readouterr().err == (
        "megatrain: --steps: the checkpoint from which step 4 could be computed again is not there any more; the first"
        " is step-000004, and step 1 can be begun with\n"
    )


def test_a_run_that_was_killed_and_went_on(tmp_path: Path, capsys: Output) -> None:
    """In bf16: the ledger ends in the middle of a line, the second run goes on from the checkpoint before, in a third
    one the settings change on purpose."""
    train(tmp_path, "--engine.precision=bf16", "--train.steps=4")
    run, ledger = tmp_path / "run", tmp_path / "run" / LEDGER_NAME
    lines = ledger.read_bytes().splitlines(keepends=True)
    third = next(n for n, line in enumerate(lines) if b'"step":3' in line and b"batch_sha256" in line)
    ledger.write_bytes(b"".join(lines[: third + 1]) + lines[third + 1][:70])
    for gone in (checkpoint(run, 4), run / "model"):
        shutil.rmtree(gone)
    assert cli.main(["verify", str(run)]) == cli.DONE
    assert "its last line was not written to its end" in capsys.readouterr().out
    train(tmp_path, "--engine.precision=bf16", resume=True)
    kinds = [entry.kind for entry in read_ledger(ledger).entries]
    went_on = kinds[kinds.index("resume") :]  # a checkpoint is entered when it is on disk, some steps later
    assert [kind for kind in went_on if kind != "checkpoint"] == ["resume", "step", "step", "step", "end"]
    capsys.readouterr()
    assert audit(run) == cli.DONE
    captured = capsys.readouterr()
    assert captured.err == "computing steps 1 to 5 again from its start\n"
    assert captured.out.splitlines()[-1].startswith("steps 1 to 5 come from the recorded data, code and settings: 5 st")
    train(tmp_path, "--engine.precision=bf16", "--train.steps=6", "--optimizer.lr=1e-3", "--force", resume=True)
    capsys.readouterr()
    assert audit(run, "--steps", "5:6") == cli.DONE
    assert capsys.readouterr().err == (
        "computing steps 5 to 5 again from step-000004\ncomputing steps 6 to 6 again from step-000005\n"
    )


def test_a_run_in_a_new_folder_begins_with_the_checkpoint_of_another(
    finished: Path, tmp_path: Path, capsys: Output
) -> None:
    settings = ["train", str(finished / "settings.yaml"), "--output", str(tmp_path / "other")]
    assert cli.main([*settings, "--resume", str(checkpoint(finished / "run", 2))]) == cli.DONE
    capsys.readouterr()
    assert audit(tmp_path / "other") == cli.DONE
    assert capsys.readouterr().out.splitlines()[-1].startswith("steps 3 to 5 come from the recorded data")


# -- tampering --------------------------------------------------------------------------------------------------------


def change_file(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def change_weight(run: Path, step: int) -> None:
    """With a manifest that is right."""
    folder = checkpoint(run, step)
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1
    save_file(weights, path, {"format": "pt"})
    manifest = read_manifest(folder)
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, manifest.facts, manifest.parent)


def edit_manifest(run: Path) -> None:
    path = checkpoint(run, 4) / MANIFEST_NAME
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))


def edit_lines(change: Callable[[list[Line]], object]) -> Callable[[Path], None]:
    """With a chain that is right; the checkpoints' records of it stay."""

    def edit(run: Path) -> None:
        lines = read_lines(run / LEDGER_NAME)
        change(lines)
        write_chain(run / LEDGER_NAME, lines)

    return edit


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (
            lambda run: change_file(checkpoint(run, 2) / "model" / "model.safetensors"),
            "step-000002/model/model.safeten",
        ),
        (
            lambda run: change_file(next((checkpoint(run, 4) / "state").iterdir())),
            "checkpoints/step-000004/state/state",
        ),
        (lambda run: change_weight(run, 2), "step-000002/manifest.json: expected sha256 "),
        (edit_manifest, "step-000004/manifest.json: expected sha256 "),
        (lambda run: change_file(run / "model" / "model.safetensors"), "model/model.safetensors: expected sha256 "),
        (edit_lines(lambda lines: lines[1].update(loss=1.5)), "ledger.jsonl: expected line 3 with sha256 "),
        (lambda run: (run / LEDGER_NAME).unlink(), "ledger.jsonl: expected "),
    ],
    ids=["weights", "state", "weights and manifest", "manifest", "model", "ledger", "no ledger"],
)
def test_what_does_not_fit_together_is_named_without_computing(
    tamper: Callable[[Path], None], expected: str, run: Path, capsys: Output
) -> None:
    tamper(run)
    assert cli.main(["verify", str(run)]) == cli.FAILED
    found = capsys.readouterr().out
    assert expected in found
    if (run / LEDGER_NAME).exists():
        assert audit(run) == cli.FAILED
        captured = capsys.readouterr()
        assert expected in captured.out and captured.err == ""


@pytest.mark.parametrize("change", ["edited", "removed", "inserted", "reordered"])
def test_a_ledger_whose_chain_is_broken_is_refused(change: str, run: Path, capsys: Output) -> None:
    lines = (run / LEDGER_NAME).read_bytes().splitlines(keepends=True)
    if change == "edited":
        lines[1] = lines[1].replace(b'"target_tokens":3', b'"target_tokens":4')
    elif change == "removed":
        del lines[1]
    elif change == "inserted":
        lines.insert(2, lines[1])
    else:
        lines[1:3] = lines[2:0:-1]
    (run / LEDGER_NAME).write_bytes(b"".join(lines))
    assert audit(run) == cli.FAILED
    line = 2 if change in ("removed", "reordered") else 3
    assert f"{LEDGER_NAME}: line {line} is wrong: it follows a line with sha256" in capsys.readouterr().err
    assert cli.main(["verify", str(run)]) == cli.FAILED
    assert f"line {line} is wrong" in capsys.readouterr().out


def line_of(lines: list[Line], kind: str, step: int) -> Line:
    return next(line for line in lines if line["kind"] == kind and line.get("step", 0) == step)


def another_seed(lines: list[Line]) -> None:
    settings = yaml.safe_load(lines[0]["config"])
    settings["train"]["seed"] = 5
    lines[0]["config"] = yaml.safe_dump(settings)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda lines: line_of(lines, "step", 4).update(batch_sha256="0" * 64),
            f"step 4: the batch's sha256 was {'0' * 64}",
        ),
        (lambda lines: line_of(lines, "step", 3).update(loss=1.5), "step 3: the loss was 1.5, computed again it is "),
        (lambda lines: line_of(lines, "step", 1).update(grad_norm="nan"), "step 1: the gradient's norm was nan"),
        (
            lambda lines: line_of(lines, "step", 3).update(lr=0.02),
            "step 3: the learning rate was 0.02, computed again it",
        ),
        (lambda lines: line_of(lines, "step", 2).update(target_tokens=1), "step 2: the number of target tokens was 1"),
        (
            lambda lines: line_of(lines, "checkpoint", 4)["units"].update({"lm_head": "0" * 64}),
            "step 4: unit lm_head had",
        ),
        (lambda lines: line_of(lines, "end", 5)["units"].pop("model.norm"), "step 5: unit model.norm had sha256 none"),
        (another_seed, "step 0: unit model.embed_tokens had sha256"),
    ],
    ids=["batch", "loss", "norm", "lr", "targets", "unit", "missing unit", "seed"],
)
def test_what_fits_together_and_is_not_true_is_found_by_computing(
    change: Callable[[list[Line]], object], expected: str, run: Path, capsys: Output
) -> None:
    """All hashes were made anew: `verify` sees nothing, and cannot."""
    forge(run, change)
    assert cli.main(["verify", str(run)]) == cli.DONE
    capsys.readouterr()
    assert audit(run) == cli.FAILED
    assert capsys.readouterr().out.splitlines()[-1].startswith(expected)


def test_weights_that_were_changed_with_all_hashes_are_not_those_that_training_gives(run: Path, capsys: Output) -> None:
    change_weight(run, 4)
    forge(run, lambda lines: None)
    assert cli.main(["verify", str(run)]) == cli.DONE
    assert audit(run, "--steps", "5:5") == cli.FAILED
    assert capsys.readouterr().out.splitlines()[-1].startswith("step 4: unit model.norm had sha256 ")


def test_a_model_that_was_changed_with_its_hash_is_not_what_the_last_step_gives(run: Path, capsys: Output) -> None:
    path = run / "model" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, path, {"format": "pt"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    forge(run, lambda lines: lines[-1]["files"].update({"model.safetensors": digest}))
    assert cli.main(["verify", str(run)]) == cli.DONE
    assert audit(run, "--steps", "5:5") == cli.FAILED
    assert (
        capsys.readouterr().out.splitlines()[-1] == "model: lm_head.weight is not the weight that the last step gives"
    )


def test_other_data_are_named(run: Path, finished: Path, capsys: Output) -> None:
    text = finished / "text.txt"
    before = text.read_bytes()
    try:
        text.write_bytes(before.replace(b"x7 = 7", b"x7 = 8"))
        assert audit(run, "--steps", "3:3") == cli.FAILED
    finally:
        text.write_bytes(before)
    recorded = hashlib.sha256(before).hexdigest()
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"data: {text} had sha256 {recorded}, {text} has ")


def test_other_code_and_libraries_are_said(run: Path, capsys: Output) -> None:
    def change(lines: list[Line]) -> None:
        lines[0]["facts"]["code"]["sha256"] = "0" * 64
        lines[0]["facts"]["libraries"]["torch"] = "1.0"

    forge(run, change)
    assert audit(run, "--steps", "1:1") == cli.DONE
    *_, note, result = capsys.readouterr().out.splitlines()
    assert note.startswith("note: torch 1.0 then, ") and f"code {'0' * 64} then, " in note
    assert note.endswith(": that bits are equal is then not promised")
    assert result.startswith("steps 1 to 1 come from the recorded data and settings: 1 steps, ")


# -- usage, and the run itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0:3"], "argument --steps: '0' is wrong; expected a whole number of at least 1"),
        (["--steps", "3"], "argument --steps: '3' is wrong; expected A:B, such as 1:100"),
        (["--steps", "4:3"], "--steps: 4:3 is wrong; steps 1 to 5 were recorded"),
        (["--steps", "3:6"], "--steps: 3:6 is wrong; steps 1 to 5 were recorded"),
        (["--device", "tpu"], "argument --device: 'tpu' is wrong; expected one of auto, cpu, cuda"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(
    arguments: list[str], message: str, finished: Path, tmp_path: Path, capsys: Output
) -> None:
    for run, expected in (
        (finished / "run", message),
        (tmp_path, message if message.startswith("argument") else "holds no ledger.jsonl; expected a run's folder"),
        (tmp_path / "nowhere", message if message.startswith("argument") else "is no folder; expected a run's folder"),
    ):
        assert audit(run, *arguments) == cli.WRONG
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1 and expected in captured.err


def test_a_resume_refuses_a_ledger_that_is_not_its_own(run: Path, finished: Path, capsys: Output) -> None:
    lines = (run / LEDGER_NAME).read_bytes().splitlines(keepends=True)
    (run / LEDGER_NAME).write_bytes(b"".join(lines[:2]))
    os.truncate(checkpoint(run, 5) / MANIFEST_NAME, 10)
    arguments = ["train", str(finished / "settings.yaml"), "--output", str(run), "--resume", "auto"]
    assert cli.main(arguments) == cli.WRONG
    assert "ledger.jsonl: expected line 6 with sha256 " in capsys.readouterr().err
    (run / LEDGER_NAME).unlink()  # as the line says: moved away
    assert cli.main(arguments) == cli.DONE
    assert read_ledger(run / LEDGER_NAME).entries[0].kind == "resume"


def test_a_first_step_that_fails_leaves_no_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatrain.engine.engine import Engine

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Engine, "train_step", fail)
    with pytest.raises(AssertionError):
        train(tmp_path)
    assert not (tmp_path / "run").exists()


# -- what the end of a ledger vouches for -----------------------------------------------------------------------------


def cut_ledger(run: Path, lines: int) -> None:
    whole = (run / LEDGER_NAME).read_bytes().splitlines(keepends=True)
    (run / LEDGER_NAME).write_bytes(b"".join(whole[:-lines]))


def flip(folder: Path) -> None:
    """One bit of a weight, in the folder's safetensors."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def flip_and_reseal(folder: Path) -> None:
    flip(folder / "model")
    manifest = read_manifest(folder)
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, manifest.facts, manifest.parent)


def test_a_ledger_without_its_end_does_not_hide_a_changed_model(run: Path, capsys: Output) -> None:
    cut_ledger(run, 1)
    flip(run / "model")
    assert cli.main(["verify", str(run)]) == cli.FAILED
    assert "model: expected an `end` of the run in the ledger" in capsys.readouterr().out
    assert audit(run, "--steps", "5:5") == cli.FAILED


def test_nor_does_one_without_its_last_checkpoint(run: Path, capsys: Output) -> None:
    """Everything agrees with everything, and the ledger could be that of a killed run."""
    cut_ledger(run, 2)
    shutil.rmtree(run / "model")
    flip_and_reseal(checkpoint(run, 5))
    assert cli.main(["verify", str(run)]) == cli.DONE
    assert "step-000005: the run was stopped before the ledger entered it" in capsys.readouterr().out
    assert audit(run, "--steps", "5:5") == cli.FAILED
    assert "in step-000005 is not what the step gives" in capsys.readouterr().out


def test_a_checkpoint_that_the_run_did_not_make(run: Path, finished: Path, capsys: Output) -> None:
    shutil.copytree(checkpoint(run, 5), checkpoint(run, 7))
    flip_and_reseal(checkpoint(run, 7))
    assert cli.main(["verify", str(run)]) == cli.FAILED
    printed = capsys.readouterr().out
    assert "step-000007/manifest.json: expected step 7, found step 5" in printed
    assert "step-000007: expected a checkpoint that the ledger has entered, found none of that step" in printed
    longer = ["--train.steps", "6", "--output", str(run), "--resume", "auto"]
    assert cli.main(["train", str(finished / "settings.yaml"), *longer]) == cli.DONE
    said = capsys.readouterr().err
    assert "expected step 7, found step 5" in said and "step-000005, step 5\n" in said
    assert not checkpoint(run, 7).exists()  # once step 6 was whole
    assert audit(run) == cli.DONE


def test_a_checkpoint_that_the_ledger_knows_otherwise_is_not_gone_on_from(
    run: Path, finished: Path, capsys: Output
) -> None:
    flip_and_reseal(checkpoint(run, 5))
    longer = ["--train.steps", "6", "--output", str(run), "--resume", "auto"]
    assert cli.main(["train", str(finished / "settings.yaml"), *longer]) == cli.DONE
    said = capsys.readouterr().err
    assert "(by the ledger)" in said and "going on from" in said and "step-000004, step 4\n" in said


def test_what_is_not_as_it_was_written_stays_until_the_next_checkpoint_is_whole(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    (checkpoint(run, 5) / "model" / ".DS_Store").touch()
    settings = ["train", str(finished / "settings.yaml"), "--output", str(run), "--resume", "auto"]
    monkeypatch.setattr("megatrain.train.checkpoints.write_manifest", lambda *_, **__: 1 / 0)
    cli.main(settings)
    assert (checkpoint(run, 5) / "model" / "model.safetensors").exists()
    assert "goes on before step-000005, which go when its own next one is complete" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(settings) == cli.DONE
    assert not (checkpoint(run, 5) / "model" / ".DS_Store").exists()
    assert cli.main(["verify", str(run)]) == cli.DONE


def test_an_explicit_return_to_an_earlier_checkpoint_is_what_auto_means_next(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    settings = ["train", str(finished / "settings.yaml"), "--output", str(run), "--resume"]
    monkeypatch.setattr("megatrain.train.checkpoints.write_manifest", lambda *_, **__: 1 / 0)
    cli.main([*settings, str(checkpoint(run, 2))])
    monkeypatch.undo()
    shutil.rmtree(run / "model", ignore_errors=True)
    cut_ledger(run, 1)  # as if killed at step 5: no `end`
    capsys.readouterr()
    assert cli.main(["verify", str(run)]) == cli.DONE
    assert "step-000004: the run has gone on from an earlier checkpoint since" in capsys.readouterr().out
    assert cli.main([*settings, "auto"]) == cli.DONE
    assert "step-000002, step 2\n" in capsys.readouterr().err


def test_tokens_per_step_that_follow_from_the_micro_batch_are_data(tmp_path: Path, capsys: Output) -> None:
    """With tokens_per_step null another micro-batch is another batch; written out, it is not."""
    train(tmp_path, "--train.tokens_per_step=null", "--engine.micro_batch=2", "--train.steps=3")
    more = ["--train.steps=5", "--output", str(tmp_path / "run"), "--resume", "auto"]
    settings = str(tmp_path / "settings.yaml")
    assert cli.main(["train", settings, "--train.tokens_per_step=null", "--engine.micro_batch=1", *more]) == cli.WRONG
    assert "train.tokens_per_step is 16, was 32" in capsys.readouterr().err
    assert cli.main(["train", settings, "--train.tokens_per_step=32", "--engine.micro_batch=1", *more]) == cli.DONE


def test_a_signed_run_goes_on(run: Path, finished: Path, capsys: Output) -> None:
    (run / "model.sig").write_text("of the run as it was")
    longer = ["--train.steps", "6", "--output", str(run), "--resume", "auto"]
    assert cli.main(["train", str(finished / "settings.yaml"), *longer]) == cli.DONE
    assert "model.sig is of the run as it was" in capsys.readouterr().err


def test_changed_weights_are_not_exported_nor_trained_on(
    run: Path, finished: Path, tmp_path: Path, capsys: Output
) -> None:
    for folder, more in ((run / "model", run), (checkpoint(run, 5) / "model", checkpoint(run, 5))):
        flip(folder)
        assert cli.main(["export", str(more), str(tmp_path / "out")]) == cli.FAILED
        assert "model.safetensors: expected sha256" in capsys.readouterr().err
        assert cli.main(["generate", str(more), "--prompt", "x", "--max-new-tokens", "1"]) == cli.FAILED
        capsys.readouterr()
        settings = [str(finished / "settings.yaml"), "--output", str(tmp_path / "next")]
        given = ["--model.path", str(more), "--model.config=null", "--model.tokenizer=null"]
        assert cli.main(["train", *settings, *given]) == cli.WRONG
        assert "--no-verify takes it as it is" in capsys.readouterr().err and not (tmp_path / "next").exists()
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--no-verify"]) == cli.DONE


def test_a_signature_inside_a_checkpoints_model_is_no_change_of_it(run: Path, tmp_path: Path) -> None:
    (checkpoint(run, 5) / "model" / "model.sig").write_text("a signature")
    assert cli.main(["export", str(checkpoint(run, 5)), str(tmp_path / "out")]) == cli.DONE
