"""`megatrain verify`: what each tampering with a checkpoint or a run says, and its exit code."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from saved_folders import FILES, fill, make_checkpoint, make_run

from megatrain import cli
from megatrain.trust.facts import describe_files
from megatrain.trust.manifest import parent_of, read_manifest, write_manifest

Output = pytest.CaptureFixture[str]
DAMAGED = "model/model.safetensors"


def said(output: Output) -> list[str]:
    """Lines on standard output; none on standard error."""
    captured = output.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def complaint(output: Output) -> str:
    """The one line on standard error; none on standard output."""
    captured = output.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def rewrite(folder: Path) -> None:
    """As somebody would who changes a file and its manifest with it."""
    (folder / DAMAGED).write_bytes(b"other weights")
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.facts, manifest.parent)


def test_a_checkpoint_as_it_was_written(tmp_path: Path, capsys: Output) -> None:
    folder = make_checkpoint(tmp_path / "step-000100")
    assert cli.main(["verify", str(folder)]) == cli.DONE
    size = sum(map(len, FILES.values())) / 1000
    (line,) = said(capsys)
    assert re.fullmatch(rf"all as recorded: checked 4 files \({size:.2f} kB\) of 1 manifests in \d+\.\d s", line)


@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_a_run_and_its_checkpoints_folder(inner: str, tmp_path: Path, capsys: Output) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / ".step-001100.saving").mkdir()  # a save that did not end
    assert cli.main(["verify", str(run / inner)]) == cli.DONE
    parents, result = said(capsys)
    assert parents == "parents: 2 with the manifest that their child recorded"
    assert result.startswith("all as recorded: checked 12 files")


def test_a_checkpoint_named_by_a_dot(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.chdir(run / "checkpoints" / "step-001000")
    assert cli.main(["verify", "."]) == cli.DONE
    assert said(capsys)[0] == "parents: 2 with the manifest that their child recorded"


def test_each_difference_is_a_line_with_its_checkpoint(tmp_path: Path, capsys: Output) -> None:
    run = make_run(tmp_path / "run")
    first, second, third = (run / "checkpoints" / f"step-{step:06d}" for step in (100, 200, 1000))
    (first / DAMAGED).unlink()
    (second / "model" / "extra\x1b[2J").write_bytes(b"12")
    os.truncate(third / DAMAGED, 7)
    assert cli.main(["verify", str(run)]) == cli.FAILED
    lines = said(capsys)
    recorded = read_manifest(first).files[DAMAGED].sha256
    assert lines[:3] == [
        f"checkpoints/step-000100/{DAMAGED}: expected sha256 {recorded}, found no file",
        "'checkpoints/step-000200/model/extra\\x1b[2J': expected no file, found 2 bytes",
        f"checkpoints/step-001000/{DAMAGED}: expected 5120 bytes, found 7 bytes",
    ]
    assert lines[-1].startswith("3 differences: checked 12 files")


@pytest.mark.parametrize("of", ["run", "checkpoint"])
def test_a_checkpoint_that_was_rewritten_with_its_manifest_is_not_what_its_child_recorded(
    of: str, tmp_path: Path, capsys: Output
) -> None:
    """By itself it is consistent; the chain tells."""
    run = make_run(tmp_path / "run")
    first, second, third = (run / "checkpoints" / f"step-{step:06d}" for step in (100, 200, 1000))
    recorded = parent_of(first).manifest_sha256
    rewrite(first)
    assert cli.main(["verify", str(first)]) == cli.DONE
    capsys.readouterr()
    assert cli.main(["verify", str(run if of == "run" else third)]) == cli.FAILED
    now = parent_of(first).manifest_sha256
    expected = f"expected parent step-000100 with manifest sha256 {recorded}, found one with sha256 {now}"
    assert f"{second.name}/manifest.json: {expected}" in said(capsys)


def test_a_swapped_parent_is_named(tmp_path: Path, capsys: Output) -> None:
    run = make_run(tmp_path / "run")
    other = make_run(tmp_path / "other", (50, 100)) / "checkpoints" / "step-000100"
    swapped = run / "checkpoints" / "step-000100"
    shutil.rmtree(swapped)
    shutil.copytree(other, swapped)
    assert cli.main(["verify", str(run)]) == cli.FAILED
    lines = said(capsys)
    assert [line for line in lines if line.startswith("step-000200/manifest.json: expected parent step-000100 ")]
    assert lines[-1].startswith("1 difference: ")


def test_a_child_whose_record_of_its_parent_was_edited(tmp_path: Path, capsys: Output) -> None:
    run = make_run(tmp_path / "run", (100, 200))
    path = run / "checkpoints" / "step-000200" / "manifest.json"
    data = json.loads(path.read_text())
    data["parent"]["manifest_sha256"] = "0" * 64
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
    assert cli.main(["verify", str(run)]) == cli.FAILED
    assert said(capsys)[0].startswith(
        f"step-000200/manifest.json: expected parent step-000100 with manifest sha256 {'0' * 64}, found one with "
    )


def test_a_parent_that_retention_has_deleted_is_no_difference(tmp_path: Path, capsys: Output) -> None:
    run = make_run(tmp_path / "run")
    gone = run / "checkpoints" / "step-000200"
    recorded = parent_of(gone).manifest_sha256
    shutil.rmtree(gone)
    assert cli.main(["verify", str(run)]) == cli.DONE
    note, result = said(capsys)
    assert note == f"note: step-000200, the parent of step-001000, is not here; its manifest had sha256 {recorded}"
    assert result.startswith("all as recorded")


def test_a_checkpoint_in_the_place_of_its_own_parent_is_not_its_parent(tmp_path: Path, capsys: Output) -> None:
    folder = make_checkpoint(tmp_path / "step-000100")
    write_manifest(folder, {"step": 100}, parent_of(folder))
    assert cli.main(["verify", str(folder)]) == cli.DONE
    assert said(capsys)[0].startswith("note: step-000100, the parent of step-000100, is not here; ")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda path: path.unlink(), r"expected a manifest, found none \('.*step-000200' holds no manifest.json; .*\)"),
        (lambda path: path.write_bytes(b"{"), r"expected a manifest, found none \(.* is damaged: .*\)"),
    ],
)
def test_a_checkpoint_of_a_run_without_a_manifest_that_can_be_read(
    damage: Callable[[Path], object], line: str, tmp_path: Path, capsys: Output
) -> None:
    run = make_run(tmp_path / "run")
    damage(run / "checkpoints" / "step-000200" / "manifest.json")
    assert cli.main(["verify", str(run)]) == cli.FAILED
    first, *_, result = said(capsys)
    assert re.fullmatch(rf"checkpoints/step-000200/manifest\.json: {line}", first)
    assert "checked 8 files" in result and "2 manifests" in result


def test_a_damaged_parent_ends_the_chain_of_a_checkpoint(tmp_path: Path, capsys: Output) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints" / "step-000200" / "manifest.json").write_bytes(b"{")
    assert cli.main(["verify", str(run / "checkpoints" / "step-001000")]) == cli.FAILED
    assert "expected parent step-000200 with manifest sha256 " in said(capsys)[0]


def test_steps_come_in_numeric_order(tmp_path: Path, capsys: Output) -> None:
    run = make_run(tmp_path / "run", (999_999, 1_000_000))
    for folder in (run / "checkpoints").iterdir():
        (folder / "training.json").unlink()
    assert cli.main(["verify", str(run)]) == cli.FAILED
    assert [line.split("/")[1] for line in said(capsys)[:2]] == ["step-999999", "step-1000000"]


def test_bad_usage_is_one_line_and_exit_2(tmp_path: Path, capsys: Output) -> None:
    fill(tmp_path / "plain", {"config.json": b"{}"})
    for arguments, line in (
        ([str(tmp_path / "nowhere")], "cannot read folder "),
        ([str(tmp_path / "plain" / "config.json")], f"'{tmp_path / 'plain' / 'config.json'}' is no folder; expected a"),
        ([str(tmp_path / "plain")], f"'{tmp_path / 'plain'}' holds no manifest.json and no checkpoints; expected a"),
        ([str(tmp_path / "plain"), "--signature", "x"], "--signature needs --public-key FILE, the key that it is"),
        ([], "the following arguments are required: FOLDER"),
    ):
        assert cli.main(["verify", *arguments]) == cli.WRONG
        assert complaint(capsys).startswith(f"megatrain: {line}")


def test_verifying_needs_no_torch(tmp_path: Path) -> None:
    """A checkpoint can be checked where nothing but the disk is."""
    folder = make_checkpoint(tmp_path / "step-000100")
    program = (
        "import sys\nfrom megatrain import cli, trust\nimport megatrain.trust.facts\n"
        f"assert cli.main(['verify', {str(folder)!r}]) == 0\n"
        "print(sorted({'torch', 'numba', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"


def test_data_that_was_trained_on(tmp_path: Path, capsys: Output) -> None:
    text, other = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_bytes(b"some text")
    other.write_bytes(b"more text")
    folder = fill(tmp_path / "step-000100", FILES)
    write_manifest(folder, {"data": describe_files([text, other])})
    assert cli.main(["verify", str(folder), "--data"]) == cli.DONE
    assert said(capsys)[0] == "data: 2 files that were trained on"
    text.write_bytes(b"some test")
    other.unlink()
    assert cli.main(["verify", str(folder)]) == cli.DONE  # without, data are not looked at
    said(capsys)
    assert cli.main(["verify", str(folder), "--data"]) == cli.FAILED
    changed, missing, _, result = said(capsys)
    assert changed.startswith(f"{text}: expected sha256 ") and ", found sha256 " in changed
    assert missing.startswith(f"{other}: expected sha256 ") and missing.endswith("none (No such file or directory)")
    assert result.startswith("2 differences")


@pytest.mark.parametrize("data", [None, [{"path": 3}], [{"path": "a", "bytes": -1, "sha256": "0" * 64}]])
def test_a_manifest_that_names_no_data(data: object, tmp_path: Path, capsys: Output) -> None:
    folder = fill(tmp_path / "step-000100", FILES)
    write_manifest(folder, {} if data is None else {"data": data})
    assert cli.main(["verify", str(folder), "--data"]) == cli.WRONG
    assert "names no files that were trained on" in complaint(capsys)
