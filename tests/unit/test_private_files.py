"""What others may read: the model, as the umask has it; nothing of training's state."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import run, settings  # noqa: F401 (a fixture)

from megatrain import cli
from megatrain.private_files import make_private_folder, private

GROUP_AND_OTHERS = 0o077


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_files_and_folders(tmp_path: Path, umask: int) -> None:
    """New ones, and such as were open to others before."""
    for name in ("new", "old"):
        path = tmp_path / name
        if name == "old":
            path.write_text("some")
            path.chmod(0o666)
        with open(path, "a", opener=private) as stream:
            stream.write(" more")
        assert mode(path) == 0o600
    assert path.read_text() == "some more"
    make_private_folder(tmp_path / "folder")
    assert mode(tmp_path / "folder") == 0o700
    (tmp_path / "folder").chmod(0o777)
    make_private_folder(tmp_path / "folder")
    assert mode(tmp_path / "folder") == 0o700


def test_a_umask_that_would_lock_out_the_owner(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        with open(tmp_path / "file", "w", opener=private) as stream:
            stream.write("x")
        make_private_folder(tmp_path / "folder")
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == 0o600 and mode(tmp_path / "folder") == 0o700


def test_a_run_keeps_its_account_to_itself_and_shares_its_model(
    settings: dict[str, Any],  # noqa: F811
    tmp_path: Path,
    umask: int,
) -> None:
    assert run(settings, tmp_path) == 0
    folder = tmp_path / "run"
    assert {mode(folder / name) for name in ("metrics.jsonl", "plan.json", "ledger.jsonl")} == {0o600}
    assert mode(folder) == mode(folder / "model") == 0o777 & ~umask
    shared = [path for path in (folder / "model").iterdir() if path.suffix in (".safetensors", ".json")]
    assert shared and {mode(path) for path in shared} == {0o666 & ~umask}


def test_a_run_that_crashes_writes_no_core_file(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        if before[1] == 0:
            pytest.skip("none may be written here at all")
        resource.setrlimit(resource.RLIMIT_CORE, (4096, before[1]))
        monkeypatch.setenv("MEGATRAIN_DEBUG", "1")
        cli._leave_no_core_dump()
        assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 4096
        monkeypatch.delenv("MEGATRAIN_DEBUG")
        cli._leave_no_core_dump()
        assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
