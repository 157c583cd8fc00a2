"""What a manifest says of where its files came from."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatrain.errors import ConfigError
from megatrain.trust import facts
from megatrain.version import __version__


def test_the_sources_hash_is_what_a_shell_says(tmp_path: Path) -> None:
    package = Path(facts.__file__).parents[1]
    tools = ("find", "sort", "xargs", "sha256sum")
    assert all(map(shutil.which, tools))
    command = "find * -name '*.py' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    done = subprocess.run(["sh", "-c", command], cwd=package, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == facts.code_sha256()


def test_the_sources_hash_changes_with_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = facts.code_sha256(tmp_path)
    (tmp_path / "notes.txt").write_text("no code")
    assert facts.code_sha256(tmp_path) == before
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = facts.code_sha256(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({before, renamed, facts.code_sha256(tmp_path)}) == 3


def test_facts_of_a_run(tmp_path: Path) -> None:
    data = [tmp_path / "b.txt", tmp_path / "a.txt"]
    for path in data:
        path.write_text(path.name)
    found = facts.run_facts("output: x\n", data, "cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["code"] == {"version": __version__, "sha256": facts.code_sha256()}
    assert found["config_sha256"] == hashlib.sha256(b"output: x\n").hexdigest()
    assert found["data"] == [
        {"path": str(path), "bytes": 5, "sha256": hashlib.sha256(path.name.encode()).hexdigest()} for path in data
    ]
    assert found["libraries"]["torch"] == torch.__version__
    assert set(found["libraries"]) == {
        *("python", "torch", "numpy", "numba", "transformers", "safetensors", "tokenizers")
    }
    assert found["hardware"]["device"] == "cpu"
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_bytes"] > 1 << 27


def test_a_training_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data: cannot read '.*gone.txt': No such file"):
        facts.describe_files([tmp_path / "gone.txt"])
