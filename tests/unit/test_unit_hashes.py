"""What two engines, batches or processes are compared by: equal where they are, different for a single bit."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import ADAMW, _slow, engine_of, train

import megatrain as mt
from megatrain.data.batches import batch_sha256
from megatrain.errors import ConfigError
from megatrain.train.determinism import determinism


@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "fp32"}, {"device": "lagged"}, {"device": "lagged", "resident_units": 2}, {"nvme": True}],
    ids=str,
)
def test_units_have_the_same_hash_wherever_they_lie_and_when_they_are_saved_and_loaded(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    given = dict(settings)
    precision = given.get("precision", "bf16")
    if given.pop("nvme", False):
        given |= {"nvme": tmp_path, "host_memory": 400_000}
    plain, engine = engine_of(precision=precision), engine_of(**given)
    for one in (plain, engine):
        train(one, 0, 2)
    expected = plain.unit_hashes()
    assert engine.unit_hashes() == expected
    assert {"model.embed_tokens", "model.layers.1", "lm_head", "all buffers"} <= expected.keys()
    save = engine.save(tmp_path / "saved", background=True, hash_units=True)
    train(engine, 2, 4)
    save.wait()
    assert save.unit_hashes == expected != engine.unit_hashes()
    again = mt.Engine.from_checkpoint(tmp_path / "saved", mt.AdamW(**ADAMW), device="cpu", precision=precision)
    assert again.unit_hashes() == expected
    for one in (plain, engine, again):
        one.close()


@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_a_save_hashes_what_was_there_when_it_began(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two more steps are asked for while the first unit waits to be written; counters move before weights do."""
    engine = engine_of(device=device)
    train(engine, 0, 2)
    expected, go = engine.unit_hashes(), _slow(monkeypatch)
    save = engine.save(tmp_path / "saved", background=True, hash_units=True)
    threading.Timer(0.5, go.set).start()
    train(engine, 2, 4)
    save.wait()
    assert save.unit_hashes == expected
    engine.close()


def test_one_bit_of_anything_changes_the_hash_of_its_unit_alone() -> None:
    engine = engine_of()
    train(engine, 0, 1)
    before = engine.unit_hashes()
    entry = next(e for e in engine.store.slots.values() if e.slot.name == "lm_head.weight")
    state = entry.slab.state
    assert state is not None
    for part in state.parts_of(entry.slab.range_of(entry.place)).values():
        bits = part.view(torch.uint8)
        bits[0] ^= 1
        found = engine.unit_hashes()
        assert [name for name in before if found[name] != before[name]] == ["lm_head"]
        bits[0] ^= 1
    entry.steps += 1
    assert engine.unit_hashes()["lm_head"] != before["lm_head"]
    entry.steps -= 1
    assert engine.unit_hashes() == before
    next(iter(engine.model.buffers()))[0] += 1
    assert [name for name, digest in engine.unit_hashes().items() if digest != before[name]] == ["all buffers"]
    engine.close()


def test_a_save_hashes_nothing_unless_it_is_asked_to(tmp_path: Path) -> None:
    engine = engine_of()
    assert engine.save(tmp_path / "saved").unit_hashes == {}
    engine.close()


def test_a_batch_has_one_hash_however_it_is_cut() -> None:
    ids = torch.arange(24).view(4, 6)
    whole = batch_sha256([{"input_ids": ids, "labels": ids + 1}])
    halves = [{"labels": part + 1, "input_ids": part} for part in (ids[:2], ids[2:])]
    assert batch_sha256(halves) == batch_sha256([{"input_ids": r, "labels": r + 1} for r in ids.split(1)]) == whole
    others = [
        [{"input_ids": ids, "labels": ids}],
        [{"input_ids": ids + 1, "labels": ids}],  # under each other's names
        [{"input_ids": ids.int(), "labels": ids.int() + 1}],
        [{"input_ids": ids.view(2, 12), "labels": ids.view(2, 12) + 1}],
        halves[::-1],
        halves[:1],
        [],
    ]
    hashes = {batch_sha256(batches) for batches in others}
    assert len(hashes) == len(others) and whole not in hashes


def test_values_beside_the_rows_count_too() -> None:
    ids = torch.arange(6).view(1, 6)
    found = {batch_sha256([{"input_ids": ids, "scale": torch.tensor(value)}]) for value in (1.0, 2.0)}
    assert len(found) == 2


def test_deterministic_algorithms_are_on_for_a_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fills
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with (
        pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'; expected :4096:8 or :16:8"),
        determinism(True),
    ):
        pass
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="CUDA has started without CUBLAS_WORKSPACE_CONFIG"), determinism(True):
        pass
