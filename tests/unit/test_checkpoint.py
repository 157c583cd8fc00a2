"""Checkpoints of an engine: what is read back is what was there, to the last bit, and training goes on meanwhile."""

import json
import operator
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import megatrain as mt
from megatrain.checkpoint.state_files import StateWriter
from megatrain.errors import MegaTrainError
from megatrain.model.loading import initialise
from megatrain.model.saving import ModelFolder

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
CAUSAL = ("llama", "llama-tied", "mixtral", "qwen3_moe", "gemma3_text", "gpt2")


def batches_of(step: int, count: int = 2) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(step)
    ids = [torch.randint(0, 96, (1, 12), generator=random) for _ in range(count)]
    return [{"input_ids": i, "labels": i} for i in ids]


def engine_of(name: str = "llama", **settings: Any) -> mt.Engine:
    model = initialise(tiny_config(name), seed=3)
    model.train()
    return mt.Engine(model, mt.AdamW(**ADAMW), **({"device": "cpu", "precision": "bf16"} | settings))


def train(engine: mt.Engine, first: int, last: int) -> list[float]:
    """Losses and norms of steps first to last - 1."""
    found = []
    for step in range(first, last):
        stats = engine.train_step(batches_of(step))
        assert stats.loss is not None
        found += [stats.loss, stats.grad_norm]
    return found


def state_of(engine: mt.Engine) -> dict[str, Tensor]:
    """Copies of everything that a step depends on."""
    engine.flush()
    found = {f"weight.{n}": p.detach().clone() for n, p in engine.model.named_parameters()}
    found |= {f"buffer.{n}": b.clone() for n, b in engine.model.named_buffers()}
    for index, entry in engine.store.slots.items():
        if entry.place.trainable:
            found |= {f"{kind}.{entry.slot.name}": t.clone() for kind, t in engine.store.read_state(index).items()}
        found[f"steps.{entry.slot.name}"] = torch.tensor(entry.steps)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        same = found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert same, name


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_engine_from_a_checkpoint_goes_on_to_the_last_bit(name: str, precision: str, tmp_path: Path) -> None:
    engine = engine_of(name, precision=precision)
    train(engine, 0, 2)
    engine.save(tmp_path / "saved", run={"position": 2})
    saved = state_of(engine)
    expected = train(engine, 2, 4)
    ended = state_of(engine)
    engine.close()
    settings = {"device": "cpu", "precision": precision}
    again = mt.Engine.from_checkpoint(tmp_path / "saved", mt.AdamW(**ADAMW), **settings)
    again.model.train()
    assert_same(state_of(again), saved)
    assert train(again, 2, 4) == expected
    assert_same(state_of(again), ended)
    again.save(tmp_path / "second")
    expected = train(again, 4, 5)
    third = mt.Engine.from_checkpoint(tmp_path / "second", mt.AdamW(**ADAMW), **settings)
    third.model.train()
    assert train(third, 4, 5) == expected
    for one in (again, third):
        one.close()


@pytest.mark.parametrize("name", [*CAUSAL, "t5", "llava"])
def test_what_is_loaded_into_an_engine_is_what_was_saved(name: str, tmp_path: Path) -> None:
    """Also where the engine has trained on something else meanwhile; its tensors stay where they are."""
    engine = engine_of(name)
    if name in CAUSAL:
        train(engine, 0, 2)
    engine.save(tmp_path / "saved", run={"position": [1, "a"]})
    saved, places = state_of(engine), [p.data_ptr() for p in engine.model.parameters()]
    if name in CAUSAL:
        train(engine, 7, 9)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(2)
    engine.optimizer.param_groups[0]["lr"] = 5.0
    torch.manual_seed(99)
    assert engine.load(tmp_path / "saved") == {"position": [1, "a"]}
    assert_same(state_of(engine), saved)
    assert [p.data_ptr() for p in engine.model.parameters()] == places
    assert engine.optimizer.param_groups[0]["lr"] == ADAMW["lr"]
    engine.close()


class Own(nn.Module):
    """No transformers model: tied weights, a frozen part, a stray parameter, whole numbers, buffers of both kinds."""

    shifts_labels = False

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)) for _ in range(3))
        self.head = nn.Linear(16, 96, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.ones(16))
        self.kinds = nn.Parameter(torch.arange(4), requires_grad=False)
        self.blocks[1].requires_grad_(False)
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        hidden = self.table(input_ids).flatten(0, 1)
        for block in self.blocks:
            hidden = hidden + nn.functional.dropout(block(hidden), 0.1, self.training)
        return {"loss": nn.functional.cross_entropy(self.head(hidden * self.scale), labels.flatten())}


@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_any_module_is_saved_and_loaded(device: str, tmp_path: Path) -> None:
    """Running statistics, buffers that no state dict holds, and dropout go on as they would have."""
    torch.manual_seed(0)
    one, other = (mt.Engine(Own(), mt.AdamW(**ADAMW), device=device, precision="fp32", seed=seed) for seed in (5, 6))
    train(one, 0, 3)
    one.save(tmp_path / "saved")
    expected = train(one, 3, 5)
    other.load(tmp_path / "saved")
    assert train(other, 3, 5) == expected
    assert_same(state_of(other), state_of(one))
    one.close()
    other.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "int8"},
        {"clip_scope": "unit"},
        {"device": "lagged"},
        {"device": "lagged", "resident_units": 2},
        {"device": "lagged", "clip_scope": "unit", "resident_units": 1},
        {"nvme": True},
        {"nvme": True, "device": "lagged", "optimizer": "int8"},
    ],
    ids=str,
)
def test_wherever_state_lies_it_is_saved_as_it_is(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory of the device, on a disk in pieces, with moments of one byte: a save in the background during two
    steps, and what is loaded from it is the state before them."""
    monkeypatch.setattr("megatrain.memory.pieces.PIECE_ELEMENTS", 4096)
    given = dict(settings)
    moments = given.pop("optimizer", "fp32")
    if given.pop("nvme", False):
        given |= {"nvme": tmp_path, "host_memory": 1_500_000 if moments == "fp32" else 800_000}
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 64, 128, 4
    model = initialise(config, seed=3)
    engine = mt.Engine(model, mt.AdamW(**ADAMW, moments=moments), **({"device": "cpu", "precision": "bf16"} | given))
    assert (engine.store.spilled is not None) == ("nvme" in given)
    train(engine, 0, 2)
    before = state_of(engine)
    save = engine.save(tmp_path / "saved", background=True)
    expected = train(engine, 2, 4)
    save.wait()
    engine.load(tmp_path / "saved")
    assert_same(state_of(engine), before)
    assert train(engine, 2, 4) == expected
    engine.close()


def test_buffers_are_those_of_the_step_that_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model's folder too, which is written while the next forward updates running statistics."""
    torch.manual_seed(0)
    engine = mt.Engine(Own(), mt.AdamW(**ADAMW), device="cpu", precision="fp32")
    train(engine, 0, 2)
    before, go = state_of(engine), _slow(monkeypatch)
    save = engine.save(tmp_path / "saved", background=True)
    engine.model(**batches_of(2)[0])
    assert not torch.equal(engine.model.blocks[0][1].running_mean, before["buffer.blocks.0.1.running_mean"])
    go.set()
    save.wait()
    saved = load_file(tmp_path / "saved" / "model" / "model.safetensors")
    assert torch.equal(saved["blocks.0.1.running_mean"], before["buffer.blocks.0.1.running_mean"])
    engine.close()


def _slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing of state waits for the event."""
    go, write = threading.Event(), StateWriter.write

    def late(self: StateWriter, slot: int) -> None:
        go.wait(20)
        write(self, slot)

    monkeypatch.setattr(StateWriter, "write", late)
    return go


@pytest.mark.parametrize("device", ["cpu", "lagged"])
@pytest.mark.parametrize("clip_scope", ["global", "unit"])
@pytest.mark.parametrize("resident", [0, 1])
def test_no_unit_is_updated_before_it_is_written(
    device: str, clip_scope: str, resident: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update of the next step has to wait, and says how long; without the wait the checkpoint holds weights
    of two steps."""
    if resident and device == "cpu":
        pytest.skip("the host has no memory beside its own")
    engine = engine_of(device=device, clip_scope=clip_scope, resident_units=resident)
    train(engine, 0, 2)
    before, go = state_of(engine), _slow(monkeypatch)
    save = engine.save(tmp_path / "saved", background=True)
    assert not save.over
    threading.Timer(0.3, go.set).start()
    train(engine, 2, 4)
    save.wait()
    assert save.stall_seconds > 0.05 and save.seconds >= 0.3
    engine.load(tmp_path / "saved")
    assert_same(state_of(engine), before)
    engine.close()


def test_forward_and_backward_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    train(engine, 0, 1)
    go = _slow(monkeypatch)
    save = engine.save(tmp_path / "saved", background=True)
    batch = batches_of(1)[0]
    loss = engine.model(**batch).loss
    loss.backward()
    assert not save.over and engine.clip_grad_norm_(1.0) > 0
    go.set()
    engine.step()
    save.wait()
    engine.close()


def test_one_group_of_weights_is_held_beside_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written lies where it lies: the writer gets views of the store, and lets go of what was converted."""
    engine = engine_of("qwen3_moe")
    train(engine, 0, 1)
    memory = {t.untyped_storage().data_ptr() for u in engine.store.units.values() for s in u.slabs for t in [s.weight]}
    alive: list[int] = []
    write = ModelFolder.write_group

    def watched(self: ModelFolder) -> list[str]:
        sources = write(self)
        alive.append(len(sources))
        return sources

    monkeypatch.setattr(ModelFolder, "write_group", watched)
    copies: list[int] = []
    from megatrain.model.shards import ShardWriter

    write_one = ShardWriter.write

    def counted(self: ShardWriter, name: str, tensor: Tensor) -> None:
        if tensor.untyped_storage().data_ptr() not in memory and not name.startswith(("buffer.", "random.")):
            copies.append(tensor.nbytes)
        write_one(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", counted)
    engine.save(tmp_path / "saved")
    experts = sum(p.nbytes for n, p in engine.model.named_parameters() if "experts" in n)
    state = sum(s.state is not None for u in engine.store.units.values() for s in u.slabs)
    assert state and max(alive) >= 1
    assert sum(n for n in copies if n) <= experts + sum(_state_bytes(engine))
    engine.close()


def _state_bytes(engine: mt.Engine) -> list[int]:
    return [
        t.nbytes
        for i, e in engine.store.slots.items()
        if e.place.trainable
        for t in engine.store.read_state(i).values()
    ]


def test_the_model_folder_is_transformers_own(tmp_path: Path) -> None:
    engine = engine_of()
    train(engine, 0, 2)
    engine.save(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "model", dtype=torch.bfloat16)
    for (name, expected), found in zip(engine.model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "saved" / "state").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
    state = load_file(next((tmp_path / "saved" / "state").iterdir()))
    assert {name.split(".")[0] for name in state} == {"remainder", "exp_avg", "exp_avg_sq", "buffer", "random"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]
    engine.close()


def test_a_parameter_written_by_somebody_else_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    go = _slow(monkeypatch)
    save = engine.save(tmp_path / "saved", background=True)
    with torch.no_grad():
        engine.model.lm_head.weight.zero_()
    go.set()
    with pytest.raises(mt.IntegrityError, match=r"parameter lm_head.weight was written while it was being saved"):
        save.wait()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(mt.IntegrityError):
        engine.wait_for_save()
    train(engine, 0, 1)
    engine.close()


def test_the_next_save_and_the_end_wait_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    go = _slow(monkeypatch)
    first = engine.save(tmp_path / "1", background=True)
    threading.Timer(0.1, go.set).start()
    engine.save(tmp_path / "2", background=True)
    assert first.over
    engine.close()
    assert (tmp_path / "2" / "manifest.json").is_file() and (tmp_path / "1" / "manifest.json").is_file()


# -- what does not fit ------------------------------------------------------------------------------------------------


def _saved(tmp_path: Path, **settings: Any) -> Path:
    engine = engine_of(**settings)
    train(engine, 0, 1)
    engine.save(tmp_path / "saved")
    engine.close()
    return tmp_path / "saved"


def _refused(folder: Path, error: type[Exception], message: str, *, verify: bool = True, **settings: Any) -> None:
    """It is refused in one line, and the engine is as it was."""
    optimizer = mt.AdamW(**ADAMW, moments=settings.pop("moments", "fp32"))
    name = settings.pop("model", "llama")
    model = initialise(tiny_config(name), seed=8)
    engine = mt.Engine(model, optimizer, **({"device": "cpu", "precision": "bf16"} | settings))
    before, random = state_of(engine), torch.get_rng_state()
    with pytest.raises(error, match=message) as caught:
        engine.load(folder, verify=verify)
    assert "\n" not in str(caught.value)
    assert_same(state_of(engine), before)
    assert torch.equal(torch.get_rng_state(), random) and engine.step_count == 0
    engine.close()


def test_another_kind_of_state_is_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    _refused(folder, mt.ConfigError, "precision is 'fp32'; the checkpoint .* was made with 'bf16'", precision="fp32")
    _refused(folder, mt.ConfigError, "optimizer.moments is 'int8'; the checkpoint .* 'fp32'", moments="int8")
    _refused(folder, mt.ConfigError, "param_groups", model="gpt2")
    _refused(tmp_path / "nowhere", MegaTrainError, "nowhere")


def _rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    from safetensors.torch import save_file

    path = next((folder / "state").iterdir())
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("exp_avg.lm_head.weight"), "lacks exp_avg.lm_head.weight"),
        (lambda s: s.update({"exp_avg.more": torch.zeros(2)}), "of another model: this one has no exp_avg.more"),
        (
            lambda s: s.update({"exp_avg.lm_head.weight": torch.zeros(3)}),
            r"is F32 \[3\]; this model needs F32 \[96, 32\]",
        ),
        (
            lambda s: s.update({"remainder.lm_head.weight": torch.zeros(96, 32)}),
            r"remainder.lm_head.weight is F32 \[96, 32\]; this model needs I16 \[96, 32\]",
        ),
    ],
)
def test_state_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    folder = _saved(tmp_path)
    _rewritten(folder, change)
    _refused(folder, mt.IntegrityError, "state", verify=True)
    _refused(folder, mt.IntegrityError, message, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=9), "format is 9; this version reads 1"),
        (lambda c: c.update(step="many"), "step is 'many'"),
        (lambda c: c.update(step=10**30), "step is 10{30}; expected a whole number from 0 to 10{12}"),
        (lambda c: c.update(seed=-1), "seed is -1; expected a whole number from 0 up"),
        (lambda c: c.update(model_dtype="os.system"), "model_dtype is 'os.system'; expected one of float64, float32,"),
        (lambda c: c.update(more=1), "'more' is no entry; expected format, step"),
        (lambda c: c.pop("random"), "random is missing; expected states of python and numpy"),
        (
            lambda c: c["steps"].update({"lm_head.weight": -1}),
            "steps of 'lm_head.weight' is -1; expected a whole number",
        ),
        (
            lambda c: c["steps"].update({"lm_head.weight": 2**80}),
            "steps of 'lm_head.weight' is 1208925819614629174706176",
        ),
        (lambda c: c.update(param_groups=["x"]), r"param_groups is \['x'\]; expected a list of mappings"),
        (
            lambda c: c["param_groups"][0].update(params=[1]),
            r"param_groups\[0\].params is \[1\]; expected a list of names",
        ),
        (
            lambda c: c["param_groups"][1].update(lr="abc"),
            r"param_groups\[1\]: optimizer.lr is 'abc'; it must be a finite",
        ),
        (
            lambda c: c["param_groups"][0].update(lr=10**400),
            r"param_groups\[0\].lr is 10{50,}; expected a finite number",
        ),
        (
            lambda c: c["param_groups"][0].update(betas=[1, 2, 3]),
            r"optimizer.betas is \[1, 2, 3\]; it must be two numbers",
        ),
        (lambda c: c["param_groups"][0].update(weight_decay=None), r"\.weight_decay is None; expected a finite number"),
        (lambda c: c["param_groups"][0].update(lr_scale=-1), r"\.lr_scale is -1; expected a number >= 0"),
        (lambda c: c["param_groups"][0].pop("eps"), r"param_groups\[0\] has no eps; expected one"),
        (lambda c: c["param_groups"][0].update(mine={}), r"\.mine is \{\}; expected a finite number, a text"),
        (lambda c: c["run"].update(x=float("inf")), "it holds Infinity; expected finite numbers"),
        # a place beyond the end, which NumPy would read memory at
        (lambda c: operator.setitem(c["random"]["numpy"], 2, 625), "random.numpy is .*; expected the state of a"),
        (lambda c: c["steps"].pop("lm_head.weight"), "it lacks the parameter lm_head.weight"),
        (lambda c: c["steps"].update(more=1), "this model has no parameter more"),
        (
            lambda c: c["random"].update(python=[3, [1], None]),
            r"random.python is \[3, \[1\], None\]; expected the state",
        ),
    ],
)
def test_a_damaged_description_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    folder = _saved(tmp_path)
    path = folder / "training.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    _refused(folder, mt.IntegrityError, "training.json", verify=True)
    _refused(folder, mt.IntegrityError, message, verify=False)


def test_a_description_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    engine = engine_of()
    with pytest.raises(mt.ConfigError, match=r"^training.json cannot be written: .*not JSON compliant"):
        engine.save(tmp_path / "saved", run={"loss": float("nan")})
    engine.optimizer.param_groups[0]["eps"] = 0.0
    with pytest.raises(
        mt.ConfigError, match=r"^training.json cannot be written: param_groups\[0\]: optimizer.eps is 0.0"
    ):
        engine.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    engine.optimizer.param_groups[0]["eps"] = 1e-8
    engine.optimizer.param_groups[0]["initial_lr"] = 0.5  # as torch's schedulers add
    engine.save(tmp_path / "saved")
    engine.close()
    again = mt.Engine.from_checkpoint(tmp_path / "saved", mt.AdamW(**ADAMW), device="cpu", precision="bf16")
    assert again.optimizer.param_groups[0]["initial_lr"] == 0.5
    again.close()


def test_a_flipped_bit_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    path = folder / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    _refused(folder, mt.IntegrityError, r"model\.safetensors")
    with pytest.raises(mt.IntegrityError, match=r"model\.safetensors"):
        mt.Engine.from_checkpoint(folder, mt.AdamW(**ADAMW), device="cpu", precision="bf16")


def test_models_made_in_other_dtypes_go_on_as_they_were(tmp_path: Path) -> None:
    """From bf16 and fp16, and in fp32 from bf16: what a model computed from its dtype is the same again."""
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float16, "bf16"), (torch.bfloat16, "fp32")):
        model = initialise(tiny_config("gemma3_text"), seed=3).to(dtype)
        engine = mt.Engine(model, mt.AdamW(**ADAMW), device="cpu", precision=precision)
        engine.model.train()
        train(engine, 0, 2)
        folder = tmp_path / f"{dtype} {precision}"
        engine.save(folder)
        expected = train(engine, 2, 4)
        engine.close()
        again = mt.Engine.from_checkpoint(folder, mt.AdamW(**ADAMW), device="cpu", precision=precision)
        again.model.train()
        assert train(again, 2, 4) == expected, (dtype, precision)
        again.close()


# -- sealed -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    pytest.importorskip("cryptography")
    path = tmp_path / "key"
    path.write_bytes(bytes(range(32)))
    path.chmod(0o600)
    return path


def test_sealed_state_is_read_back_with_its_key_alone(key_file: Path, tmp_path: Path) -> None:
    engine = engine_of()
    train(engine, 0, 2)
    engine.save(tmp_path / "saved", key_file=key_file)
    engine.save(tmp_path / "plain")
    before = state_of(engine)
    expected = train(engine, 2, 4)
    assert [p.name for p in (tmp_path / "saved" / "state").iterdir()] == ["state.safetensors.sealed"]
    held = before["exp_avg.model.layers.0.mlp.up_proj.weight"].numpy().tobytes()
    sealed, plain = (b"".join(p.read_bytes() for p in (tmp_path / n / "state").iterdir()) for n in ("saved", "plain"))
    assert held in plain and held not in sealed and held[:64] not in sealed
    engine.load(tmp_path / "saved", key_file=key_file)
    assert_same(state_of(engine), before)
    assert train(engine, 2, 4) == expected
    engine.close()
    again = mt.Engine.from_checkpoint(
        tmp_path / "saved", mt.AdamW(**ADAMW), key_file=key_file, device="cpu", precision="bf16"
    )
    again.model.train()
    assert train(again, 2, 4) == expected
    again.close()
    _refused(tmp_path / "saved", mt.ConfigError, r"is sealed; give the key that it was sealed with")
    key_file.write_bytes(bytes(32))
    other = engine_of()
    with pytest.raises(mt.IntegrityError, match="sealed with another key"):
        other.load(tmp_path / "saved", key_file=key_file)
    other.close()


def test_a_changed_sealed_byte_is_found_without_the_manifest(key_file: Path, tmp_path: Path) -> None:
    engine = engine_of()
    engine.save(tmp_path / "saved", key_file=key_file)
    path = tmp_path / "saved" / "state" / "state.safetensors.sealed"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = state_of(engine)
    with pytest.raises(mt.IntegrityError, match=r"state\.safetensors\.sealed"):
        engine.load(tmp_path / "saved", verify=False, key_file=key_file)
    assert_same(state_of(engine), before)
    engine.close()
