"""Bits that change by themselves, in every place that weights, state and gradients pass: found, named, and nothing is
trained on; what is written on purpose is not."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from some_of import some_of
from test_cli import TINY, run
from test_engine_random import tiny_llama
from test_engine_toys import WIDTH, Net, Output, batches_of, free_step, make_batch, make_engine
from test_resident_units import assert_same, trained
from test_tiers import losses, make_net, tight
from torch import Tensor, nn

import megatrain as mt
from megatrain.device.lagged import LaggedDevice
from megatrain.engine import device_checks, gradient_stream
from megatrain.engine.weight_stream import WeightStream
from megatrain.errors import ConfigError
from megatrain.memory import checksum_book, pieces
from megatrain.memory.arena import allocate
from megatrain.memory.checksum_book import ROTATION_STEPS, as_bytes

LEVELS = ("sampled", "full")
INT8 = mt.AdamW(lr=1e-2, moments="int8")


def device_of(name: str, precision: str = "fp32", **options: Any) -> Any:
    return LaggedDevice(precision, **options) if name == "lagged" else name


def flip(memory: Tensor, byte: int | None = None) -> None:
    """One bit, past all that torch counts."""
    held = as_bytes(memory).numpy()
    held[held.size // 2 if byte is None else byte] ^= 16


def slab_of(engine: mt.Engine, name: str) -> Any:
    return next(entry for entry in engine.store.slots.values() if entry.slot.name == name)


def flip_held(engine: mt.Engine, name: str, what: str) -> None:
    """In what the store holds of a parameter."""
    entry = slab_of(engine, name)
    here = entry.slab.range_of(entry.place)
    flip(entry.slab.weight[here] if what == "weights" else entry.slab.state.parts()[what][here])


def weights_of(engine: mt.Engine) -> dict[str, Tensor]:
    return {e.slot.name: e.weight.clone() for e in engine.store.slots.values()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(as_bytes(value), as_bytes(after[name]))}


def whole_step(engine: mt.Engine, step: int) -> None:
    """With its updates."""
    engine.train_step(batches_of(step, 2))
    engine.flush()


def train_until_found(engine: mt.Engine, damage: Callable[[], None], match: str, level: str, first: int = 2) -> int:
    """Bits go wrong before each step, as in a cell that is broken; returns how many steps it took to find them."""
    for step in range(first):
        engine.train_step(batches_of(step, 2))
    assert engine.store.book is not None
    most = engine.store.book.rotation_steps
    assert most == 1 if level == "full" else 1 < most <= ROTATION_STEPS
    for count in range(1, most + 1):
        engine.flush()
        if engine.checks is not None:
            engine.device.drain()  # the checksums of what lies there have been taken
        damage()
        try:
            engine.train_step(batches_of(first + count, 2))
            engine.flush()
        except mt.IntegrityError as error:
            text = f"{error} {error.__cause__ or ''}"
            assert match in text, text
            return count
    pytest.fail(f"not found in {most} steps")


# -- nothing else changes ---------------------------------------------------------------------------------------------


CLIPS = {"global": {}, "none": {"clip_norm": None}, "tight": {"clip_norm": 0.01}}


@pytest.mark.parametrize(
    ("moments", "name", "precision", "clip"), some_of(5, ("fp32", "int8"), ("cpu", "lagged"), ("fp32", "bf16"), CLIPS)
)
def test_the_same_training(name: str, precision: str, clip: str, moments: str) -> None:
    settings = {"precision": precision, "optimizer": mt.AdamW(lr=1e-2, moments=moments), **CLIPS[clip]}
    expected = trained(steps=4, device=device_of(name, precision), **settings)
    for level in LEVELS:
        assert_same(trained(steps=4, device=device_of(name, precision), integrity=level, **settings), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("resident", [3, 6])
def test_the_same_training_with_units_on_the_device(resident: int, level: str) -> None:
    settings: dict[str, Any] = {"precision": "bf16", "resident_units": resident, "steps": 4}
    assert_same(trained(integrity=level, **settings), trained(**settings))


@pytest.mark.parametrize("slow", ["", "up", "down", "compute"])
def test_the_same_training_at_any_pace(slow: str) -> None:
    """Nothing is compared too early, or with what is meant for another step."""
    expected = trained(steps=4, device="cpu")
    for seed in range(3):
        device = LaggedDevice("fp32", slow=slow, seed=seed, longest_delay_seconds=0.004)
        assert_same(trained(steps=4, device=device, slots=1, keep_graphs="off", integrity="full"), expected)


@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_off_costs_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a checksum was taken")

    for module, function in (
        (checksum_book, "host_sums"),
        (device_checks, "device_sums"),
        (gradient_stream, "merged"),
    ):
        monkeypatch.setattr(module, function, refuse)
    held, copied = [], []
    for setting in ({}, {"integrity": "off"}):
        with make_engine(Net(count=4), device=device_of(name), **setting) as engine:
            assert engine.store.book is None and engine.checks is None
            stats = [engine.train_step(batches_of(step, 2)) for step in range(3)]
            copied.append((stats[-1].h2d_bytes, stats[-1].d2h_bytes))
            held.append(engine.device.peak_bytes())
    assert held[0] == held[1] and copied[0] == copied[1]
    if name == "lagged":
        weights = sum(p.nbytes for p in Net(count=4).parameters())
        assert copied[0][1] == weights  # gradients, and nothing besides
    with pytest.raises(AssertionError, match="a checksum was taken"):
        make_engine(Net(count=4), device=device_of(name), integrity="full")


def test_no_step_waits_for_its_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come with gradients. What a wait would be for comes after the last gradient alone."""
    device, waits = LaggedDevice("fp32"), []
    own = device.host_wait
    monkeypatch.setattr(device, "host_wait", lambda name, wait: waits.append(name) or own(name, wait))
    with make_engine(Net(count=4), device=device, integrity="full") as engine:
        for step in range(3):
            engine.train_step(batches_of(step, 2))
        assert "gradient_landed" in waits and "checks_made" not in waits
        with torch.no_grad():
            engine.model(**make_batch(0))
        assert "checks_made" in waits


# -- in host memory ---------------------------------------------------------------------------------------------------

HELD = {
    "weights": {},
    "remainder": {"precision": "bf16"},
    "exp_avg": {"precision": "bf16"},
    "exp_avg_sq": {},
    "exp_avg_scale": {"optimizer": INT8},
}


@pytest.mark.parametrize("clip", [{}, {"clip_norm": None}], ids=["global", "none"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["cpu", "lagged"])
@pytest.mark.parametrize("what", HELD)
def test_in_what_the_host_holds(what: str, name: str, level: str, clip: dict[str, Any]) -> None:
    settings = {"precision": "fp32", **HELD[what], **clip}
    engine = make_engine(
        Net(count=4), device=device_of(name, settings["precision"]), integrity=level, keep_graphs="off", **settings
    )
    parameter = "blocks.1.up.weight"

    def damage() -> None:
        if what == "exp_avg_scale":
            entry = slab_of(engine, parameter)
            flip(entry.slab.state.moments[what][entry.place.start // 64 :][:1])
        else:
            flip_held(engine, parameter, what)

    named = "weights of blocks.1" if what == "weights" else f"state ({what}) of blocks.1"
    train_until_found(engine, damage, f"{named} in host memory", level)


@pytest.mark.parametrize("name", ["cpu", "lagged"])
@pytest.mark.parametrize("what", ["weights", "remainder", "exp_avg"])
def test_nothing_is_updated_then(what: str, name: str) -> None:
    """Of the first unit that would be updated; its checksum is looked at before."""
    engine = make_engine(Net(count=4), device=device_of(name, "bf16"), precision="bf16", integrity="full")
    first = "embed.weight"
    for step in range(2):
        engine.train_step(batches_of(step, 2))
    engine.flush()
    flip_held(engine, first, what)
    before = weights_of(engine)
    with pytest.raises(mt.IntegrityError, match=r"of embed in host memory"):
        whole_step(engine, 2)
    assert changed(before, weights_of(engine)) == set()
    with pytest.raises(mt.IntegrityError, match=r"of embed in host memory"):  # and it stays so
        whole_step(engine, 3)


@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_weights_that_change_after_their_last_use_and_before_the_update(name: str) -> None:
    """A new checksum of what an update makes of them would be right for good."""
    engine = make_engine(Net(count=4), device=device_of(name), integrity="full")
    for step in range(2):
        engine.train_step(batches_of(step, 2))
    engine.flush()
    before = weights_of(engine)
    own = engine.gradients.norm

    def norm() -> float:
        flip_held(engine, "embed.weight", "weights")
        return own()

    engine.gradients.norm = norm  # type: ignore[method-assign]
    with pytest.raises(mt.IntegrityError, match="weights of embed in host memory"):
        whole_step(engine, 2)
    assert changed(before, weights_of(engine)) == {"embed.weight"}  # by the flipped bit alone


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_frozen_weights(name: str, level: str) -> None:
    """Nothing writes them, so that one bit, once, is found in one rotation."""
    model = Net(count=4)
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    engine = make_engine(model, device=device_of(name), integrity=level)
    pending = [lambda: flip_held(engine, "blocks.0.down.weight", "weights")]
    train_until_found(engine, lambda: pending and pending.pop()(), "weights of blocks.0 in host memory", level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_tied_weights(name: str, level: str) -> None:
    """The head reads the embedding, where a copy is made of that parameter alone."""
    engine = make_engine(tiny_llama(tie_word_embeddings=True), device=device_of(name), integrity=level)
    damage = lambda: flip_held(engine, "model.embed_tokens.weight", "weights")  # noqa: E731
    train_until_found(engine, damage, "weights of model.embed_tokens in host memory", level)


@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_tied_weights_where_another_unit_reads_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were right where their own unit has read them: on the host they change before the head runs; what comes to
    the head is wrong on its way."""
    device, armed = device_of(name), [False]
    if name == "lagged":
        damage_copies(device.up, "lm_head", armed, monkeypatch)
    model = tiny_llama(tie_word_embeddings=True)
    engine = make_engine(model, device=device, integrity="full")
    ids = torch.tensor([[3, 5, 7, 9]])
    engine.train_step([{"input_ids": ids, "labels": ids}])
    engine.flush()
    if name == "cpu":
        model.model.norm.register_forward_hook(lambda *_: flip_held(engine, "model.embed_tokens.weight", "weights"))
    armed[0] = True
    named = r"weights of (lm_head as they|model\.embed_tokens in)"
    with torch.no_grad(), pytest.raises(mt.IntegrityError, match=named):
        model(input_ids=ids)


class Stray(Net):
    """A parameter that belongs to no unit."""

    def __init__(self) -> None:
        super().__init__(count=3)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return Output(self.loss(self.head(self.hidden(input_ids) * self.scale), labels))


@pytest.mark.parametrize("what", ["weights", "exp_avg_sq"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_stray_parameters(name: str, level: str, what: str) -> None:
    engine = make_engine(Stray(), device=device_of(name), integrity=level)
    assert engine.store.slots[slab_of(engine, "scale").slot.index].unit == -1
    train_until_found(engine, lambda: flip_held(engine, "scale", what), "of stray parameters in host memory", level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_state_on_disk(tmp_path: Path, name: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 43 * 64)
    settings: dict[str, Any] = {"precision": "bf16", "nvme": tmp_path}
    engine = make_engine(
        make_net(),
        device=device_of(name, "bf16"),
        host_memory=tight(precision="bf16", device=device_of(name, "bf16")),
        integrity=level,
        **settings,
    )
    spilled = engine.store.spilled
    assert spilled is not None
    unit = next(iter(engine.plan.spilled))
    piece = engine.store.units[unit].pieces[1]

    def damage() -> None:
        spilled.flush()
        offset, length = spilled._places[piece]
        buffer = allocate(length)
        spilled._file.read(offset, buffer)
        flip(buffer, 100)
        spilled._file.write(offset, buffer)

    found = f"state (remainder) of {engine.partition.units[unit].name} as it came back from disk"
    train_until_found(engine, damage, found, level)


@pytest.mark.parametrize(
    ("parameter", "unit"), [("blocks.2.up.weight", r"blocks\.2"), ("scale", "stray parameters")], ids=["unit", "stray"]
)
@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_in_an_evaluation(name: str, parameter: str, unit: str) -> None:
    """No update comes that would look, too."""
    engine = make_engine(Stray(), device=device_of(name), integrity="full")
    whole_step(engine, 0)
    flip_held(engine, parameter, "weights")
    with torch.no_grad(), pytest.raises(mt.IntegrityError, match=rf"weights of {unit} in host memory"):
        engine.model(**make_batch(0))


@pytest.mark.parametrize("what", ["weights", "remainder"])
def test_what_is_saved_is_looked_at_before(tmp_path: Path, what: str) -> None:
    engine = make_engine(tiny_llama(), precision="bf16", integrity="full")
    engine.save_pretrained(tmp_path / "right")
    flip_held(engine, "model.layers.0.mlp.up_proj.weight", what)
    with pytest.raises(mt.IntegrityError, match=r"of model\.layers\.0 in host memory"):
        engine.save_pretrained(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


# -- on the way -------------------------------------------------------------------------------------------------------


def damage_copies(stream: Any, label: str, armed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flip a bit in the first target of each copy called `label`, once it is there and before anybody may read it."""
    own = stream.copy

    def copy_and_flip(pairs: Any, after: Any, **options: Any) -> Any:
        done = own(pairs, after, **options)
        if options.get("label") != label or not armed[0]:
            return done
        return stream.submit(lambda: flip(pairs[0][0]), (), "flip")

    monkeypatch.setattr(stream, "copy", copy_and_flip)


@pytest.mark.parametrize("clip", [{}, {"clip_norm": None}], ids=["global", "none"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("label", ["blocks.1", "head"])
def test_on_the_link(
    direction: str, level: str, label: str, clip: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, armed = LaggedDevice("bf16"), [False]
    damage_copies(getattr(device, direction), label, armed, monkeypatch)
    engine = make_engine(Net(count=4), device=device, precision="bf16", integrity=level, **clip)
    where = f"weights of {label} as they arrived" if direction == "up" else f"gradient of {label} as it landed"

    def damage() -> None:
        armed[0] = True

    train_until_found(engine, damage, where, level)


def test_units_that_have_device_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small beside the largest one, they go through no slot."""
    device, armed = LaggedDevice("fp32"), [False]
    damage_copies(device.up, "embed", armed, monkeypatch)
    engine = make_engine(make_net(2), device=device, integrity="full")
    assert isinstance(engine.weights, WeightStream) and 0 in engine.weights._small
    train_until_found(engine, lambda: armed.__setitem__(0, True), "weights of embed as they arrived", "full")


@pytest.mark.parametrize("direction", ["up", "down"])
def test_nothing_is_updated_with_what_came_wrong(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once copies are right again, training goes on as if nothing had been: the step was given up."""
    models, engines = [Net(count=4) for _ in range(2)], []
    device, armed = LaggedDevice("fp32"), [False]
    damage_copies(getattr(device, direction), "blocks.1", armed, monkeypatch)
    for model, own in zip(models, (device, LaggedDevice("fp32")), strict=True):
        engines.append(make_engine(model, device=own, integrity="full"))
        for step in range(2):
            engines[-1].train_step(batches_of(step, 2))
        engines[-1].flush()
    before, armed[0] = weights_of(engines[0]), True
    with pytest.raises(mt.IntegrityError, match=r"of blocks\.1 as"):
        engines[0].train_step(batches_of(2, 2))
    engines[0].flush()
    assert changed(before, weights_of(engines[0])) == set()
    armed[0] = False
    for engine in engines:
        whole_step(engine, 2)
    assert changed(weights_of(engines[1]), weights_of(engines[0])) == set()


def test_where_units_are_updated_at_once_those_with_wrong_weights_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of `blocks.1` and of what comes after it in backward are made of wrong weights."""
    device, armed = LaggedDevice("fp32"), [False]
    damage_copies(device.up, "blocks.1", armed, monkeypatch)
    engine = make_engine(Net(count=4), device=device, clip_norm=None, integrity="full", keep_graphs="off")
    for step in range(2):
        engine.train_step(batches_of(step, 2))
    before, armed[0] = weights_of(engine), True
    with pytest.raises(mt.IntegrityError, match=r"weights of blocks\.1 as they arrived"):
        engine.train_step(batches_of(2, 2))
    assert changed(before, weights_of(engine)) == set()  # it was wrong in the forward already, before any gradient


def test_under_a_callers_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    device, armed = LaggedDevice("fp32"), [False]
    damage_copies(device.up, "blocks.1", armed, monkeypatch)
    engine = make_engine(Net(count=4), device=device, integrity="full", keep_graphs="off")
    for step in range(3):
        for number in range(2):
            engine.model(**make_batch(10 * step + number)).loss.backward()
        engine.step()
    engine.flush()
    before, armed[0] = weights_of(engine), True
    with pytest.raises(mt.IntegrityError, match=r"weights of blocks\.1 as they arrived"):
        free_step(engine, [lambda model: model(**make_batch(50)).loss])
    armed[0] = False
    assert changed(before, weights_of(engine)) == set()
    engine.model(**make_batch(50)).loss.backward()
    engine.step()


@pytest.mark.parametrize("without", [[], ["checks_made"]], ids=["with", "without"])
def test_an_evaluation_waits_for_its_checks(without: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    device, armed = LaggedDevice("fp32", slow="down", without=without), [True]
    engine = make_engine(Net(count=4), device=device, integrity="full")
    damage_copies(device.up, "head", armed, monkeypatch)

    def evaluate() -> None:
        with torch.no_grad():
            engine.model(**make_batch(0))

    if not without:
        with pytest.raises(mt.IntegrityError, match="weights of head as they arrived"):
            evaluate()
        return
    evaluate()  # what was found has not come yet


# -- units in the device's memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["fp32", "int8"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("what", ["weights", "remainder", "exp_avg"])
@pytest.mark.parametrize("clip", [{}, {"clip_norm": None}], ids=["global", "none"])
def test_units_on_the_device(what: str, level: str, moments: str, clip: dict[str, Any]) -> None:
    engine = make_engine(
        Net(count=4),
        device=LaggedDevice("bf16"),
        precision="bf16",
        integrity=level,
        resident_units=3,
        optimizer=mt.AdamW(lr=1e-2, moments=moments),
        **clip,
    )
    assert slab_of(engine, "blocks.1.up.weight").slab.on_device
    named = "weights of blocks.1" if what == "weights" else f"state ({what}) of blocks.1"
    found = f"{named} in the device's memory"
    train_until_found(engine, lambda: flip_held(engine, "blocks.1.up.weight", what), found, level)


def test_all_units_on_the_device() -> None:
    """No gradient leaves it, and nothing is updated all the same."""
    engine = make_engine(Net(count=3), device=LaggedDevice("fp32"), integrity="full", resident_units=5)
    for step in range(2):
        engine.train_step(batches_of(step, 2))
    engine.flush()
    engine.device.drain()
    flip_held(engine, "head.weight", "exp_avg")
    before = weights_of(engine)
    with pytest.raises(mt.IntegrityError, match=r"state \(exp_avg\) of head in the device's memory"):
        engine.train_step(batches_of(2, 2))
    engine.flush()
    assert changed(before, weights_of(engine)) == set()


# -- what is written on purpose ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "level", "precision", "moments", "resident"),
    some_of(5, ("cpu", "lagged"), LEVELS, ("fp32", "bf16"), ("fp32", "int8"), (0, 3)),
)
def test_writes_are_no_damage(name: str, level: str, precision: str, moments: str, resident: int) -> None:
    """In place, by load_state_dict, of optimizer state; before a step, a forward of one's own loop, an evaluation. And
    checksums follow: each run ends as one without them."""
    if resident and name == "cpu":
        return
    ends = []
    for integrity in ("off", level):
        model = Net(count=4)
        engine = make_engine(
            model,
            device=device_of(name, precision),
            precision=precision,
            integrity=integrity,
            optimizer=mt.AdamW(lr=1e-2, moments=moments),
            resident_units=resident,
        )
        saved = {n: value.clone() for n, value in model.state_dict().items()}
        for step in range(7):
            engine.train_step(batches_of(step, 2))
            engine.flush()
            if step == 0:
                with torch.no_grad():
                    model.blocks[1].up.weight.mul_(1.5)
            elif step == 1:
                model.load_state_dict(saved)
            elif step == 2:
                state = {n: {k: v.clone() for k, v in s.items()} for n, s in engine.optimizer_state().items()}
            elif step == 3:
                engine.load_optimizer_state(state)
            elif step == 4:
                engine.load_optimizer_state({n: s for n, s in state.items() if n % 2})
            elif step == 5:
                with torch.no_grad():
                    model.head.weight.zero_()
                    model(**make_batch(0))
                    model.head.weight.fill_(0.25)
                    engine.store.read_master(slab_of(engine, "head.weight").slot.index)
                model(**make_batch(1)).loss.backward()
                engine.step()
                engine.flush()
        ends.append(weights_of(engine))
        engine.close()
    assert changed(*ends) == set()


@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_checksums_come_back_after_a_write(name: str) -> None:
    """What was written is looked at from the next step on."""
    engine = make_engine(Net(count=4), device=device_of(name), integrity="full")
    engine.train_step(batches_of(0, 2))
    engine.flush()
    with torch.no_grad():
        engine.model.blocks[1].up.weight.mul_(1.5)
    engine.begin_step(None)
    flip_held(engine, "blocks.1.up.weight", "weights")
    with pytest.raises(mt.IntegrityError, match=r"weights of blocks\.1 in host memory"):
        engine.train_step(batches_of(1, 2))


@pytest.mark.parametrize("name", ["cpu", "lagged"])
def test_what_was_taken_over_is_looked_at(name: str) -> None:
    engine = make_engine(Net(count=4), device=device_of(name), integrity="full")
    flip_held(engine, "blocks.1.up.weight", "weights")
    with pytest.raises(mt.IntegrityError, match=r"weights of blocks\.1 in host memory"):
        engine.train_step(batches_of(0, 2))


@pytest.mark.parametrize("level", LEVELS)
def test_a_write_past_the_version_counter_is_refused(level: str) -> None:
    """Nothing tells it from damage. With sampling, whatever unit's turn it is."""
    engine = make_engine(Net(count=4), precision="bf16", integrity=level)
    engine.train_step(batches_of(0, 2))
    engine.model.blocks[1].up.weight.data.mul_(1.5)
    with pytest.raises(mt.IntegrityError, match=r"\.data"):
        engine.train_step(batches_of(1, 2))


def test_a_skipped_step_keeps_its_checksums() -> None:
    model, batch = Net(count=4), make_batch(0)
    other = copy.deepcopy(model)
    engines = [make_engine(m, integrity=level) for m, level in ((model, "full"), (other, "off"))]
    for engine in engines:
        own = engine.gradients.norm
        engine.train_step([batch])
        engine.gradients.norm = lambda: float("inf")  # type: ignore[method-assign]
        assert engine.train_step([batch]).skipped
        engine.gradients.norm = own  # type: ignore[method-assign]
        engine.train_step([batch])
    assert changed(weights_of(engines[0]), weights_of(engines[1])) == set()
    flip_held(engines[0], "embed.weight", "exp_avg")
    with pytest.raises(mt.IntegrityError, match=r"state \(exp_avg\) of embed"):
        engines[0].train_step([batch])


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "text.txt").write_text("".join(f"x{n} = {n}\n" for n in range(400)))
    return {
        "model": {"config": dict(TINY), "tokenizer": {"train": "bpe", "vocab_size": 280}},
        "data": {"train": str(tmp_path / "text.txt"), "seq_len": 32},
        "train": {"steps": 2},
        "engine": {"precision": "fp32"},
    }


# -- the setting ------------------------------------------------------------------------------------------------------


def test_a_rotation_looks_at_every_unit_once() -> None:
    for count in (2, 20, 40):
        with make_engine(Net(count=count), integrity="sampled") as engine:
            book = engine.store.book
            assert book is not None
            turns = [{u for u in engine.store.units if book.due(u, step)} for step in range(book.rotation_steps)]
            assert all(turns) and sum(map(len, turns)) == len(engine.store.units) == len(set.union(*turns))
            assert book.rotation_steps == min(ROTATION_STEPS, count + 2)


@pytest.mark.parametrize("value", ["on", None, True, "FULL"])
def test_a_wrong_level(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"engine\.integrity is .*; it must be one of off, sampled, full"):
        make_engine(Net(), integrity=value)


def test_by_key(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same losses; another word is refused."""
    for level in ("off", "sampled", "full"):
        assert run(settings, tmp_path, "--engine.integrity", level, "--output", str(tmp_path / level)) == 0
    assert losses(tmp_path, "full") == losses(tmp_path, "sampled") == losses(tmp_path, "off")
    capsys.readouterr()
    assert run(settings, tmp_path, "--engine.integrity", "always") == 2
    assert "engine.integrity" in capsys.readouterr().err
