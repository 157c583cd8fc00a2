"""What a checkpoint says of its step and data, in three places that have to agree; nothing here needs a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.description import Description
from megatrain.errors import ConfigError
from megatrain.train.resume import check_data, find_checkpoint
from megatrain.trust.manifest import write_manifest

DATA = [{"path": "a.txt", "bytes": 3, "sha256": "0" * 64}]
FACTS: dict[str, Any] = {"data": DATA, "libraries": {"torch": "2", "numba": None}, "step": 8}


def saved(folder: Path, facts: dict[str, Any], **entries: Any) -> Path:
    folder.mkdir(parents=True)
    names = {"precision": "bf16", "moments": "fp32", "model_dtype": "float32"}
    told = Description(step=8, seed=0, steps={"a": 8}, param_groups=[], **names)
    (folder / "training.json").write_text(json.dumps(json.loads(told.to_bytes()) | entries))
    write_manifest(folder, facts)
    return folder


@pytest.mark.parametrize(
    ("change", "entries", "message"),
    [
        (lambda f: f.update(data="x"), {}, "manifest.json is damaged: facts.data is 'x'; expected files with path"),
        (lambda f: f.update(data=["x"]), {}, r"facts.data is \['x'\]; expected files"),
        (lambda f: f.update(libraries=["x"]), {}, r"facts.libraries is \['x'\]; expected versions by name"),
        (lambda f: f.update(libraries={"x": {}}), {}, r"facts.libraries is \{'x': \{\}\}; expected versions by name"),
        (lambda f: f.update(ledger={"lines": -5, "sha256": ""}), {}, "facts.ledger is .*; expected lines and sha256"),
        (lambda f: f.update(step=True), {}, "facts.step is True; expected a whole number"),
        (lambda f: f.update(step=9), {}, "training.json is damaged: step is 8; expected 9, as manifest.json says"),
        (lambda f: None, {"step": 5}, "training.json is damaged: step is 5; expected 8, as the folder's name says"),
        (lambda f: None, {"steps": {"a": 9}}, "training.json is damaged: steps of 'a' is 9; expected at most step, 8"),
    ],
)
def test_what_does_not_agree_is_refused(
    change: Callable[[dict[str, Any]], object], entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    facts = dict(FACTS)
    change(facts)
    folder = saved(tmp_path / "checkpoints" / "step-000008", facts, **entries)
    for resume in (str(folder), "auto"):
        with pytest.raises(ConfigError, match=message):
            find_checkpoint(resume, tmp_path, verify=True)


@pytest.mark.parametrize("name", ["step-000008", "kept"])  # under another name it is still one
def test_what_agrees_goes_on_with_the_same_data_only(name: str, tmp_path: Path) -> None:
    resumed = find_checkpoint(str(saved(tmp_path / name, FACTS)), tmp_path, verify=True)
    assert resumed is not None and resumed.step == 8
    check_data(resumed, {"data": DATA}, force=False)
    for other in ([], [DATA[0] | {"sha256": "1" * 64}], [*DATA, *DATA]):
        with pytest.raises(ConfigError, match=r"data\.train has changed"):
            check_data(resumed, {"data": other}, force=False)
        check_data(resumed, {"data": other}, force=True)


def test_a_manifest_without_data_is_not_taken_for_the_same_data(tmp_path: Path) -> None:
    resumed = find_checkpoint(str(saved(tmp_path / "step-000008", {})), tmp_path, verify=True)
    assert resumed is not None
    with pytest.raises(ConfigError, match=r"manifest.json has no facts.data, so that nobody can say"):
        check_data(resumed, {"data": DATA}, force=False)
    check_data(resumed, {"data": DATA}, force=True)
