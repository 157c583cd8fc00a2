"""Optimizer state on disk, and moments of one byte, under a whole engine."""

import copy
import errno
import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from some_of import some_of
from test_arena import linux_only, vm_flags
from test_cli import run
from test_engine_toys import WIDTH, Block, Net, assert_trains_like_plain, batches_of, make_batch, make_engine
from torch import Tensor, nn

import megatrain as mt
from megatrain.device.lagged import LaggedDevice
from megatrain.engine import setup
from megatrain.errors import CapacityError, ConfigError, IntegrityError
from megatrain.memory import pieces
from megatrain.memory.arena import allocate
from megatrain.memory.placement import choose_spilled, spread
from megatrain.memory.plan import MemoryPlan
from megatrain.memory.spilled_states import BUFFERS
from megatrain.optim.int8_moments import BLOCK
from megatrain.trust.encryption import ProcessCipher

PIECE_ELEMENTS = 43 * BLOCK  # of units of 33,000: pieces begin inside of parameters, and end there
INT8 = mt.AdamW(lr=1e-2, moments="int8")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", PIECE_ELEMENTS)


class Wide(Block):
    """Most of its parameters in one matrix, so that state outweighs the buffers it goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 4096, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden + self.wide(hidden).sum(-1, keepdim=True) / 4096)


def make_net(count: int = 6) -> Net:
    return Net(Wide, count=count)


def device(name: str, precision: str) -> Any:
    return LaggedDevice(precision) if name == "lagged" else name


def tight(some: bool = True, **settings: Any) -> int:
    """Host memory with room for a part of the optimizer state, or (not `some`) for next to nothing of it."""
    engine = make_engine(make_net(), **settings)
    engine.close()
    state = sum(engine.plan.state[name] for name in ("remainders", "exp_avg", "exp_avg_sq"))
    spilled = 3 if some else 6  # of the six large units
    layouts = [[slab.layout for slab in unit.slabs] for unit in engine.store.units.values()]
    buffers = BUFFERS * max(pieces.buffer_bytes(slabs, engine.store.moments) for slabs in layouts)
    return engine.plan.total_bytes - spilled * (state // 6) + buffers + 4 * 4096


def trained(steps: int = 4, **settings: Any) -> tuple[list[Any], dict[str, torch.Tensor], dict[int, Any], int]:
    """(loss and norm of each step, weights, optimizer state, units on disk)."""
    model = make_net()
    engine = make_engine(model, **settings)
    seen = []
    for step in range(steps):
        stats = engine.train_step(batches_of(step, 2))
        seen.append((stats.loss, stats.grad_norm))
    state = {n: {k: v.clone() for k, v in s.items()} for n, s in engine.optimizer_state().items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    masters = {f"master {slot}": engine.store.read_master(slot) for slot in engine.store.slots}
    engine.close()
    return seen, weights | masters, state, len(engine.plan.spilled)


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert one[2].keys() == other[2].keys()
    for number, state in one[2].items():
        assert state.keys() == other[2][number].keys()
        assert all(torch.equal(state[name], other[2][number][name]) for name in state)


CLIPS = {"global": {}, "unit": {"clip_scope": "unit"}, "none": {"clip_norm": None}}


@pytest.mark.parametrize(
    ("moments", "name", "precision", "clip"), some_of(5, ("fp32", "int8"), ("cpu", "lagged"), ("fp32", "bf16"), CLIPS)
)
def test_state_on_disk_changes_no_bit(tmp_path: Path, name: str, precision: str, clip: str, moments: str) -> None:
    """All of it there, half of it, none of it."""
    settings = {"precision": precision, "optimizer": mt.AdamW(lr=1e-2, moments=moments), **CLIPS[clip]}
    expected = trained(**settings, device=device(name, precision))
    assert expected[3] == 0
    for some in (True, False):
        memory = tight(some, **settings, device=device(name, precision))
        found = trained(**settings, device=device(name, precision), nvme=tmp_path, host_memory=memory)
        assert_same(found, expected)
        assert found[3] >= (3 if some else 6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moments", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_sealed_state_on_disk_changes_no_bit(tmp_path: Path, name: str, moments: str) -> None:
    settings: dict[str, Any] = {"precision": "bf16", "optimizer": mt.AdamW(lr=1e-2, moments=moments)}
    expected = trained(**settings, device=device(name, "bf16"))
    settings |= {"host_memory": tight(**settings, device=device(name, "bf16")), "nvme": tmp_path}
    found = trained(**settings, device=device(name, "bf16"), nvme_encryption=True)
    assert_same(found, expected)
    assert found[3] >= 3


@pytest.mark.parametrize("encrypted", [False, True])
def test_the_disk_shows_state_only_where_it_is_not_sealed(tmp_path: Path, encrypted: bool) -> None:
    memory = tight(False)
    engine = make_engine(make_net(), nvme=tmp_path, host_memory=memory, nvme_encryption=encrypted)
    engine.train_step(batches_of(0, 2))
    moments = [moment for state in engine.optimizer_state().values() for moment in (state["exp_avg"],) if moment.any()]
    assert engine.store.spilled is not None
    engine.store.spilled.flush()
    file: Any = engine.store.spilled._file
    file = file._file if encrypted else file
    disk = allocate(file.n_bytes)
    file.read(0, disk)
    content = disk.numpy().tobytes()
    shown = sum(moment.numpy().tobytes()[:64] in content for moment in moments)
    assert shown == 0 if encrypted else shown >= 6
    engine.close()


def test_encryption_without_its_library_is_refused_before_anything_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"^engine.nvme_encryption: encryption needs .*'megatrain\[encryption\]'$"):
        make_engine(make_net(), nvme=tmp_path, nvme_encryption=True)


@linux_only
def test_no_core_dump_holds_what_an_engine_keeps(tmp_path: Path) -> None:
    """Weights, optimizer state, gradients that wait for the norm, and the buffers of the disk."""
    engine = make_engine(make_net(), precision="bf16", nvme=tmp_path, host_memory=tight(precision="bf16"))
    engine.train_step(batches_of(0, 2))
    held = {f"parameter {name}": value for name, value in engine.model.named_parameters()}
    for unit, slab in ((unit, slab) for unit, state in engine.store.units.items() for slab in state.slabs):
        held[f"gradient {unit}"] = slab.gradient
        if slab.state is not None:
            held |= {f"remainder {unit}": slab.state.remainder}
            held |= {f"{name} {unit}": moment for name, moment in slab.state.moments.items()}
    assert engine.store.spilled is not None
    held |= {f"buffer {number}": buffer for number, buffer in enumerate(engine.store.spilled._free)}
    assert len(held) > 20
    smaps = Path("/proc/self/smaps").read_text()
    found = {name: vm_flags(tensor.data_ptr(), smaps) for name, tensor in held.items() if tensor.nbytes}
    assert [name for name, flags in found.items() if "dd" not in flags] == []
    engine.close()


def test_all_three_tiers_at_once(tmp_path: Path) -> None:
    """Some units on the device, state of others on disk, the rest in host memory: the same training."""
    settings: dict[str, Any] = {"precision": "bf16", "clip_norm": 0.1}
    expected = trained(**settings, device=device("lagged", "bf16"))
    settings["resident_units"] = 3  # the embedding and two blocks
    engine = make_engine(make_net(), **settings, device=device("lagged", "bf16"))
    engine.close()
    assert len(engine.plan.resident) == 3
    large = engine.plan.state["exp_avg"] // 4  # of each of the other four blocks, about
    memory = engine.plan.total_bytes - 4 * large + BUFFERS * 10 * PIECE_ELEMENTS + 10 * 4096
    found = trained(**settings, device=device("lagged", "bf16"), nvme=tmp_path, host_memory=memory)
    assert 1 <= found[3] < 4
    assert [norm for _, norm in found[0]] == pytest.approx([norm for _, norm in expected[0]], rel=1e-13)
    assert_same(([loss for loss, _ in found[0]], *found[1:]), ([loss for loss, _ in expected[0]], *expected[1:]))


def test_as_few_units_as_it_takes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"precision": "bf16", "nvme": tmp_path}
    for memory, expected in ((tight(precision="bf16"), {3, 4}), (10**9, {0})):
        engine = make_engine(make_net(), **settings, host_memory=memory)
        assert len(engine.plan.spilled) in expected
        assert engine.plan.total_bytes <= memory
        held = engine.memory_report()
        assert {k: n for k, n in engine.plan.state.items() if n} == {k: n for k, n in held.items() if n}
        engine.train_step(batches_of(0, 1))
        engine.close()
    with pytest.raises(CapacityError, match=r"missing: .* disk buffers .* engine.host_memory is 1.00 kB"):
        make_engine(make_net(), **settings, host_memory=1000)


def test_training_with_state_on_disk_is_like_plain(tmp_path: Path) -> None:
    """Against plain PyTorch, to the last bit."""
    assert_trains_like_plain(make_net(), micro_batches=2, nvme=tmp_path, host_memory=tight())


def test_everything_that_reads_or_writes_state_goes_through_the_disk(tmp_path: Path) -> None:
    """Masters and moments read and written from outside, weights written in place."""
    model, other = make_net(), make_net()
    on_disk = make_engine(model, precision="bf16", nvme=tmp_path, host_memory=tight(precision="bf16"))
    in_memory = make_engine(other, precision="bf16")
    assert on_disk.plan.spilled
    for engine in (on_disk, in_memory):
        engine.train_step(batches_of(0, 2))
        state = {n: {k: v.clone() for k, v in s.items()} for n, s in engine.optimizer_state().items()}
        engine.train_step(batches_of(1, 2))
        engine.load_optimizer_state(state)
        engine.load_optimizer_state({n: s for n, s in state.items() if n % 3})
        engine.flush()
        with torch.no_grad():
            engine.model.head.weight.mul_(1.5)
            engine.model.blocks[1].wide.weight.mul_(1.5)
        engine.model.blocks[2].wide.weight.data.mul_(1.5)  # past torch's version counter
        engine.train_step(batches_of(2, 2))
        engine.flush()
        engine.model.blocks[3].wide.weight.data.mul_(1.5)
    for slot in on_disk.store.slots:
        assert torch.equal(on_disk.store.read_master(slot), in_memory.store.read_master(slot))
    for n, s in on_disk.optimizer_state().items():
        assert all(torch.equal(s[k], in_memory.optimizer_state()[n][k]) for k in s)
    on_disk.close()
    in_memory.close()


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_a_failing_disk_stops_training_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    engine = make_engine(
        make_net(), device=device(name, "fp32"), nvme=tmp_path, host_memory=tight(device=device(name, "fp32"))
    )
    engine.train_step(batches_of(0, 1))
    engine.flush()

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)

    def go_on() -> None:
        for step in range(1, 4):
            engine.train_step(batches_of(step, 1))

    with pytest.raises(IntegrityError, match=r"engine.nvme: (reading|writing) optimizer state in .* at byte"):
        go_on()
    with pytest.raises(IntegrityError, match=r"engine.nvme"):
        engine.flush()


@pytest.mark.parametrize("value", ["/nowhere", 3])
def test_a_wrong_folder(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"engine.nvme is .*; it must be a folder that exists"):
        make_engine(Net(), nvme=value)


@pytest.mark.parametrize("value", [0, -1, "lots", 1.5])
def test_a_wrong_host_memory(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"engine.host_memory is .*; it must be a number of bytes > 0"):
        make_engine(Net(), host_memory=value)


def test_too_little_host_memory_without_a_disk() -> None:
    with pytest.raises(CapacityError, match=r"missing: .* parameters need .* and engine.host_memory is 20.00 kB"):
        make_engine(Net(), host_memory=20_000)


def test_units_on_disk_are_few_and_spread() -> None:
    assert spread(range(8), 0) == frozenset()
    assert spread(range(8), 2) == {2, 6}
    assert spread(range(8), 8) == set(range(8))
    plan_of = lambda chosen: MemoryPlan(1, {"state": 100 - 10 * len(chosen)}, {})  # noqa: E731
    assert choose_spilled(range(8), plan_of, 100) == frozenset()
    assert len(choose_spilled(range(8), plan_of, 71)) == 3
    assert len(choose_spilled(range(8), plan_of, 5)) == 8


# -- moments of one byte ----------------------------------------------------------------------------------------------


def test_wrong_moments() -> None:
    with pytest.raises(ConfigError, match=r"moments"):
        mt.AdamW(moments="int4")


def test_int8_moments_take_two_bytes_and_an_eighth() -> None:
    model = make_net()
    engines = {m: make_engine(copy.deepcopy(model), optimizer=mt.AdamW(moments=m)) for m in ("fp32", "int8")}
    held = {m: engine.memory_report() for m, engine in engines.items()}
    elements = held["fp32"]["exp_avg"] / 4
    # a byte each, and a scale for 64; every parameter begins a block here
    assert elements * 1.0625 <= held["int8"]["exp_avg"] < elements * 1.1
    for m, engine in engines.items():
        engine.train_step([make_batch(0)])
        assert held[m]["exp_avg"] == engine.plan.state["exp_avg"]
        engine.close()


def test_int8_state_is_given_and_taken_exactly() -> None:
    """Training goes on from a copy of the state as it would have gone on."""
    model = Net(count=3)
    engine = make_engine(model, optimizer=INT8)
    for step in range(3):
        engine.train_step(batches_of(step, 1))
    other = Net(count=3)
    other.load_state_dict(model.state_dict())
    resumed = make_engine(other, optimizer=INT8)
    resumed.load_optimizer_state(engine.optimizer_state())
    resumed.step_count = engine.step_count
    for step in range(3, 6):
        assert resumed.train_step(batches_of(step, 1)).loss == engine.train_step(batches_of(step, 1)).loss
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    plain = make_engine(Net(count=3))
    with pytest.raises(ConfigError, match=r"optimizer.moments is fp32; the state given holds torch.int8"):
        plain.load_optimizer_state(engine.optimizer_state())
    wrong = engine.optimizer_state()
    for name, expected in (("exp_avg", "[29, 8]"), ("exp_avg_scale", "[4]")):
        with pytest.raises(
            ConfigError, match=rf"embed.weight: {name} has the shape \[1\]; it must be {re.escape(expected)}"
        ):
            resumed.load_optimizer_state({**wrong, 0: {**wrong[0], name: wrong[0][name].reshape(-1)[:1]}})


# -- from the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("".join(f"x{n} = {n}\n" for n in range(400)))
    config = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
    return {
        "model": {
            "config": config | {"num_attention_heads": 2, "max_position_embeddings": 64},
            "tokenizer": {"train": "bpe", "vocab_size": 280},
        },
        "data": {"train": str(tmp_path / "text.txt"), "seq_len": 32},
        "train": {"steps": 3},
        "engine": {"precision": "fp32"},
        "output": str(tmp_path / "run"),
    }


def losses(tmp_path: Path, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


def test_a_run_whose_state_does_not_fit_goes_on_with_a_disk(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it goes with enough memory, loss by loss, also where the disk's content is sealed; without the disk it is
    refused, and says what is missing."""
    (tmp_path / "disk").mkdir()
    assert run(settings, tmp_path, "--output", str(tmp_path / "roomy")) == 0
    plan = json.loads((tmp_path / "roomy" / "plan.json").read_text())
    tight = ["--engine.host_memory", str(sum_of_state(plan) * 9 // 10)]
    capsys.readouterr()
    assert run(settings, tmp_path, *tight, "--output", str(tmp_path / "refused")) == 2
    assert "missing" in capsys.readouterr().err
    disk = ["--engine.nvme", str(tmp_path / "disk"), "--output", str(tmp_path / "spilled")]
    assert run(settings, tmp_path, *tight, *disk) == 0
    assert losses(tmp_path, "spilled") == losses(tmp_path, "roomy")
    assert json.loads((tmp_path / "spilled" / "plan.json").read_text())["bytes"]["nvme"]
    made: list[ProcessCipher] = []
    monkeypatch.setattr(setup, "ProcessCipher", lambda: made.append(ProcessCipher()) or made[0])
    sealed = [*disk[:2], "--engine.nvme_encryption", "on", "--output", str(tmp_path / "sealed")]
    assert run(settings, tmp_path, *tight, *sealed) == 0
    assert losses(tmp_path, "sealed") == losses(tmp_path, "roomy") and len(made) == 1


def test_a_run_whose_state_does_not_fit_goes_on_with_units_on_the_device(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As planned, and as told; the model that is saved is the one that all-host training saves."""
    streaming = ["--engine.device", "lagged", "--engine.resident_units", "0"]
    assert run(settings, tmp_path, *streaming, "--output", str(tmp_path / "roomy")) == 0
    needed = sum_of_state(json.loads((tmp_path / "roomy" / "plan.json").read_text()))
    tight = ["--engine.host_memory", str(needed * 6 // 10)]
    assert run(settings, tmp_path, *streaming, *tight, "--output", str(tmp_path / "refused")) == 2
    for name, options in (
        ("planned", [*tight, "--engine.device_memory", "60MB"]),
        ("told", ["--engine.resident_units", "4"]),
    ):
        where = ["--engine.device", "lagged", "--output", str(tmp_path / name)]
        assert run(settings, tmp_path, *where, *options) == 0
        plan = json.loads((tmp_path / name / "plan.json").read_text())
        resident = plan["placement"]["tiers"]["device"]
        assert resident[:2] == ["model.embed_tokens", "model.layers.0"]
        assert name == "planned" or len(resident) == 4
        assert losses(tmp_path, name) == losses(tmp_path, "roomy")
        saved = [load_file(tmp_path / run / "model" / "model.safetensors") for run in (name, "roomy")]
        assert all(torch.equal(value, saved[1][key]) for key, value in saved[0].items())
    assert run(settings, tmp_path, "--engine.resident_units", "-1") == 2
    assert "engine.resident_units" in capsys.readouterr().err


def sum_of_state(plan: dict[str, Any]) -> int:
    host = plan["bytes"]["host"]
    return sum(
        n for name, n in host.items() if name in ("weights", "remainders", "moments", "gradients", "gradient sum")
    )


def test_moments_of_one_byte_by_key(settings: dict[str, Any], tmp_path: Path) -> None:
    assert run(settings, tmp_path, "--optimizer.moments", "int8") == 0
    assert run(settings, tmp_path, "--optimizer.moments", "int4", "--output", str(tmp_path / "other")) == 2


def test_a_disk_that_is_no_folder(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings, tmp_path, "--engine.nvme", "/nowhere") == 2
    assert "engine.nvme is '/nowhere'; it must be a folder that exists" in capsys.readouterr().err
