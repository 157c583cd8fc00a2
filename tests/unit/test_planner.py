"""The planner's arithmetic by hand, and what it foresees against what the engine does on a device with late copies."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engine_toys import make_engine
from torch import nn

from megatrain.device.lagged import LaggedDevice
from megatrain.errors import ConfigError
from megatrain.memory import pieces
from megatrain.memory.layout import ALIGNMENT_BYTES
from megatrain.memory.pieces import buffer_bytes
from megatrain.memory.spilled_states import BUFFERS
from megatrain.model.loading import build_on_meta, initialise, load_config
from megatrain.optim import int8_moments
from megatrain.planner.choose import Settings, choose
from megatrain.planner.flops import UnitFlops, attended_pairs
from megatrain.planner.hardware import FIGURES, PROFILES, Hardware, load_hardware, parse_hardware, profile_names
from megatrain.planner.meta_pass import run_on_meta
from megatrain.planner.placement import (
    DEVICE,
    HOST,
    NVME,
    Placement,
    ledger,
    moment_bytes,
    state_bytes,
)
from megatrain.planner.plan import Plan, make_plan
from megatrain.planner.simulate import simulate
from megatrain.planner.visits import planned_visits
from megatrain.planner.workload import Workload, build_workload
from megatrain.yaml_file import read_yaml

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, LENGTH = 128, 256, 3, 256, 32
BLOCK = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE  # elements of its matrices
TABLE = VOCABULARY * HIDDEN
PARAMETERS = 2 * TABLE + LAYERS * (BLOCK + 2 * HIDDEN) + HIDDEN
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def workload(precision: str = "bf16", seq_len: int = LENGTH, **entries: Any) -> Workload:
    return build_workload(load_config(LLAMA | entries), precision=precision, seq_len=seq_len)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small beside these models as pieces are beside large ones."""
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 4096)


def placed(work: Workload, tier: str = HOST, **settings: Any) -> Placement:
    return Placement({u.index: tier for u in work.homes}, **({"micro_batch": 1} | settings))


def machine(**figures: Any) -> Hardware:
    return replace(load_hardware("h200"), **figures)


# -- bytes and operations, by hand ------------------------------------------------------------------------------------


def test_state_takes_twelve_bytes_or_fourteen() -> None:
    work = workload()
    assert work.parameters == PARAMETERS
    held = ledger(work, placed(work), 1, in_host_memory=False, process=0)[HOST]
    assert held["weights"] == held["remainders"] == held["gradients"] == 2 * PARAMETERS
    assert held["moments"] == 8 * PARAMETERS
    held = ledger(work, placed(work, clip_scope="unit"), 1, in_host_memory=False, process=0)[HOST]
    assert held["gradients"] == 2 * 2 * (BLOCK + 2 * HIDDEN)  # the largest unit's: one arrives, one is used
    assert held["token ids"] == 16 * LENGTH


def test_int8_moments_take_two_bytes_and_their_scales() -> None:
    work = workload()
    block = work.units[1]
    count = BLOCK + 2 * HIDDEN
    assert moment_bytes(block, "fp32") == 8 * count
    assert moment_bytes(block, "int8") == 2 * count + 2 * 4 * -(-count // int8_moments.BLOCK)


def test_tiers_hold_what_they_say() -> None:
    work = workload()
    on_device = ledger(work, placed(work, DEVICE), 1, in_host_memory=False, process=0)
    assert on_device[DEVICE]["weights"] == 2 * PARAMETERS and on_device[DEVICE]["moments"] == 8 * PARAMETERS
    assert not on_device[HOST].get("weights")
    away = placed(work, NVME)
    on_nvme = ledger(work, away, 1, in_host_memory=False, process=0)
    assert on_nvme[NVME] == {"remainders": 2 * PARAMETERS, "moments": 8 * PARAMETERS}
    assert on_nvme[HOST]["weights"] == 2 * PARAMETERS
    assert on_nvme[HOST]["NVMe buffers"] == BUFFERS * max(buffer_bytes(u.slabs, "fp32") for u in work.homes)


def test_operations_of_a_unit() -> None:
    work = workload()
    assert work.units[0].flops == UnitFlops(0, passes=False)  # a look-up, of no hidden states
    assert work.units[1].flops == UnitFlops(BLOCK, 2 * HIDDEN)
    assert work.units[-1].flops == UnitFlops(TABLE)
    assert work.units[1].flops.forward(LENGTH) == 2 * BLOCK * LENGTH + 2 * 2 * HIDDEN * LENGTH**2 // 2


@pytest.mark.parametrize(("length", "window", "pairs"), [(6, None, 18), (6, 10, 18), (6, 2, 10), (6, 6, 18)])
def test_pairs_inside_a_window(length: int, window: int | None, pairs: int) -> None:
    assert attended_pairs(length, window) == pairs


def test_a_token_passes_its_share_of_the_experts() -> None:
    mixtral = {
        **LLAMA,
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
    }
    work = build_workload(load_config(mixtral), precision="bf16", seq_len=LENGTH)
    attention, router, expert = 4 * HIDDEN * HIDDEN, 8 * HIDDEN, 3 * HIDDEN * INTERMEDIATE
    assert work.units[1].flops.matrix_elements == attention + router + 2 * expert


def test_sliding_windows_are_seen() -> None:
    work = build_workload(load_config({"model_type": "gpt_oss", "num_hidden_layers": 2}), precision="bf16", seq_len=256)
    assert [u.flops.window for u in work.units[1:3]] == [128, None]


def test_a_tied_head_brings_the_embeddings_weights() -> None:
    work = workload(tie_word_embeddings=True)
    head = work.units[-1]
    assert head.slabs == () and head.reads == (0,) and head.copied_bytes == 2 * TABLE
    assert work.parameters == PARAMETERS - TABLE


# -- what a model keeps, without running it ---------------------------------------------------------------------------


def test_the_pass_in_shapes_finds_what_a_real_run_keeps() -> None:
    """Order of units, bytes of inputs, and of graphs as the engine's own meter counts them."""
    config = load_config(LLAMA)
    model = initialise(config, 0)
    engine = make_engine(model, keep_graphs="auto")
    ids = torch.randint(0, VOCABULARY, (1, LENGTH))
    engine.train_step([{"input_ids": ids, "labels": ids}])
    found = run_on_meta(build_on_meta(config, dtype=torch.float32), LENGTH)
    assert found.complete and found.order == list(range(LAYERS + 3))
    for unit in range(1, LAYERS + 1):
        assert found.runs[unit].input_bytes == LENGTH * HIDDEN * 4
        # the host's kernel of attention keeps a little less or more than the fused one that is assumed
        assert found.runs[unit].graph_bytes == pytest.approx(engine.kept_graphs._measured[unit], rel=0.1)
    engine.close()


def test_a_model_that_cannot_run_in_shapes_is_planned_all_the_same() -> None:
    class Reads(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * float(x.sum())

    model = build_on_meta(load_config(LLAMA))
    model.model.norm.register_forward_pre_hook(lambda _, given: Reads()(given[0]))
    found = run_on_meta(model, LENGTH)
    assert not found.complete
    assert sorted(found.order) == list(range(LAYERS + 3)) and found.runs[LAYERS + 2].input_bytes > 0


# -- against the engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("scope", "slots", "tight"), [("global", 2, False), ("global", 1, True), ("unit", 3, False), ("unit", 2, True)]
)
def test_bytes_on_the_link_are_those_that_the_engine_copies(tied: bool, scope: str, slots: int, tight: bool) -> None:
    """To the byte, with saved inputs that stay and with those that leave."""
    layers, sequences = 6, 2
    entries = {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    work = workload("fp32", **entries)
    # too little for all inputs at once beside slots and gradients, which makes them leave
    block = 4 * (BLOCK + 2 * HIDDEN)
    cap = (slots + 6) * block + (3 + layers // 2) * sequences * LENGTH * HIDDEN * 4 if tight else None
    model = initialise(load_config(LLAMA | entries), 0)
    engine = make_engine(model, device=LaggedDevice("fp32", cap), slots=slots, clip_scope=scope, keep_graphs="off")
    ids = torch.randint(0, VOCABULARY, (1, LENGTH))
    steps = [engine.train_step([{"input_ids": ids, "labels": ids}] * sequences) for _ in range(4)]
    left = engine.weights.inputs.offloading  # type: ignore[union-attr]
    engine.close()
    placement = placed(work, slots=slots, inputs_leave=left, clip_scope=scope)
    found = simulate(work, placement, flat_durations(work), sequences)
    assert (found.h2d_bytes, found.d2h_bytes) == (steps[-1].h2d_bytes, steps[-1].d2h_bytes)


def flat_durations(work: Workload) -> Any:
    from megatrain.planner.durations import durations

    return durations(work, placed(work), machine(), 1)


def test_visits_are_those_that_the_engine_records() -> None:
    model = initialise(load_config(LLAMA), 0)
    engine = make_engine(model, device=LaggedDevice("fp32"), keep_graphs="off")
    ids = torch.randint(0, VOCABULARY, (1, LENGTH))
    for _ in range(2):
        engine.train_step([{"input_ids": ids, "labels": ids}])
    recorded = engine.weights.schedule_of("step")  # type: ignore[attr-defined]
    engine.close()
    work = workload("fp32")
    tiers = placed(work).tiers
    assert tuple(v.visit for v in planned_visits(work, tiers)) == recorded.visits


def test_device_peak_is_what_the_engine_holds() -> None:
    """Slots, staging, inputs and sums, which the lagged device counts."""
    work = workload("fp32", num_hidden_layers=6)
    model = initialise(load_config(LLAMA | {"num_hidden_layers": 6}), 0)
    engine = make_engine(model, device=LaggedDevice("fp32"), keep_graphs="off")
    ids = torch.randint(0, VOCABULARY, (1, LENGTH))
    peak = [engine.train_step([{"input_ids": ids, "labels": ids}] * 2).device_peak_bytes for _ in range(4)][-1]
    engine.close()
    held = ledger(work, placed(work), 2, in_host_memory=False, process=0)[DEVICE]
    counted = held["weight slots"] + held["gradient staging"] + held["saved inputs and gradient sums"]
    assert counted == pytest.approx(peak, rel=0.05)


# -- the choice -------------------------------------------------------------------------------------------------------


def plan(work: Workload, hardware: Hardware, **settings: Any) -> Plan:
    return make_plan(work, hardware, Settings(**({"sequences": 4, "process_bytes": 0} | settings)))


def test_what_fits_stays_in_host_memory_where_the_device_is_full() -> None:
    work = workload()
    device = sum(ledger(work, placed(work), 4, in_host_memory=False, process=0)[DEVICE].values())
    found = plan(work, machine(), device_memory=device, micro_batch=1)
    assert found.fits
    assert found.placement.units_in(HOST) == [u.index for u in found.workload.homes]


def test_device_memory_that_is_left_over_holds_the_first_units() -> None:
    """All that fit, where that is faster; as many as are asked for; none where units share parameters."""
    work = workload()
    found = plan(work, machine())
    assert found.placement.units_in(DEVICE) == [u.index for u in work.homes]
    assert found.simulation.h2d_bytes == found.simulation.d2h_bytes == 0
    assert found.simulation.step_seconds < plan(work, machine(), resident=0).simulation.step_seconds
    two = plan(work, machine(), resident=2)
    assert two.placement.units_in(DEVICE) == [0, 1]
    tied = plan(workload(tie_word_embeddings=True), machine())
    assert 0 not in tied.placement.units_in(DEVICE) and 1 in tied.placement.units_in(DEVICE)


def test_a_refusal_names_the_missing_bytes_and_what_fits() -> None:
    work = workload()
    needed = sum(plan(work, machine(), resident=0).ledger[HOST].values())
    short = plan(work, machine(host_memory=needed - 1000), resident=0)
    assert not short.fits and short.missing_bytes == 1000
    assert short.candidate.missing == {HOST: 1000}
    assert short.refusal().startswith(f"host memory: 1.00 kB missing: {PARAMETERS:,} parameters need ")
    assert short.refusal().endswith("; it would fit with train.clip_scope unit or with train.tokens_per_step 64")
    fitting = ["train.clip_scope unit", "optimizer.moments int8", "train.tokens_per_step 64"]
    assert [r.change for r in short.remedies if r.fits] == fitting


def test_with_a_disk_the_engine_itself_spills(small_pieces: None) -> None:
    """As few units as it takes, spread over the order of updates."""
    work = workload()
    needed = sum(plan(work, machine(), resident=0).ledger[HOST].values())
    short = machine(host_memory=needed - 1_000_000)
    found = plan(work, short, resident=0, nvme=10**9, clip_scope="global")
    away = found.placement.units_in(NVME)
    assert away
    assert sum(found.ledger[NVME].values()) == sum(
        state_bytes(u, found.placement) for u in work.homes if u.index in away
    )
    assert found.simulation.step_seconds > 0


def test_first_units_go_to_the_device_when_host_memory_is_short() -> None:
    work = workload()
    needed = sum(plan(work, machine(), resident=0).ledger[HOST].values())
    found = plan(work, machine(host_memory=int(needed * 0.6)))
    resident = found.placement.units_in(DEVICE)
    assert found.fits and resident and resident == list(range(len(resident)))
    assert not plan(work, machine(host_memory=int(needed * 0.6)), resident=0).fits


def test_an_embedding_that_is_too_large_does_not_keep_the_units_after_it_away() -> None:
    work = workload(vocab_size=40_000)
    least = ledger(work, placed(work, slots=1, inputs_leave=True), 4, in_host_memory=False, process=0)
    device, host = sum(least[DEVICE].values()), sum(least[HOST].values())
    block = 14 * next(u.state_count for u in work.homes if u.index == 1)
    limits = {"device_memory": (device + 2 * block) * 100 // 95, "host_memory": host - block // 2}
    found = plan(work, machine(), **limits, micro_batch=1, slots=1)
    assert found.fits and found.placement.units_in(DEVICE)[:1] == [1]


def test_state_goes_to_nvme_only_where_that_is_allowed(small_pieces: None) -> None:
    work = workload(num_hidden_layers=12)
    # a device that has room for slots and a step, and none for units
    streaming = ledger(work, placed(work, slots=1, inputs_leave=True), 4, in_host_memory=False, process=0)
    device, host = sum(streaming[DEVICE].values()), sum(streaming[HOST].values())
    tight = {"device_memory": device, "host_memory": host // 2, "micro_batch": 1, "slots": 1}
    refused = plan(work, machine(), **tight)
    assert not refused.fits
    assert "engine.nvme on a local disk" in [r.change for r in refused.remedies if r.fits]
    found = plan(work, machine(), nvme=10**9, **tight)
    assert found.fits and found.placement.units_in(NVME)
    assert found.placement.units_in(NVME)[-1] == work.units[-1].index  # the last ones, whose updates have slack


def test_a_shorter_context_is_offered_where_it_is_what_is_missing() -> None:
    work = workload(seq_len=512)
    needed = ledger(work, placed(work, inputs_leave=True, slots=1), 1, in_host_memory=False, process=0)[DEVICE]
    limits = {"device_memory": int(sum(needed.values()) * 0.9), "sequences": 1}
    found = make_plan(
        work, machine(), Settings(**limits, process_bytes=0), at_length=lambda seq_len: workload(seq_len=seq_len)
    )
    assert not found.fits
    assert "sequences of 256 tokens" in [r.change for r in found.remedies if r.fits]


def _needed_on_device(work: Workload, sequences: int, micro_batch: int) -> int:
    needs = placed(work, inputs_leave=True, slots=1, micro_batch=micro_batch)
    return sum(ledger(work, needs, sequences, in_host_memory=False, process=0)[DEVICE].values())


def test_fewer_tokens_per_step_are_offered_where_those_are_what_is_missing() -> None:
    """Whole micro-batches as long as there are any, then smaller ones; what is offered does fit."""
    work = workload(seq_len=512)
    tight = {"device_memory": (_needed_on_device(work, 2, 2) + _needed_on_device(work, 4, 4)) // 2}
    found = plan(work, machine(), sequences=8, micro_batch=4, **tight)
    assert not found.fits
    assert "engine.micro_batch 2 and train.tokens_per_step 1024" in [r.change for r in found.remedies if r.fits]
    assert found.refusal().endswith(" it would fit with engine.micro_batch 2")
    assert plan(work, machine(), sequences=2, micro_batch=2, **tight).fits

    needed = sum(plan(work, machine(), sequences=8, micro_batch=4, resident=0).ledger[HOST].values())
    kept = plan(work, machine(host_memory=needed - 1), sequences=8, micro_batch=4, resident=0)
    assert not kept.fits and "train.tokens_per_step 2048" in [r.change for r in kept.remedies if r.fits]


def test_what_changes_no_number_is_offered_first() -> None:
    """Fewer sequences at a time, units that need not stay, graphs that need not be kept, one slot."""
    work = workload(seq_len=512)
    tight = {"device_memory": (_needed_on_device(work, 8, 2) + _needed_on_device(work, 8, 4)) // 2}
    found = plan(work, machine(), sequences=8, micro_batch=4, slots=1, resident=0, keep_graphs="off", **tight)
    assert not found.fits and found.remedies[0].change == "engine.micro_batch 2" and found.remedies[0].fits

    free = _needed_on_device(work, 4, 1)
    for setting, change in (
        ({"resident": 4}, "engine.resident_units auto"),
        ({"keep_graphs": 5}, "engine.keep_graphs auto"),
        ({"slots": 6}, "engine.slots 1"),
    ):
        given = {"micro_batch": 1, "slots": 1, "keep_graphs": "off", "resident": 0} | setting
        found = plan(work, machine(), sequences=4, device_memory=free + 1000, **given)
        assert not found.fits, change
        assert next(r.change for r in found.remedies if r.fits) == change


def test_all_changes_together_may_need_smaller_micro_batches_too() -> None:
    """Host memory for int8 moments with clipping by unit, device memory for half the sequences."""
    work = workload(seq_len=512)
    one = plan(work, machine(), sequences=4, micro_batch=4, clip_scope="unit", moments="int8", resident=0)
    limits = {
        "host_memory": one.used_bytes(HOST),
        "device_memory": (_needed_on_device(work, 2, 2) + _needed_on_device(work, 4, 4)) // 2,
    }
    found = plan(work, machine(), sequences=4, micro_batch=4, resident=0, **limits)
    fitting = [r.change for r in found.remedies if r.fits]
    assert fitting == ["train.clip_scope unit and optimizer.moments int8 and engine.micro_batch 2"]


def test_more_units_than_there_are_cannot_stay() -> None:
    work = workload()
    with pytest.raises(ConfigError, match=r"engine.resident_units is 99; it must be at most 6"):
        plan(work, machine(), resident=99)
    with pytest.raises(ConfigError, match=r"engine.resident_units is 1; it must be 0 on .*no memory of its own"):
        plan(work, machine(device_memory=None), resident=1)


def test_micro_batches_divide_a_step() -> None:
    work = workload()
    for sequences in (1, 6, 7):
        chosen = choose(work, machine(), Settings(sequences)).placement.micro_batch
        assert sequences % chosen == 0


# -- hardware ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", profile_names())
def test_every_figure_of_a_profile_says_where_it_comes_from(name: str) -> None:
    found = load_hardware(name)
    assert set(found.sources) == set(FIGURES) - {"description"}
    assert "measured" not in " ".join(found.sources.values()).replace("not measured", "")


def test_profiles_that_were_asked_for_are_there() -> None:
    named = {"rtx3090", "rtx4090", "a100-80", "h100", "h200", "gh200", "b200", "dgx-spark"}
    assert set(profile_names()) == named
    assert load_hardware("h200").h2d_bandwidth == 55e9
    assert load_hardware("h200").product_rate == pytest.approx(790e12, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coers": 4}, "hardware mine: coers: unknown key; did you mean cores?"),
        ({"cores": "many"}, "hardware mine: cores: 'many' is wrong; expected a whole number of at least 1"),
        ({"matmul_efficiency": 1.5}, "hardware mine: matmul_efficiency: 1.5 is wrong; expected a number above 0"),
        ({"cores": None}, "hardware mine: cores: None is wrong"),
        ({"sources": {"coers": "x"}}, "hardware mine: sources.coers: unknown key"),
    ],
)
def test_a_wrong_figure_is_named(change: dict[str, Any], message: str) -> None:
    from megatrain.planner.hardware import PROFILES

    values = read_yaml(PROFILES / "h200.yaml")
    with pytest.raises(ConfigError) as error:
        parse_hardware(values | change, "mine")
    assert str(error.value).startswith(message)
    del values["cores"]
    with pytest.raises(ConfigError, match=r"^hardware mine: cores: missing; expected a whole number"):
        parse_hardware(values, "mine")


def test_sizes_are_whole_cache_lines() -> None:
    """Else bytes in slots and bytes on the link would differ, and the equality above would be luck."""
    assert all(u.copied_bytes % ALIGNMENT_BYTES == 0 for u in workload("fp32").units)


def test_a_given_limit_is_one_on_what_the_engine_allocates() -> None:
    """What a CUDA context takes comes off only where the limit is the whole device's memory."""
    assert "process" in plan(workload(), machine()).ledger[DEVICE]
    assert "process" not in plan(workload(), machine(), device_memory=10**9).ledger[DEVICE]


def test_many_small_micro_batches_are_not_refused_for_their_threads() -> None:
    work = workload()
    held = [ledger(work, placed(work), n, in_host_memory=True, process=0)[HOST]["threads"] for n in (20, 10_000)]
    assert held[0] == held[1]


def test_fp32_is_planned_at_the_rate_of_fp32() -> None:
    bf16, fp32 = (
        plan(workload(precision), machine(matmul_flops=1e15, matmul_flops_fp32=1e13)) for precision in ("bf16", "fp32")
    )
    assert fp32.hardware.product_rate == pytest.approx(bf16.hardware.product_rate / 100)
    with pytest.raises(ConfigError, match="matmul_flops_fp32: missing"):
        plan(workload("fp32"), machine(matmul_flops_fp32=None))


def test_a_rate_of_nothing_is_refused() -> None:
    known = read_yaml(PROFILES / "h200.yaml")
    for key, value in (("h2d_bandwidth", 1e-300), ("nvme_read", 0), ("name", 5)):
        with pytest.raises(ConfigError, match=f"{key}: "):
            parse_hardware(known | {key: value}, "mine")
