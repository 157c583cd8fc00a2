"""Saves on a disk that fails, at every call in turn: one line, nothing half-done is left, and training is untouched."""

import contextlib
import errno
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_disk import FAULTS, FailingDisk
from test_checkpoint import ADAMW, assert_same, batches_of, state_of
from tiny_models import tiny_config
from transformers import PretrainedConfig

import megatrain as mt
from megatrain import files
from megatrain.checkpoint.folders import list_checkpoints, retain
from megatrain.config import CheckpointConfig
from megatrain.errors import ConfigError, IntegrityError, MegaTrainError
from megatrain.model import folder_swap
from megatrain.model.loading import initialise
from megatrain.train.checkpoints import RunCheckpoints
from megatrain.trust.ledger import LedgerWriter
from megatrain.trust.manifest import require_unchanged

Tree = dict[str, bytes | None]


class Tokenizer:
    """Written by Python's own means, as those of transformers are."""

    def save_pretrained(self, folder: Path) -> None:
        with open(folder / "tokenizer.json", "w", encoding="utf-8") as stream:
            stream.write("{}")


def _config() -> PretrainedConfig:
    """A llama of one layer without a head of its own: as few calls as there can be."""
    config = tiny_config("llama-tied")
    config.num_hidden_layers = 1
    return config


def engine_of(**settings: Any) -> mt.Engine:
    model = initialise(_config(), seed=3)
    model.train()
    return mt.Engine(model, mt.AdamW(**ADAMW), **({"device": "cpu", "precision": "bf16"} | settings))


def tree_of(folder: Path) -> Tree:
    """All that lies below a folder: its bytes; None: a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def turns(
    disk: FailingDisk, save: Callable[[], object], every: int = 1
) -> Iterator[tuple[str, str, BaseException | None]]:
    """(fault, kind of the call that met it, what came of it) of one save for each call (each of `every`) and fault that
    it can meet; before and after them whole saves, that meet none: ""."""
    disk.arm(-1, "")
    save()
    kinds = list(disk.calls)
    yield "", "", None
    for fault, of in FAULTS.items():
        able = [number for number, kind in enumerate(kinds) if of is None or kind in of]
        for number in [*able[::every], len(kinds)]:
            disk.arm(number, fault)
            error: BaseException | None = None
            try:
                save()
            except Exception as raised:
                error = raised
            disk.disarm()
            if disk.struck is None:
                assert error is None, (number, repr(error))
                yield "", "", None
            else:
                yield f"{fault} at call {number}", disk.struck, error


def assert_one_line(error: BaseException | None, turn: str) -> None:
    assert isinstance(error, MegaTrainError) and not isinstance(error, IntegrityError), (turn, repr(error))
    assert "\n" not in str(error) and str(error).startswith("cannot save to "), (turn, str(error))
    assert any(s in str(error) for s in ("Input/output error", "No space left", "took no more")), (turn, str(error))


def assert_as_before(folder: Path, before: Tree, turn: str) -> None:
    now = tree_of(folder)
    assert now.keys() == before.keys(), (turn, now.keys() ^ before.keys())
    assert now == before, turn


@pytest.mark.parametrize(
    ("background", "every"), [(False, 1), (True, 11), pytest.param(True, 1, marks=pytest.mark.long)]
)
def test_a_save_that_fails_anywhere_leaves_all_as_it_was(
    background: bool, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on during and after it as without it; what was saved before is untouched; the next save works."""
    engine, never_saved = engine_of(), engine_of()
    folder = tmp_path / "run"
    steps = itertools.count()

    def step() -> None:
        number = next(steps)
        found, expected = (one.train_step(batches_of(number, 1)) for one in (engine, never_saved))
        assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)

    step()
    engine.save(folder / "first")
    before, state = tree_of(tmp_path), state_of(engine)
    disk = FailingDisk(tmp_path, monkeypatch)

    def save() -> None:
        begun = engine.save(folder / "next", tokenizer=Tokenizer(), extra={"more": b"x"}, background=background)
        if background:
            step()
            engine.wait_for_save()
            assert begun.over

    seen = set()
    for turn, kind, error in turns(disk, save, every):
        fault = turn.split(" at call ")[0]
        if fault in ("", "a short write"):
            assert error is None, turn
            require_unchanged(folder / "next")
            _remove(folder / "next")
        else:
            assert_one_line(error, f"{turn}, {kind}")
        assert_as_before(tmp_path, before, turn)
        if not background:
            assert_same(state_of(engine), state)
        if (fault, kind) not in seen:  # once for each kind: the next save works
            seen.add((fault, kind))
            engine.save(folder / "next")
            require_unchanged(folder / "next")
            _remove(folder / "next")
    if every == 1:  # each kind of call has met each fault that it can meet
        kinds = {"create", "mkdir", "rename", "write", "stream write", "fsync", "close"}
        expected = {("EIO", kind) for kind in kinds | {"open", "read"}} | {("ENOSPC", kind) for kind in kinds}
        assert seen - {("", "")} == expected | {("a short write", "write"), ("a write of nothing", "write")}
    step()
    assert_same(state_of(engine), state_of(never_saved))
    engine.save(folder / "next")
    saved = state_of(engine)
    engine.load(folder / "first")
    assert_same(state_of(engine), state)
    engine.load(folder / "next")
    assert_same(state_of(engine), saved)
    engine.close()
    never_saved.close()


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


@pytest.mark.parametrize("atomic", [True, False])
def test_a_model_whose_saving_fails_anywhere_leaves_the_old_one(
    atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not atomic:
        monkeypatch.setattr(folder_swap, "_exchange", lambda one, other: False)
    engine = engine_of()
    engine.save_pretrained(tmp_path / "model", tokenizer=Tokenizer())
    (tmp_path / "model" / "README.md").write_text("mine")
    before = tree_of(tmp_path)
    engine.train_step(batches_of(0, 1))
    engine.save_pretrained(tmp_path / "new", tokenizer=Tokenizer())
    (tmp_path / "new" / "README.md").write_text("mine")
    new = tree_of(tmp_path / "new")
    _remove(tmp_path / "new")
    disk = FailingDisk(tmp_path, monkeypatch)
    failed = 0
    for turn, kind, error in turns(disk, lambda: engine.save_pretrained(tmp_path / "model", tokenizer=Tokenizer())):
        if error is None:  # or of the old one not all could be removed
            assert tree_of(tmp_path / "model") == new, (turn, kind)
            for path in tmp_path.iterdir():
                _remove(path)
            for name, content in before.items():
                path = tmp_path / name
                path.mkdir() if content is None else path.write_bytes(content)
        else:
            failed += 1
            assert isinstance(error, OSError), (turn, kind, repr(error))
        assert_as_before(tmp_path, before, f"{turn}, {kind}")
    assert failed > 80
    engine.close()


def test_what_cannot_be_written_to_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    engine.train_step(batches_of(0, 1))
    state = state_of(engine)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = tree_of(tmp_path)
    for background in (False, True):
        for name, reason in (
            ("file", "it is there already; give a new folder"),
            ("there", "it is there already; give a new folder"),
            ("dangling", "it is there already; give a new folder"),
            ("file/inside", "it is a file; what was saved before is untouched"),
            ("file/far/inside", "Not a directory; what was saved before is untouched"),
            ("x" * 300, "File name too long; what was saved before is untouched"),
        ):
            with pytest.raises(MegaTrainError) as caught:
                engine.save(tmp_path / name, background=background)
            assert str(caught.value) == f"cannot save to {tmp_path / name}: {reason}"
            assert_as_before(tmp_path, before, name)
    with monkeypatch.context() as patch:  # for root, every folder can be written to
        patch.setattr(files.os, "mkdir", _read_only)
        with pytest.raises(
            MegaTrainError, match=r"^cannot save to .*new: Read-only file system; what was saved before"
        ):
            engine.save(tmp_path / "missing" / "new")
    assert_as_before(tmp_path, before, "read-only")
    assert_same(state_of(engine), state)
    engine.save(tmp_path / "missing" / "above" / "new")
    require_unchanged(tmp_path / "missing" / "above" / "new")
    engine.close()


def _read_only(*_: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything is writable for root")
def test_a_read_only_folder(tmp_path: Path) -> None:
    engine = engine_of()
    tmp_path.chmod(0o500)
    with pytest.raises(MegaTrainError, match=r"^cannot save to .*new: Permission denied; what was saved before is"):
        engine.save(tmp_path / "new")
    engine.close()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("No space left on device (os error 28)"), "No space left on device (os error 28)"),
        (OSError("two\nlines"), "two"),
        (MemoryError(), "MemoryError: MemoryError"),
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
    ],
)
def test_what_libraries_raise_is_one_line_too(error: Exception, said: str, tmp_path: Path) -> None:
    """Of a full disk, tokenizers' own writer raises a plain Exception."""

    class Failing:
        def save_pretrained(self, _folder: Path) -> None:
            raise error

    engine = engine_of()
    with pytest.raises(MegaTrainError) as caught:
        engine.save(tmp_path / "saved", tokenizer=Failing(), background=True)
    assert str(caught.value) == f"cannot save to {tmp_path / 'saved'}: {said}; what was saved before is untouched"
    assert list(tmp_path.iterdir()) == []
    engine.close()


def test_every_folder_and_file_is_flushed_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the names of the folders above it, where they were missing."""
    flushed: set[str] = set()
    rename, fsync = os.rename, os.fsync
    at_rename: list[set[str]] = []

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def renamed(source: Path, target: Path) -> None:
        inside = {str(path) for path in [Path(source), *Path(source).rglob("*")]}
        at_rename.append(inside - flushed)
        rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files are in /proc")
    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    engine = engine_of()
    engine.save(tmp_path / "a" / "b" / "saved", tokenizer=Tokenizer())
    assert at_rename == [set()]
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= flushed
    engine.close()


def test_what_a_killed_save_left_is_removed_by_the_next_one_to_that_place(tmp_path: Path) -> None:
    engine = engine_of()
    left = folder_swap.temporary_for(tmp_path / "saved")
    dead = left.with_name(left.name.rpartition("-")[0] + "-4194399")  # above the highest number of a process
    for folder in (left, dead):
        folder.mkdir()
        (folder / "half").write_text("x")
    engine.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    engine.close()


# -- the checkpoints of a run -----------------------------------------------------------------------------------------


def run_checkpoints(
    engine: mt.Engine, folder: Path, first_step: int = 0, held_out: Any = None, **settings: Any
) -> RunCheckpoints:
    return RunCheckpoints(
        CheckpointConfig(**({"every": 1, "keep": 1} | settings)),
        engine,
        folder,
        config="steps: 3\n",
        facts={},
        tokenizer=None,
        first_step=first_step,
        parent=None,
        ledger=LedgerWriter(Path(tempfile.mkdtemp()) / "ledger.jsonl"),
        held_out=held_out,
    )


def test_old_checkpoints_that_cannot_be_removed_cost_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of retention fails, each in turn: what is listed is whole at every moment, and the next time makes up for
    it."""
    disk = FailingDisk(tmp_path, monkeypatch)
    failed = 0
    for number in itertools.count():
        for step in range(1, 4):
            folder = tmp_path / f"step-{step:06d}"
            folder.mkdir(exist_ok=True)
            (folder / "training.json").write_text("{}")
            (folder / "more").write_text("x")
        disk.arm(number, "EIO")
        try:
            retain(tmp_path, 1)
        except OSError:
            failed += 1
        disk.disarm()
        listed = list_checkpoints(tmp_path)
        assert listed[-1].name == "step-000003", number
        assert all(len(list(one.iterdir())) == 2 for one in listed), number
        if disk.struck is None:
            break
        retain(tmp_path, 1)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000003"], number
    assert 2 <= failed < number and number > 10


def test_what_cannot_be_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint has been saved all the same, and is the next one's parent."""
    engine = engine_of()
    checkpoints = run_checkpoints(engine, tmp_path)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        _read_only() if Path(target).name == ".step-000001.removed" else rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    for done in (1, 2, 3):
        engine.train_step(batches_of(done, 1))
        checkpoints.after_step(done, last=True)
    said = f"checkpoint: an old one in {tmp_path} cannot be removed: Read-only file system"
    assert [record.getMessage() for record in caplog.records] == [said, said]
    assert (checkpoints.saved, checkpoints.failed, checkpoints.lost) == (3, 0, None)
    manifest = json.loads((tmp_path / "step-000003" / "manifest.json").read_text())
    assert manifest["parent"]["folder"] == "step-000002"
    engine.close()


def test_a_save_that_fails_is_said_and_the_next_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of()
    checkpoints = run_checkpoints(engine, tmp_path / "checkpoints", keep=None)
    disk = FailingDisk(tmp_path, monkeypatch)
    for done in range(1, 5):
        engine.train_step(batches_of(done, 1))
        if done in (2, 4):
            disk.arm(40, "ENOSPC")
        checkpoints.after_step(done, last=done == 4)
        if checkpoints._running is not None:  # written before the next step, which the disk is well in again
            checkpoints._running[1]._thread.join()
        disk.disarm()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-000001", "step-000003"]
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("checkpoint: step 2 was not saved: cannot save to ")
    assert "No space left on device" in first and first.endswith("the last checkpoint is step-000001; training goes on")
    assert checkpoints.lost is not None and last == f"{checkpoints.lost}; training goes on"
    assert (checkpoints.saved, checkpoints.failed) == (2, 2)
    # the chain leaves out what is not there
    manifest = json.loads((tmp_path / "checkpoints" / "step-000003" / "manifest.json").read_text())
    assert manifest["parent"]["folder"] == "step-000001"
    checkpoints.after_step(4, last=True)
    assert checkpoints.lost is None
    engine.close()


@pytest.mark.parametrize("background", [False, True])
def test_state_that_is_not_what_it_should_be_ends_the_run(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit is no matter of the disk, and training must not go on."""
    engine = engine_of(integrity="full")
    engine.train_step(batches_of(0, 1))
    checkpoints = run_checkpoints(engine, tmp_path / "checkpoints")
    if background:

        def damaged(*_: object) -> None:
            raise IntegrityError("unit model.layers.0: its state has changed")

        monkeypatch.setattr("megatrain.checkpoint.state_files.StateWriter.write", damaged)
    else:
        slab = next(slab for unit in engine.store.units.values() for slab in unit.slabs)
        slab.weight_bits[3] ^= 1
    with pytest.raises(IntegrityError):
        checkpoints.after_step(1, last=True)
    assert list_checkpoints(tmp_path / "checkpoints") == []
    with contextlib.suppress(MegaTrainError):
        engine.close()


def test_what_lies_in_a_checkpoint_and_must_not_is_no_matter_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A link that leaves the folder: the checkpoint is refused, and the run goes on."""

    class Linking:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "link").symlink_to("/etc")

    engine = engine_of()
    engine.train_step(batches_of(0, 1))
    checkpoints = run_checkpoints(engine, tmp_path / "checkpoints")
    checkpoints._tokenizer = Linking()
    checkpoints.after_step(1, last=True)
    (record,) = caplog.records
    assert "step 1 was not saved: cannot save to " in record.getMessage() and "link" in record.getMessage()
    engine.close()


def test_damaged_checkpoints_of_later_steps_give_way(tmp_path: Path) -> None:
    """One without its description is none, but stands where the run is going to write."""
    engine = engine_of()
    engine.train_step(batches_of(0, 1))
    (tmp_path / "step-000001" / "model").mkdir(parents=True)
    (tmp_path / ".step-000001.saving-elsewhere-1").mkdir()
    (tmp_path / ".step-000009.removed").mkdir()
    run_checkpoints(engine, tmp_path).after_step(1, last=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    require_unchanged(tmp_path / "step-000001")
    engine.close()


def test_a_folder_of_checkpoints_that_cannot_be_cleared_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    (tmp_path / ".step-000009.removed").mkdir()
    monkeypatch.setattr(files, "remove_tree", _read_only)
    with pytest.raises(ConfigError, match=r"^output: cannot remove checkpoints in '.*': Read-only file system$"):
        run_checkpoints(engine, tmp_path, first_step=5)
    engine.close()


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="megatrain")
    torch.manual_seed(0)
